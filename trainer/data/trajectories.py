"""Jacobi trajectories of a model: what each block of an answer looks like after every iteration, from draft to fixed point.

A *state* of block b is n ids: slot 0 holds the verified first token, the rest a draft (state 0) that each iteration replaces by
the model's choices, until it equals the model's own output, the *fixed point* (arXiv 2512.14681, section 3.1). Two collectors
give the same states:

- `record_trajectories` watches `generate(decoding="jacobi")`, one block after the other: the plain way, and the oracle.
- `collect_trajectories` lets ordinary `generate` write the answers and then iterates all blocks of all answers together, each
  behind the keys and values that `generate` has left of what precedes it. The first unsettled token of a block is known from
  the answer, so only what lies behind it is computed.

Shapes: B rows, P prompt ids, T blocks of a row, n ids of a block, C columns of clean keys and values, Q slots, V ids.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList
from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from jacobi_hf.attention.interface import LAYER_TYPES, TAKES_MASK, MaskBuilder, attention_of, layer_types
from jacobi_hf.decoding.cache import JacobiStaticCache
from jacobi_hf.decoding.noise import generator_state, set_generator_state
from jacobi_hf.decoding.selection import best
from jacobi_hf.drafts.window import ids_of_the_text
from jacobi_hf.integration.compat import CACHE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

State = list[int]
# Answers whose blocks iterate in one forward.
GROUP = 16


@dataclass(frozen=True)
class Trajectory:
    """One answer of a model and how Jacobi iteration reaches it.

    Attributes:
        prompt_ids: what was answered.
        answer_ids: the answer, its end-of-sequence id included.
        blocks: per block its states, each of n ids; the first is the draft, the last the fixed point. Slots behind the end
            of the answer hold the pad id in every state.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    blocks: list[list[State]]

    @property
    def forwards(self) -> int:
        """Forwards that `decoding="jacobi"` needs for the answer: the prefill, and one for each state."""
        return 1 + sum(map(len, self.blocks))

    @property
    def tokens_per_forward(self) -> float:
        """New tokens over forwards."""
        return len(self.answer_ids) / self.forwards


