"""`jacobi-hf chat`: talk to a model in the terminal."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path  # noqa: TC003  (typer reads the annotation)
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
import yaml

from jacobi_hf.cli._answers import DoSample, Dtype, MaxNewTokens, Sampling, Seed, Temperature, TopK, TopP, note, say
from jacobi_hf.cli._interrupts import StopOnInterrupt
from jacobi_hf.cli._options import errors_in_one_line, recipe_option, with_knobs

if TYPE_CHECKING:
    from jacobi_hf.cli._conversation import Conversation

COMMANDS = "/clear begins anew, /knobs shows or changes the decoding, /exit leaves"


@with_knobs
def chat(
    *,
    model: Annotated[str, typer.Option(help="Model name or folder.")],
    drafter: Annotated[str | None, typer.Option(help="Folder or Hub repository of a drafter to decode with.")] = None,
    system: Annotated[str | None, typer.Option(help="System text in front of the conversation.")] = None,
    max_new_tokens: MaxNewTokens = 1024,
    do_sample: DoSample = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    dtype: Dtype = "auto",
    config: Annotated[Path | None, recipe_option()] = None,  # noqa: ARG001  (its callback has read it)
    knobs: dict[str, Any],
) -> None:
    """Talk to a model, a line a turn; answers are shown as they are written, and behind each what it took.

    The cache is kept: of the conversation so far nothing is computed again. /clear begins anew, /knobs shows how the model decodes and
    /knobs jacobi_block_size=8 changes it, /exit leaves. Ctrl-C stops an answer, a second one leaves.
    """
    from jacobi_hf.cli._conversation import Conversation
    from jacobi_hf.cli._models import check_knobs, decoding_of
    from jacobi_hf.loading import load

    with errors_in_one_line("chat"):
        sampling = Sampling(do_sample, temperature, top_p, top_k)
        check_knobs(knobs)
        loaded, tokenizer = load(model, dtype, drafter)
        decoding_of(loaded, knobs)
        conversation = Conversation(loaded, tokenizer, system)
        note(f"{model}; {COMMANDS}. Ctrl-C stops an answer, a second one leaves.")
        if not conversation.has_template:
            note(f"{model} has no chat template: turns are concatenated as they are.")
        if seed is not None:
            torch.manual_seed(seed)
        _Session(conversation, loaded, {"max_new_tokens": max_new_tokens, **sampling.arguments(loaded)}, knobs).run()


class _Session:
    """What a user types, line by line.

    Args:
        arguments: of `generate`, without knobs.
        knobs: those that were given.
    """

    def __init__(
        self, conversation: Conversation, model: Any, arguments: dict[str, Any], knobs: dict[str, Any]
    ) -> None:
        self._conversation, self._model, self._arguments, self._knobs = conversation, model, arguments, knobs
        self._is_tty = sys.stdin.isatty()
        if self._is_tty:
            with contextlib.suppress(ImportError):  # arrow keys and a history, where there is the library
                import readline  # noqa: F401

    def run(self) -> None:
        """Until `/exit` or the end of the input; a second Ctrl-C in a row is raised."""
        was_interrupted = False
        while True:
            try:
                line = input("> " if self._is_tty else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                typer.echo(err=True)  # behind the ^C
                if was_interrupted:
                    raise
                was_interrupted = True
                note("Ctrl-C again leaves.")
                continue
            if line.strip() == "/exit":
                return
            was_interrupted = bool(line.strip()) and self._take(line)

    def _take(self, line: str) -> bool:
        """Do what a line asks for; returns whether Ctrl-C stopped it."""
        command, _, rest = line.strip().partition(" ")
        try:
            if command == "/clear":
                self._conversation.clear()
                note("a new conversation")
            elif command == "/knobs":
                self._change_knobs(rest.split())
            elif re.fullmatch(r"/\w+", command):
                note(f"{command} is no command: {COMMANDS}.")
            else:
                return self._answer(line)
        except ValueError as error:
            note(f"jacobi-hf chat: {' '.join(str(error).split())}")
        return False

    def _answer(self, line: str) -> bool:
        stop = StopOnInterrupt()
        with stop.watching():
            answer = self._conversation.ask(line, self._arguments | self._decoding(self._knobs), show=say, stop=stop)
        typer.echo()
        for warning in answer.warnings:
            note(f"jacobi-hf chat: {warning}")
        note(f"[{'stopped; ' if stop.is_stopped else ''}{answer}; {self._conversation.prefilled} tokens prefilled]")
        return stop.is_stopped

    def _change_knobs(self, changes: list[str]) -> None:
        pairs = [change.partition("=") for change in changes]
        if unread := [name for name, equals, _ in pairs if not equals]:
            raise ValueError(f"{unread[0]!r} is no change of a knob: /knobs jacobi_block_size=8, or /knobs alone.")
        try:
            new = {name: yaml.safe_load(value) for name, _, value in pairs}
        except yaml.YAMLError:
            raise ValueError(f"{' '.join(changes)} cannot be read: a value is a number or a word.") from None
        used = self._decoding(self._knobs | new)
        self._knobs = self._knobs | new
        note(" ".join(f"{name}={'none' if value is None else value}" for name, value in used.items()))

    def _decoding(self, knobs: dict[str, Any]) -> dict[str, Any]:
        from jacobi_hf.cli._models import decoding_of

        decoding = decoding_of(self._model, knobs)
        return decoding.to_knobs() if decoding else {"decoding": None}
