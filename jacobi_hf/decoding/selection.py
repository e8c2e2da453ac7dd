"""The model's choice at every slot under a call's processors, and which guesses the choices accept.

A guess is accepted if it equals the model's choice at the slot before it.

Shapes: B rows, Q slots of a forward, S segments, N guesses of a segment, V vocabulary. R is a number of slots of any
rows, see `jacobi_hf.decoding.choice`.
"""

from __future__ import annotations

import copy
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation import logits_process as processors_of_transformers

from jacobi_hf.decoding.choice import Choice, choose

if TYPE_CHECKING:
    from collections.abc import Callable

    from jacobi_hf.decoding.layout import Layout
    from jacobi_hf.decoding.noise import SamplingNoise

# Processors that look at the scores of one slot alone, so that all slots can be processed at once.
SCORE_ONLY = tuple(
    getattr(processors_of_transformers, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "LogitNormalization",
        "InfNanRemoveLogitsProcessor",
    )
)
# Attributes of processors that only enter arithmetic; a change of them does not change a compiled step.
VALUES = ("temperature", "penalty", "top_p", "min_p", "mass", "epsilon")
# Attributes of processors that matter for the prompt alone.
OF_PROMPTS = ("prompt_ignore_length", "logits_indices", "cu_seq_lens_q")


