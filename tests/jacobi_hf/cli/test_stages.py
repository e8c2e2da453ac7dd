"""`jacobi-hf collect`, `pack`, `train` and `bench`: from prompts to a measured model."""

from __future__ import annotations

import importlib
import json
import resource
import shutil
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner

from jacobi_hf.cli import app
from jacobi_hf.results.schema import Results
from jacobi_hf.trainer import JacobiForcingTrainer
from jacobi_hf.trainer.run_checks import same_model
from tests.helpers.tiny import CHECKPOINT, EXAMPLE

runner = CliRunner()


def run(*words, code=0):
    result = runner.invoke(app, list(map(str, words)))
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def refused(*words, code=2):
    """The one line that a verb ends with."""
    result = run(*words, code=code)
    assert not result.stdout
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"jacobi-hf {words[0]}: ")
    assert "Traceback" not in result.stderr
    return line


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe whose four stages have run."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Question: Anna has {i} apples and buys 3."}) + "\n" for i in range(12))
    )
    (folder / "held_out.json").write_text(
        json.dumps({"prompts": {"own": ["Question: Ben has 7 books.", "def f(x):"]}})
    )
    (folder / "text.jsonl").write_text(json.dumps({"domain": "own", "text": "def f(x):\n    return x\n" * 30}) + "\n")
    (folder / "problems.jsonl").write_text(json.dumps({"prompt": "Question: 1 + 1?\nAnswer:", "answer": "2"}) + "\n")
    sections = {
        "collect": {
            "model": str(CHECKPOINT),
            "dtype": "float32",
            "dataset": str(folder / "prompts.jsonl"),
            "output_dir": str(folder / "trajectories"),
            "block_size": 4,
            "max_new_tokens": 16,
        },
        "pack": {"sources": [str(folder / "trajectories")], "output_dir": str(folder / "packed"), "noise_levels": 4},
        "train": {
            "model": str(CHECKPOINT),
            "train_dataset": str(folder / "packed"),
            "output_dir": str(folder / "model"),
            "use_cpu": True,
            "bf16": False,
            "block_size": 4,
            "max_length": 128,
            "max_steps": 2,
            "report_to": "none",
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 4,
            "jacobi_block_size": 4,
            "save_steps": 1,
        },
        "bench": {
            "model": str(folder / "model" / "final"),
            "output": str(folder / "results" / "bench.json"),
            "prompts": str(folder / "held_out.json"),
            "held_out": str(folder / "text.jsonl"),
            "problems": str(folder / "problems.jsonl"),
            "problem_domain": "own",
            "max_new_tokens": 12,
            "decoders": {"window": {"jacobi_block_size": 4, "jacobi_pool_size": 0, "jacobi_lookup_tokens": 0}},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections))
    for stage in sections:
        assert str(folder) in run(stage, "--config", path).stdout.replace("\n", "")
    return path


def without_times(results):
    times = {"seconds": None, "tokens_per_second": None, "speedups": []}
    return [one.model_copy(update=times) for one in results.measurements]


def test_all_stages_write_their_results(recipe):
    folder = recipe.parent
    results = Results.read(folder / "results" / "bench.json")
    ordinary, window = (m for m in results.measurements if m.prompts.source == "held-out prompts")
    assert (ordinary.decoder.name, ordinary.decoder.kind, ordinary.tokens_per_forward) == ("generate", "generate", 1)
    assert window.speedups[0].baseline == "generate"
    assert window.speedups[0].factor == pytest.approx(window.tokens_per_second / ordinary.tokens_per_second)
    assert window.new_tokens / window.seconds == pytest.approx(window.tokens_per_second)
    by_source = {m.prompts.source: m for m in results.measurements}
    assert by_source["held-out prompts"].agreement.identical == 2
    assert by_source["held-out prompts"].tokens_per_forward >= 1
    assert 0 < by_source["held-out text"].held_out_loss < 20
    assert by_source["held-out problems"].quality.samples == 1
    assert [file.name for file in (folder / "results").iterdir()] == ["bench.json"]
    report = json.loads((folder / "model" / "final" / "forcing.json").read_text())
    assert (report["steps"], report["packed"]["schedule"], report["arguments"]["warmup_steps"]) == (
        2,
        "progressive",
        0,
    )
    assert report["command"] == f"jacobi-hf train --config {recipe}"
    (stage,) = results.training
    assert (stage.method, stage.steps, stage.strategy.schedule, stage.strategy.block_size) == (
        "finetune",
        2,
        "progressive",
        4,
    )
    assert (stage.command, stage.batch.devices, stage.precision, stage.hardware) == (
        report["command"],
        1,
        "fp32",
        results.hardware,
    )
    assert stage.arguments["warmup_steps"] == 0
    assert "learning_rate" not in stage.arguments
    knobs = json.loads((folder / "model" / "final" / "generation_config.json").read_text())
    assert (knobs["decoding"], knobs["jacobi_block_size"]) == ("jacobi_multiblock", 4)


