"""Outcomes of steps and contexts of proposals, made by hand for one row."""

from __future__ import annotations

import torch

from jacobi_hf.decoding.accept import Acceptance
from jacobi_hf.decoding.step import StepInputs
from jacobi_hf.drafts.base import ProposalContext, StepOutcome, chain_slots


def outcome_of_step(
    layout,
    *,
    before=0,
    generated=1,
    tokens=None,
    choice=None,
    agrees=None,
    lengths=None,
    accepted=0,
    best=0,
    run=None,
    count=None,
    ranked=None,
):
    """Return the outcome of a step of one row over `layout`; what is not given is zero."""
    slots = layout.slots
    token_BQ = torch.tensor([tokens if tokens is not None else [0] * slots])
    choice_BQ = torch.tensor([choice if choice is not None else [0] * slots])
    length_BS = torch.tensor([lengths if lengths is not None else layout.lengths])
    depths = len(layout.offset_D)
    agrees_BSN = torch.zeros(1, len(layout.lengths), depths - 1, dtype=torch.bool)
    if agrees is not None:
        agrees_BSN[0, layout.draft_segment, : len(agrees)] = torch.tensor(agrees, dtype=torch.bool)
    accepted_BS = torch.zeros(1, len(layout.lengths), dtype=torch.long)
    accepted_BS[0, best] = accepted
    acceptance = Acceptance(
        choice_BQ=choice_BQ,
        agrees_BSN=agrees_BSN,
        accepted_BS=accepted_BS,
        best_B=torch.tensor([best]),
        path_BD=layout.path_SD[best][None],
        run_BD=torch.tensor([run if run is not None else [0] * depths]),
        count_B=torch.tensor([count if count is not None else generated - before]),
        halted_B=torch.tensor([False]),
        ranked_BQR=ranked,
    )
    segment = layout.draft_segment
    return StepOutcome(
        inputs=StepInputs(layout, token_BQ, length_BS),
        acceptance=acceptance,
        before_B=torch.tensor([before]),
        generated_B=torch.tensor([generated]),
        chain_choice_BD=choice_BQ[:, chain_slots(layout)],
        chain_length_B1=length_BS[:, segment : segment + 1],
    )


def context_of(outcome, *rows, backbone=None):
    """Return the context of a proposal after texts, each a list of ids."""
    longest = max(map(len, rows))
    text_BL = torch.tensor([row + [9] * (longest - len(row)) for row in rows])
    length_B = torch.tensor([len(row) for row in rows])
    pending_B1 = text_BL.gather(1, length_B[:, None] - 1)
    return ProposalContext(outcome, text_BL, length_B, pending_B1, backbone)
