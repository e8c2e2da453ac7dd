"""The tiny checkpoint and the corpus that it was trained on."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.tiny import CHECKPOINT, EXAMPLE


@pytest.fixture(scope="module")
def corpus():
    sys.path.insert(0, str(EXAMPLE))
    import corpus

    yield corpus
    sys.path.remove(str(EXAMPLE))


@pytest.fixture(scope="module")
def trained():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(
        CHECKPOINT
    )


def test_every_template_computes_its_result(corpus):
    arithmetic = corpus.arithmetic
    assert len(arithmetic.TEMPLATES) >= 12
    assert len(arithmetic.HELD_OUT_TEMPLATES) == 2
    for template in arithmetic.TEMPLATES:
        for seed in range(100):
            problem = arithmetic.problem(template, seed)
            equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem.completion)
            assert equations
            for a, sign, b, result in equations:
                a = int(a)
                b = int(b)
                assert {"+": a + b, "-": a - b, "*": a * b, "/": a // b if a % b == 0 else None}[sign] == int(result)
            assert int(equations[-1][3]) == problem.result == arithmetic.read_answer(problem.completion)
            assert problem.result >= 0


def test_training_and_held_out_problems_are_apart(corpus):
    training = {p.question for p in corpus.arithmetic.training_problems(3000)}
    held_out = corpus.arithmetic.held_out_problems(400)
    assert training.isdisjoint(p.question for p in held_out)
    assert {p.template for p in held_out}.isdisjoint(corpus.arithmetic.HELD_OUT_TEMPLATES)


@pytest.mark.slow
def test_held_out_modules_are_in_no_training_text(corpus):
    held_out = corpus.code_texts(held_out=True)
    training = corpus.code_texts(held_out=False)
    assert len(held_out) >= 20
    assert set(held_out).isdisjoint(training)
    assert set(corpus.prose_texts(held_out=True)).isdisjoint(corpus.prose_texts(held_out=False))


@pytest.mark.slow
def test_stored_prompts_are_held_out(corpus):
    stored = json.loads((EXAMPLE / "prompts.json").read_text(encoding="utf-8"))["prompts"]
    assert {domain: len(texts) for domain, texts in stored.items()} == dict.fromkeys(corpus.DOMAINS, 64)
    assert stored["arithmetic"] == corpus.prompts("arithmetic", 64)
    training = "\n".join(corpus.prose_texts(held_out=False))
    assert not [text for text in stored["prose"] if text in training]


def test_readme_has_the_numbers_of_the_report():
    text = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    report = json.loads((CHECKPOINT / "training.json").read_text(encoding="utf-8"))
    for domain, loss in report["held_out_loss_nats_per_token"].items():
        assert f"| {domain} | {loss:.3f} |" in text
    for kind, share in report["arithmetic_exact_match"].items():
        assert f"{kind.replace('_', ' ')}: {share:.3f}" in text
    assert f"{report['minutes_of_this_process_to_the_end_of_training']} minutes" in text
    assert f"torch {report['torch'].removesuffix('+cpu')}, transformers {report['transformers']}" in text


def test_checkpoint_is_small_and_plain():
    files = [path for path in CHECKPOINT.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["dtype"] == "bfloat16"


def test_tokenizer_decodes_its_input(trained):
    _, tokenizer = trained
    for text in (
        "def f(x):\n    return x ** 2  # naïve\n",
        "Question: 12 + 7?\nAnswer:",
        "tabs\tand   spaces\n\n\n",
        "日本語 🙂",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("1234")["input_ids"]) == 4
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "1 + 1?"}], tokenize=False)
    assert chat == "Question: 1 + 1?\nAnswer:"


@pytest.mark.slow
def test_checkpoint_solves_as_much_as_its_report(trained, corpus):
    """On a sample, the share of right answers is at most 15 points below that in training.json."""
    model, tokenizer = trained
    report = json.loads((CHECKPOINT / "training.json").read_text(encoding="utf-8"))
    problems = corpus.arithmetic.held_out_problems(60)
    batch = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True, return_token_type_ids=False)
    ids = model.generate(**batch, max_new_tokens=96, do_sample=False, decoding="jacobi_multiblock")
    texts = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(
        corpus.arithmetic.read_answer(text) == p.result for text, p in zip(texts, problems, strict=True)
    ) / len(problems)
    assert right >= report["arithmetic_exact_match"]["held_out_seeds"] - 0.15


def test_forced_checkpoint_is_small_plain_and_switches_decoding_on(trained):
    forced = EXAMPLE / "forced"
    assert sum(path.stat().st_size for path in forced.iterdir()) <= 16 * 2**20
    config = json.loads((forced / "config.json").read_text(encoding="utf-8"))
    assert (config["architectures"], config["dtype"], config["use_cache"]) == (["Qwen3ForCausalLM"], "bfloat16", True)
    report = json.loads((forced / "forcing.json").read_text(encoding="utf-8"))
    assert report["log"][-1]["step"] == report["steps"]
    model = AutoModelForCausalLM.from_pretrained(forced, dtype=torch.float32).eval()
    assert model.generation_config.decoding == "jacobi_multiblock"
    _, tokenizer = trained
    assert AutoTokenizer.from_pretrained(forced).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("report", "recipe"), [("forcing-stage1", "tiny_qwen3_cpu"), ("forcing", "tiny_qwen3_cpu_stage2")]
)
def test_the_forced_checkpoint_was_made_by_the_recipes(report, recipe):
    said = json.loads((EXAMPLE / "forced" / f"{report}.json").read_text(encoding="utf-8"))
    asked = yaml.safe_load((EXAMPLE.parent / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8"))["train"]
    used = (
        said["arguments"]
        | said["data"]
        | {"max_steps": said["steps"], "per_device_train_batch_size": said["batch"]["per_device"]}
    )
    shared = asked.keys() & used.keys()
    assert {
        "learning_rate",
        "muon_learning_rate",
        "kl_loss_weight",
        "max_steps",
        "ar_loss_weight",
        "replay_ratio",
    } <= shared
    assert {name: used[name] for name in shared} == {name: asked[name] for name in shared}


@pytest.mark.slow
def test_forcing_halves_the_forwards(trained, corpus):
    """On held-out problems, the forced model's window needs less than half the forwards of the base's window."""
    from jacobi_hf import JacobiConfig
    from jacobi_hf.evaluation.decoding import measure_decoding, ordinary_outputs

    base, tokenizer = trained
    forced = AutoModelForCausalLM.from_pretrained(EXAMPLE / "forced", dtype=torch.float32).eval()
    prompts = [tokenizer(p.prompt)["input_ids"] for p in corpus.arithmetic.held_out_problems(12)]
    window = JacobiConfig(jacobi_block_size=16, jacobi_max_blocks=1, jacobi_pool_size=0, jacobi_lookup_tokens=0)
    before, after = (measure_decoding(model, prompts, window, 96) for model in (base, forced))
    assert after.tokens_per_forward > 2 * before.tokens_per_forward
    assert after.outputs == ordinary_outputs(forced, prompts, 96)