@dataclass(frozen=True)
class AnswerConfig:
    """How the model answers.

    Parameters:
        max_new_tokens: longest answer, a multiple of the block size.
        do_sample: sample instead of greedy decoding. The noise of a position stays the same in every iteration, so that
            the fixed point is exactly the sample.
        temperature, top_k, top_p, min_p: of the sampling; None leaves a filter out. Other processors of the model's
            generation config (a repetition penalty, say) are not applied.
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1.")
        if self.do_sample and self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be above 0; greedy answers are do_sample=False.")

    def generation_config(self, model: PreTrainedModel) -> GenerationConfig:
        """For ordinary `generate`."""
        own = model.generation_config
        assert own is not None
        sampling: dict[str, Any] = {"do_sample": False}
        if self.do_sample:
            # Neutral values, not None: `generate` fills None from the model's own config.
            sampling = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_k": self.top_k or 0,
                "top_p": 1.0 if self.top_p is None else self.top_p,
                "min_p": 0.0 if self.min_p is None else self.min_p,
            }
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            repetition_penalty=1.0,
            eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id,
            **sampling,
        )

    def warpers(self) -> LogitsProcessorList:
        """What `generate` does to the scores under this config, in its order."""
        warpers = LogitsProcessorList()
        if not self.do_sample:
            return warpers
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            warpers.append(MinPLogitsWarper(self.min_p))
        return warpers


def collect_trajectories(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    block_size: int,
    answers: AnswerConfig | None = None,
    seed: int | None = None,
    starts: Sequence[int] | None = None,
) -> list[Trajectory]:
    """Trajectories of a batch of prompts, all blocks of all answers iterating together.

    Args:
        model: any registered model, in eval mode, with or without a LoRA.
        prompts: ids of each prompt, not empty.
        block_size: n, at least 2.
        answers: how the model answers; greedy, 256 tokens by default.
        seed: of torch's generator, for sampling; None goes on from where it stands.
        starts: tokens of each answer in front of its first block, which become part of the prompt, as far as a block stays behind
            them. Of an answer without an end, whole blocks are taken: nobody knows what follows it. None for 0.

    Raises:
        ValueError: a block size below 2, an answer length that is no multiple of it, no prompt or an empty one, starts of another
            number; a model whose attention takes no mask of ours, or with a prompt-learning adapter.
    """
    answers, model = answers or AnswerConfig(), base_of(model)
    _check(model, prompts, block_size, answers)
    if starts is not None and len(starts) != len(prompts):
        raise ValueError(f"starts has {len(starts)} entries for {len(prompts)} prompts.")
    device = model.device
    if seed is not None:
        torch.manual_seed(seed)
    before = generator_state(device)
    written, clean = _answer(model, prompts, answers)
    after = generator_state(device)
    ends, width = end_ids(model), max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    parts = [_split(a, s, block_size, ends) for a, s in zip(written, starts or [0] * len(prompts), strict=True)]
    prompts = [[*prompt, *front] for prompt, (front, _) in zip(prompts, parts, strict=True)]
    starts, written = [len(front) for front, _ in parts], [blocks for _, blocks in parts]
    collected: dict[int, Trajectory] = {}
    # Rows of a forward are as wide as the widest: those of like length go together.
    order = sorted(range(len(prompts)), key=lambda row: (len(written[row]), len(prompts[row])))
    for start in range(0, len(order), GROUP):
        rows = order[start : start + GROUP]
        noise = _Noise(before, rows, len(prompts), [starts[row] for row in rows]) if answers.do_sample else None
        blocks = _Blocks(
            model, [prompts[row] for row in rows], [written[row] for row in rows], block_size, answers.warpers(), noise
        )
        blocks.load(clean, [pads[row] for row in rows], rows)
        blocks.iterate()
        collected |= zip(rows, blocks.trajectories(), strict=True)
    set_generator_state(device, after)
    return [collected[row] for row in range(len(prompts))]


def record_trajectories(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    block_size: int,
    answers: AnswerConfig | None = None,
    seed: int | None = None,
) -> list[Trajectory]:
    """The same trajectories from `generate(decoding="jacobi")`, read off what goes into each forward.

    Takes and raises what `collect_trajectories` does.
    """
    answers, model = answers or AnswerConfig(), base_of(model)
    _check(model, prompts, block_size, answers)
    if seed is not None:
        torch.manual_seed(seed)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        seen.append((kwargs["input_ids"].cpu(), kwargs["position_ids"].cpu()))

    config = answers.generation_config(model)
    # One token more than the answer may have, so that the last slot of the last block is drafted too.
    config.max_new_tokens = answers.max_new_tokens + 1
    hook = model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        with _bare(model):
            ids_BL = model.generate(
                **_left_padded(model, prompts),
                generation_config=config,
                decoding="jacobi",
                jacobi_block_size=block_size,
            )
    finally:
        hook.remove()
    width = max(map(len, prompts))
    ends = end_ids(model)
    trajectories = []
    for row, prompt in enumerate(prompts):
        answer = _cut(ids_BL[row, width : width + answers.max_new_tokens].tolist(), ends)
        # The pads behind the answer are whatever generate pads with; a block's own slots count only.
        states: list[list[State]] = [[] for _ in range(-(-len(answer) // block_size))]
        for token_BQ, position_BQ in seen[1:]:
            pending = int(position_BQ[row, 0]) - len(prompt)
            block, slot = divmod(pending, block_size)
            if block < len(states) and pending < len(answer):
                drafted = token_BQ[row, : block_size - slot].tolist()
                states[block].append(answer[block * block_size : pending] + drafted)
        trajectories.append(_tidy(list(prompt), answer, states, block_size, pad_id(model)))
    return trajectories


def _tidy(prompt: list[int], answer: list[int], states: list[list[State]], block_size: int, pad: int) -> Trajectory:
    """Pads behind the answer, no state twice, the fixed point last."""
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


def base_of(model: Any) -> Any:
    """The transformers model under an adapter, if there is one. The layers of a LoRA are in it, and work there."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "the model has a prompt-learning adapter, whose prompts are not part of the model under it; use a LoRA."
        )
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check(model: PreTrainedModel, prompts: Sequence[Sequence[int]], block_size: int, answers: AnswerConfig) -> None:
    config = model.config.get_text_config(decoder=True)
    if attention_of(config) not in TAKES_MASK:
        raise ValueError(
            f"attn_implementation={attention_of(config)!r} takes no mask of our own: collect with attn_implementation='sdpa' "
            "(training is free to use another)."
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
            f"max_new_tokens={answers.max_new_tokens} must be a multiple of block_size={block_size}, for example {near}."
        )
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {number} is empty.")


