"""Schedules for tests: shapes chosen at random, and a host that does not see what the device does."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from jacobi_hf.decoding.loop import Decoder
from jacobi_hf.drafts.lookup import NgramLookup
from jacobi_hf.tuning.controller import Controller
from jacobi_hf.tuning.options import Option


@contextlib.contextmanager
def random_shapes(seed: int) -> Iterator[list[Option]]:
    """Calls with the adaptive schedule get an option at random in each step; the list holds what was chosen."""
    generator = random.Random(seed)
    chosen: list[Option] = []

    def choose(self: Any, _: Sequence[tuple[int, int]]) -> Option:
        # Runs of the same option are likely, because a window shows what it can in its second step only.
        option = chosen[-1] if chosen and generator.random() < 0.4 else generator.choice(self._options)
        option = option if option in self._options else self._options[-1]
        chosen.append(option)
        return option

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Controller, "choose", choose)
        yield chosen


def let_the_host_lag(patch: pytest.MonkeyPatch, *, lags: bool = True) -> None:
    """Make the host run ahead of a CPU as it does of a GPU, so that it reads nothing in between."""
    patch.setattr(Decoder, "LAGS_ON", ("cpu",) if lags else ())
    patch.setattr(NgramLookup, "ON_HOST", () if lags else ("cpu",))
