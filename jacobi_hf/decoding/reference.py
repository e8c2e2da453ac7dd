"""Jacobi decoding in plain Python: greedy, one prompt, no cache.

This is the algorithm that the rest of the package makes fast (arXiv 2512.14681, sections 2 and 3.3): guesses for the
next tokens go through the model together, and the longest prefix that the model itself would have chosen is kept. The
tests use it as an oracle: tokens and number of forwards equal those of `generate` with a window and a lookup branch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from jacobi_hf.drafts.window import scattered

if TYPE_CHECKING:
    from jacobi_hf.config import JacobiConfig


def decode(model: Any, prompt: list[int], max_new_tokens: int, config: JacobiConfig) -> tuple[list[int], int]:
    """Return the new tokens and the number of forwards, the prefill included."""
    new = choices_after(model, prompt, [])  # the prefill
    forwards = 1
    window = fill_window([], new, prompt, config)
    while len(new) < max_new_tokens:
        text = prompt + new
        room = max_new_tokens - len(new) - 1
        chains = [window[:room], lookup(text, config.jacobi_lookup_tokens)[:room]]
        # Verify: the real decoder covers all chains in one forward, in which each sees the text and itself.
        choices = [choices_after(model, text, chain) for chain in chains]
        forwards += 1
        accepted = [accepted_guesses(chain, choice) for chain, choice in zip(chains, choices, strict=True)]
        best = accepted.index(max(accepted))
        # Commit the accepted guesses and the model's own choice after them.
        committed = accepted[best] + 1
        new = new + choices[best][:committed]
        # Draft: the choices after the committed tokens are the next guesses, those of the best chain first.
        newest = choices[best][committed:]
        window = fill_window(newest + choices[0][committed + len(newest) :], new, prompt, config)
    return new, forwards


def choices_after(model: Any, text: list[int], chain: list[int]) -> list[int]:
    """Return the model's next token after the text, and after each guess of the chain."""
    with torch.no_grad():
        logits_1LV = model(torch.tensor([text + chain])).logits
    choices: list[int] = logits_1LV[0, len(text) - 1 :].argmax(-1).tolist()
    return choices


def accepted_guesses(chain: list[int], choices: list[int]) -> int:
    """Return how many guesses of the chain equal the model's choice before them, up to the first that does not."""
    agrees = [guess == choice for guess, choice in zip(chain, choices, strict=False)]
    return [*agrees, False].index(False)


def fill_window(guesses: list[int], new: list[int], prompt: list[int], config: JacobiConfig) -> list[int]:
    """Return guesses for all places up to the end of the last block; places without one get ids of the text."""
    block = config.jacobi_block_size
    end = (len(new) // block + config.jacobi_max_blocks) * block
    text = prompt + new
    filler = [text[int(scattered(torch.tensor(index))) % len(text)] for index in range(len(new), end)]
    return (guesses + filler[len(guesses) :])[: max(0, end - len(new))]


def lookup(text: list[int], length: int, max_ngram: int = 3) -> list[int]:
    """Return what followed the last tokens of the text where they occurred before: the longest, latest match."""
    for size in range(min(max_ngram, len(text) - 1), 0, -1):
        for last in range(len(text) - 2, size - 2, -1):
            if text[last + 1 - size : last + 1] == text[-size:]:
                repeated = text[last + 1 :]
                return [repeated[place % len(repeated)] for place in range(length)]
    return []
