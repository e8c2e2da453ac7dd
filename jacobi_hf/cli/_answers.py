"""Texts of a loaded model with their figures, for the verbs that show texts."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import typer
from transformers import TextStreamer

from jacobi_hf.output import steps_in_words

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import StoppingCriteria

MOST_SHAPES = 3  # in a line for readers


@dataclass(frozen=True)
class Answer:
    """A generated text and its figures.

    Attributes:
        text: The text without special tokens.
        ids: The new tokens.
        forwards: Forwards of the model; the prefill counts as one.
        seconds: Wall time of the call.
        warnings: Reasons why the call was not decoded as requested.
        steps_by_shape: Decoding steps by their shape, as in `JacobiStats`; empty for ordinary decoding.
    """

    text: str
    ids: list[int]
    forwards: int
    seconds: float
    warnings: tuple[str, ...] = ()
    steps_by_shape: Mapping[str, int] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, Any]:
        """The figures by name, for a program to read."""
        return {
            "new_tokens": len(self.ids),
            "forwards": self.forwards,
            "tokens_per_forward": len(self.ids) / self.forwards,
            "seconds": self.seconds,
            "tokens_per_second": len(self.ids) / self.seconds,
            **({"steps_by_shape": dict(self.steps_by_shape)} if self.steps_by_shape else {}),
        }

    def __str__(self) -> str:
        f = self.figures
        shapes = steps_in_words(self.steps_by_shape, MOST_SHAPES)
        return (
            f"{f['new_tokens']} tokens in {f['forwards']} forwards, {f['tokens_per_forward']:.2f} tokens per forward, "
            f"{f['seconds']:.2f} s, {f['tokens_per_second']:.0f} tok/s" + (f"; steps: {shapes}" if shapes else "")
        )


class _Shown(TextStreamer):
    """A streamer that passes text on as soon as its words are whole."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._show(text)


def write(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    arguments: dict[str, Any],
    *,
    seed: int | None = None,
    show: Callable[[str], None] | None = None,
    stop: StoppingCriteria | None = None,
) -> Answer:
    """Return the model's continuation of a prompt.

    Args:
        model: A loaded model.
        tokenizer: Tokenizer of the model.
        ids: Token ids of the prompt; of the whole prompt, even if `arguments` hold a cache.
        arguments: Arguments of `generate`.
        seed: Seed of torch's random generator, set before the text begins.
        show: Called with each piece of the text as soon as it is known.
        stop: Criterion that ends the text.
    """
    prompt_1P = torch.tensor([ids], device=model.device)
    if seed is not None:
        torch.manual_seed(seed)
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = model.generate(
            input_ids=prompt_1P,
            attention_mask=torch.ones_like(prompt_1P),
            return_dict_in_generate=True,
            streamer=None if show is None else _Shown(tokenizer, show),
            stopping_criteria=None if stop is None else [stop],
            **arguments,
        )
    seconds = time.perf_counter() - started
    new = output.sequences[0, len(ids) :].tolist()
    stats = getattr(output, "jacobi_stats", None)
    reasons = dict.fromkeys(str(one.message) for one in caught if one.category is UserWarning)
    return Answer(
        tokenizer.decode(new, skip_special_tokens=True),
        new,
        stats.forwards if stats else len(new),
        seconds,
        tuple(reasons),
        dict(stats.steps_by_shape) if stats else {},
    )


def say(text: str) -> None:
    """Print a piece of a text to stdout at once, without a line break."""
    typer.echo(text, nl=False)


def note(text: str) -> None:
    """Print a dim line to stderr."""
    typer.secho(text, err=True, dim=True)
