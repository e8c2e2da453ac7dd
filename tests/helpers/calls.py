"""Short calls of `generate` for tests of how steps run: settings, arguments and what is compared."""

from __future__ import annotations

import torch

# Every step sends all guesses, so that counts do not depend on the clock.
CONSTANT = {"jacobi_schedule": "constant"}
BOTH = {
    **CONSTANT,
    "jacobi_block_size": 4,
    "jacobi_lookup_tokens": 4,
    "jacobi_pool_size": 2,
    "jacobi_branch_length": 3,
}
SETTINGS = {
    "jacobi": {"decoding": "jacobi", "jacobi_block_size": 4},
    "window": {**CONSTANT, "jacobi_block_size": 4, "jacobi_lookup_tokens": 0, "jacobi_pool_size": 0},
    "lookup alone": {**CONSTANT, "jacobi_max_blocks": 0, "jacobi_lookup_tokens": 4, "jacobi_pool_size": 0},
    "both": BOTH,
    "late blocks": {**BOTH, "jacobi_activation_ratio": 0.5},
}
CALLS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 10, "repetition_penalty": 1.2},
    "ends": {"do_sample": False, "eos_token_id": list(range(1, 9))},
}


def prompt(rows, columns, seed=0, alphabet=6):
    return torch.randint(1, alphabet, (rows, columns), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, **arguments):
    torch.manual_seed(5)
    arguments = {"decoding": "jacobi_multiblock", "pad_token_id": 0, "max_new_tokens": 24, **arguments}
    return model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **arguments)


def counts(stats):
    return stats.forwards, stats.new_tokens, stats.row_forwards, stats.accepted_lengths, stats.accepted_from
