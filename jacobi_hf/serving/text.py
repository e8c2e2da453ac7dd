"""Answers of the server as text: events of a stream read back, and stop strings cut off (transformers leaves them at the end)."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Sequence


class StopCutter:
    """Text up to the first stop string, given piece by piece.

    Attributes:
        stopped: whether a stop string was there.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held, self.stopped = stops, "", False

    def feed(self, piece: str) -> str:
        """What is certain by now not to be part of a stop string."""
        if self.stopped:
            return ""
        text = self._held + piece
        ends = [at + len(stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:  # the stop string that is complete first ends the text, though another one may begin before it
            self.stopped, self._held = True, ""
            done = text[: min(ends)]
            return done[: min(at for stop in self._stops if (at := done.find(stop)) >= 0)]
        beginnings = (
            n for stop in self._stops for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])
        )
        held = max(beginnings, default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back, when the text has ended."""
        held, self._held = self._held, ""
        return held


async def read_events(parts: AsyncIterable[str | bytes | memoryview]) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events."""
    async for part in parts:
        text = part if isinstance(part, str) else bytes(part).decode()
        for event in text.split("\n\n"):
            if event:
                yield json.loads(event.removeprefix("data: "))


async def cut_events(events: AsyncIterator[dict[str, Any]], stops: Sequence[str]) -> AsyncIterator[dict[str, Any]]:
    """Events of a streamed answer, cut behind its text."""
    cutter = StopCutter(stops)
    async for event in events:
        if "error" in event or not stops:
            yield event
            continue
        choice = event["choices"][0]
        if choice.get("finish_reason"):
            if rest := cutter.rest():
                yield _with_text(event, rest)
            if cutter.stopped:
                choice["finish_reason"] = "stop"
            yield event
        elif piece := _holder(choice)[0].get(_holder(choice)[1]):
            if piece := cutter.feed(piece):
                _set_text(choice, piece)
                yield event
        else:
            yield event


def cut_answer(answer: dict[str, Any], stops: Sequence[str]) -> dict[str, Any]:
    """A whole answer, cut behind its text."""
    for choice in answer["choices"]:
        holder, key = _holder(choice)
        cutter = StopCutter(stops)
        if holder.get(key):
            holder[key] = cutter.feed(holder[key]) + cutter.rest()
        if cutter.stopped:
            choice["finish_reason"] = "stop"
    return answer


def _holder(choice: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Where a choice has its text: `delta` or `message` of a chat, the choice itself of a completion."""
    for name in ("delta", "message"):
        if name in choice:
            return choice[name], "content"
    return choice, "text"


def _set_text(choice: dict[str, Any], text: str) -> None:
    holder, key = _holder(choice)
    holder[key] = text


def _with_text(finish: dict[str, Any], text: str) -> dict[str, Any]:
    """An event like the last one that has text instead of an end."""
    event = copy.deepcopy(finish)
    event.pop("usage", None)
    event["choices"][0].pop("finish_reason")
    _set_text(event["choices"][0], text)
    return event
