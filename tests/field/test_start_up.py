"""What people type first: the help of the command line, a misspelt option, a verb whose extra is not installed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import HfArgumentParser, TrainingArguments

from jacobi_hf.cli._parser import Parser
from jacobi_hf.cli._training import of_method, training_arguments
from jacobi_hf.integration.compat import CheckpointingArguments
from jacobi_hf.trainer import DrafterConfig, JacobiForcingConfig

ROOT = Path(__file__).resolve().parents[2]
# Packages of the extras, which a plain installation lacks.
EXTRAS = ("datasets", "fastapi", "filelock", "gradio", "lm_eval", "matplotlib", "openai", "peft", "uvicorn")

# Runs command lines one after another without the extras. Prints exit code, both outputs, and what was loaded.
RUNNER = """
import json, sys
sys.modules.update(dict.fromkeys(sys.argv[2].split()))
from jacobi_hf.cli import app
from typer.testing import CliRunner

for words in json.loads(sys.argv[1]):
    result = CliRunner().invoke(app, words)
    loaded = [name for name in ("torch", "transformers") if name in sys.modules]
    print(json.dumps([result.exit_code, result.stdout, result.stderr, loaded]))
"""


def run(*lines, without=EXTRAS):
    command = [sys.executable, "-c", RUNNER, json.dumps(lines), " ".join(without)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(zip(lines, map(json.loads, done.stdout.splitlines()), strict=True))


def verbs():
    ((_, (_, said, _, _)),) = run(["--help"])
    found = [
        line.split()[0] for line in said.split("Commands:")[1].splitlines() if line[:3].strip() and line[2:3] != " "
    ]
    assert {"collect", "train", "info"} <= {*found}
    return found


def test_help_of_every_verb_needs_no_extra_and_loads_neither_torch_nor_transformers():
    """A newcomer reads the help of all verbs after `pip install` without extras, on a slow laptop."""
    lines = [["--help"], ["--version"], [], *([verb, "--help"] for verb in verbs())]
    for words, (code, said, errors, loaded) in run(*lines):
        assert (code if words else 0, errors if words else "", loaded) == (0, "", []), words
        assert words != ["--version"] or said.startswith("jacobi-hf ")
        if len(words) == 2:
            assert said.startswith(f"usage: jacobi-hf {words[0]}"), words
            assert "--config" in said


ERRORS = [
    (["nosuch"], "nosuch"),
    (["generate", "--max-new-tokns", "3"], "did you mean --max-new-tokens?"),
    (["generate", "--model", "m", "--max-new-tokens", "x", "a"], "invalid int value: 'x'"),
    (["generate", "--model", "m", "--jacobi-block-size", "5000", "a"], "an integer from 2 to 1024"),
    (["generate", "--model", "m"], "give one prompt"),
    (["chat"], "model missing"),
    (["chat", "--model", "m", "--temperature", "0"], "temperature=0.0 cannot be used"),
    (["serve"], "model missing"),
    (["serve", "m", "--port", "70000"], "port=70000 must be at most 65535"),
    (["serve", "m", "--decoding", "jacoby"], "did you mean 'jacobi'?"),
    (["collect", "--model", "m"], "dataset, output_dir missing"),
    (["collect", "--block-size", "1"], "block_size=1 must be at least 2"),
    (["collect", "--do-sample", "maybe"], "neither true nor false"),
    (["pack"], "sources, output_dir missing"),
    (["pack", "--schedule", "x"], "schedule"),
    (["train", "--learning-rate", "x"], "invalid float value: 'x'"),
    (["train", "--max-steps", "1.5"], "invalid int value: '1.5'"),
    (["train", "--warmup-stepz", "1"], "did you mean --warmup-steps?"),
    (["train", "--method", "drafter", "--kl-loss-weight", "1"], "it belongs to JacobiForcingConfig"),
    (["train", "--method", "x"], "must be one of 'finetune', 'drafter'"),
    (["train"], "model, train_dataset missing"),
    (["bench", "--limit", "3"], "--limit is no option of bench"),
    (["eval", "--limit", "0", "--model", "m"], "limit=0 must be at least 1"),
    (["autotune", "--model", "m"], "prompts missing"),
    (["autotune", "--model", "m", "--prompts", "nowhere"], "nowhere cannot be read"),
    (["card", "folder"], "repo_id missing"),
    (["push", "folder"], "repo_id missing"),
    (["info", "--drafter", "d"], "is for a model, and none is named"),
    (["demo", "--port", "1"], "--host and --port are for the page"),
    (["generate", "--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
]


def test_errors_in_the_command_line_load_neither_torch_nor_transformers():
    """A misspelt option is answered at once, not after the seconds that torch takes to load."""
    for (words, part), (_, (code, _, errors, loaded)) in zip(
        ERRORS, run(*(words for words, _ in ERRORS)), strict=True
    ):
        assert code == 2, (words, errors)
        assert part in errors, (words, errors)
        assert loaded == [], words


def test_a_verb_without_its_extra_says_which_one(tmp_path):
    """`jacobi-hf collect` on a plain installation: the error names the extra to install."""
    out = ["--output-dir", str(tmp_path / "out")]
    lines = {
        "train": [
            ["collect", "--model", "m", "--dataset", "d", *out],
            ["pack", "--sources", "s", *out],
            ["train", "--model", "m", "--train-dataset", "d", *out],
        ],
        "serve": [["serve", "m", "--port", "0"]],
        "eval": [["eval", "--model", "m", "--tasks", "t"]],
        "demo": [["demo", "--web"]],
    }
    for extra, named in lines.items():
        for words, (code, _, errors, _) in run(*named):
            assert code == 2, words
            assert f"[{extra}]'" in errors, (words, errors)


LAZY = """
import importlib, importlib.util, inspect, sys
import jacobi_hf
assert not {"torch", "transformers"} & set(sys.modules)
assert jacobi_hf.config.MULTIBLOCK == jacobi_hf.JacobiConfig().decoding
assert not {"torch", "transformers"} & set(sys.modules)
import jacobi_hf.trainer, jacobi_hf.hub_cards
for name in "trainer.run", "tuning.autotune", "hub_cards.push", "inspection", "evaluation.decoding":
    importlib.import_module(f"jacobi_hf.{name}")
