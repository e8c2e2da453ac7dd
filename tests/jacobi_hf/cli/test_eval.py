"""The verb `eval` measures the tiny checkpoint through lm-evaluation-harness."""

from __future__ import annotations

import logging
import re
import sys

import datasets
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from jacobi_hf.cli import app
from jacobi_hf.cli.eval import Evaluation, run
from jacobi_hf.evaluation.harness import AlternatingLM, Output
from jacobi_hf.evaluation.tasks import TaskFile
from jacobi_hf.results.schema import Results
from tests.helpers.tasks import TASK, task_manager, write_task
from tests.helpers.tiny import CHECKPOINT, EXAMPLE

FORCED = str(EXAMPLE / "forced")
invoke = CliRunner().invoke
SMALL = {"dtype": "float32", "limit": 4, "max_new_tokens": 48}


@pytest.fixture(autouse=True)
def one_index(monkeypatch):
    """Let the harness read the index of its tasks once."""
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda include_defaults: task_manager(include_defaults=include_defaults)
    )
    yield
    logging.getLogger("lm_eval").setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Results of the shipped task on the forced checkpoint, written and read back."""
    output = tmp_path_factory.mktemp("eval") / "new folder" / "results.json"
    decoders = {
        "multiblock": {"jacobi_schedule": "constant"},
        "blocks": {"decoding": "jacobi", "jacobi_block_size": 8},
    }
    run(Evaluation(FORCED, task_file=[str(TASK)], decoders=decoders, output=str(output), **SMALL), quiet=True)
    assert [file.name for file in output.parent.iterdir()] == ["results.json"]
    return Results.read(output)


def test_all_decoders_write_the_same_and_score_the_same(evaluated):
    ordinary, multiblock, blocks = evaluated.measurements
    assert [m.decoder.kind for m in evaluated.measurements] == ["generate", "jacobi_multiblock", "jacobi"]
    assert ordinary.agreement is None
    for m in (multiblock, blocks):
        assert (m.agreement.baseline, m.agreement.identical, m.agreement.total, m.agreement.different) == (
            "generate",
            4,
            4,
            [],
        )
        assert m.quality == ordinary.quality
        assert m.new_tokens == ordinary.new_tokens == ordinary.forwards
        assert m.speedups[0].factor == pytest.approx(m.tokens_per_second / ordinary.tokens_per_second)
    assert ordinary.tokens_per_forward == ordinary.mean_slots == 1
    assert multiblock.tokens_per_forward > blocks.tokens_per_forward > 1
    assert (blocks.decoder.block_size, multiblock.decoder.block_size) == (8, 16)
    assert not multiblock.decoder.adaptive
    assert ordinary.prompts.source == "held-out word problems, written by examples/tiny_qwen3/task.py"


def test_the_score_is_that_of_plain_generate(evaluated):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(FORCED, dtype=torch.float32),
        AutoTokenizer.from_pretrained(FORCED),
    )
    right, tokens = 0, 0
    for problem in TaskFile.read(TASK).problems[:4]:
        inputs = tokenizer(problem.prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=48, do_sample=False, decoding=None)[
            0, inputs["input_ids"].shape[1] :
        ]
        found = re.search(r"The answer is (-?\d+)", tokenizer.decode(ids, skip_special_tokens=True))
        right, tokens = right + (found is not None and int(found[1]) == problem.answer), tokens + len(ids)
    ordinary = evaluated.measurements[0]
    assert (ordinary.quality.value, ordinary.quality.samples, ordinary.new_tokens) == (right / 4, 4, tokens)
    assert 0 < ordinary.quality.low <= ordinary.quality.value <= ordinary.quality.high <= 1
    assert ordinary.extra["scores"] == {ordinary.quality.metric: right / 4}


def test_with_a_drafter_the_models_own_knobs(tmp_path):
    drafter = str(EXAMPLE / "drafter")
    results = run(
        Evaluation(str(CHECKPOINT), drafter=drafter, task_file=[str(TASK)], **SMALL | {"limit": 2}), quiet=True
    )
    ordinary, drafted = results.measurements
    assert (drafted.decoder.name, drafted.decoder.drafter) == ("jacobi_multiblock", drafter)
    assert drafted.agreement.identical == 2
    assert drafted.quality == ordinary.quality


def test_how_answers_are_read(tmp_path, monkeypatch):
    """The first match counts, or its group; numbers are compared as text, and without a pattern the whole text."""
    texts = {"a": "so 7 apples\n\n8", "b": "12", "c": " yes \n", "d": "no"}
    monkeypatch.setattr(
        "jacobi_hf.evaluation.harness.AlternatingLM._generate",
        lambda self, name, request, seed: Output(texts[request.args[0]], [1], 1, 1, 1, 1.0),
    )
    cases = [
        ({"answer_pattern": r"(\d+)"}, [("a", 7), ("b", "12"), ("c", 3)], 2 / 3),
        ({"answer_pattern": r"\d"}, [("a", 7), ("b", 12)], 1 / 2),
        ({}, [("c", "yes"), ("d", "yes")], 1 / 2),
    ]
    for number, (header, problems, share) in enumerate(cases):
        rows = [{"prompt": prompt, "answer": answer, "more": None} for prompt, answer in problems]
        path = write_task(tmp_path, *[header] * bool(header), "", *rows, name=f"t{number}.jsonl")
        results = run(Evaluation(FORCED, task_file=[path]), quiet=True)
        assert [m.quality.value for m in results.measurements] == pytest.approx([share, share])


def test_stop_strings_of_a_file_end_the_text(tmp_path):
    problem = {"prompt": TaskFile.read(TASK).problems[0].prompt, "answer": "Ben starts with 51 stickers"}
    path = write_task(tmp_path, {"stop": ["."], "max_new_tokens": 40}, problem)
    ordinary, jacobi = run(Evaluation(FORCED, task_file=[path], dtype="float32"), quiet=True).measurements
    assert ordinary.quality.value == jacobi.quality.value == 1
    assert jacobi.agreement.identical == 1
    assert ordinary.new_tokens < 40


@pytest.mark.slow
def test_a_task_of_the_harness_by_name(monkeypatch):
    """The task is gsm8k of the harness, with made-up data in the form of its own."""
    rows = [{"question": f"What is {n} plus 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(6)]
    data = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in ("train", "test")})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda path, *args, **kwargs: asked.append(path) or data)
    results = run(
        Evaluation(FORCED, tasks=["gsm8k"], num_fewshot=2, **SMALL | {"limit": 2, "max_new_tokens": 8}), quiet=True
    )
    ordinary, jacobi = results.measurements
    assert asked == ["openai/gsm8k"]
    assert (ordinary.prompts.domain, ordinary.prompts.source, ordinary.prompts.count) == ("gsm8k", "openai/gsm8k", 2)
    assert set(ordinary.extra["scores"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert ordinary.quality.metric == "exact_match,strict-match"
    assert jacobi.agreement.identical == 2


def test_an_interrupted_evaluation_goes_on(tmp_path, monkeypatch):
    output = tmp_path / "results.json"
    options = Evaluation(FORCED, task_file=[str(TASK)], output=str(output), **SMALL)
    generate, calls = AlternatingLM._generate, []

    def interrupted(self, name, request, seed):
        calls.append(name)
        if len(calls) > 2 + 3:  # two to warm up, then both decoders on one problem and one decoder on the next
            raise KeyboardInterrupt
        return generate(self, name, request, seed)

    monkeypatch.setattr(AlternatingLM, "_generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(options, quiet=True)
    assert not output.exists()
    calls.clear()
    with pytest.raises(
        ValueError, match=r"unfinished.jsonl was begun under other settings \(max_new_tokens: 48, now 20; requests: "
    ):
        run(Evaluation(**{**vars(options), "max_new_tokens": 20}), quiet=True)
    file = tmp_path / "results.json.unfinished.jsonl"
    with file.open("a") as end:
        end.write('{"part": "gener')  # a line that was cut off
    calls.clear()
    monkeypatch.setattr(AlternatingLM, "_generate", lambda *args: calls.append(args[1]) or generate(*args))
    results = run(options, quiet=True)
    assert len(calls) == 2 + 8 - 3
    assert Results.read(output) == results
    assert not file.exists()
    assert results.measurements[1].agreement.identical == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_file": []}, "nothing to evaluate on"),
        ({"limit": 0}, "limit=0"),
        ({"num_fewshot": -1}, "num_fewshot=-1"),
        ({"max_new_tokens": 5000}, "2048 positions"),
        ({"decoders": {"generate": {}}}, "'generate' is the name of ordinary decoding"),
        ({"decoders": {"x": {"decoding": "none"}}}, "leave it out"),
        ({"decoders": {"x": {"jacobi_block_size": 1}}}, "from 2 to 1024"),
        ({"decoders": {"x": {"jacobi_blok_size": 8}}}, "did you mean 'jacobi_block_size'"),
        ({"output": "."}, "is a folder"),
        ({"model": "nowhere/at/all"}, "nowhere"),
        ({"dtype": "float33"}, "float33"),
        ({"drafter": "nowhere"}, "nowhere"),
        ({"task_file": [str(TASK), str(TASK)]}, "arithmetic"),
    ],
)
def test_bad_options_fail_before_anything_is_generated(change, message, monkeypatch):
    monkeypatch.setattr(AlternatingLM, "generate_until", lambda *_: pytest.fail("generated"))
    with pytest.raises((ValueError, OSError), match=message):
        run(Evaluation(**{"model": FORCED, "task_file": [str(TASK)], **change}), quiet=True)


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'jacobi-hf[eval]'")):
        run(Evaluation(FORCED, task_file=[str(TASK)]), quiet=True)


def recipe(folder, section):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"train": {}, "eval": section}))
    return str(path)


def test_the_verb_takes_a_recipe_and_prints_a_document(tmp_path):
    section = {
        "model": FORCED,
        "task_file": [str(TASK)],
        "limit": 3,
        "dtype": "float32",
        "max_new_tokens": 16,
        "decoders": {"small": {"jacobi_block_size": 4}},
    }
    result = invoke(app, ["eval", "--config", recipe(tmp_path, section), "--limit", "2", "--json"])
    assert result.exit_code == 0, result.output
    measured = Results.model_validate_json(result.stdout).measurements
    assert [(m.decoder.name, m.decoder.block_size, m.prompts.count) for m in measured] == [
        ("generate", None, 2),
        ("small", 4, 2),
    ]
    assert measured[1].agreement.identical == 2


def test_the_verb_shows_a_table(tmp_path):
    arguments = [
        "--model",
        FORCED,
        "--task-file",
        str(TASK),
        "--limit",
        "1",
        "--dtype",
        "float32",
        "--jacobi-block-size",
        "8",
    ]
    result = invoke(app, ["eval", *arguments, "--output", str(tmp_path / "r.json")], env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    (row,) = [line.split() for line in result.stdout.splitlines() if "jacobi_multiblock" in line]
    measured = Results.read(tmp_path / "r.json").measurements[1]
    assert row[:2] == ["arithmetic", "jacobi_multiblock"]
    assert f"{measured.tokens_per_forward:.2f}" in row
    assert measured.decoder.block_size == 8


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"limt": 3}, "did you mean 'limit'"),
        ({"limit": 2.5}, "--limit"),
        ({"limit": "x"}, "--limit"),
        ({"limit": {"a": 1}}, "--limit"),
        ({"decoders": 3}, "--decoders"),
        ({"tasks": "a", "decoders": {"x": 3}}, "decoder 'x'"),
        ([1], "no section 'eval'"),
        (None, "no section"),
        ({"tasks": "a", "decoders": {"x": {"jacobi_blok_size": 8}}}, "did you mean 'jacobi_block_size'"),
        ({"jacobi_block_size": 8, "decoders": {"x": {}}}, "besides the recipe's decoders"),
    ],
)
def test_bad_recipes_are_refused(tmp_path, section, message):
    result = invoke(app, ["eval", "--config", recipe(tmp_path, section), "--model", FORCED], env={"COLUMNS": "300"})
    assert (result.exit_code, message in result.stderr) == (2, True), result.output


@pytest.mark.parametrize("text", ["eval: [", "- eval", "", "\0"])
def test_files_that_are_no_recipes_are_refused(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    for name in (path, tmp_path, tmp_path / "nowhere.yaml"):
        result = invoke(app, ["eval", "--config", str(name), "--model", FORCED], env={"COLUMNS": "300"})
        assert (result.exit_code, "Traceback" in result.output) == (2, False)


def test_errors_of_the_verb_are_one_line_and_an_interruption_keeps_what_is_done(tmp_path, monkeypatch):
    result = invoke(app, ["eval", "--model", FORCED, "--task-file", "nowhere.jsonl"])
    assert (result.exit_code, result.stderr.splitlines()[-1][:44]) == (
        2,
        "jacobi-hf eval: nowhere.jsonl cannot be read",
    )

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("jacobi_hf.cli.eval.run", interrupt)
    result = invoke(app, ["eval", "--model", FORCED, "--output", "r.json"])
    assert (result.exit_code, "r.json.unfinished.jsonl; the same command goes on" in result.stderr) == (130, True)
