"""The prefill: the forward over the prompt, in parts if it needs a mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jacobi_hf.decoding.layout import chain_layout
from jacobi_hf.decoding.step import ForwardInputs, ForwardOutput

if TYPE_CHECKING:
    from jacobi_hf.decoding.prompt import Prompt
    from jacobi_hf.decoding.state import DecodingState
    from jacobi_hf.decoding.step import Forward


def prompt_forward(
    forward: Forward, state: DecodingState, prompt: Prompt, part_slots: int
) -> tuple[ForwardOutput, list[torch.Tensor]]:
    """Run the model over the prompt and commit it to the cache.

    A prompt that needs a mask goes in by parts, because a mask has as many rows as columns.

    Args:
        forward: the model.
        state: the rows; the cache holds what came before the prompt.
        prompt: the prompt of every row.
        part_slots: the most slots of a part.

    Returns:
        The logits `(B, 1, V)` of each row's last prompt token, and the features of each part, if a source has taps.
    """
    cache = state.cache
    last_B1 = prompt.length_B[:, None] - 1
    columns = prompt.inputs.shape[1]
    lengths = cache.lengths_B.tolist()
    cached = max(lengths)
    size = part_slots if forward.needs_mask(columns, without_past=not cached) else columns
    logits_B1V: torch.Tensor | None = None
    features = []
    for first in range(0, columns, size):
        part = slice(first, first + size)
        slots = prompt.inputs[:, part].shape[1]
        place_B1 = last_B1 - first
        inputs = ForwardInputs(
            chain_layout(slots, last_B1.device, without_past=not cached and not first),
            cache.columns(slots, cached + first),
            None if prompt.ids_BP is None else prompt.ids_BP[:, part],
            None if prompt.embeds_BPH is None else prompt.embeds_BPH[:, part],
            place_B1.clamp(0, slots - 1),
            past=cached if not first and min(lengths) == cached else None,
        )
        output = forward(inputs)
        # A row that ended in an earlier part keeps the logits from there.
        ended_B11 = place_B1[..., None] < 0
        logits_B1V = output.logits_BQV if logits_B1V is None else torch.where(ended_B11, logits_B1V, output.logits_BQV)
        if output.features_BQF is not None:
            features.append(output.features_BQF)
        cache.commit((place_B1[:, 0] + 1).clamp(0, slots))
    assert logits_B1V is not None
    return ForwardOutput(logits_B1V), features


def read_prompt_parts(state: DecodingState, prompt: Prompt, features: list[torch.Tensor]) -> None:
    """Hand the prompt to the sources, part by part, with the token after each of its tokens.

    Args:
        state: the rows, after the first new token was chosen.
        prompt: the prompt of every row; embeddings have no ids, so the sources get nothing.
        features: the features of each part; empty without taps.
    """
    if prompt.ids_BP is None:
        return
    next_BP = prompt.ids_BP.roll(-1, 1).scatter(1, prompt.length_B[:, None] - 1, state.pending_B1)
    parts = next_BP.split([part_BPF.shape[1] for part_BPF in features], 1) if features else [next_BP]
    place_B = state.start_B - prompt.length_B
    for number, part_BP in enumerate(parts):
        for source in state.sources.all:
            source.read_prompt(place_B, part_BP, features[number] if features else None)
        place_B = place_B + part_BP.shape[1]
