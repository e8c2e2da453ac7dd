"""Attention masks over packed Jacobi trajectories: `[prompt | k_0 | l_0 | k_1 | l_1 | ...]`, noisy blocks k and clean blocks l.

The prompt is causal and seen by everybody; a block sees itself causally. What else a block sees is what the masks differ in
(arXiv 2512.14681, figure 3 and section 3.2):

| context | noisy block j | clean block j |
|---|---|---|
| `"noisy"`: noise-conditioned (NC) | all noisy blocks before it | all clean blocks before it |
| `"window"`: NC with intra-window clean context (NC-IC) | clean blocks of earlier windows, noisy ones of its own window | same |
| `"clean"`: clean context (as CLLM trains) | all clean blocks before it | same |

So all three are one rule with a window of infinitely many, `window` or one block. Several noisy views of a sample may share its prompt
and clean blocks; no view sees another. Where a row holds several samples, none sees another.
`python -m jacobi_hf.trainer.forcing.mask FILE.png` draws the masks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from jacobi_hf.trainer.data.record import interleave

CONTEXTS = ("noisy", "window", "clean")
# A stream from NOISY on is one noisy view of the sample; there may be several.
PROMPT, CLEAN, NOISY = 0, 1, 2
PADDING = -1

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Slots:
    """What each slot of a batch of packed rows is; all fields are int `(B, L)`.

    Attributes:
        sample: number of the sample within the row, `PADDING` for padding.
        stream: `PROMPT`, `CLEAN`, or `NOISY` plus the number of the noisy view.
        block: number of the block within the sample; 0 in the prompt.
        position: position id within the sample.
        start: of a noisy slot, the position of the first slot of its block that is laid out; clean slots before it are its context.
    """

    sample: torch.Tensor
    stream: torch.Tensor
    block: torch.Tensor
    position: torch.Tensor
    start: torch.Tensor

    @classmethod
    def of(cls, batch: Mapping[str, torch.Tensor]) -> Slots:
        """From a collated batch of packed rows."""
        return cls(batch["sample"], batch["stream"], batch["block"], batch["position_ids"], batch["start"])


def window_of(context: str, window: int | None) -> int | None:
    """Blocks per window of the rule behind a context; None for no bound.

    Raises:
        ValueError: an unknown context, or `"window"` without a window of at least one block.
    """
    if context not in CONTEXTS:
        raise ValueError(f"context={context!r} must be one of {', '.join(map(repr, CONTEXTS))}.")
    if context == "window" and (window is None or window < 1):
        raise ValueError(f"context='window' needs a window of at least 1 block, not {window!r}.")
    return None if context == "noisy" else 1 if context == "clean" else window


def mask_mod(slots: Slots, context: str, window: int | None = None, sliding_window: int | None = None) -> MaskMod:
    """The mask as a FlexAttention `mask_mod(b, h, q_idx, kv_idx)`; also works on index tensors that broadcast.

    Args:
        slots: what the slots are.
        context: what noisy blocks see, one of `CONTEXTS`.
        window: blocks per window of `"window"`.
        sliding_window: positions that a query may look back, itself included, for layers with sliding attention.
    """
    bound = window_of(context, window)

    def allowed(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
        stream_q, stream_k = slots.stream[b, q], slots.stream[b, kv]
        block_q, block_k = slots.block[b, q], slots.block[b, kv]
        same_block = (stream_q == stream_k) & (block_q == block_k) & (q >= kv)
        earlier = block_k < block_q
        if bound is None:
            context_of_noisy = (stream_k == stream_q) & earlier
        elif bound == 1:  # what is left out of a noisy block's beginning equals the clean block's
            context_of_noisy = (stream_k == CLEAN) & (slots.position[b, kv] < slots.start[b, q])
        else:
            same_window = block_q // bound == block_k // bound
            context_of_noisy = earlier & torch.where(same_window, stream_k == stream_q, stream_k == CLEAN)
        context = torch.where(stream_q >= NOISY, context_of_noisy, (stream_k == CLEAN) & earlier)
        to_prompt = (stream_k == PROMPT) & (stream_q != PROMPT)
        inside = (slots.sample[b, q] == slots.sample[b, kv]) & (slots.sample[b, q] != PADDING)
        result = inside & (same_block | to_prompt | ((stream_q != PROMPT) & context))
        if sliding_window is not None:
            result = result & (slots.position[b, kv] > slots.position[b, q] - sliding_window)
        return result | (q == kv)  # padding sees itself, so that no row of attention is empty

    return allowed


def dense_mask(
    slots: Slots, context: str, window: int | None = None, sliding_window: int | None = None
) -> torch.Tensor:
    """The mask as bool `(B, 1, L, L)`, True where attention is allowed. Arguments as in `mask_mod`."""
    batch, length = slots.sample.shape
    index_L = torch.arange(length, device=slots.sample.device)
    row_B = torch.arange(batch, device=index_L.device)[:, None, None]
    rule = mask_mod(slots, context, window, sliding_window)
    return rule(row_B, row_B, index_L[:, None], index_L)[:, None]


def sample_slots(prompt_length: int, blocks: int, block_size: int) -> Slots:
    """Return the slots of one sample with one view, alone in its row: `L = P + 2nT`, or P without blocks.

    Args:
        prompt_length: P, tokens of the prompt.
        blocks: T, blocks of the answer.
        block_size: n, tokens of a block.
    """
    offset_Tn = np.arange(blocks * block_size).reshape(blocks, block_size)
    block_Tn = offset_Tn // block_size

    def with_prompt(prompt: int | np.ndarray, noisy_Tn: np.ndarray, clean_Tn: np.ndarray) -> torch.Tensor:
        prompt_P = np.broadcast_to(prompt, prompt_length)
        return torch.from_numpy(np.concatenate([prompt_P, interleave(noisy_Tn[None], clean_Tn)]))[None]

    position_Tn = prompt_length + offset_Tn
    start_Tn = prompt_length + block_Tn * block_size
    return Slots(
        sample=with_prompt(0, np.zeros_like(block_Tn), np.zeros_like(block_Tn)),
        stream=with_prompt(PROMPT, np.full_like(block_Tn, NOISY), np.full_like(block_Tn, CLEAN)),
        block=with_prompt(0, block_Tn, block_Tn),
        position=with_prompt(np.arange(prompt_length), position_Tn, position_Tn),
        start=with_prompt(0, start_Tn, start_Tn),
    )


def draw(path: Path, prompt_length: int = 3, blocks: int = 4, block_size: int = 2, window: int = 2) -> None:
    """Write a PNG of the three masks for a small sample."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    slots = sample_slots(prompt_length, blocks, block_size)
    streams, numbers = slots.stream[0].tolist(), slots.block[0].tolist()
    names = ["p" if s == PROMPT else f"{'lk'[s - CLEAN]}{b}" for s, b in zip(streams, numbers, strict=True)]
    titles = {
        "noisy": "noise-conditioned",
        "window": f"clean context outside windows of {window}",
        "clean": "clean context",
    }
    figure = Figure(figsize=(15, 5.4), layout="constrained")
    for number, (context, title) in enumerate(titles.items(), 1):
        axes = figure.add_subplot(1, 3, number)
        allowed = dense_mask(slots, context, window)[0, 0]
        # Coloured by what is seen: prompt, noisy, clean.
        colour = torch.where(allowed, slots.stream[0] + 1, 0)
        axes.imshow(colour.numpy(), cmap=ListedColormap(["#ffffff", "#9aa5b1", "#2a7f9e", "#e07b39"]), vmin=0, vmax=3)
        axes.set_title(title)
        axes.set_xticks(range(len(names)), names, fontsize=6, rotation=90)
        axes.set_yticks(range(len(names)), names, fontsize=6)
        axes.set_xticks([i - 0.5 for i in range(len(names))], minor=True)
        axes.set_yticks([i - 0.5 for i in range(len(names))], minor=True)
        axes.grid(which="minor", color="#dddddd", linewidth=0.4)
        axes.tick_params(which="both", length=0)
    figure.supylabel("query")
    figure.supxlabel("key (grey: prompt, orange: noisy block k, blue: clean block l)")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m jacobi_hf.trainer.forcing.mask FILE.png")
    draw(Path(sys.argv[1]))
