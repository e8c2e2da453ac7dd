"""Measure a model apart from its decoding: loss on held-out text, and the share of right answers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from jacobi_hf.evaluation.decoding import untracked
from jacobi_hf.results.schema import Quality

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def held_out_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    tokens: int,
    row: int = 512,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = untracked,
) -> tuple[float, int]:
    """Return the mean next-token loss in nats on held-out texts, and the number of tokens that it was measured on.

    The texts are joined, each one followed by the end-of-text token, and cut into rows of equal length.

    Args:
        model: causal language model in eval mode.
        tokenizer: the model's tokenizer.
        texts: held-out texts; texts after the first `tokens` tokens are not used.
        tokens: most tokens to measure on.
        row: tokens of a row; a shorter stream makes one row.
        track: progress bar, called as `untracked` is.

    Raises:
        ValueError: the texts have fewer than two tokens.
    """
    stream: list[int] = []
    for text in texts:
        stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(stream) >= tokens:
            break
    row = min(row, len(stream))
    if row < 2:
        raise ValueError(f"{len(texts)} texts hold {len(stream)} tokens: the held-out loss needs at least two.")
    rows = torch.tensor(stream[: min(tokens, len(stream)) // row * row], device=model.device).view(-1, row)
    total = 0.0
    with torch.no_grad():
        for batch in track(rows.split(8), "held-out loss"):
            total += float(model(input_ids=batch, labels=batch, use_cache=False).loss) * len(batch)
    return total / len(rows), rows.numel()


def right_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Mapping[str, Any]],
    pattern: str,
    max_new_tokens: int,
    batch_size: int = 50,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = untracked,
) -> Quality:
    """Return the share of problems that ordinary greedy decoding answers correctly, with its 95 % interval.

    Args:
        model: causal language model in eval mode.
        tokenizer: the model's tokenizer.
        problems: mappings with `prompt` and `answer`.
        pattern: regular expression; group 1 of its first match in the model's text is the model's answer.
        max_new_tokens: most new tokens of an answer.
        batch_size: problems that are answered together.
        track: progress bar, called as `untracked` is.

    Raises:
        ValueError: there are no problems.
    """
    if not problems:
        raise ValueError("problems is empty: there is no share of right answers.")
    right = 0
    for start in track(range(0, len(problems), batch_size), "problems"):
        part = problems[start : start + batch_size]
        texts = _answers(model, tokenizer, [problem["prompt"] for problem in part], max_new_tokens)
        for text, problem in zip(texts, part, strict=True):
            found = re.search(pattern, text)
            right += found is not None and found.group(1) == str(problem["answer"])
    return Quality.of_share("exact_match", right, len(problems))


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> list[str]:
    """Return what the model writes after each prompt of a batch."""
    inputs = tokenizer(
        prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False
    ).to(model.device)
    ids_BL = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, decoding=None)
    texts: list[str] = tokenizer.batch_decode(ids_BL[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts
