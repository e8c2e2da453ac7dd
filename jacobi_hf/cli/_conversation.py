"""A conversation with a model in the terminal: its turns and cache, the lines that a user types, and Ctrl-C."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import torch
import typer
import yaml
from jinja2 import TemplateError
from transformers import DynamicCache, StoppingCriteria

from jacobi_hf.cli._answers import Answer, note, say, write
from jacobi_hf.cli._models import arguments_of, decoding_of
from jacobi_hf.integration.compat import CACHE
from jacobi_hf.loading import positions_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COMMANDS = "/clear starts a new conversation, /knobs shows or changes the decoding, /exit leaves"


class StopOnInterrupt(StoppingCriteria):  # type: ignore[misc, unused-ignore]
    """A criterion that ends an answer after its next token when the user presses Ctrl-C inside `watching`.

    A second Ctrl-C raises `KeyboardInterrupt`. The first one ends generation as any criterion does, so that its cache
    can be continued.

    Attributes:
        is_stopped: Whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.is_stopped = False

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **_: Any) -> torch.BoolTensor:
        """Return for each row whether it ends."""
        stopped_B: Any = torch.full((len(input_ids),), self.is_stopped, dtype=torch.bool, device=input_ids.device)
        return stopped_B  # type: ignore[no-any-return]

    def _stop(self, *_: Any) -> None:
        if self.is_stopped:
            raise KeyboardInterrupt
        self.is_stopped = True

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Listen to Ctrl-C. Only the main thread of a program can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class Conversation:
    """Turns of a user and a model, whose cache is kept from turn to turn.

    The prompt of a turn is the whole conversation through the chat template, so that answers equal those without a
    cache. The part of the prompt that is in the cache is not computed again. Without a template the turns are
    concatenated.

    Args:
        model: A loaded model.
        tokenizer: Tokenizer of the model.
        system: Text of a system turn before the others.

    Attributes:
        messages: The turns so far.
        prefilled: Tokens of the last prompt that were not in the cache.

    Raises:
        ValueError: There is a system turn but no chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, system: str | None = None) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        if system is not None and not self.has_template:
            raise ValueError("the model has no chat template, which would hold a --system text: leave it out.")
        self.prefilled = 0
        self.clear()

    @property
    def has_template(self) -> bool:
        """Whether turns go through a chat template."""
        return self._tokenizer.chat_template is not None

    def clear(self) -> None:
        """Start a new conversation."""
        self.messages = list(self._opening)
        self._forget()

    def ask(
        self,
        text: str,
        arguments: dict[str, Any],
        *,
        show: Callable[[str], None] | None = None,
        stop: StoppingCriteria | None = None,
    ) -> Answer:
        """Return the model's answer to a turn of the user. If anything raises, the turn is dropped.

        Args:
            text: The user's turn.
            arguments: Arguments of `generate`, `max_new_tokens` among them.
            show: Called with each piece of the answer.
            stop: Criterion that ends the answer.

        Raises:
            ValueError: The conversation is longer than the model's positions, or the template or `generate` refuses
            it.
        """
        turns = [*self.messages, {"role": "user", "content": text}]
        ids = self._encode(turns)
        positions = positions_of(self._model)
        room = positions - len(ids)
        if not ids or room < 1:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, the model {positions} positions: /clear starts a new one."
            )
        self._keep_prefix(ids)
        limits = {"max_new_tokens": int(min(arguments["max_new_tokens"], room)), CACHE: self._cache}
        try:
            answer = write(self._model, self._tokenizer, ids, arguments | limits, show=show, stop=stop)
        except BaseException:  # an interrupt too: some layers may be a token ahead
            self._forget()
            raise
        self._cached = [*ids, *answer.ids][: self._cache.get_seq_length()]
        content = answer.text.strip() if self.has_template else answer.text  # templates bring their own white space
        self.messages = [*turns, {"role": "assistant", "content": content}]
        return answer

    def _encode(self, turns: list[dict[str, str]]) -> list[int]:
        if not self.has_template:
            plain: list[int] = self._tokenizer("".join(turn["content"] for turn in turns))["input_ids"]
            return plain
        try:
            ids: list[int] = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from None
        return ids

    def _keep_prefix(self, ids: list[int]) -> None:
        """Cut the cache back to the tokens that it shares with `ids`. The last of `ids` is always computed."""
        pairs = enumerate(zip(self._cached, ids, strict=False))
        shared = next((at for at, (old, new) in pairs if old != new), len(self._cached))
        kept = min(shared, len(ids) - 1)
        if kept < len(self._cached):
            try:
                self._cache.crop(kept - len(self._cached))
            except (RuntimeError, ValueError):  # a sliding window has dropped tokens that would be needed
                self._forget()
                kept = 0
        self.prefilled = len(ids) - kept

    def _forget(self) -> None:
        self._cache = DynamicCache(config=self._model.config)
        self._cached = list[int]()


class Session:
    """The lines that a user types: turns of a conversation, and commands.

    Args:
        conversation: The conversation.
        model: Its model.
        arguments: Arguments of `generate` without knobs.
        knobs: Knobs that were given.
    """

    def __init__(
        self, conversation: Conversation, model: Any, arguments: dict[str, Any], knobs: dict[str, Any]
    ) -> None:
        self._conversation = conversation
        self._model = model
        self._arguments = arguments
        self._knobs = knobs
        self._is_tty = sys.stdin.isatty()
        if self._is_tty:
            with contextlib.suppress(ImportError):  # arrow keys and a history, if the library is there
                import readline  # noqa: F401

    def run(self) -> None:
        """Read lines until `/exit` or the end of the input. A second Ctrl-C in a row is raised."""
        was_interrupted = False
        while True:
            try:
                line = input("> " if self._is_tty else "")
            except EOFError:
                return
            except KeyboardInterrupt:
                typer.echo(err=True)  # ends the line with ^C
                if was_interrupted:
                    raise
                was_interrupted = True
                note("Ctrl-C again leaves.")
                continue
            if line.strip() == "/exit":
                return
            was_interrupted = bool(line.strip()) and self._take(line)

    def _take(self, line: str) -> bool:
        """Answer a line or run its command. Return whether Ctrl-C stopped the answer."""
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
        return arguments_of(decoding_of(self._model, knobs))
