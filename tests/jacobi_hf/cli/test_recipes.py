"""Options of verbs: dataclasses that a recipe and the command line fill under the same names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from jacobi_hf.cli import VERBS as ALL_VERBS
from jacobi_hf.cli import app
from jacobi_hf.cli._errors import Ending
from jacobi_hf.cli._options import Options, argument, flag, option, required, several, switch
from jacobi_hf.cli._recipes import Call, parse
from jacobi_hf.cli.bench import BenchConfig
from jacobi_hf.trainer import DrafterConfig, JacobiForcingConfig
from jacobi_hf.trainer.data.collect_options import CollectConfig
from jacobi_hf.trainer.data.pack_options import PackConfig
from jacobi_hf.trainer.method_options import RunConfig
from jacobi_hf.trainer.options import RENAMED

ROOT = Path(__file__).resolve().parents[3]
invoke = CliRunner().invoke
VERBS = {
    "collect": (CollectConfig,),
    "pack": (PackConfig,),
    "train": (RunConfig, JacobiForcingConfig, DrafterConfig),
    "bench": (BenchConfig,),
}


def call_with(section, words):
    """A call of `jacobi-hf train` with a recipe's section and a command line."""
    return Call("train", (), None, section, line=words, words=words, as_json=False, ending=Ending())


@dataclass
class Everything:
    """One field of each kind."""

    name: str = ""
    count: int = 3
    rate: float = 0.5
    several: list[str] = field(default_factory=list)
    switch: bool = False
    limit: int | None = 7
    table: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("recipe", "words", "expected"),
    [
        ("name: a b", ["--name", "a b"], {"name": "a b"}),
        ("count: 5", ["--count=5"], {"count": 5}),
        ("rate: 1.0e-3", ["--rate", "1e-3"], {"rate": 1e-3}),
        ("rate: 1e-3", ["--rate", "0.001"], {"rate": 1e-3}),  # to YAML, a string
        ("several: [a, 1]", ["--several", "a", "1"], {"several": ["a", "1"]}),
        ("switch: true", ["--switch"], {"switch": True}),
        ("switch: yes", ["--switch", "true"], {"switch": True}),
        ("switch: false", ["--switch", "false"], {"switch": False}),
        ("limit: 2", ["--limit", "2"], {"limit": 2}),
        ("table: {a: {b: 1}}", ["--table", '{"a": {"b": 1}}'], {"table": {"a": {"b": 1}}}),
    ],
)
def test_a_recipe_and_the_command_line_say_the_same(recipe, words, expected):
    read = parse((Everything,), yaml.safe_load(recipe), [], "verb"), parse((Everything,), {}, words, "verb")
    assert read[0] == read[1] == (Everything(**expected),)


def test_an_empty_value_is_none_if_the_option_allows_it():
    assert parse((Everything,), {"limit": None}, [], "verb") == (Everything(limit=None),)
    with pytest.raises(ValueError, match="count is empty"):
        parse((Everything,), {"count": None}, [], "verb")


@pytest.mark.parametrize("words", [["--learning_rate", "2e-4"], ["--learning-rate", "2e-4"], ["--learning-rate=2e-4"]])
def test_the_command_line_comes_before_the_recipe(words, tmp_path):
    section = {"learning_rate": 1e-3, "output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    _, args = parse((RunConfig, JacobiForcingConfig), section, words, "train")
    assert (args.learning_rate, args.output_dir) == (2e-4, str(tmp_path))


@pytest.mark.parametrize(
    ("section", "words", "message"),
    [
        ({"cuont": 1}, [], "'cuont' is no option of verb; did you mean 'count'?"),
        ({"zzz": 1}, [], "'zzz' is no option of verb."),
        ({}, ["--cuont", "1"], "--cuont is no option of verb; did you mean --count?"),
        ({}, ["--coun", "1"], "--coun is no option of verb; did you mean --count?"),
        ({}, ["1"], "'1' belongs to no option"),
        ({"count": 2.5}, [], "invalid int value: '2.5'"),
        ({"count": True}, [], "invalid int value: 'True'"),
        ({"count": {"a": 1}}, [], "count takes one value"),
        ({"count": [1]}, [], "count takes one value"),
        ({"switch": 3}, [], "neither true nor false"),
        ({"table": 3}, [], "the value is not a JSON object"),
        ({}, ["--table", "{"], "the value is not JSON"),
        ({}, ["--rate"], "expected one argument"),
    ],
)
def test_faults_are_named(section, words, message):
    with pytest.raises(ValueError, match=r"option|value|argument") as raised:
        parse((Everything,), section, words, "verb")
    assert message in str(raised.value)


@pytest.mark.parametrize(("verb", "old", "new"), [(v, old, new) for v in RENAMED for old, new in RENAMED[v].items()])
def test_a_renamed_option_is_named_by_its_new_name(verb, old, new):
    kinds = VERBS[verb][:2]
    with pytest.raises(ValueError, match=f"the recipe's section '{verb}': '{old}' is now '{new}'"):
        parse(kinds, {old: 1}, [], verb)
    with pytest.raises(ValueError, match=f"^--{old} is now --{new}"):
        parse(kinds, {}, [f"--{old}", "1"], verb)


def test_options_of_another_method_name_the_config_that_has_them():
    kinds = (RunConfig, DrafterConfig)
    message = "'kl_loss_weight' is no option of train with RunConfig, DrafterConfig: it belongs to JacobiForcingConfig"
    with pytest.raises(ValueError, match=message):
        parse(kinds, {"kl_loss_weight": 1}, [], "train", VERBS["train"])
    with pytest.raises(
        ValueError, match=r"--kl-loss-weight is no option of train with .*it belongs to JacobiForcingC"
    ):
        parse(kinds, {}, ["--kl-loss-weight", "1"], "train", VERBS["train"])


@pytest.mark.parametrize(
    ("section", "words", "method"),
    [
        ({}, [], "finetune"),
        ({"method": "drafter"}, [], "drafter"),
        ({"method": "drafter"}, ["--lora_r", "8", "--method", "finetune"], "finetune"),
        ({}, ["--method=drafter", "--lora_r", "8"], "drafter"),
    ],
)
def test_the_method_is_read_before_the_other_options(section, words, method):
    assert call_with(section, words).value_of("method", "finetune") == method


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("full", "method='full' is now method='finetune'"),
        ("gated", "method='gated' is now method='drafter'"),
        ("both", "method='both' must be one of 'finetune', 'drafter'"),
    ],
)
def test_unknown_methods_are_named(method, message):
    refused = invoke(app, ["train", "--method", method])
    assert refused.exit_code == 2
    assert message in refused.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_help_lists_every_option(verb):
    shown = invoke(app, [verb, "--help"])
    assert shown.exit_code == 0
    for kind in VERBS[verb]:
        for one in fields(kind):
            assert not one.init or re.search(rf"--{one.name.replace('_', '-')}[ ,\n]", shown.stdout), one.name
    assert "--config" in shown.stdout
    assert shown.stdout.isascii()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("[1, 2", "is not YAML"),
        ("- a\n- b", "is no recipe"),
        ("other: 3", "has no section '{verb}' with options by name; it has other."),
        ("{verb}: 3", "has no section '{verb}'"),
        ("{verb}: {{sead: 3}}", "'sead' is no option of {verb}"),
    ],
)
def test_files_that_are_no_recipes_are_refused(verb, content, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content.format(verb=verb))
    refused = invoke(app, [verb, "--config", str(path)])
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"jacobi-hf {verb}: ")
    assert refused.stderr.count("\n") == 1
    assert message.format(verb=verb) in refused.stderr


