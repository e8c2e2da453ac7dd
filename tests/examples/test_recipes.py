"""Every recipe and accelerate config parses, and the example script runs all its stages."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jacobi_hf.results import Results
from jacobi_hf.trainer import JacobiForcingConfig
from jacobi_hf.trainer.collection import CollectConfig
from jacobi_hf.trainer.packing import PackConfig
from tests.tiny import CHECKPOINT

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "train_jacobi_forcing.py"
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_jacobi_forcing", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_section_of_a_recipe_is_understood(script, path):
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert recipe.keys() == {"collect", "pack", "train", "evaluate"}
    common = {k: v for k, v in recipe["collect"].items() if k != "sets"}
    folders = set()
    for name, own in recipe["collect"].get("sets", {"": {}}).items():
        (collected,) = script.parse((CollectConfig,), {**common, "name": name, **own}, [], "collect")
        folders.add(collected.output_dir)
    (packed,) = script.parse((PackConfig,), recipe["pack"], [], "pack")
    assert {source.split("=")[0] for source in packed.sources} == folders or "sets" not in recipe["collect"]
    section = {**recipe["train"], "use_cpu": True, "bf16": False}
    data, args = script.parse((script.TrainData, JacobiForcingConfig), section, [], "train")
    assert args.block_size == collected.block_size
    assert data.train_dataset == packed.output_dir
    assert data.model == collected.model
    (evaluation,) = script.parse((script.Evaluation,), recipe["evaluate"], [], "evaluate")
    assert (evaluation.drafter if args.method == "gated" else evaluation.model) == f"{args.output_dir}/final"
    assert args.method == "full" or evaluation.model == data.model
    assert {name: script.jacobi_hf.JacobiConfig(**knobs) for name, knobs in evaluation.decoders.items()}


def test_every_control_of_the_drafter_is_understood(script):
    spec = importlib.util.spec_from_file_location("gated_controls", ROOT / "examples/tiny_qwen3/gated_controls.py")
    controls = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(controls)
    recipe = yaml.safe_load((ROOT / controls.RECIPE).read_text(encoding="utf-8"))
    for arguments in controls.VARIATIONS.values():
        section = {**recipe["train"], "use_cpu": True, "bf16": False}
        _, args = script.parse((script.TrainData, JacobiForcingConfig), section, arguments.split(), "train")
        assert args.method == "gated"


def test_every_ablation_is_understood(script):
    spec = importlib.util.spec_from_file_location("ablations", ROOT / "examples/tiny_qwen3/ablations.py")
    ablations = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ablations)
    recipe = yaml.safe_load((ROOT / ablations.RECIPE).read_text(encoding="utf-8"))
    train = {**recipe["train"], "use_cpu": True, "bf16": False}

    def settings(variation):
        (packed,) = script.parse((PackConfig,), recipe["pack"], variation.pack.split(), "pack")
        _, args = script.parse((script.TrainData, JacobiForcingConfig), train, variation.train.split(), "train")
        script.parse(
            (CollectConfig,), recipe["collect"], ["--block_size", str(variation.second_stage or 16), *variation.collect.split()], "collect"
        )
        return str(
            (
                packed,
                variation.collect,
                variation.second_stage,
                args.max_steps,
                *(getattr(args, name) for name in JacobiForcingConfig.__annotations__),
            )
        )

    distinct = {settings(variation) for variation in ablations.VARIATIONS.values()}
    assert len(distinct) == len(ablations.VARIATIONS)


def test_the_published_runs_are_what_was_published(script):
    """Figures of method.md, section 3."""
    recipe = yaml.safe_load((ROOT / "examples/recipes/qwen3_1.7b.yaml").read_text(encoding="utf-8"))
    _, args = script.parse((script.TrainData, JacobiForcingConfig), recipe["train"] | {"use_cpu": True, "bf16": False}, [], "train")
    (packed,) = script.parse((PackConfig,), recipe["pack"], [], "pack")
    assert (args.block_size, packed.window, packed.schedule, packed.max_blocks, packed.buckets) == (32, 16, "progressive", 3, "8-11")
    assert (args.learning_rate, str(args.lr_scheduler_type), args.get_warmup_steps(1000)) == (5e-6, "SchedulerType.COSINE", 30)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (1, 4)
    assert (args.ar_loss_weight, args.consistency_loss_weight, args.kl_loss_weight) == (10, 1, 0)


def test_the_command_line_comes_before_the_recipe(script):
    section = {"learning_rate": 1e-3, "output_dir": "there", "use_cpu": True, "bf16": False}
    _, args = script.parse((script.TrainData, JacobiForcingConfig), section, ["--learning_rate", "2e-4"], "train")
    assert (args.learning_rate, args.output_dir) == (2e-4, "there")
    with pytest.raises(ValueError, match="section 'train' has learning_rat, which train does not know"):
        script.parse((script.TrainData, JacobiForcingConfig), {"learning_rat": 1e-3}, [], "train")


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configs_parse(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == 4
    text = path.read_text(encoding="utf-8")
    assert "Never run" in text or "Not run on GPUs" in text


def run(*arguments, check=True):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=check)


def test_all_stages_from_prompts_to_results(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Question: Anna has {i} apples and buys 3 more."}) + "\n" for i in range(12)))
    held_out = tmp_path / "held_out.json"
    held_out.write_text(json.dumps({"prompts": {"own": ["Question: Ben has 7 books.", "def f(x):"]}}))
    (tmp_path / "text.jsonl").write_text(json.dumps({"domain": "own", "text": "def f(x):\n    return x\n" * 30}) + "\n")
    (tmp_path / "problems.jsonl").write_text(json.dumps({"prompt": "Question: 1 + 1?\nAnswer:", "answer": "2"}) + "\n")
    recipe = {
        "collect": {
            "model": str(CHECKPOINT), "dtype": "float32", "dataset": str(prompts), "output_dir": str(tmp_path / "trajectories"),
            "block_size": 4, "max_new_tokens": 16,
        },
        "pack": {"sources": [str(tmp_path / "trajectories")], "output_dir": str(tmp_path / "packed"), "window": 4},
        "train": {
            "model": str(CHECKPOINT), "train_dataset": str(tmp_path / "packed"), "output_dir": str(tmp_path / "model"), "use_cpu": True,
            "bf16": False, "block_size": 4, "max_length": 128, "max_steps": 2, "report_to": "none", "learning_rate": 1e-3,
            "per_device_train_batch_size": 4, "jacobi_block_size": 4,
        },
        "evaluate": {
            "model": str(tmp_path / "model" / "final"), "output": str(tmp_path / "results.json"), "prompts": str(held_out),
            "held_out": str(tmp_path / "text.jsonl"), "problems": str(tmp_path / "problems.jsonl"), "problem_domain": "own",
            "max_new_tokens": 12, "decoders": {"window": {"jacobi_block_size": 4, "jacobi_pool_size": 0, "jacobi_lookup_tokens": 0}},
        },
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    for stage in ("collect", "pack", "train", "evaluate"):
        run(stage, "--config", path)
    results = Results.read(tmp_path / "results.json")
    by_source = {m.prompts.source: m for m in results.measurements}
    assert by_source["held-out prompts"].agreement.identical == 2
    assert by_source["held-out prompts"].tokens_per_forward >= 1
    assert 0 < by_source["held-out text"].held_out_loss < 20
    assert by_source["held-out problems"].quality.samples == 1
    assert "finished already" in run("train", "--config", path).stdout
    refused = run("train", "--config", path, "--learning_rate", "0.5", check=False)
    assert "holds a run under other arguments (learning_rate: 0.001, now 0.5)" in refused.stderr
    forced = ROOT / "examples" / "tiny_qwen3" / "forced"
    refused = run("train", "--config", path, "--model", forced, "--output_dir", tmp_path / "other", check=False)
    assert f"was collected from {CHECKPOINT}, and {forced} is to be trained" in refused.stderr
    raw = run("train", "--config", path, "--train_dataset", tmp_path / "trajectories", "--output_dir", tmp_path / "other", check=False)
    assert "holds trajectories: pack them first" in raw.stderr
    report = json.loads((tmp_path / "model" / "final" / "forcing.json").read_text())
    assert report["steps"] == 2
    assert report["packed"]["schedule"] == "progressive"
    assert report["arguments"]["warmup_steps"] == 0
    knobs = json.loads((tmp_path / "model" / "final" / "generation_config.json").read_text())
    assert (knobs["decoding"], knobs["jacobi_block_size"]) == ("jacobi_multiblock", 4)


def test_errors_are_one_line(tmp_path):
    failed = run("collect", "--model", CHECKPOINT, "--dataset", tmp_path / "none.jsonl", "--output_dir", tmp_path / "out", check=False)
    assert failed.returncode != 0
    assert failed.stderr.strip().splitlines()[-1].startswith("train_jacobi_forcing.py collect: the dataset ")
    assert "Traceback" not in failed.stderr
    assert "usage" in run("fly", check=False).stderr
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(b"PAR1 and nothing else")
    for arguments in (
        ("--config", tmp_path / "none.yaml"),
        ("--model", CHECKPOINT, "--dataset", damaged, "--output_dir", tmp_path / "out"),
        ("--model", tmp_path / "no-model", "--dataset", damaged, "--output_dir", tmp_path / "out"),
    ):
        failed = run("collect", *arguments, check=False)
        assert failed.returncode != 0
        assert "Traceback" not in failed.stderr
        assert failed.stderr.strip().splitlines()[-1].startswith("train_jacobi_forcing.py collect: ")


def test_what_is_missing_is_named_before_any_work(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"prompts": {"code": ["def f():"]}}))
    for stage, arguments, message in (
        ("collect", [], "model, dataset, output_dir missing: give them"),
        ("pack", [], "sources, output_dir missing"),
        ("train", ["--model", "none"], "train_dataset missing: give it"),
        ("evaluate", ["--model", "none", "--prompts", str(prompts)], "output missing"),
        (
            "evaluate",
            ["--model", "none", "--prompts", str(prompts), "--output", "o.json", "--domains", "cod"],
            "no domain cod; it has code",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            script.STAGES[stage]({}, arguments)
    section = {"model": "none", "prompts": str(prompts), "output": "o.json", "decoders": {"x": {"jacobi_blocksize": 4}}}
    with pytest.raises(ValueError, match="did you mean 'jacobi_block_size'"):
        script.run_evaluate(section, [])
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "trainer_output") == ["prompts.json"]


def test_paths_of_one_model_are_one(script, tmp_path):
    (tmp_path / "model").mkdir()
    assert script.same_model(f"{tmp_path}/model/", str(tmp_path / "." / "model"))
    assert script.same_model("Qwen/Qwen3-1.7B", "Qwen/Qwen3-1.7B")
    assert not script.same_model("Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B")