class Selector:
    """Processors and sampling noise of a call; it turns logits into scores, and scores into tokens.

    Args:
        processors: the call's processors, as `generate` prepared them.
        noise: sampling noise; None for greedy decoding.
        prompt_BP: prompt ids as the processors see them, pads included.
        store: function of a name and a tensor that returns a tensor of fixed address with the same value. Compiled
            steps need it: they read the numbers of processors (`VALUES`) from such tensors, so that other numbers need
            no other step.

    Attributes:
        processors: the processors; with `store`, copies that read their numbers from tensors.
        noise: sampling noise, or None.
        is_vectorised: whether all slots can be scored at once.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        noise: SamplingNoise | None,
        prompt_BP: torch.Tensor,
        store: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.processors = processors
        self.noise = noise
        self._prompt_BP = prompt_BP
        self._store = store
        self.is_vectorised = all(
            type(p) in SCORE_ONLY or _counts_all_new_tokens(p, prompt_BP.shape[1]) for p in processors
        )
        self._seen: list[torch.Tensor] = []  # for each repetition penalty, bool (B, V): the ids that it counts
        if store is not None and self.is_vectorised:
            self.processors = LogitsProcessorList(
                _with_stored_values(p, f"processor {number}", prompt_BP.device, store)
                for number, p in enumerate(processors)
            )

    @property
    def key(self) -> tuple[Any, ...]:
        """Cache key: what must be equal for two calls to run the same compiled step, apart from stored values."""
        return (None if self.noise is None else len(self.noise.ring_IBV)), self._processors_key

    @cached_property
    def _processors_key(self) -> tuple[Any, ...]:
        return tuple(
            (type(p), *((name, repr(value)) for name, value in vars(p).items() if name not in (*VALUES, *OF_PROMPTS)))
            for p in self.processors
        )

    def choose(
        self,
        logits_BQV: torch.Tensor,
        layout: Layout,
        token_BQ: torch.Tensor,
        index_BQ: torch.Tensor | None,
        ranks: int = 0,
    ) -> Choice:
        """Return the choice at every slot; for vectorised processors only.

        Args:
            logits_BQV: logits of the model.
            layout: the slots. Each slot is scored as the end of the text along its own path.
            token_BQ: tokens of the slots.
            index_BQ: the index of the new token that is chosen at each slot; None in greedy decoding.
            ranks: as in `jacobi_hf.decoding.choice.choose`.
        """
        if not self.processors:
            return choose(logits_BQV, index_BQ, self.noise, None, ranks)
        self._count_prompt(logits_BQV.shape[-1])
        return choose(logits_BQV, index_BQ, self.noise, partial(self.scores, layout, token_BQ), ranks)

    def scores(
        self, layout: Layout, token_BQ: torch.Tensor, logits_RV: torch.Tensor, place_R: slice | torch.Tensor
    ) -> torch.Tensor:
        """Return the processed scores of some slots, float32 `(R, V)`; for vectorised processors only.

        Args:
            layout: the slots. Each slot is scored as the end of the text along its own path.
            token_BQ: tokens of all slots.
            logits_RV: logits of these slots.
            place_R: their places, where the slots of all rows follow each other.
        """
        scores_RV = logits_RV.float()
        self._count_prompt(scores_RV.shape[1])
        penalties = iter(self._seen)
        for processor in self.processors:
            if type(processor) is RepetitionPenaltyLogitsProcessor:
                seen_RV = _on_path(next(penalties), layout, token_BQ, place_R)
                # A step that is compiled or recorded cannot read which ids have been seen.
                host_may_read = self._store is None and scores_RV.device.type == "cpu"
                scores_RV = _penalise(scores_RV, seen_RV, processor.penalty, host_may_read=host_may_read)
            else:
                scores_RV = processor(None, scores_RV)
        return scores_RV

    def _count_prompt(self, vocab_size: int) -> None:
        """Make the ids that the repetition penalties count in the prompt, when the vocabulary is first known."""
        if self._seen:
            return
        penalties = [p for p in self.processors if type(p) is RepetitionPenaltyLogitsProcessor]
        self._seen = [_counted_ids(p, self._prompt_BP, vocab_size) for p in penalties]
        if self._store is not None:
            self._seen = [self._store(f"seen by {number}", seen_BV) for number, seen_BV in enumerate(self._seen)]

    def commit(self, token_BN: torch.Tensor, count_B: torch.Tensor) -> None:
        """Make the first `count_B` of `token_BN` part of what the repetition penalties count in each row."""
        for seen_BV in self._seen:
            kept_BN = torch.arange(token_BN.shape[1], device=token_BN.device) < count_B[:, None]
            added_BV = torch.zeros_like(seen_BV, dtype=torch.uint8).scatter_reduce_(
                1, token_BN, kept_BN.to(torch.uint8), "amax"
            )
            seen_BV.logical_or_(added_BV.bool())

    def recount(self, row: int, ids_L: torch.Tensor) -> None:
        """Replace what the repetition penalties count in a row.

        Args:
            row: number of the row.
            ids_L: the output of the row, prompt and pads included.
        """
        penalties = [p for p in self.processors if type(p) is RepetitionPenaltyLogitsProcessor]
        for penalty, seen_BV in zip(penalties, self._seen, strict=False):
            ids_BL = self._prompt_BP.new_zeros(len(seen_BV), len(ids_L))
            ids_BL[row] = ids_L
            seen_BV[row] = _counted_ids(penalty, ids_BL, seen_BV.shape[1])[row]


def _with_stored_values(
    processor: Any, name: str, device: torch.device, store: Callable[[str, torch.Tensor], torch.Tensor]
) -> Any:
    """Return a copy of a processor that has stored tensors in place of its numbers."""
    copied = copy.copy(processor)
    for attribute in [a for a in VALUES if a in vars(processor)]:
        value = getattr(processor, attribute)
        if not isinstance(value, torch.Tensor):
            # A float64 tensor without dimensions acts on float32 scores as a Python number does.
            value = torch.tensor(value, dtype=torch.float64, device=device)
        setattr(copied, attribute, store(f"{name} {attribute}", value))
    return copied


def _counts_all_new_tokens(processor: Any, prompt_columns: int) -> bool:
    """Return whether a processor is a repetition penalty that counts all new tokens."""
    if type(processor) is not RepetitionPenaltyLogitsProcessor:
        return False
    ignored = processor.prompt_ignore_length
    return ignored is None or int(torch.as_tensor(ignored).max()) <= prompt_columns


def _counted_ids(penalty: RepetitionPenaltyLogitsProcessor, prompt_BP: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return bool `(B, V)`: the ids of a text that a penalty counts."""
    seen_BV = torch.zeros(len(prompt_BP), vocab_size + 1, dtype=torch.bool, device=prompt_BP.device)
    ignored = penalty.prompt_ignore_length
    if ignored is not None:
        ignored_B1 = ignored.to(prompt_BP.device)[:, None] if isinstance(ignored, torch.Tensor) else ignored
        prompt_BP = prompt_BP.masked_fill(
            torch.arange(prompt_BP.shape[1], device=prompt_BP.device) < ignored_B1, vocab_size
        )
    return seen_BV.scatter_(1, prompt_BP.clamp(max=vocab_size), value=True)[:, :-1].contiguous()


