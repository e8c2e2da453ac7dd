"""The arguments of both trainers: each has help, is described, and belongs to one method or to both."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from jacobi_hf.trainer import DrafterConfig, JacobiForcingConfig
from jacobi_hf.trainer.base_config import BaseConfig
from jacobi_hf.trainer.method_options import RunConfig

KINDS = (JacobiForcingConfig, DrafterConfig)


@pytest.mark.parametrize("kind", KINDS)
def test_every_argument_has_help_and_is_described(kind):
    described = set(re.findall(r"\w+", " ".join(re.findall(r"^ {8}([a-z0-9_, ]+): ", kind.__doc__, re.MULTILINE))))
    assert described == set(kind.own_arguments())
    assert all(field.metadata["help"] for field in fields(kind) if field.name in described)


def test_each_method_has_only_what_it_uses():
    finetune, drafter = (set(kind.own_arguments()) for kind in KINDS)
    assert finetune & drafter == set(BaseConfig.own_arguments())
    assert {"block_size", "kl_loss_weight", "context"} <= finetune - drafter
    assert {"window_width", "windows_per_text", "steps_per_window"} <= drafter - finetune
    assert [kind.method for kind in KINDS] == ["finetune", "drafter"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_argument_is_one_of_the_run(kind):
    """The command line reads both from one recipe's section."""
    assert not {field.name for field in fields(kind)} & {field.name for field in fields(RunConfig)}