@contextmanager
def _bare(model: PreTrainedModel) -> Iterator[None]:
    """`generate` fills what a call leaves open from the model's own generation config: only end and pad ids may come from there."""
    own = model.generation_config
    assert own is not None
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    try:
        yield
    finally:
        model.generation_config = own


def _left_padded(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    width, device = max(map(len, prompts)), model.device
    pad = pad_id(model)
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _answer(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], answers: AnswerConfig
) -> tuple[list[list[int]], DynamicCache]:
    """What ordinary `generate` writes, end-of-sequence id included, pads not; and its keys and values, left-padded as the prompts."""
    clean = DynamicCache()  # of no config, so that sliding layers keep everything too
    with torch.no_grad(), _bare(model):
        ids_BL = model.generate(
            **_left_padded(model, prompts),
            generation_config=answers.generation_config(model),
            decoding=None,
            **{CACHE: clean},
        )
    ends, width = end_ids(model), max(map(len, prompts))
    return [_cut(row[width:].tolist(), ends) for row in ids_BL], clean


def end_ids(model: PreTrainedModel) -> set[int]:
    """The ids that end an answer."""
    return set(special_ids(model.generation_config, "eos_token_id"))


def pad_id(model: PreTrainedModel) -> int:
    """What fills the slots behind an answer."""
    return next(iter(special_ids(model.generation_config, "pad_token_id")), min(end_ids(model), default=0))


def special_ids(holder: Any, name: str) -> tuple[int, ...]:
    """`eos_token_id` or `pad_token_id` of a generation config or tokenizer, of which there may be none, one or several."""
    value = getattr(holder, name, None)
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (int(value),)


def _cut(ids: list[int], ends: set[int]) -> list[int]:
    first = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: first + 1]


def _split(answer: list[int], start: int, block_size: int, ends: set[int]) -> tuple[list[int], list[int]]:
    """What stands in front of the first block, as far as a block stays behind it, and the blocks: up to the end, else whole ones."""
    ended = answer[-1] in ends
    start = max(0, min(start, len(answer) - (2 if ended else block_size)))
    last = len(answer) if ended else start + (len(answer) - start) // block_size * block_size
    return answer[:start], answer[start:last]


@dataclass(frozen=True)
class _Noise:
    """The noise under which answers were sampled: the generator's state before, which rows of that batch these are, and how many
    tokens of the answers are in front of their first blocks.
    """

    state: torch.Tensor
    rows: list[int]
    batch: int
    starts: list[int]


