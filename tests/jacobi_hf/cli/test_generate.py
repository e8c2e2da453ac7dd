"""The verb `generate`: texts equal those of ordinary `generate`."""

from __future__ import annotations

import functools
import json
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from jacobi_hf.cli import _answers, app
from jacobi_hf.cli._answers import Answer
from jacobi_hf.cli._options import Sampling
from tests.helpers.tiny import EXAMPLE

run = CliRunner().invoke
FORCED, CHECKPOINT, DRAFTER = (str(EXAMPLE / name) for name in ("forced", "checkpoint", "drafter"))
QUESTION = "Anna has 12 apples and buys 30 more. How many apples does Anna have now?"
PROMPT = f"Question: {QUESTION}\nAnswer:"
SHORT = ["--dtype", "float32", "--max-new-tokens", "16"]


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """Each model once: most of a test's time would be loading."""
    from jacobi_hf import loading

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load", functools.cache(loading.load))
        yield


def generated(folder, prompt, **options):
    """What ordinary `generate` writes, as ids and as text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    arguments = {"max_new_tokens": 16, "do_sample": False, "decoding": None, **options}
    ids = model.generate(**inputs, **arguments)[0, inputs["input_ids"].shape[1] :]
    return ids.tolist(), tokenizer.decode(ids, skip_special_tokens=True)


def document(*arguments, **options):
    result = run(app, ["generate", *arguments, *SHORT, "--json"], **options)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("folder", [FORCED, CHECKPOINT])
def test_the_text_is_that_of_ordinary_generate_in_fewer_forwards(folder):
    ids, text = generated(folder, PROMPT)
    options = ["--model", folder, "--jacobi-schedule", "constant", PROMPT]
    result = run(app, ["generate", *options, *SHORT])
    assert (result.exit_code, result.stdout) == (0, text + "\n")
    shown = document(*options)
    assert (shown["text"], shown["new_tokens"]) == (text, len(ids))
    assert f"{len(ids)} tokens in {shown['forwards']} forwards" in result.stderr
    assert shown["forwards"] < len(ids)
    assert shown["tokens_per_forward"] == len(ids) / shown["forwards"]


def test_a_prompt_comes_from_the_command_line_a_file_or_stdin(tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    wanted = document("--model", FORCED, PROMPT)["text"]
    assert document("--model", FORCED, "--file", str(tmp_path / "prompt.txt"))["text"] == wanted
    assert document("--model", FORCED, "-", input=PROMPT)["text"] == wanted


def test_chat_puts_the_prompt_through_the_template():
    shown = document("--model", FORCED, "--chat", QUESTION)
    assert (shown["text"], shown["prompt"]) == (generated(FORCED, PROMPT)[1], QUESTION)


def test_knobs_and_recipes_reach_generate(tmp_path):
    plain = document("--model", FORCED, "--jacobi-schedule", "constant", PROMPT)
    (tmp_path / "recipe.yaml").write_text(
        f"generate: {{model: {FORCED}, decoding: jacobi, jacobi_block_size: 4}}", encoding="utf-8"
    )
    one_block = document("--config", str(tmp_path / "recipe.yaml"), PROMPT)
    ordinary = document("--model", FORCED, PROMPT, "--decoding", "none")
    assert plain["text"] == one_block["text"] == ordinary["text"]
    assert one_block["knobs"] == {"decoding": "jacobi", "jacobi_block_size": 4}
    assert plain["forwards"] < one_block["forwards"] < ordinary["forwards"] == ordinary["new_tokens"]


def test_with_a_drafter_the_text_is_the_models_own():
    options = ["--model", CHECKPOINT, "--jacobi-schedule", "constant", PROMPT]
    shown = document("--drafter", DRAFTER, *options)
    assert shown["text"] == generated(CHECKPOINT, PROMPT)[1]
    assert shown["forwards"] < document(*options)["forwards"]


def test_a_comparison_decodes_the_ordinary_way_too():
    shown = document("--model", FORCED, PROMPT, "--compare")
    assert shown["identical"] is True
    assert (shown["ordinary"]["text"], shown["ordinary"]["forwards"]) == (shown["text"], shown["new_tokens"])
    result = run(app, ["generate", "--model", FORCED, PROMPT, *SHORT, "--compare"])
    assert "the texts are identical; speed-up" in result.stderr


def test_a_difference_is_shown(monkeypatch):
    def write(model, tokenizer, ids, arguments, **_):
        return Answer("ours", [1, 2], 1, 0.1) if arguments["decoding"] else Answer("theirs", [1, 3], 2, 0.1)

    monkeypatch.setattr(_answers, "write", write)
    result = run(app, ["generate", "--model", FORCED, PROMPT, *SHORT, "--compare"])
    assert "differ from new token 2 on. Ordinary" in result.stderr
    assert result.stdout.endswith("theirs\n")


def test_the_most_frequent_shapes_are_shown():
    shapes = {"window 16": 1, "1": 5, "lookup 8": 3, "lookup 16": 2, "window 8": 1}
    answer = Answer("text", [1, 2], 1, 0.1, steps_by_shape=shapes)
    assert str(answer).endswith("tok/s; steps: 5 of one slot, 3 of lookup 8, 2 of lookup 16 and 2 more shapes")
    assert answer.figures["steps_by_shape"] == shapes
    assert str(Answer("text", [1, 2], 2, 0.1)).endswith("tok/s")
    assert "steps_by_shape" not in Answer("text", [1, 2], 2, 0.1).figures


def test_sampling_is_that_of_generate_for_the_same_seed():
    sampled = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 40}
    options = ["--temperature", "0.9", "--top-p", "0.95", "--top-k", "40", "--compare"]
    torch.manual_seed(7)
    wanted = generated(CHECKPOINT, "def main(", **sampled)[1]
    shown = document("--model", CHECKPOINT, "def main(", *options, "--seed", "7")
    assert (shown["text"], shown["identical"]) == (wanted, True)
    assert shown["sampling"] == {"max_new_tokens": 16, **sampled, "seed": 7}
    unseeded = document("--model", CHECKPOINT, "def main(", *options)
    assert unseeded["identical"] is True
    again = document("--model", CHECKPOINT, "def main(", *options, "--seed", str(unseeded["sampling"]["seed"]))
    assert again["text"] == unseeded["text"]


def test_a_fallback_is_reported(tmp_path):
    for file in (EXAMPLE / "forced").iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((EXAMPLE / "forced" / "generation_config.json").read_text(encoding="utf-8"))
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text(json.dumps({**config, "prefill_chunk_size": 8}), encoding="utf-8")
    shown = document("--model", str(tmp_path), PROMPT)
    assert shown["forwards"] == shown["new_tokens"]
    assert "does not support prefill_chunk_size" in shown["warnings"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one prompt"),
        (["x", "--file", "y"], "give one prompt"),
        (["--file", "nowhere.txt"], "nowhere.txt"),
        ([" "], "is empty"),
        (["x", "--temperature", "0"], "--no-do-sample is greedy"),
        (["x", "--top-p", "2"], "top_p=2.0"),
        (["x", "--top-k", "-1"], "top_k=-1"),
        (["x", "--top-k", "3", "--no-do-sample"], "drop one"),
        (["x", "--dtype", "fp32"], "'fp32'"),
        (["x", "--jacobi-block-size", "1"], "from 2 to 1024"),
        (["x", "--decoding", "jacoby"], "did you mean 'jacobi'"),
        (["x", "--model", "nowhere/at/all"], "nowhere/at/all is no model"),
        (["x", "--model", str(EXAMPLE)], "holds no model"),
        (["x", "--drafter", "nowhere/at/all"], "nowhere/at/all"),
        (["x", "--jacobi-verify-width", "4"], "--drafter"),
    ],
)
def test_errors_are_one_line(arguments, message):
    result = run(app, ["generate", "--model", FORCED, *arguments])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("jacobi-hf")]
    assert line.startswith("jacobi-hf generate: ")
    assert message in line


def test_a_misspelt_option_is_named_with_the_nearest(tmp_path):
    assert "--max-new-tokens" in run(app, ["generate", "--model", FORCED, "x", "--max-new-token", "3"]).output
    (tmp_path / "recipe.yaml").write_text("generate: {temprature: 3}", encoding="utf-8")
    result = run(
        app, ["generate", "--model", FORCED, "x", "--config", str(tmp_path / "recipe.yaml")], env={"COLUMNS": "300"}
    )
    assert (result.exit_code, "did you mean 'temperature'" in result.output) == (2, True)


def test_binary_prompts_and_models_without_a_template_are_refused(tmp_path):
    (tmp_path / "prompt.bin").write_bytes(b"\xff\xfe\x00")
    result = run(app, ["generate", "--model", FORCED, "--file", str(tmp_path / "prompt.bin")])
    assert (result.exit_code, "is not UTF-8 text" in result.stderr) == (2, True)
    for file in (EXAMPLE / "forced").iterdir():
        if file.suffix != ".jinja":
            (tmp_path / file.name).symlink_to(file)
    result = run(app, ["generate", "--model", str(tmp_path), "--chat", "x"])
    assert (result.exit_code, "has no chat template" in result.stderr) == (2, True)


def test_ctrl_c_ends_with_130(monkeypatch):
    monkeypatch.setattr(_answers, "write", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    result = run(app, ["generate", "--model", FORCED, PROMPT])
    assert (result.exit_code, "jacobi-hf generate: interrupted" in result.stderr) == (130, True)


def test_sampling_follows_the_model_by_default():
    class Model:
        class generation_config:  # noqa: N801
            do_sample = True

    assert Sampling().arguments(Model) == {"do_sample": True}
    assert Sampling(do_sample=False).arguments(Model) == {"do_sample": False}
    assert Sampling(temperature=0.5).arguments(Model) == {"do_sample": True, "temperature": 0.5}
