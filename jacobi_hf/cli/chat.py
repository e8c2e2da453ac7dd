"""`jacobi-hf chat`: talk to a model in the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jacobi_hf.cli._options import ModelOptions, Sampling, option, verb

if TYPE_CHECKING:
    from jacobi_hf.cli._recipes import Call


@dataclass
class ChatOptions(ModelOptions):
    """Options of `jacobi-hf chat`."""

    system: str | None = option(None, "System text before the conversation.")
    max_new_tokens: int = option(1024, "Most new tokens of an answer.", low=1)
    seed: int | None = option(
        None, "Seed of torch's random generator; with the same seed, the same text is sampled.", low=0
    )


def _kinds() -> tuple[type, ...]:
    from jacobi_hf.cli._models import KnobOptions

    return ChatOptions, Sampling, KnobOptions


@verb(_kinds)
def chat(call: Call) -> None:
    """Talk to a model, one line a turn. Answers are shown while they are written, with their figures after them.

    The cache is kept from turn to turn, so that only new tokens are computed. /clear starts a new conversation. /knobs
    shows how the model decodes, and /knobs jacobi_block_size=8 changes it. /exit leaves. Ctrl-C stops an answer; a
    second Ctrl-C leaves.
    """
    from jacobi_hf.cli._models import check_knobs, decoding_of, given_knobs

    options, sampling, knobs = call.parse()
    given = given_knobs(knobs)
    check_knobs(given)
    import torch

    from jacobi_hf.cli._answers import note
    from jacobi_hf.cli._conversation import COMMANDS, Conversation, Session
    from jacobi_hf.loading import load

    model, tokenizer = load(options.model, options.dtype, options.drafter)
    decoding_of(model, given)
    conversation = Conversation(model, tokenizer, options.system)
    note(f"{options.model}; {COMMANDS}. Ctrl-C stops an answer, a second one leaves.")
    if not conversation.has_template:
        note(f"{options.model} has no chat template: turns are concatenated without one.")
    if options.seed is not None:
        torch.manual_seed(options.seed)
    arguments = {"max_new_tokens": options.max_new_tokens, **sampling.arguments(model)}
    Session(conversation, model, arguments, given).run()
