"""Several generations that take turns, forward by forward.

Only one of them computes at a time, so the clock of each counts its own forwards alone.
"""

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

PATIENCE = 60.0  # seconds after which a runner without a turn ends, because nobody watches it any more


@dataclass(frozen=True)
class Lane:
    """A model and how it decodes.

    Attributes:
        title: what the page calls the lane.
        model: model of a registered class, in eval mode.
        tokenizer: the model's tokenizer.
        decoding: name of the Jacobi decoding; None for ordinary decoding.
    """

    title: str
    model: Any
    tokenizer: Any
    decoding: str | None = "jacobi_multiblock"


def twin(model: Any) -> Any:
    """Return a copy of a model that shares its weights, so that it can have a drafter or a decoding of its own."""
    shared = {id(tensor): tensor for tensor in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


class _StopError(Exception):
    """Ends a generation that was stopped."""


@dataclass
class Pieces:
    """Text that each forward added.

    A character whose bytes come from several forwards counts as text of the last one.

    Attributes:
        tokenizer: turns ids into text.
        of_step: text of each forward.
        token_ids: ids of all forwards.
    """

    tokenizer: Any
    of_step: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    _written: int = 0

    def add(self, step: StepEvent) -> None:
        """Add the tokens of the next forward."""
        self.token_ids += step.token_ids
        unwritten = self._unwritten()
        self.of_step.append("" if unwritten.endswith("\ufffd") else unwritten)
        self._written += len(self.of_step[-1])

    def finish(self) -> None:
        """Add an incomplete character at the end to the text of the last forward."""
        if self.of_step:
            self.of_step[-1] += self._unwritten()

    def _unwritten(self) -> str:
        return str(self.tokenizer.decode(self.token_ids, skip_special_tokens=True))[self._written :]


class Runner(StepStreamer):
    """One generation in a thread of its own, which runs one forward in each turn.

    Args:
        lane: model and decoding.
        token_ids: ids of the prompt.
        options: arguments of `generate`.

    Attributes:
        lane: model and decoding.
        steps: reports of the forwards so far.
        pieces: text of the forwards so far.
        seconds: wall time of the turns so far.
        is_done: whether the generation has ended.
        error: why the generation failed; empty if it did not.
    """

    def __init__(self, lane: Lane, token_ids: Sequence[int], options: dict[str, Any]) -> None:
        self.lane = lane
        self._prompt = list(token_ids)
        self._options = options
        self.steps: list[StepEvent] = []
        self.pieces = Pieces(lane.tokenizer)
        self.seconds = 0.0
        self.is_done = False
        self.error = ""
        self._may_start = threading.Semaphore(0)
        self._has_ended = threading.Semaphore(0)
        self._stops = False
        threading.Thread(target=self._run, name=f"runner {lane.title}", daemon=True).start()

    @property
    def tokens(self) -> int:
        """New tokens so far."""
        return len(self.pieces.token_ids)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens divided by forwards so far, prefill included."""
        return self.tokens / max(1, len(self.steps))

    def turn(self) -> None:
        """Run one forward, and wait until it has ended."""
        started = time.perf_counter()
        self._may_start.release()
        self._has_ended.acquire()
        self.seconds += time.perf_counter() - started
        for step in self.steps[len(self.pieces.of_step) :]:
            self.pieces.add(step)
        if self.is_done:
            self.pieces.finish()

    def stop(self) -> None:
        """End the generation before its next forward."""
        self._stops = True
        self._may_start.release()

    def step(self, step: StepEvent) -> None:
        """Keep the report of a forward and wait for the next turn; `generate` calls this."""
        self.steps.append(step)
        self._has_ended.release()
        self._wait()

    def _wait(self) -> None:
        """Wait for the next turn.

        Raises:
            _StopError: the generation was stopped, or nobody watches it any more.
        """
        if not self._may_start.acquire(timeout=PATIENCE) or self._stops:
            raise _StopError

    def _run(self) -> None:
        import torch

        error = "it broke off; see the log of the server."  # for an exception that is not caught below
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
            self.error = error
            self.is_done = True
            self._has_ended.release()


class Race:
    """Runners that take turns: the next turn goes to the runner with the least time. As a context it stops all of
    them.

    Args:
        runners: runners that have not had a turn.

    Attributes:
        runners: the same runners.
        is_stopped: whether `stop` was called.
    """

    def __init__(self, runners: Sequence[Runner]) -> None:
        self.runners = tuple(runners)
        self.is_stopped = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def is_over(self) -> bool:
        """Whether the race was stopped or all runners have ended."""
        return self.is_stopped or all(runner.is_done for runner in self.runners)

    def advance(self, seconds: float) -> None:
        """Give turns for about so many seconds."""
        until = time.perf_counter() + seconds
        while not self.is_over and time.perf_counter() < until:
            running = [runner for runner in self.runners if not runner.is_done]
            min(running, key=lambda runner: runner.seconds).turn()

    def stop(self) -> None:
        """End all runners. Other threads may call this, and more than once."""
        self.is_stopped = True
        for runner in self.runners:
            runner.stop()