def test_a_traceback_is_printed_on_request(tmp_path):
    words = ["pack", "--config", str(tmp_path / "none.yaml")]
    assert "Traceback" not in invoke(app, words).stderr
    shown = invoke(app, ["--traceback", *words])
    assert shown.exit_code == 2
    assert "Traceback" in shown.stderr
    assert shown.stderr.splitlines()[-1].startswith("jacobi-hf pack: ")


@dataclass
class Roles(Options):
    """A field of each role."""

    folder: str = argument("A folder.")
    prompt: str | None = argument("A prompt.", optional=True)
    name: str = required("A name.")
    quiet: bool = flag("Say nothing.")
    sample: bool | None = switch("Sample.")
    files: list[str] = several("A file")  # noqa: RUF009
    share: float = option(0.5, "A share.", low=0, high=1)


def roles(section, *words):
    (config,) = parse((Roles,), {"name": "x", **section}, ["here", *words], "verb")
    return config


@pytest.mark.parametrize(
    ("section", "words", "expected"),
    [
        ({}, [], {}),
        ({"prompt": "p"}, [], {"prompt": "p"}),
        ({"prompt": "p"}, ["q"], {"prompt": "q"}),
        ({}, ["--quiet", "q"], {"quiet": True, "prompt": "q"}),
        ({}, ["--", "--quiet"], {"prompt": "--quiet"}),
        ({}, ["-"], {"prompt": "-"}),
        ({}, ["- a --b"], {"prompt": "- a --b"}),
        ({"quiet": True}, [], {"quiet": True}),
        ({"sample": True}, ["--no-sample"], {"sample": False}),
        ({"sample": False}, [], {"sample": False}),
        ({}, ["--files", "a", "--files", "b", "q"], {"files": ["a", "b"], "prompt": "q"}),
        ({"files": ["a", 1]}, [], {"files": ["a", "1"]}),
        ({"files": "a"}, [], {"files": ["a"]}),
        ({"files": ["a"]}, ["--files", "b"], {"files": ["b"]}),
        ({"share": 1}, [], {"share": 1.0}),
    ],
)
def test_fields_of_each_role(section, words, expected):
    assert roles(section, *words) == Roles(**{"folder": "here", "name": "x", **expected})


@pytest.mark.parametrize(
    ("section", "words", "message"),
    [
        ({}, ["a", "b"], "'b' belongs to no option"),
        ({}, ["--loud"], "--loud is no option of verb."),
        ({}, ["--quite"], "--quite is no option of verb; did you mean --quiet?"),
        ({"quiet": "yes"}, [], "quiet takes true or false; it is 'yes'"),
        ({"name": ""}, [], "name missing: give it in the recipe's section 'verb' or on the command line"),
        ({"share": 2}, [], "share=2.0 must be at most 1"),
        ({}, ["--share=-1"], "share=-1.0 must be at least 0"),
    ],
)
def test_faults_of_fields_with_a_role_are_named(section, words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        roles(section, *words)


@pytest.mark.parametrize("verb", sorted(ALL_VERBS))
def test_every_verb_has_help_for_each_option(verb):
    for kind in ALL_VERBS[verb].kinds():
        for one in fields(kind):
            assert not one.init or one.metadata.get("help") or not kind.__module__.startswith("jacobi_hf"), one.name
