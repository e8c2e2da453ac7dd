"""One text after another from a loaded model, for the verbs that show texts: how tokens are chosen, the stream, and what it took."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from transformers import TextStreamer

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import StoppingCriteria

# Options of every verb that generates, named as generate names them.
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most new tokens of a text.")]
DoSample = Annotated[
    bool | None, typer.Option(help="Sample, or take the likeliest token; as the model's generation config says.")
]
Temperature = Annotated[float | None, typer.Option(help="Sample at this temperature.")]
TopP = Annotated[
    float | None, typer.Option(help="Sample from the likeliest tokens that have this probability together.")
]
TopK = Annotated[int | None, typer.Option(help="Sample from so many of the likeliest tokens; 0 is all.")]
Seed = Annotated[
    int | None, typer.Option(min=0, help="Of torch's random generator; the same seed samples the same text.")
]
Dtype = Annotated[str, typer.Option(help="auto (as the weights are), float32, bfloat16 or float16.")]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; None is what the model's generation config says.

    Raises:
        ValueError: a value is out of range, or sampling is both asked for and not.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature={self.temperature} cannot be used; it must be above 0. --no-do-sample is greedy."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} cannot be used; it must be above 0 and at most 1.")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} cannot be used; it must be at least 0.")
        if self.do_sample is False and self._given:
            raise ValueError(
                f"{', '.join(self._given)} given with --no-do-sample, which takes the likeliest token: drop one of the two."
            )

    @property
    def _given(self) -> list[str]:
        return [name for name in ("temperature", "top_p", "top_k") if getattr(self, name) is not None]

    def arguments(self, model: Any) -> dict[str, Any]:
        """For `generate`; `do_sample` is always among them."""
        if self._given:
            return {"do_sample": True, **{name: getattr(self, name) for name in self._given}}
        return {"do_sample": bool(model.generation_config.do_sample) if self.do_sample is None else self.do_sample}


@dataclass(frozen=True)
class Answer:
    """A text and what it took.

    Attributes:
        text: without special tokens.
        ids: the new tokens.
        forwards: of the model, the prefill as one.
        seconds: wall time of the call.
        warnings: why it was not decoded as asked for.
    """

    text: str
    ids: list[int]
    forwards: int
    seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def figures(self) -> dict[str, float]:
        """For a program to read."""
        return {
            "new_tokens": len(self.ids),
            "forwards": self.forwards,
            "tokens_per_forward": len(self.ids) / self.forwards,
            "seconds": self.seconds,
            "tokens_per_second": len(self.ids) / self.seconds,
        }

    def __str__(self) -> str:
        f = self.figures
        return (
            f"{f['new_tokens']} tokens in {f['forwards']} forwards, {f['tokens_per_forward']:.2f} tokens per forward, "
            f"{f['seconds']:.2f} s, {f['tokens_per_second']:.0f} tok/s"
        )


class _Shown(TextStreamer):
    """A streamer that hands text on as soon as it is whole words."""

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
    """Continue a prompt.

    Args:
        ids: of the prompt, all of it where `arguments` hold `past_key_values`.
        arguments: of `generate`.
        seed: for torch's generator, before the text is begun.
        show: called with each piece of text as it is there.
        stop: ends the text when it says so.
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
    said = dict.fromkeys(str(one.message) for one in caught if one.category is UserWarning)
    return Answer(
        tokenizer.decode(new, skip_special_tokens=True),
        new,
        stats.forwards if stats else len(new),
        seconds,
        tuple(said),
    )


def say(text: str) -> None:
    """Write a piece of a text, at once."""
    typer.echo(text, nl=False)


def note(text: str) -> None:
    """Say something about a text, beside it."""
    typer.secho(text, err=True, dim=True)
