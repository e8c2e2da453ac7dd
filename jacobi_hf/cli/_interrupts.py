"""Ctrl-C in the middle of a text."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria

if TYPE_CHECKING:
    from collections.abc import Iterator


class StopOnInterrupt(StoppingCriteria):  # type: ignore[misc, unused-ignore]
    """Ends an answer at its next token on the first Ctrl-C while `watching`; a second one raises `KeyboardInterrupt`.

    Generation ends as by any other criterion, so that its cache can be continued.

    Attributes:
        is_stopped: whether there was a Ctrl-C.
    """

    def __init__(self) -> None:
        self.is_stopped = False

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        """Whether each row is over."""
        stopped: Any = torch.full((len(input_ids),), self.is_stopped, dtype=torch.bool, device=input_ids.device)
        return stopped  # type: ignore[no-any-return]

    def _stop(self, *_: Any) -> None:
        if self.is_stopped:
            raise KeyboardInterrupt
        self.is_stopped = True

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Listen to Ctrl-C, which only a program's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