@dataclass
class _Blocks:
    """All blocks of a group of answers, between two iterations."""

    model: PreTrainedModel
    prompts: Sequence[Sequence[int]]
    answers: list[list[int]]
    block_size: int
    warpers: LogitsProcessorList
    noise: _Noise | None
    _states: list[torch.Tensor] = field(default_factory=list)
    _unsettled: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        device, n = self.model.device, self.block_size
        batch, blocks = len(self.prompts), max(-(-len(a) // n) for a in self.answers)
        pad = pad_id(self.model)
        self._length_B = torch.tensor([len(p) for p in self.prompts], device=device)
        answer_length_B = torch.tensor([len(a) for a in self.answers], device=device)
        answer_BL = torch.tensor([a + [pad] * (blocks * n - len(a)) for a in self.answers], device=device)
        columns = int((self._length_B + answer_length_B).max())
        text_BC = torch.tensor(
            [[*p, *a, *[pad] * (columns - len(p) - len(a))] for p, a in zip(self.prompts, self.answers, strict=True)],
            device=device,
        )
        self._fixed_BTn = answer_BL.view(batch, blocks, n)
        first_T = torch.arange(blocks, device=device) * n
        self._valid_BT = (answer_length_B[:, None] - first_T).clamp(0, n)
        # The draft, drawn as `decoding="jacobi"` draws it: from the prompt and the answer up to the block's first token.
        index_BL = torch.arange(blocks * n, device=device).expand(batch, -1)
        known_BL = (self._length_B[:, None] + (index_BL // n) * n + 1).clamp(max=columns)
        draft_BL = ids_of_the_text(index_BL, text_BC, known_BL)
        self._state_BTn = torch.where(index_BL % n == 0, answer_BL, draft_BL).view(batch, blocks, n)
        slot_n = torch.arange(n, device=device)
        self._inside_BTn = slot_n < self._valid_BT[..., None]
        self._state_BTn = torch.where(self._inside_BTn, self._state_BTn, pad)
        self._text_BC, self._columns = text_BC, columns
        self._masks = MaskBuilder(self.model.config, self.model.dtype)
        self._cache = JacobiStaticCache(self.model.config, batch, columns + blocks * n, device)

    def load(self, clean: DynamicCache, pads: list[int], rows: list[int]) -> None:
        """Take over the keys and values of the answers: rows of a cache with so many pads on the left."""
        device = self.model.device
        self._cache.load(clean, torch.tensor(pads, device=device), torch.tensor(rows, device=device))
        self._cache.lengths_B.fill_(self._columns)  # each forward's slots go behind the longest row

    def iterate(self) -> None:
        """Until every block is at its fixed point; each state on the way is kept."""
        with torch.no_grad():
            while True:
                wrong_BTn = (self._state_BTn != self._fixed_BTn) & self._inside_BTn
                unsettled_BT = wrong_BTn.any(-1)
                if not bool(unsettled_BT.any()):
                    return
                self._states.append(self._state_BTn.cpu())
                self._unsettled.append(unsettled_BT.cpu())
                self._advance(wrong_BTn.long().argmax(-1), unsettled_BT)

    def _advance(self, wrong_BT: torch.Tensor, unsettled_BT: torch.Tensor) -> None:
        """One Jacobi iteration of the unsettled blocks; `wrong_BT` is the first slot of each that differs from the fixed point."""
        batch, blocks, n = self._state_BTn.shape
        slot_n = torch.arange(n, device=wrong_BT.device)
        # The choice in front of the first wrong slot is the answer's token; the last slot of the answer predicts nothing here.
        needed_BTn = (
            unsettled_BT[..., None] & (slot_n >= wrong_BT[..., None]) & (slot_n < self._valid_BT[..., None] - 1)
        )
        corrected_BTn = torch.where(slot_n == wrong_BT[..., None], self._fixed_BTn, self._state_BTn)
        needed_BL = needed_BTn.view(batch, -1)
        width = int(needed_BL.sum(1).max())
        if width:
            index_BQ = (~needed_BL).long().argsort(dim=1, stable=True)[:, :width]
            used_BQ = needed_BL.gather(1, index_BQ)
            choice_BQ = self._choose(self._forward(index_BQ, used_BQ, wrong_BT), index_BQ, used_BQ)
            corrected_BL = corrected_BTn.view(batch, -1)
            # Slots that are not used write behind the last column.
            target_BQ = torch.where(used_BQ, index_BQ + 1, blocks * n)
            corrected_BL = torch.nn.functional.pad(corrected_BL, (0, 1)).scatter(1, target_BQ, choice_BQ)[:, :-1]
            corrected_BTn = corrected_BL.view(batch, blocks, n)
        self._state_BTn = corrected_BTn

    def _forward(self, index_BQ: torch.Tensor, used_BQ: torch.Tensor, wrong_BT: torch.Tensor) -> torch.Tensor:
        """Logits `(B, Q, V)` of the slots `index_BQ` (counted over the answer), each block behind its own clean prefix."""
        n, columns = self.block_size, self._columns
        position_BQ = self._length_B[:, None] + index_BQ
        block_BQ = index_BQ // n
        clean_BQ = (
            self._length_B[:, None] + block_BQ * n + wrong_BT.gather(1, block_BQ)
        )  # clean tokens in front of each slot's block
        key_column_K = self._cache.columns(index_BQ.shape[1], columns)
        self._cache.open_step(index_BQ.shape[1], key_column_K)

        def mask(window: int | None) -> torch.Tensor:
            column_C = key_column_K[:columns]
            clean_BQC = column_C < clean_BQ[..., None]
            own_BQQ = (
                (block_BQ[..., None] == block_BQ[:, None])
                & (index_BQ[..., None] >= index_BQ[:, None])
                & used_BQ[:, None]
            )
            if window is not None:
                clean_BQC &= column_C > position_BQ[..., None] - window
                own_BQQ &= index_BQ[:, None] > index_BQ[..., None] - window
            allowed_BQK = torch.cat([clean_BQC, own_BQQ], -1)
            return torch.nn.functional.pad(allowed_BQK, (0, len(key_column_K) - allowed_BQK.shape[-1]))[:, None]

        outputs = self.model(
            input_ids=self._state_BTn.view(len(index_BQ), -1).gather(1, index_BQ),
            attention_mask=self._masks(mask, self.model.device),
            position_ids=position_BQ,
            use_cache=True,
            **{CACHE: self._cache},
        )
        logits: torch.Tensor = outputs.logits
        return logits

    def _choose(self, logits_BQV: torch.Tensor, index_BQ: torch.Tensor, used_BQ: torch.Tensor) -> torch.Tensor:
        """The model's token behind each slot: the greedy one, or the sample under the noise of that new-token index."""
        if self.noise is None:
            return best(logits_BQV)
        choice_BQ = torch.zeros_like(index_BQ)
        set_generator_state(logits_BQV.device, self.noise.state)
        noise_BV = torch.empty(self.noise.batch, logits_BQV.shape[-1], device=logits_BQV.device)
        own_B = torch.tensor(self.noise.rows, device=logits_BQV.device)
        behind_BQ = index_BQ + 1 + torch.tensor(self.noise.starts, device=logits_BQV.device)[:, None]
        # One index at a time: the noise of a whole answer would be as large as the logits once more.
        for index in range(self._fixed_BTn.shape[1] * self.block_size + max(self.noise.starts)):
            noise_BV.exponential_()
            row_N, slot_N = ((behind_BQ == index) & used_BQ).nonzero(as_tuple=True)
            if len(row_N):
                scores_NV = self.warpers(None, logits_BQV[row_N, slot_N].float())
                choice_BQ[row_N, slot_N] = best(scores_NV.softmax(-1) / noise_BV[own_B[row_N]])
        return choice_BQ

    def trajectories(self) -> list[Trajectory]:
        """What was kept, per prompt."""
        n, pad = self.block_size, pad_id(self.model)
        collected = []
        for row, (prompt, answer) in enumerate(zip(self.prompts, self.answers, strict=True)):
            states: list[list[State]] = [[] for _ in range(-(-len(answer) // n))]
            for state_BTn, unsettled_BT in zip(self._states, self._unsettled, strict=True):
                for block in unsettled_BT[row, : len(states)].nonzero().flatten().tolist():
                    states[block].append(state_BTn[row, block].tolist())
            collected.append(_tidy(list(prompt), answer, states, n, pad))
        return collected
