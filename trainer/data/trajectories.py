"""Jacobi trajectories of a model: the states of each block of an answer, from its draft to its fixed point.

A *state* of a block is n token ids. In state 0, the draft, only the first token is known to be right. Each Jacobi
iteration replaces the others by the model's choices, until the block equals the model's own output, the *fixed point*
(arXiv 2512.14681, section 3.1). Two functions give the same trajectories:

- `record_trajectories` watches `generate(decoding="jacobi")`, which iterates one block after the other. It is the
  plain way, and the oracle of the tests.
- `collect_trajectories` lets ordinary `generate` write the answers, and then iterates all blocks of all answers
  together. It is
  fast: the answer already gives the first wrong token of each block, so only the tokens after that are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from jacobi_hf.attention.interface import LAYER_TYPES, TAKES_MASK, attention_of, layer_types
from jacobi_hf.decoding.noise import generator_state, set_generator_state
from jacobi_hf.trainer.data.answer_options import AnswerConfig
from jacobi_hf.trainer.data.answers import (
    base_of,
    cut_at_end,
    end_ids,
    left_padded,
    pad_id,
    without_own_options,
    write_answers,
)
from jacobi_hf.trainer.data.iteration import BlockIteration, SampledNoise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

State = list[int]
# Most answers whose blocks iterate in one forward.
GROUP = 16


@dataclass(frozen=True)
class Trajectory:
    """One answer of a model, and the states of its blocks on the way there.

    Attributes:
        prompt_ids: token ids of the prompt.
        answer_ids: token ids of the answer, with its end-of-sequence id.
        blocks: for each block its states of n ids; the first is the draft, the last the fixed point. Slots after the
            end of the answer hold the pad id in every state.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    blocks: list[list[State]]

    @property
    def forwards(self) -> int:
        """Forward passes that `decoding="jacobi"` needs for the answer: the prefill, and one for each state."""
        return 1 + sum(map(len, self.blocks))

    @property
    def tokens_per_forward(self) -> float:
        """New tokens / forward passes."""
        return len(self.answer_ids) / self.forwards


def collect_trajectories(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    block_size: int,
    answers: AnswerConfig | None = None,
    seed: int | None = None,
    starts: Sequence[int] | None = None,
) -> list[Trajectory]:
    """Return the trajectories of a batch of prompts. All blocks of all answers iterate together.

    Args:
        model: any registered model in eval mode, with or without a LoRA.
        prompts: token ids of each prompt, not empty.
        block_size: n, at least 2.
        answers: how the model answers; greedy with at most 256 tokens by default.
        seed: seed of torch's generator, for sampling. None keeps the generator's state.
        starts: for each answer, how many of its tokens come before the first block. They count as part of the prompt.
            A start is lowered if no block would be left after it. An answer without an end id is cut to whole blocks,
            since the tokens after it are not known. None means 0 for every answer.

    Returns:
        The trajectories in the order of the prompts.

    Raises:
        ValueError: the block size is below 2 or does not divide max_new_tokens; there is no prompt, or one is empty;
            starts has another length than prompts; the model's attention takes no mask, or it has a prompt-learning
            adapter.
    """
    answers = answers or AnswerConfig()
    model = base_of(model)
    _check(model, prompts, block_size, answers)
    if starts is not None and len(starts) != len(prompts):
        raise ValueError(f"starts has {len(starts)} entries for {len(prompts)} prompts.")
    device = model.device
    if seed is not None:
        torch.manual_seed(seed)
    before = generator_state(device)
    written, clean = write_answers(model, prompts, answers)
    after = generator_state(device)
    ends = end_ids(model)
    width = max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    parts = [_split(a, s, block_size, ends) for a, s in zip(written, starts or [0] * len(prompts), strict=True)]
    longer = [[*prompt, *front] for prompt, (front, _) in zip(prompts, parts, strict=True)]
    collected: dict[int, Trajectory] = {}
    # Rows of a forward are as wide as the widest one, so answers of like length go together.
    order = sorted(range(len(prompts)), key=lambda row: (len(parts[row][1]), len(longer[row])))
    for first in range(0, len(order), GROUP):
        rows = order[first : first + GROUP]
        noise = None
        if answers.do_sample:
            noise = SampledNoise(before, len(prompts), rows, [len(parts[row][0]) for row in rows])
        own_prompts = [longer[row] for row in rows]
        own_answers = [parts[row][1] for row in rows]
        iteration = BlockIteration(model, own_prompts, own_answers, block_size, answers.warpers(), noise)
        iteration.load(clean, [pads[row] for row in rows], rows)
        iteration.iterate()
        for row, prompt, answer, states in zip(rows, own_prompts, own_answers, iteration.states(), strict=True):
            collected[row] = _tidy(prompt, answer, states, block_size, pad_id(model))
    set_generator_state(device, after)
    return [collected[row] for row in range(len(prompts))]


