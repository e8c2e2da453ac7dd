"""The model's choice at every slot, greedy or sampled, and how many guesses it confirms.

Sampled decoding is greedy decoding under fixed noise: `torch.multinomial(p, 1)` is `argmax(p / q)` with exponential noise
`q`, so when each new-token index keeps its own `q`, drafts can be verified by equality and the text is that of `generate`.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers.generation import logits_process as processors_of_transformers

if TYPE_CHECKING:
    from collections.abc import Callable

    from jacobi_hf.decoding.layout import Layout
    from jacobi_hf.decoding.noise import SamplingNoise

# Processors that look at one slot's scores alone: applied to all slots at once.
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
# Among so many scores or more, the greatest of each slot is looked for in blocks.
BLOCKED_FROM, BLOCK = 1 << 16, 128
# Attributes of theirs that only enter arithmetic, and those that matter for prompts alone.
VALUES = ("temperature", "penalty", "top_p", "min_p", "mass", "epsilon")
OF_PROMPTS = ("prompt_ignore_length", "logits_indices", "cu_seq_lens_q")


def best(scores: torch.Tensor) -> torch.Tensor:
    """Index of the first largest score along the last dimension, as `argmax` gives it.

    On the CPU `argmax` and `max` with indices go through a vocabulary one by one, `amax` does not: where there are many scores the block
    with the largest one is found first, in down to a sixth of the time.
    """
    if (
        scores.device.type != "cpu"
        or scores.numel() < BLOCKED_FROM
        or scores.shape[-1] % BLOCK
        or torch.compiler.is_compiling()
    ):
        return scores.max(-1).indices  # in bfloat16 on the CPU six times as fast as argmax
    blocks = scores.unflatten(-1, (-1, BLOCK))
    block = blocks.amax(-1).max(-1, keepdim=True).indices
    inside = blocks.gather(-2, block[..., None].expand(*block.shape, BLOCK))[..., 0, :].max(-1, keepdim=True).indices
    return (block * BLOCK + inside)[..., 0]


def pick(
    scores_BQV: torch.Tensor, noise_BQV: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The token of every slot, greedy without noise; with noise, which slots had no distribution to sample from; and what it was the
    greatest of.
    """
    if noise_BQV is None:
        return best(scores_BQV), None, scores_BQV
    probability_BQV = scores_BQV.float().softmax(-1)
    merit_BQV = probability_BQV / noise_BQV
    return best(merit_BQV), probability_BQV.sum(-1).isnan(), merit_BQV


def check_samples(broken: bool) -> None:
    """Refuse samples from what is no distribution, as `torch.multinomial` does.

    Raises:
        RuntimeError: `broken`.
    """
    if broken:
        raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")


class Selector:
    """Scores and choices of a call to `generate`: its processors, its noise, its tokens seen so far.

    Args:
        processors: as `generate` prepared them.
        noise: for sampling, or None for greedy decoding.
        prompt_BP: prompt ids as the processors see them, pads included.
        hold: gives the tensor of static address that is to hold a value of a given name, for steps that are kept between calls. The
            processors' values are tensors then, so that others of the same kind are no other step.

    Attributes:
        is_vectorised: whether all slots can be scored at once.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        noise: SamplingNoise | None,
        prompt_BP: torch.Tensor,
        hold: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.processors, self.noise, self._prompt_BP, self._hold = processors, noise, prompt_BP, hold
        self.is_vectorised = all(
            type(p) in SCORE_ONLY or _counts_all_new_tokens(p, prompt_BP.shape[1]) for p in processors
        )
        self._seen: list[torch.Tensor] = []  # per repetition penalty, (B, V): ids that it counts
        self._broken_BQ: torch.Tensor | None = None
        if hold is not None and self.is_vectorised:
            held = [
                _with_held_values(p, f"processor {number}", prompt_BP.device, hold)
                for number, p in enumerate(processors)
            ]
            self.processors = LogitsProcessorList(held)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What one call's selection has different from another's, but for values that are held."""
        processors = tuple(
            (type(p), *((name, repr(value)) for name, value in vars(p).items() if name not in (*VALUES, *OF_PROMPTS)))
            for p in self.processors
        )
        return (None if self.noise is None else len(self.noise.ring_IBV)), processors

    @property
    def is_argmax(self) -> bool:
        """Whether the choice is the plain argmax of the logits."""
        return self.noise is None and not self.processors

    def scores(self, logits_BQV: torch.Tensor, layout: Layout, token_BQ: torch.Tensor) -> torch.Tensor:
        """Processed float32 scores of every slot, each under the tokens before it on its own path. Vectorised processors only."""
        scores_BQV = logits_BQV.float()
        batch, slots, vocab = scores_BQV.shape
        if not self._seen:
            penalties_of_call = [p for p in self.processors if type(p) is RepetitionPenaltyLogitsProcessor]
            self._seen = [_counted_ids(p, self._prompt_BP, vocab) for p in penalties_of_call]
            if self._hold is not None:
                self._seen = [self._hold(f"seen by {number}", seen_BV) for number, seen_BV in enumerate(self._seen)]
        penalties = iter(self._seen)
        for processor in self.processors:
            if type(processor) is RepetitionPenaltyLogitsProcessor:
                scores_BQV = _penalise(scores_BQV, _on_path(next(penalties), layout, token_BQ), processor.penalty)
            else:
                scores_BQV = processor(None, scores_BQV.reshape(batch * slots, vocab)).view(batch, slots, vocab)
        return scores_BQV

    def choose(self, scores_BQV: torch.Tensor, index_BQ: torch.Tensor) -> torch.Tensor:
        """The token of every slot; `index_BQ` is the new-token index that each slot predicts."""
        choice_BQ, self._broken_BQ, _ = pick(scores_BQV, None if self.noise is None else self.noise.at(index_BQ))
        return choice_BQ

    def check(self) -> None:
        """Refuse tokens that were chosen from what is no distribution, as `torch.multinomial` does.

        Raises:
            RuntimeError: a score is NaN, or all scores of a token are -inf.
        """
        if self._broken_BQ is not None:
            check_samples(bool(self._broken_BQ.any()))

    def commit(self, token_BN: torch.Tensor, count_B: torch.Tensor) -> None:
        """Note the first `count_B` of `token_BN` as part of each row."""
        for seen_BV in self._seen:
            kept_BN = torch.arange(token_BN.shape[1], device=token_BN.device) < count_B[:, None]
            added_BV = torch.zeros_like(seen_BV, dtype=torch.uint8).scatter_reduce_(
                1, token_BN, kept_BN.to(torch.uint8), "amax"
            )
            seen_BV.logical_or_(added_BV.bool())

    def recount(self, row: int, ids_T: torch.Tensor) -> None:
        """Forget what was noted of a row, and note its output `ids_T` instead, prompt and pads included."""
        penalties = [p for p in self.processors if type(p) is RepetitionPenaltyLogitsProcessor]
        for penalty, seen_BV in zip(penalties, self._seen, strict=False):
            ids_BT = self._prompt_BP.new_zeros(len(seen_BV), len(ids_T))
            ids_BT[row] = ids_T
            seen_BV[row] = _counted_ids(penalty, ids_BT, seen_BV.shape[1])[row]


