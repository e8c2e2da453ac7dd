"""Several generations on one machine that take turns, forward by forward, so that the clock of each counts its own forwards alone."""

from __future__ import annotations

import copy
import itertools
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from jacobi_hf.streaming import StepEvent, StepStreamer

if TYPE_CHECKING:
    from collections.abc import Sequence

PATIENCE = 60.0  # seconds; a runner that has not had a turn for so long has been forgotten, and ends


@dataclass(frozen=True)
class Lane:
    """A model and a way to decode with it; `decoding` is None for ordinary decoding."""

    title: str
    model: Any
    tokenizer: Any
    decoding: str | None = "jacobi_multiblock"


def twin(model: Any) -> Any:
    """A second model of the same weights, which are there once, for a drafter or a decoding of its own."""
    return copy.deepcopy(
        model, {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    )


class _StopError(Exception):
    pass


@dataclass
class Pieces:
    """The text that each forward added.

    A character whose bytes come from several forwards is the last one's.
    """

    tokenizer: Any
    of_step: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    _written: int = 0

    def add(self, step: StepEvent) -> None:
        """One more forward."""
        self.token_ids += step.token_ids
        unwritten = self._unwritten()
        self.of_step.append("" if unwritten.endswith("\ufffd") else unwritten)
        self._written += len(self.of_step[-1])

    def finish(self) -> None:
        """There are no more forwards, so nothing is to be waited for."""
        if self.of_step:
            self.of_step[-1] += self._unwritten()

    def _unwritten(self) -> str:
        return str(self.tokenizer.decode(self.token_ids, skip_special_tokens=True))[self._written :]


class Runner(StepStreamer):
    """One generation, in a thread of its own, which does a forward when it is told to.

    Args:
        lane: who decodes.
        token_ids: the prompt.
        options: of `generate`.

    Attributes:
        steps, pieces: what was done so far.
        seconds: wall time of its turns.
        is_done: whether there is nothing left to do.
        error: what is wrong, where that ended it.
    """

    def __init__(self, lane: Lane, token_ids: Sequence[int], options: dict[str, Any]) -> None:
        self.lane, self._prompt, self._options = lane, list(token_ids), options
        self.steps: list[StepEvent] = []
        self.pieces = Pieces(lane.tokenizer)
        self.seconds, self.is_done, self.error = 0.0, False, ""
        self._go, self._told, self._stops = threading.Semaphore(0), threading.Semaphore(0), False
        threading.Thread(target=self._run, name=f"runner {lane.title}", daemon=True).start()

    @property
    def tokens(self) -> int:
        """Committed so far."""
        return len(self.pieces.token_ids)

    @property
    def tokens_per_forward(self) -> float:
        """So far, the prefill included."""
        return self.tokens / max(1, len(self.steps))

    def turn(self) -> None:
        """One forward."""
        started = time.perf_counter()
        self._go.release()
        self._told.acquire()
        self.seconds += time.perf_counter() - started
        for step in self.steps[len(self.pieces.of_step) :]:
            self.pieces.add(step)
        if self.is_done:
            self.pieces.finish()

    def stop(self) -> None:
        """End before the next forward."""
        self._stops = True
        self._go.release()

    def step(self, step: StepEvent) -> None:
        """A forward is over; called by `generate`."""
        self.steps.append(step)
        self._told.release()
        self._wait()

    def _wait(self) -> None:
        if not self._go.acquire(timeout=PATIENCE) or self._stops:
            raise _StopError

    def _run(self) -> None:
        import torch

        error = "it broke off; the log of the server says where."  # unless it ends as it should, or says itself what is wrong
        try:
            self._wait()
            ids_1P = torch.tensor([self._prompt], device=self.lane.model.device)
            self.lane.model.generate(ids_1P, attention_mask=torch.ones_like(ids_1P), streamer=self, **self._options)
            error = ""
        except _StopError:
            error = ""
        except (ValueError, RuntimeError) as raised:
            error = " ".join(str(raised).split())
        finally:
            self.error, self.is_done = error, True
            self._told.release()


class Race:
    """Runners side by side: the next turn is that of the one whose clock shows least. As a context it stops them at its end."""

    def __init__(self, runners: Sequence[Runner]) -> None:
        self.runners = tuple(runners)
        self.is_stopped = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def is_over(self) -> bool:
        """Whether no runner has anything left to do."""
        return self.is_stopped or all(runner.is_done for runner in self.runners)

    def advance(self, seconds: float) -> None:
        """Turns for about so long."""
        until = time.perf_counter() + seconds
        while not self.is_over and time.perf_counter() < until:
            min((runner for runner in self.runners if not runner.is_done), key=lambda runner: runner.seconds).turn()

    def stop(self) -> None:
        """End all of them; may be called from another thread, and more than once."""
        self.is_stopped = True
        for runner in self.runners:
            runner.stop()
