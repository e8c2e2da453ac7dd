"""Arguments of verbs that dataclasses describe."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from jacobi_hf.cli import app
from jacobi_hf.cli._recipes import Given, parse
from jacobi_hf.cli.bench import BenchConfig
from jacobi_hf.trainer import DrafterConfig, JacobiForcingConfig
from jacobi_hf.trainer.data.collection import CollectConfig
from jacobi_hf.trainer.data.packing import PackConfig
from jacobi_hf.trainer.options import RENAMED
from jacobi_hf.trainer.run import RunConfig

invoke = CliRunner().invoke
VERBS = {
    "collect": (CollectConfig,),
    "pack": (PackConfig,),
    "train": (RunConfig, JacobiForcingConfig, DrafterConfig),
    "bench": (BenchConfig,),
}


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


def test_what_is_empty_is_none_where_it_may_be():
    assert parse((Everything,), {"limit": None}, [], "verb") == (Everything(limit=None),)
    with pytest.raises(ValueError, match="count is empty in the recipe"):
        parse((Everything,), {"count": None}, [], "verb")


@pytest.mark.parametrize("words", [["--learning_rate", "2e-4"], ["--learning-rate", "2e-4"], ["--learning-rate=2e-4"]])
def test_the_command_line_comes_before_the_recipe(words, tmp_path):
    section = {"learning_rate": 1e-3, "output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    _, args = parse((RunConfig, JacobiForcingConfig), section, words, "train")
    assert (args.learning_rate, args.output_dir) == (2e-4, str(tmp_path))


@pytest.mark.parametrize(
    ("section", "words", "message"),
    [
        ({"cuont": 1}, [], "'cuont', which is no option of verb; did you mean count?"),
        ({"zzz": 1}, [], "'zzz', which is no option of verb."),
        ({}, ["--cuont", "1"], "--cuont is no option of verb; did you mean --count?"),
        ({}, ["--coun", "1"], "--coun is no option of verb; did you mean --count?"),
        ({}, ["1"], "'1' belongs to no option"),
        ({"count": 2.5}, [], "invalid int value: '2.5'"),
        ({"count": True}, [], "invalid int value: 'True'"),
        ({"count": {"a": 1}}, [], "invalid int value"),
        ({"count": [1]}, [], "count takes one value"),
        ({"switch": 3}, [], "Truthy value expected"),
        ({"table": 3}, [], "the value is not a JSON object"),
        ({}, ["--table", "{"], "the value is not JSON"),
        ({}, ["--rate"], "expected one argument"),
    ],
)
def test_what_is_wrong_is_named(section, words, message):
    with pytest.raises(ValueError, match=r"option|value|argument") as raised:
        parse((Everything,), section, words, "verb")
    assert message in str(raised.value)


@pytest.mark.parametrize(("verb", "old", "new"), [(v, old, new) for v in RENAMED for old, new in RENAMED[v].items()])
def test_a_renamed_option_is_named_by_its_new_name(verb, old, new):
    kinds = VERBS[verb][:2]
    with pytest.raises(ValueError, match=f"the recipe's section '{verb}' has '{old}', which is now '{new}'"):
        parse(kinds, {old: 1}, [], verb)
    with pytest.raises(ValueError, match=f"^--{old} is now --{new}"):
        parse(kinds, {}, [f"--{old}", "1"], verb)


def test_options_of_another_method_name_the_config_that_has_them():
    kinds = (RunConfig, DrafterConfig)
    message = (
        "kl_loss_weight', which is no option of train with RunConfig, DrafterConfig: it belongs to JacobiForcingConfig"
    )
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
    assert Given("train", section, words, as_json=False).value_of("method", "finetune") == method


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("full", "method='full' is now method='finetune'"),
        ("gated", "method='gated' is now method='drafter'"),
        ("both", "method='both' must be one of 'finetune', 'drafter'"),
    ],
)
def test_methods_that_are_none_are_named(method, message):
    refused = invoke(app, ["train", "--method", method])
    assert refused.exit_code == 2
    assert message in refused.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_help_lists_every_option(verb):
    shown = invoke(app, [verb, "--help"])
    assert shown.exit_code == 0
    for kind in VERBS[verb]:
        for one in fields(kind):
            assert not one.init or f"--{one.name} " in shown.stdout or f"--{one.name}\n" in shown.stdout, one.name
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
        ("{verb}: {{sead: 3}}", "has 'sead', which is no option of {verb}"),
    ],
)
def test_recipes_that_are_none(verb, content, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content.format(verb=verb))
    refused = invoke(app, [verb, "--config", str(path)])
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"jacobi-hf {verb}: ")
    assert refused.stderr.count("\n") == 1
    assert message.format(verb=verb) in refused.stderr


def test_the_traceback_is_there_for_who_asks(tmp_path):
    words = ["pack", "--config", str(tmp_path / "none.yaml")]
    assert "Traceback" not in invoke(app, words).stderr
    shown = invoke(app, ["--traceback", *words])
    assert shown.exit_code == 2
    assert "Traceback" in shown.stderr
    assert shown.stderr.splitlines()[-1].startswith("jacobi-hf pack: ")
