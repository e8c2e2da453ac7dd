"""Answers with several choices: one generation for each choice, put together as the OpenAI API has them."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from jacobi_hf.serving.errors import FailedError
from jacobi_hf.serving.text import cut_answer, cut_events, with_text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence


@dataclass(frozen=True)
class Part:
    """One generation of a request.

    Attributes:
        request: the request as transformers' handler takes it.
        counts_prompt: whether the tokens of the prompt count; of several answers to one prompt only the first counts.
        echo: text before the answer.
    """

    request: dict[str, Any]
    counts_prompt: bool = True
    echo: str = ""


@dataclass(frozen=True)
class Form:
    """What the client gets of the generations.

    Attributes:
        stops: stop strings.
        one_tool_call: whether further tool calls of an answer are left out.
        include_usage: whether a stream ends with an event for the usage; None has it in the last event.
    """

    stops: Sequence[str] = ()
    one_tool_call: bool = False
    include_usage: bool | None = None


async def whole_answer(
    parts: Sequence[Part], generate: Callable[[int], Awaitable[dict[str, Any]]], form: Form
) -> dict[str, Any]:
    """Return one answer with a choice for each part.

    Args:
        parts: the generations.
        generate: returns the answer to the part of a number.
        form: what the client gets.
    """
    answers = [cut_answer(await generate(number), form.stops) for number in range(len(parts))]
    usage = _Usage()
    choices = []
    for number, (part, answer) in enumerate(zip(parts, answers, strict=True)):
        (choice,) = answer["choices"]
        usage.add(answer["usage"], part)
        if part.echo:
            choice["text"] = part.echo + choice["text"]
        if form.one_tool_call and choice["message"].get("tool_calls"):
            choice["message"]["tool_calls"] = choice["message"]["tool_calls"][:1]
        choices.append({**choice, "index": number})
    return {**answers[0], "choices": choices, "usage": usage.total()}


async def all_events(
    parts: Sequence[Part], stream: Callable[[int], Awaitable[AsyncIterator[dict[str, Any]]]], form: Form
) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of one streamed answer: the choices one after another, and the usage of all at the end.

    Args:
        parts: the generations.
        stream: starts the part of a number, and returns its events; closing them ends the generation.
        form: what the client gets.

    Raises:
        ValueError, TemplateError, FailedError: the first part cannot start. If another one cannot, an event says so.
    """
    usage = _Usage()
    common: dict[str, Any] = {}  # fields of every event
    for number, part in enumerate(parts):
        try:
            source = await stream(number)
        except (ValueError, TemplateError, FailedError) as error:
            if number == 0:
                raise
            yield {"error": f"{getattr(error, 'status', 400)} {getattr(error, 'message', error)}"}
            return
        async with aclosing(_events(source, part, number, form)) as events:  # type: ignore[type-var]
            async for event in events:
                usage.add(event.pop("usage", None), part)
                if "error" in event:
                    yield event
                    return
                common = common or {name: value for name, value in event.items() if name != "choices"}
                is_last = part is parts[-1] and event["choices"][0].get("finish_reason")
                total = {"usage": usage.total()} if is_last and form.include_usage is None else {}
                yield {**event, **common, **total}
    if form.include_usage:
        yield {**common, "choices": [], "usage": usage.total()}


async def _events(
    source: AsyncIterator[dict[str, Any]], part: Part, number: int, form: Form
) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of one choice: first the text before the answer, then the answer without what is cut off."""
    echo = part.echo
    async with aclosing(source):  # type: ignore[type-var]
        async for event in cut_events(source, form.stops):
            if "error" not in event:
                event["choices"][0]["index"] = number
                if echo:
                    yield with_text(event, echo)
                    echo = ""
            if not (form.one_tool_call and _is_further_tool_call(event)):
                yield event


def _is_further_tool_call(event: dict[str, Any]) -> bool:
    return any(call["index"] > 0 for call in event.get("choices", [{}])[0].get("delta", {}).get("tool_calls") or ())


class _Usage:
    """Counts the tokens of a request."""

    def __init__(self) -> None:
        self._prompt = 0
        self._completion = 0

    def add(self, usage: dict[str, Any] | None, part: Part) -> None:
        """Count the tokens of one part, if there are any."""
        if usage:
            self._prompt += usage["prompt_tokens"] if part.counts_prompt else 0
            self._completion += usage["completion_tokens"]

    def total(self) -> dict[str, int]:
        """Return the usage as the OpenAI API has it."""
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
        }
