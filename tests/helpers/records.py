"""Packed records for tests: random ones, and those of a tiny model's own trajectories."""

from __future__ import annotations

import random

from jacobi_hf.trainer import AnswerConfig, NoiseSchedule, PackedRecord, collect_trajectories, pack
from tests.helpers.models import VOCAB

END = 1


def random_record(
    rng: random.Random,
    n: int,
    blocks: int | None = None,
    ended: bool | None = None,
    prompt: int | None = None,
    views: int = 1,
) -> dict:
    """Return the row of a valid packed record with random ids."""
    prompt_ids = [rng.randrange(2, VOCAB) for _ in range(prompt or rng.randint(1, 7))]
    blocks = blocks or rng.randint(1, 4)
    answer = [rng.randrange(2, VOCAB) for _ in range(blocks * n)]
    if ended if ended is not None else rng.random() < 0.5:
        last = rng.randrange((blocks - 1) * n, blocks * n)
        answer[last:] = [END] + [0] * (blocks * n - last - 1)

    def noisy(clean: list[int]) -> list[int]:
        first_wrong = rng.randint(1, n)
        return clean[:first_wrong] + [rng.randrange(2, VOCAB) if token != 0 else 0 for token in clean[first_wrong:]]

    clean_blocks = [answer[block * n : (block + 1) * n] for block in range(blocks)]
    noisy_views = [[noisy(clean) for clean in clean_blocks] for _ in range(views)]
    record = PackedRecord.build(prompt_ids, noisy_views, clean_blocks, states=[0] * blocks)
    return {"data_id": f"random {rng.random()}", **record.to_row()}


def records(count: int, n: int, seed: int = 0, **options) -> list[dict]:
    """Return rows of several random records."""
    rng = random.Random(seed)
    return [random_record(rng, n, **options) for _ in range(count)]


def own_records(model, count: int, n: int, tokens: int, seed: int = 0, visits: int = 1) -> list[dict]:
    """Return rows with the model's own trajectories of random prompts."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(2, VOCAB) for _ in range(rng.randint(2, 8))] for _ in range(count)]
    trajectories = collect_trajectories(model, prompts, n, AnswerConfig(tokens))
    schedule = NoiseSchedule(noise_levels=4)
    return [pack(t, schedule, f"own {i} {v}", rng) for v in range(visits) for i, t in enumerate(trajectories)]