def test_stages_that_are_finished_say_so_to_programs_too(recipe):
    folder = recipe.parent
    assert json.loads(run("collect", "--config", recipe, "--json").stdout)[0]["prompts"] == 12
    assert json.loads(run("pack", "--config", recipe, "--json").stdout)["trajectories"] == {
        str(folder / "trajectories"): 12
    }
    assert "finished already" in run("train", "--config", recipe).stdout
    assert json.loads(run("train", "--config", recipe, "--json").stdout)["steps"] == 2
    output = json.loads(run("bench", "--config", recipe, "--json", "--output", folder / "again.json").stdout)
    former, again = Results.read(folder / "results" / "bench.json"), Results.read(folder / "again.json")
    assert Results.model_validate(output).measurements == again.measurements
    assert without_times(again) == without_times(former)


def test_training_for_a_program_writes_json_alone(recipe, tmp_path):
    shown = run(
        "train",
        "--config",
        recipe,
        "--json",
        "--output_dir",
        tmp_path / "model",
        "--max_steps",
        1,
        "--logging_steps",
        1,
    )
    assert json.loads(shown.stdout)["saved"] == str(tmp_path / "model" / "final")


def test_the_method_of_a_recipe_decides_what_is_trained(recipe, tmp_path):
    section = yaml.safe_load(recipe.read_text(encoding="utf-8"))["train"]
    finetune_alone = ("block_size", "max_length", "jacobi_block_size", "output_dir")
    section = {name: value for name, value in section.items() if name not in finetune_alone}
    section |= {"method": "drafter", "lora_r": 2, "window_width": 3, "windows_per_text": 2, "max_steps": 1}
    own = tmp_path / "drafter.yaml"
    own.write_text(yaml.safe_dump({"train": section}))
    words = ("train", "--config", own, "--output_dir", tmp_path / "drafter")
    assert "ref_model has no use with method=drafter" in refused(*words, "--ref_model", CHECKPOINT)
    assert "replay_dataset has no use with method=drafter" in refused(*words, "--replay_dataset", "a.jsonl")
    assert "ar_loss_weight is no option of train with RunConfig, DrafterConfig" in refused(
        *words, "--ar_loss_weight", "1"
    )
    run(*words)
    final = tmp_path / "drafter" / "final"
    assert {"drafter_config.json", "drafter_model.safetensors"} <= {file.name for file in final.iterdir()}
    report = json.loads((final / "forcing.json").read_text())
    (stage,) = report["training"]
    assert (stage["method"], stage["lora_rank"], stage["strategy"]["window_width"]) == ("drafter", 2, 3)
    assert "kl_loss_weight" not in report["arguments"]


def test_an_interrupted_training_goes_on(recipe, tmp_path, monkeypatch):
    words = ("train", "--config", recipe, "--output_dir", tmp_path / "model")
    step, original = [], JacobiForcingTrainer.training_step

    def interrupted(self, *arguments, **options):
        step.append(1)
        if len(step) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    monkeypatch.setattr(JacobiForcingTrainer, "training_step", interrupted)
    stopped = run(*words, code=130).stderr.splitlines()[-1]
    assert (
        stopped
        == f"jacobi-hf train: interrupted; {tmp_path}/model/checkpoint-1 is kept; the same command goes on from there."
    )
    assert not (tmp_path / "model" / "final").exists()
    run(*words)
    assert len(step) == 3
    assert json.loads((tmp_path / "model" / "final" / "forcing.json").read_text())["steps"] == 2


