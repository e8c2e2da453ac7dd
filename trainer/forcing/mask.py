"""Attention masks over packed records: which slots of `[prompt | k_0 | l_0 | k_1 | l_1 | ...]` a slot attends to.

`jacobi_hf.trainer.data.record` explains noisy blocks k and clean blocks l. Every slot sees the prompt. The prompt and
each block are causal inside. A clean block also sees all clean blocks before it. The contexts differ in what else a
noisy block sees (arXiv 2512.14681, figure 3 and section 3.2):

- `"noisy"`, noise-conditioned (NC): all noisy blocks before it.
- `"window"`, NC with intra-window clean context (NC-IC): the noisy blocks before it in its window, and the clean
  blocks of earlier windows. A window is a run of `context_window` blocks.
- `"clean"`, clean context (as CLLM trains): all clean blocks before it.

So `"noisy"` is a window without end, and `"clean"` is a window of one block. For two blocks (x: the row attends to the
column, causally on the diagonal):

              "noisy"                         "clean"
              p   k_0 l_0 k_1 l_1             p   k_0 l_0 k_1 l_1
        p     x                         p     x
        k_0   x   x                     k_0   x   x
        l_0   x       x                 l_0   x       x
        k_1   x   x       x             k_1   x       x   x
        l_1   x       x       x         l_1   x       x       x

The views of a sample do not see each other. Samples that share a row do not see each other. The command
`python -m jacobi_hf.trainer.forcing.mask FILE.png` draws the masks.

Suffixes of tensor names: B rows, L slots of a row, P prompt tokens, T blocks, n tokens of a block.
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
# Streams of a sample. Its noisy views are the streams NOISY, NOISY + 1, ...
PROMPT = 0
CLEAN = 1
NOISY = 2
# The sample number of padding.
PADDING = -1

MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Slots:
    """What each slot of a batch of packed rows is. The masks are computed from it.

    Attributes (int tensors `(B, L)`):
        sample: number of the sample in its row, `PADDING` for padding.
        stream: `PROMPT`, `CLEAN`, or `NOISY` plus the number of the view.
        block: number of the block in its sample; 0 for the prompt.
        position: position id.
        start: for a slot of a noisy block, the position of the block's first slot in the row. With the clean context
            the first slots of a block may be left out; it then sees the clean slots before `start`.
    """

    sample: torch.Tensor
    stream: torch.Tensor
    block: torch.Tensor
    position: torch.Tensor
    start: torch.Tensor

    @classmethod
    def of(cls, batch: Mapping[str, torch.Tensor]) -> Slots:
        """Return the slots of a batch that `JacobiForcingCollator` made with `layout="packed"`."""
        return cls(batch["sample"], batch["stream"], batch["block"], batch["position_ids"], batch["start"])


def blocks_per_window(context: str, context_window: int | None) -> int | None:
    """Return how many blocks share a window in a context: None for all, 1 for the clean context.

    Args:
        context: what noisy blocks see, one of `CONTEXTS`.
        context_window: blocks of a window; only `"window"` reads it.

    Raises:
        ValueError: the context is unknown, or `"window"` comes without a context_window of at least 1.
    """
    if context not in CONTEXTS:
        raise ValueError(f"context={context!r} must be one of {', '.join(map(repr, CONTEXTS))}.")
    if context == "window" and (context_window is None or context_window < 1):
        raise ValueError(f"context='window' needs a context_window of at least 1 block, not {context_window!r}.")
    return None if context == "noisy" else 1 if context == "clean" else context_window


def mask_mod(
    slots: Slots, context: str, context_window: int | None = None, sliding_window: int | None = None
) -> MaskMod:
    """Return the mask as a FlexAttention `mask_mod(b, h, q_idx, kv_idx)`. It also takes index tensors that broadcast.

    Args:
        slots: what the slots are.
        context: what noisy blocks see, one of `CONTEXTS`.
        context_window: blocks of a window, for `"window"`.
        sliding_window: for layers with sliding attention, how many positions a query may look back, its own included.
    """
    window = blocks_per_window(context, context_window)

    def allowed(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
        stream_q = slots.stream[b, q]
        stream_k = slots.stream[b, kv]
        block_q = slots.block[b, q]
        block_k = slots.block[b, kv]
        same_block = (stream_q == stream_k) & (block_q == block_k) & (q >= kv)
        earlier = block_k < block_q
        if window is None:
            context_of_noisy = (stream_k == stream_q) & earlier
        elif window == 1:  # slots that are left out of a noisy block equal the clean block's, which it sees instead
            context_of_noisy = (stream_k == CLEAN) & (slots.position[b, kv] < slots.start[b, q])
        else:
            same_window = block_q // window == block_k // window
            context_of_noisy = earlier & torch.where(same_window, stream_k == stream_q, stream_k == CLEAN)
        earlier_blocks = torch.where(stream_q >= NOISY, context_of_noisy, (stream_k == CLEAN) & earlier)
        to_prompt = (stream_k == PROMPT) & (stream_q != PROMPT)
        inside = (slots.sample[b, q] == slots.sample[b, kv]) & (slots.sample[b, q] != PADDING)
        result = inside & (same_block | to_prompt | ((stream_q != PROMPT) & earlier_blocks))
        if sliding_window is not None:
            result = result & (slots.position[b, kv] > slots.position[b, q] - sliding_window)
        # Padding sees itself, since attention without any key gives NaN.
        return result | (q == kv)

    return allowed


def dense_mask(
    slots: Slots, context: str, context_window: int | None = None, sliding_window: int | None = None
) -> torch.Tensor:
    """Return the mask as a bool tensor `(B, 1, L, L)`, True where a query attends to a key.

    The arguments are those of `mask_mod`.
    """
    batch, length = slots.sample.shape
    index_L = torch.arange(length, device=slots.sample.device)
    row_B = torch.arange(batch, device=index_L.device)[:, None, None]
    rule = mask_mod(slots, context, context_window, sliding_window)
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


def draw(path: Path, prompt_length: int = 3, blocks: int = 4, block_size: int = 2, context_window: int = 2) -> None:
    """Write a PNG with the masks of the three contexts for a small sample."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    slots = sample_slots(prompt_length, blocks, block_size)
    streams = slots.stream[0].tolist()
    numbers = slots.block[0].tolist()
    names = ["p" if s == PROMPT else f"{'lk'[s - CLEAN]}{b}" for s, b in zip(streams, numbers, strict=True)]
    titles = {
        "noisy": "noise-conditioned",
        "window": f"clean context outside windows of {context_window}",
        "clean": "clean context",
    }
    figure = Figure(figsize=(15, 5.4), layout="constrained")
    for number, (context, title) in enumerate(titles.items(), 1):
        axes = figure.add_subplot(1, 3, number)
        allowed = dense_mask(slots, context, context_window)[0, 0]
        # The colour says what is seen: prompt, clean or noisy.
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