modelling = "transformers.models.qwen3.modeling_qwen3"
assert modelling not in sys.modules  # or its registration would import half a package
assert all(getattr(jacobi_hf, name) for name in (*jacobi_hf.__all__, "register_defaults"))
assert "class Qwen3ForCausalLM" in importlib.util.find_spec(modelling).loader.get_source(modelling)
from transformers import AutoModelForCausalLM, Qwen3Config
model = AutoModelForCausalLM.from_config(Qwen3Config(vocab_size=8, hidden_size=8, num_hidden_layers=1))
assert type(model).__bases__[0] is jacobi_hf.JacobiGenerationMixin
assert "class Qwen3ForCausalLM" in inspect.getsource(sys.modules[modelling])
assert sys.modules[modelling].__loader__ is sys.modules[modelling].__spec__.loader
assert type(sys.modules[modelling].__loader__).__name__ == "SourceFileLoader"
from jacobi_hf.integration.registry import registered
assert [one.__name__ for one in registered()] == ["Qwen3ForCausalLM"], registered()
jacobi_hf.unregister()
from transformers import LlamaForCausalLM
assert not issubclass(LlamaForCausalLM, jacobi_hf.JacobiGenerationMixin) and not registered()
importlib.reload(jacobi_hf)
assert sum(type(finder).__module__ == "jacobi_hf.integration.on_load" for finder in sys.meta_path) == 1
"""

EARLY = """
import threading
import transformers
from transformers import Qwen3ForCausalLM
import jacobi_hf
assert Qwen3ForCausalLM.__bases__[0] is jacobi_hf.JacobiGenerationMixin
threads = [threading.Thread(target=lambda: transformers.Qwen2ForCausalLM) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert transformers.Qwen2ForCausalLM.__bases__[0] is jacobi_hf.JacobiGenerationMixin
"""


FAMILIES = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM
import jacobi_hf
sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
sizes |= dict(num_key_value_heads=2, head_dim=8, bos_token_id=None, eos_token_id=None, pad_token_id=None)
for family in "llama", "mistral", "gemma2", "phi", "phi3":
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    prompt = torch.tensor([[3, 4, 5]])
    plain = model.generate(prompt, max_new_tokens=20, do_sample=False)
    assert torch.equal(plain, model.generate(prompt, max_new_tokens=20, do_sample=False, decoding="jacobi_multiblock"))
"""


def test_the_families_of_the_readme_need_no_other_line():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FAMILIES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("program", [LAZY, EARLY], ids=["jacobi_hf first", "transformers first"])
def test_the_classes_are_registered_when_they_are_loaded_in_either_order(program):
    """Programs import transformers before this package, after it, or from several threads."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ANY_FIRST = """
import os, pkgutil, sys, traceback
import torch  # once for all
from jacobi_hf import integration

assert "transformers" not in sys.modules
for module in pkgutil.iter_modules(integration.__path__, "jacobi_hf.integration."):
    child = os.fork()
    if child == 0:
        try:
            __import__(module.name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, module.name
"""


@pytest.mark.slow
def test_any_module_that_touches_transformers_can_be_the_first_to_import_it():
    """Importing transformers calls this package, which then must not need the module that imports it."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ANY_FIRST], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def options_of(parser):
    return {
        name: action for action in parser._actions for name in action.option_strings if name not in ("-h", "--help")
    }


def test_the_options_of_training_arguments_are_those_of_the_installed_transformers():
    """Names, defaults and help come from the source of TrainingArguments, without its import."""
    ours = training_arguments()
    real = {one.name: one for one in dataclasses.fields(TrainingArguments) if one.init}
    added = getattr(CheckpointingArguments, "__dataclass_fields__", {})
    assert [one.name for one in dataclasses.fields(ours)] == [*real, *added]
    for one in dataclasses.fields(ours):
        if one.name in real:
            assert one.metadata["help"] == real[one.name].metadata.get("help"), one.name
            assert one.default in (real[one.name].default, None), one.name
    theirs, own = options_of(HfArgumentParser(TrainingArguments)), options_of(Parser((ours,)))
    assert {*theirs} <= {*own}
    for name, action in theirs.items():
        assert own[name].dest == action.dest
        if name != "--include_num_input_tokens_seen" and action.dest != "include_num_input_tokens_seen":
            assert own[name].nargs == action.nargs, name
        if action.type in (int, float):
            assert own[name].type is action.type, name


def test_without_the_source_of_training_arguments_the_class_itself_is_loaded(monkeypatch):
    """A build of transformers that holds no sources."""
    monkeypatch.setattr("jacobi_hf.cli._training.find_spec", lambda name: None)
    assert training_arguments.__wrapped__() is TrainingArguments


WORDS = {
    "JacobiForcingConfig": ["--no_prompt_loss", "--context", "window", "--context-window", "2"],
    "DrafterConfig": ["--window_width", "4", "--constant-draft", "3"],
}
COMMON = [
    "--bf16",
    "false",
    "--save_strategy",
    "steps",
    "--lr_scheduler_type",
    "linear",
    "--label_names",
    "a",
    "b",
    "--debug",
    "underflow_overflow",
    "--optim",
    "adamw_torch",
    "--fsdp_config",
    '{"a":1}',
    "--save_total_limit",
    "3",
    "--use_cpu",
    "--disable_tqdm",
    "true",
    "--seed",
    "5",
    "--include_num_input_tokens_seen",
    "non_padding",
    "--report_to",
    "none",
    "--no_skip_memory_metrics",
]


@pytest.mark.parametrize(("method", "real"), [("finetune", JacobiForcingConfig), ("drafter", DrafterConfig)])
def test_both_readings_of_a_training_command_agree(method, real):
    """The first reading finds errors before torch is loaded; the second one fills the trainer's arguments."""
    words = [*WORDS[real.__name__], *COMMON]
    light, full = (vars(Parser((kind,)).parse_args(words)) for kind in (of_method(method), real))
    given = {word.removeprefix("--no_").lstrip("-").replace("-", "_") for word in words if word.startswith("--")}
    assert {name: light[name] for name in given} == {name: full[name] for name in given}
    assert of_method(method).__name__ == real.__name__
    config = real(**full)
    assert config.include_num_input_tokens_seen == "non_padding"
    assert config.lr_scheduler_type == "linear"
    assert config.label_names == ["a", "b"]
