"""A dialogue with a model, whose cache is kept from turn to turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers import DynamicCache

from jacobi_hf.cli._answers import Answer, write
from jacobi_hf.integration.compat import CACHE
from jacobi_hf.loading import positions_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import StoppingCriteria


class Conversation:
    """Turns of a user and a model.

    The prompt of a turn is the whole dialogue through the chat template, so that answers are those to a dialogue that was never cached.
    What of it lies in the cache is not computed again. Without a template the turns are concatenated as they are.

    Args:
        system: text of a system turn in front.

    Attributes:
        messages: the turns so far.
        prefilled: tokens of the last prompt that were not in the cache.

    Raises:
        ValueError: there is a system turn and no template to put it into.
    """

    def __init__(self, model: Any, tokenizer: Any, system: str | None = None) -> None:
        self._model, self._tokenizer = model, tokenizer
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
        """Begin anew."""
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
        """The model's answer to a turn of the user. If anything goes wrong the turn is as if it had never been.

        Args:
            arguments: of `generate`, `max_new_tokens` among them.
            show, stop: as `answers.write`.

        Raises:
            ValueError: the dialogue is longer than the model's positions, the template refuses it, or `generate` the arguments.
        """
        turns = [*self.messages, {"role": "user", "content": text}]
        ids = self._encode(turns)
        room = positions_of(self._model) - len(ids)
        if not ids or room < 1:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, the model {positions_of(self._model)} positions: /clear begins anew."
            )
        self._keep_prefix(ids)
        limits = {"max_new_tokens": int(min(arguments["max_new_tokens"], room)), CACHE: self._cache}
        try:
            answer = write(self._model, self._tokenizer, ids, arguments | limits, show=show, stop=stop)
        except BaseException:  # an interrupt too: some layers may be a token ahead
            self._forget()
            raise
        self._cached = [*ids, *answer.ids][: self._cache.get_seq_length()]
        said = answer.text.strip() if self.has_template else answer.text  # templates bring their own white space
        self.messages = [*turns, {"role": "assistant", "content": said}]
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
        """Cut the cache back to what it has in common with `ids`, whose last token is always computed."""
        same = next((at for at, (old, new) in enumerate(zip(self._cached, ids, strict=False)) if old != new), None)
        kept = min(len(self._cached) if same is None else same, len(ids) - 1)
        if kept < len(self._cached):
            try:
                self._cache.crop(kept - len(self._cached))
            except (RuntimeError, ValueError):  # a sliding window has dropped what would be needed
                self._forget()
                kept = 0
        self.prefilled = len(ids) - kept

    def _forget(self) -> None:
        self._cache, self._cached = DynamicCache(config=self._model.config), list[int]()
