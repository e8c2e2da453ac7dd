"""Penalties of the OpenAI API on tokens that the answer has already."""

from __future__ import annotations

import torch
from transformers import LogitsProcessor


class Penalties(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """Lowers the score of each token that the answer has already.

    A token that the answer has c times, c > 0, loses `c * frequency + presence`. Tokens of the prompt do not count.

    Args:
        prompt_tokens: tokens of the prompt.
        frequency: what each occurrence takes away.
        presence: what the first occurrence takes away besides.
    """

    def __init__(self, prompt_tokens: int, frequency: float, presence: float) -> None:
        self._prompt_tokens = prompt_tokens
        self._frequency = frequency
        self._presence = presence

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores without the penalties.

        Args:
            input_ids: prompt and answer so far, of shape [B, L].
            scores: scores of the next token, of shape [B, V].
        """
        answer_BL = input_ids[:, self._prompt_tokens :]
        counts_BV = torch.zeros_like(scores).scatter_add_(1, answer_BL, torch.ones_like(answer_BL, dtype=scores.dtype))
        return scores - self._frequency * counts_BV - self._presence * (counts_BV > 0)