def test_an_interrupted_bench_goes_on_after_finished_domains(recipe, tmp_path, monkeypatch):
    words = ("bench", "--config", recipe, "--output", tmp_path / "bench.json")
    bench = importlib.import_module("jacobi_hf.cli.bench")  # the attribute of the package is the verb
    decoded = bench._decoded

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "_decoded", interrupted)
    assert "bench.json.unfinished.json; the same command goes on from there" in run(*words, code=130).stderr
    other = refused(*words, "--max_new_tokens", 5)
    assert "bench.json.unfinished.json was begun under other settings (config.max_new_tokens: " in other
    monkeypatch.setattr(bench, "_decoded", decoded)
    monkeypatch.setattr(bench, "_solved", interrupted)  # must not run again
    run(*words)
    former = Results.read(recipe.parent / "results" / "bench.json")
    assert without_times(Results.read(tmp_path / "bench.json")) == without_times(former)
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]


def test_an_interrupted_collection_says_what_is_kept(recipe, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("jacobi_hf.trainer.data.collection.collect", interrupted)
    assert (
        f"shards are kept in {tmp_path}/out; the same"
        in run("collect", "--config", recipe, "--output_dir", tmp_path / "out", code=130).stderr
    )


def test_folders_of_other_runs_are_refused(recipe, tmp_path):
    folder, forced = recipe.parent, EXAMPLE / "forced"
    assert "under other settings (seed: 0, now 1)" in refused("collect", "--config", recipe, "--seed", 1)
    assert "under other settings (noise_levels: 4, now 5)" in refused("pack", "--config", recipe, "--noise_levels", 5)
    assert "under other settings (learning_rate: 0.001, now 0.5)" in refused(
        "train", "--config", recipe, "--learning_rate", "0.5"
    )
    other = refused("train", "--config", recipe, "--model", forced, "--output_dir", tmp_path / "other")
    assert f"was collected from {CHECKPOINT}, and {forced} is to be trained" in other
    raw = refused(
        "train", "--config", recipe, "--train_dataset", folder / "trajectories", "--output_dir", tmp_path / "other"
    )
    assert "holds trajectories: pack them first" in raw
    assert not (tmp_path / "other").exists()


def test_a_full_disk_is_noticed_before_a_step(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    assert "has room for 0.00 GB, and a checkpoint and the finished model take 0.08 GB" in refused(
        "train", "--config", recipe, "--output_dir", tmp_path / "model"
    )
    assert not list((tmp_path / "model").iterdir())


@pytest.mark.parametrize("largest", [10_000_000, 30_000_000], ids=["weights", "optimizer"])
def test_a_disk_that_fills_up_ends_training_in_one_line(recipe, tmp_path, largest):
    words = ("train", "--config", recipe, "--output_dir", tmp_path / "model", "--max_steps", 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        stopped = run(*words, code=2).stderr
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert stopped.splitlines()[-1].startswith("jacobi-hf train: ")
    assert "Traceback" not in stopped
    assert not (tmp_path / "model" / "final").exists()
    assert "is finished: 1 steps" in run(*words).stdout


def test_faults_are_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.json").write_text(json.dumps({"prompts": {"code": ["def f():"]}}))
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and nothing else")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt"\n')
    (tmp_path / "good.jsonl").write_text('{"prompt": "a"}\n')
    before = sorted(file.name for file in tmp_path.iterdir())
    bench = ("bench", "--model", "none", "--prompts", "prompts.json", "--output", "o.json")
    collect = ("collect", "--model", CHECKPOINT, "--output_dir", "out")
    for words, message in (
        (("collect",), "model, dataset, output_dir missing: give them"),
        (("pack",), "sources, output_dir missing"),
        (("pack", "--sources", "none", "--output_dir", "out"), "none/manifest.json does not exist"),
        (("train", "--model", "none", "--use_cpu"), "train_dataset missing: give it"),
        (
            ("train", "--model", "none", "--use_cpu", "--train_dataset", "good.jsonl", "--dtype", "flaot32"),
            "dtype 'flaot32' is not known",
        ),
        (("train", "--model", "./none", "--use_cpu", "--train_dataset", "good.jsonl"), "./none"),
        ((*collect, "--dataset", "none.jsonl"), "the dataset none.jsonl does not exist"),
        ((*collect, "--dataset", "damaged.parquet"), "the dataset damaged.parquet cannot be read"),
        ((*collect, "--dataset", "rows.jsonl"), "the dataset rows.jsonl cannot be read"),
        (("collect", "--model", "./none", "--dataset", "good.jsonl", "--output_dir", "out"), "./none"),
        (
            ("collect", "--model", CHECKPOINT, "--dataset", "good.jsonl", "--output_dir", "good.jsonl/out"),
            "good.jsonl is a file",
        ),
        ((*collect, "--dataset", "good.jsonl", "--block_size", "1"), "block_size=1 must be at least 2"),
        (bench[:5], "output missing"),
        ((*bench, "--domains", "cod"), "no domain cod; it has code"),
        ((*bench, "--decoders", '{"x": {"jacobi_blocksize": 4}}'), "did you mean 'jacobi_block_size'"),
        ((*bench, "--decoders", '{"x": 4}'), "the decoder 'x' must hold knobs by name"),
        ((*bench, "--problems", "rows.jsonl"), "rows.jsonl, line 2 is not JSON"),
        ((*bench, "--problems", "good.jsonl"), "good.jsonl, row 1 has no prompt or no answer"),
        ((*bench, "--held_out", "good.jsonl"), "good.jsonl has no text of code"),
        ((*bench, "--prompts", "good.jsonl", "--column", "ask"), "good.jsonl, line 1 does not have the column ask"),
        ((*bench, "--prompt_count", "0"), "prompt_count=0 must be at least 1"),
        (bench, "none cannot be loaded"),
    ):
        assert message in refused(*words), words
    assert sorted(file.name for file in tmp_path.iterdir() if file.name != "trainer_output") == before


def test_several_sets_have_their_own_folders(tmp_path):
    path = tmp_path / "recipe.yaml"
    (tmp_path / "a.jsonl").write_text('{"prompt": "def f(x):"}\n')
    common = {
        "model": str(CHECKPOINT),
        "dtype": "float32",
        "block_size": 4,
        "max_new_tokens": 8,
        "dataset": str(tmp_path / "a.jsonl"),
    }
    sets = {name: {"output_dir": str(tmp_path / name)} for name in ("one", "two")}
    path.write_text(yaml.safe_dump({"collect": {**common, "sets": sets}}))
    assert "several sets" in refused("collect", "--config", path, "--output-dir", tmp_path / "other")
    counts = json.loads(run("collect", "--config", path, "--json").stdout)
    assert [(one["set"], one["prompts"]) for one in counts] == [("one", 1), ("two", 1)]
    path.write_text(yaml.safe_dump({"collect": {**common, "sets": ["one"]}}))
    assert "must be sections by name" in refused("collect", "--config", path)


@pytest.mark.slow
def test_launchers_start_it_as_a_module(tmp_path):
    command = [
        sys.executable,
        "-m",
        "jacobi_hf.cli",
        "collect",
        "--model",
        CHECKPOINT,
        "--dataset",
        tmp_path / "none.jsonl",
    ]
    failed = subprocess.run(
        [*map(str, command), "--output_dir", tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.splitlines()[-1] == f"jacobi-hf collect: the dataset {tmp_path}/none.jsonl does not exist."


def test_different_paths_of_one_model_are_equal(tmp_path):
    (tmp_path / "model").mkdir()
    assert same_model(f"{tmp_path}/model/", str(tmp_path / "." / "model"))
    assert same_model("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B")
    assert not same_model("Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B")