def _on_path(
    seen_BV: torch.Tensor, layout: Layout, token_BQ: torch.Tensor, place_R: slice | torch.Tensor
) -> torch.Tensor:
    """Return bool `(R, V)`: the ids in the text of each slot's row, and the guesses on the path to the slot.

    Args:
        seen_BV: the ids in the text, the pending token among them.
        layout: the slots.
        token_BQ: tokens of all slots.
        place_R: the places of the slots that are wanted, where the slots of all rows follow each other.
    """
    batch, slots = token_BQ.shape
    nothing = seen_BV.shape[1]
    place_R = torch.arange(batch * slots, device=token_BQ.device)[place_R]
    row_R = place_R // slots
    guess_RQ = torch.where(layout.sees_QQ[place_R % slots], token_BQ[row_R], nothing)[:, 1:].clamp(max=nothing)
    path_RV = torch.zeros(len(place_R), nothing + 1, dtype=torch.bool, device=seen_BV.device)
    path_RV.scatter_(1, guess_RQ, torch.ones_like(guess_RQ, dtype=torch.bool))
    return path_RV[:, :-1] | seen_BV[row_R]


def _penalise(scores_RV: torch.Tensor, seen_RV: torch.Tensor, penalty: float, *, host_may_read: bool) -> torch.Tensor:
    """Return scores after a repetition penalty for the ids in `seen_RV`.

    Where the host can read at no cost which ids these are, the few scores are written into a copy.
    """
    if not host_may_read:
        return torch.where(seen_RV, _penalised(scores_RV, penalty), scores_RV)
    penalised_RV = scores_RV.clone(memory_format=torch.contiguous_format)
    scores = penalised_RV.view(-1)
    place = _true_places(seen_RV)
    scores[place] = _penalised(scores[place], penalty)
    return penalised_RV


def _penalised(scores: torch.Tensor, penalty: float) -> torch.Tensor:
    return torch.where(scores < 0, scores * penalty, scores / penalty)


def _true_places(mask: torch.Tensor) -> torch.Tensor:
    """Return `mask.flatten().nonzero()[:, 0]` of a contiguous mask; faster if few entries are true."""
    flat = mask.view(-1)
    if len(flat) % 8:
        return flat.nonzero()[:, 0]
    place = (flat.view(torch.int64).nonzero() * 8 + torch.arange(8)).view(-1)
    return place[flat[place]]


def accepted_prefixes(
    layout: Layout, token_BQ: torch.Tensor, choice_BQ: torch.Tensor, length_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which guesses equal the model's choice at the slot before them, and how many each segment has accepted.

    Args:
        layout: the slots.
        token_BQ: tokens of the slots.
        choice_BQ: the model's choice at each slot.
        length_BS: valid guesses of each segment.

    Returns:
        agreement, bool `(B, S, N)`, of each segment's guess with the choice before it, whether the guess is valid or
        not; and the number of valid guesses at the start of each segment that all agree, `(B, S)`.
    """
    if layout.is_chain:
        agrees_BSN = (token_BQ[:, 1:] == choice_BQ[:, :-1])[:, None]
    else:
        agrees_BSN = token_BQ[:, layout.path_SD[:, 1:]] == choice_BQ[:, layout.path_SD[:, :-1]]
    most = agrees_BSN.shape[-1]
    if not most:
        return agrees_BSN, torch.zeros_like(length_BS)
    # The index of the first guess that does not agree is the number of guesses before it.
    agreeing_BS = torch.where(agrees_BSN, most, layout.offset_D[:-1]).amin(-1)
    return agrees_BSN, torch.minimum(agreeing_BS, length_BS)