def _with_held_values(
    processor: Any, name: str, device: torch.device, hold: Callable[[str, torch.Tensor], torch.Tensor]
) -> Any:
    """The processor with tensors in place of its numbers."""
    held = copy.copy(processor)
    for attribute in [a for a in VALUES if a in vars(processor)]:
        value = getattr(processor, attribute)
        if not isinstance(value, torch.Tensor):
            # In float64 and without dimensions: float32 scores take it as they take a Python number.
            value = torch.tensor(value, dtype=torch.float64, device=device)
        setattr(held, attribute, hold(f"{name} {attribute}", value))
    return held


def _counts_all_new_tokens(processor: Any, prompt_columns: int) -> bool:
    """Whether this is a repetition penalty, and one that ignores nothing behind the prompt."""
    if type(processor) is not RepetitionPenaltyLogitsProcessor:
        return False
    ignored = processor.prompt_ignore_length
    return ignored is None or int(torch.as_tensor(ignored).max()) <= prompt_columns


def _counted_ids(penalty: RepetitionPenaltyLogitsProcessor, prompt_BP: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Bool `(B, V)`: which ids of a text the penalty counts."""
    seen_BV = torch.zeros(len(prompt_BP), vocab_size + 1, dtype=torch.bool, device=prompt_BP.device)
    ignored = penalty.prompt_ignore_length
    if ignored is not None:
        ignored_B1 = ignored.to(prompt_BP.device)[:, None] if isinstance(ignored, torch.Tensor) else ignored
        prompt_BP = prompt_BP.masked_fill(
            torch.arange(prompt_BP.shape[1], device=prompt_BP.device) < ignored_B1, vocab_size
        )
    return seen_BV.scatter_(1, prompt_BP.clamp(max=vocab_size), value=True)[:, :-1].contiguous()


def _on_path(seen_BV: torch.Tensor, layout: Layout, token_BQ: torch.Tensor) -> torch.Tensor:
    """Bool `(B, Q, V)`: what each slot has seen, the guesses on its own path included. The pending token is among `seen_BV`."""
    batch, slots = token_BQ.shape
    nothing = seen_BV.shape[1]
    guess_BQQ = torch.where(layout.sees_QQ, token_BQ[:, None, :], nothing)[:, :, 1:].clamp(max=nothing)
    path_BQV = torch.zeros(batch, slots, nothing + 1, dtype=torch.bool, device=seen_BV.device)
    path_BQV.scatter_(2, guess_BQQ, torch.ones_like(guess_BQQ, dtype=torch.bool))
    return path_BQV[..., :-1] | seen_BV[:, None]


def _penalise(scores_BQV: torch.Tensor, seen_BQV: torch.Tensor, penalty: float) -> torch.Tensor:
    return torch.where(seen_BQV, torch.where(scores_BQV < 0, scores_BQV * penalty, scores_BQV / penalty), scores_BQV)


def accepted_prefixes(
    layout: Layout, token_BQ: torch.Tensor, choice_BQ: torch.Tensor, length_BS: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which guesses equal the model's choice one slot before.

    Args:
        token_BQ: what went in; `choice_BQ`: what the model chose at each slot.
        length_BS: valid guesses of each segment.

    Returns:
        `(agrees_BSD, accepted_BS)`: agreement of each segment's guess at depths 1..D, valid or not, and the length of its confirmed
        prefix of valid guesses.
    """
    if layout.is_chain:
        agrees_BSD = (token_BQ[:, 1:] == choice_BQ[:, :-1])[:, None]
    else:
        agrees_BSD = token_BQ[:, layout.path_SD[:, 1:]] == choice_BQ[:, layout.path_SD[:, :-1]]
    deepest = agrees_BSD.shape[-1]
    if not deepest:
        return agrees_BSD, torch.zeros_like(length_BS)
    # The place of the first guess that does not agree; behind the last one where all do.
    return agrees_BSD, torch.minimum(torch.where(agrees_BSD, deepest, layout.offset_D[:-1]).amin(-1), length_BS)
