"""The model's choice at every slot, greedy or sampled, and which guesses the choices accept.

Sampling is greedy decoding of noisy scores, see `jacobi_hf.decoding.noise`. So in both cases a guess is accepted if it
equals the model's choice at the slot before it.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation import logits_process as processors_of_transformers

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
# From this number of scores on, `best` looks at blocks of scores.
BLOCKED_FROM = 1 << 16
BLOCK = 128
# Attributes of processors that only enter arithmetic; a change of them does not change a compiled step.
VALUES = ("temperature", "penalty", "top_p", "min_p", "mass", "epsilon")
# Attributes of processors that matter for the prompt alone.
OF_PROMPTS = ("prompt_ignore_length", "logits_indices", "cu_seq_lens_q")


def best(scores: torch.Tensor) -> torch.Tensor:
    """Return the index of the largest score along the last dimension; on ties the first one, as `argmax` does.

    On the CPU, `argmax` and `max` with indices go through a vocabulary one by one, but `amax` does not. So among many
    scores, the block with the largest one is found first. That takes down to a sixth of the time.
    """
    if (
        scores.device.type != "cpu"
        or scores.numel() < BLOCKED_FROM
        or scores.shape[-1] % BLOCK
        or torch.compiler.is_compiling()
    ):
        return scores.max(-1).indices  # on the CPU, six times as fast as argmax in bfloat16
    blocks = scores.unflatten(-1, (-1, BLOCK))
    block = blocks.amax(-1).max(-1, keepdim=True).indices
    inside = blocks.gather(-2, block[..., None].expand(*block.shape, BLOCK))[..., 0, :].max(-1, keepdim=True).indices
    return (block * BLOCK + inside)[..., 0]


def pick(
    scores_BQV: torch.Tensor, noise_BQV: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return the token that is chosen at every slot.

    Args:
        scores_BQV: processed scores.
        noise_BQV: sampling noise; None for greedy decoding.

    Returns:
        the tokens `(B, Q)`; bool `(B, Q)`, whether the scores of a slot are no distribution to sample from, or None
        without noise; and `(B, Q, V)`, of which each token is the index of the largest value.
    """
    if noise_BQV is None:
        return best(scores_BQV), None, scores_BQV
    probability_BQV = scores_BQV.float().softmax(-1)
    merit_BQV = probability_BQV / noise_BQV
    return best(merit_BQV), probability_BQV.sum(-1).isnan(), merit_BQV


def check_samples(broken: bool) -> None:
    """Raise the error of `torch.multinomial` if a token was sampled from scores that are no distribution.

    Args:
        broken: whether there is such a token.

    Raises:
        RuntimeError: `broken` is True.
    """
    if broken:
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")


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
        self._broken_BQ: torch.Tensor | None = None
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

    @property
    def is_argmax(self) -> bool:
        """Whether the choice is the plain argmax of the logits."""
        return self.noise is None and not self.processors

    def scores(self, logits_BQV: torch.Tensor, layout: Layout, token_BQ: torch.Tensor) -> torch.Tensor:
        """Return the processed scores of every slot, float32 `(B, Q, V)`; for vectorised processors only.

        Args:
            logits_BQV: logits of the model.
            layout: the slots. Each slot is scored as the end of the text along its own path.
            token_BQ: tokens of the slots.
        """
        scores_BQV = logits_BQV.float()
        batch, slots, vocab = scores_BQV.shape
        if not self._seen:
            penalties_of_call = [p for p in self.processors if type(p) is RepetitionPenaltyLogitsProcessor]
            self._seen = [_counted_ids(p, self._prompt_BP, vocab) for p in penalties_of_call]
            if self._store is not None:
                self._seen = [self._store(f"seen by {number}", seen_BV) for number, seen_BV in enumerate(self._seen)]
        penalties = iter(self._seen)
        for processor in self.processors:
            if type(processor) is RepetitionPenaltyLogitsProcessor:
                scores_BQV = _penalise(scores_BQV, _on_path(next(penalties), layout, token_BQ), processor.penalty)
            else:
                scores_BQV = processor(None, scores_BQV.reshape(batch * slots, vocab)).view(batch, slots, vocab)
        return scores_BQV

    def choose(self, scores_BQV: torch.Tensor, index_BQ: torch.Tensor) -> torch.Tensor:
        """Return the token that is chosen at every slot, `(B, Q)`.

        Args:
            scores_BQV: processed scores.
            index_BQ: the index of the new token that is chosen at each slot.
        """
        choice_BQ, self._broken_BQ, _ = pick(scores_BQV, None if self.noise is None else self.noise.at(index_BQ))
        return choice_BQ

    def check(self) -> None:
        """Raise the error of `torch.multinomial` if `choose` has just sampled from scores that are no distribution.

        Raises:
            RuntimeError: a score is NaN, or all scores of a slot are -inf.
        """
        if self._broken_BQ is not None:
            check_samples(bool(self._broken_BQ.any()))

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


def _on_path(seen_BV: torch.Tensor, layout: Layout, token_BQ: torch.Tensor) -> torch.Tensor:
    """Return bool `(B, Q, V)`: the ids in the text of each row, and the guesses on the path to each slot.

    Args:
        seen_BV: the ids in the text, the pending token among them.
        layout: the slots.
        token_BQ: tokens of the slots.
    """
    batch, slots = token_BQ.shape
    nothing = seen_BV.shape[1]
    guess_BQQ = torch.where(layout.sees_QQ, token_BQ[:, None, :], nothing)[:, :, 1:].clamp(max=nothing)
    path_BQV = torch.zeros(batch, slots, nothing + 1, dtype=torch.bool, device=seen_BV.device)
    path_BQV.scatter_(2, guess_BQQ, torch.ones_like(guess_BQQ, dtype=torch.bool))
    return path_BQV[..., :-1] | seen_BV[:, None]


def _penalise(scores_BQV: torch.Tensor, seen_BQV: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return scores after a repetition penalty for the ids in `seen_BQV`."""
    return torch.where(seen_BQV, torch.where(scores_BQV < 0, scores_BQV * penalty, scores_BQV / penalty), scores_BQV)


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