def record_trajectories(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    block_size: int,
    answers: AnswerConfig | None = None,
    seed: int | None = None,
) -> list[Trajectory]:
    """Return the trajectories of `generate(decoding="jacobi")`, read from the inputs of its forward passes.

    Arguments, result and errors are those of `collect_trajectories`.
    """
    answers = answers or AnswerConfig()
    model = base_of(model)
    _check(model, prompts, block_size, answers)
    if seed is not None:
        torch.manual_seed(seed)
    inputs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        inputs.append((kwargs["input_ids"].cpu(), kwargs["position_ids"].cpu()))

    config = answers.generation_config(model)
    # One token more than the answer may have, so that the last slot of the last block is drafted too.
    config.max_new_tokens = answers.max_new_tokens + 1
    hook = model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        with without_own_options(model):
            ids_BL = model.generate(
                **left_padded(model, prompts),
                generation_config=config,
                decoding="jacobi",
                jacobi_block_size=block_size,
            )
    finally:
        hook.remove()
    width = max(map(len, prompts))
    trajectories = []
    for row, prompt in enumerate(prompts):
        answer = cut_at_end(ids_BL[row, width : width + answers.max_new_tokens].tolist(), end_ids(model))
        states: list[list[State]] = [[] for _ in range(-(-len(answer) // block_size))]
        for token_BQ, position_BQ in inputs[1:]:
            pending = int(position_BQ[row, 0]) - len(prompt)
            block, slot = divmod(pending, block_size)
            if block < len(states) and pending < len(answer):
                drafted = token_BQ[row, : block_size - slot].tolist()
                states[block].append(answer[block * block_size : pending] + drafted)
        trajectories.append(_tidy(list(prompt), answer, states, block_size, pad_id(model)))
    return trajectories


def _tidy(prompt: list[int], answer: list[int], states: list[list[State]], block_size: int, pad: int) -> Trajectory:
    """Return a trajectory with pads after the answer in every state, no state twice, and the fixed points last."""
    blocks = []
    for number, of_block in enumerate(states):
        fixed = answer[number * block_size : (number + 1) * block_size]
        padding = [pad] * (block_size - len(fixed))
        kept: list[State] = []
        for state in of_block:
            if state[: len(fixed)] == fixed:
                break
            kept.append(state[: len(fixed)] + padding)
        blocks.append([*kept, fixed + padding])
    return Trajectory(prompt, answer, blocks)


def _check(model: PreTrainedModel, prompts: Sequence[Sequence[int]], block_size: int, answers: AnswerConfig) -> None:
    """Raise `ValueError` if trajectories cannot be collected."""
    config = model.config.get_text_config(decoder=True)
    if attention_of(config) not in TAKES_MASK:
        raise ValueError(
            f"attn_implementation={attention_of(config)!r} takes no mask of our own: collect with "
            "attn_implementation='sdpa'. Training may use another one."
        )
    if unknown := set(layer_types(config)) - LAYER_TYPES:
        raise ValueError(
            f"layers of type {', '.join(sorted(unknown))} are not known; only full and sliding attention are."
        )
    if not len(prompts):
        raise ValueError("prompts is empty.")
    if block_size < 2:
        raise ValueError(f"block_size={block_size} must be at least 2: a block of one token has nothing to draft.")
    if answers.max_new_tokens % block_size:
        near = -(-answers.max_new_tokens // block_size) * block_size
        raise ValueError(
            f"max_new_tokens={answers.max_new_tokens} must be a multiple of block_size={block_size}, "
            f"for example {near}."
        )
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} is empty.")


def _split(answer: list[int], start: int, block_size: int, ends: set[int]) -> tuple[list[int], list[int]]:
    """Return the tokens before the first block, and those of the blocks: up to the end id, or else whole blocks."""
    ended = answer[-1] in ends
    start = max(0, min(start, len(answer) - (2 if ended else block_size)))
    last = len(answer) if ended else start + (len(answer) - start) // block_size * block_size
    return answer[:start], answer[start:last]
