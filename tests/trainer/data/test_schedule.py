"""Noise schedules against the paper's formulas, and the packed record."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jacobi_hf.trainer import NoiseSchedule, PackedRecord, Trajectory, pack
from jacobi_hf.trainer.data.schedule import END_POINTS, NOISES, PHASES, kinds, noise_of

RNG = random.Random(0)


def test_end_points_of_reference_and_paper():
    assert NoiseSchedule(noise_levels=5).levels() == [0, 0.25, 0.5, 0.75, 1]
    assert NoiseSchedule(noise_levels=4, end_points="paper").levels() == [0, 0.25, 0.5, 0.75]
    assert NoiseSchedule(noise_levels=1).levels() == [0]
    assert NoiseSchedule(noise_levels=3, min_noise=0.5).levels() == [0.5, 0.75, 1]


def test_targets_of_each_kind():
    def targets(kind, blocks=7):
        return NoiseSchedule(kind, noise_levels=3, phase="fixed").targets(blocks, random.Random(1))

    assert targets("progressive") == [0, 0.5, 1, 0, 0.5, 1, 0]
    assert targets("reverse") == [1, 0.5, 0, 1, 0.5, 0, 1]
    assert targets("constant", 2) == [1, 1]
    assert set(targets("random", 200)) == {0, 0.5, 1}


def test_random_phase_reaches_high_noise_in_short_samples():
    schedule = NoiseSchedule(noise_levels=8)
    reached = {schedule.targets(2, random.Random(seed))[0] for seed in range(100)}
    assert reached == set(schedule.levels())
    fixed = NoiseSchedule(noise_levels=8, phase="fixed")
    assert max(fixed.targets(2, RNG)) < 0.2


def test_both_definitions_of_noise():
    fixed = [1, 2, 3, 4, 5, 6, 7, 8]
    state = [1, 2, 9, 4, 9, 6, 7, 8]
    assert noise_of(state, fixed, 8, "suffix") == 6 / 8
    assert noise_of(state, fixed, 8, "fraction") == 2 / 8
    assert noise_of(state, fixed, 4, "suffix") == 2 / 8  # nothing is wrong after the end
    assert noise_of(fixed, fixed, 8, "suffix") == 0


def test_cyclic_chooses_by_the_number_of_the_state():
    states = [[[9, 9, 9, 9], [9, 9, 9, 1], [9, 9, 2, 1], [9, 3, 2, 1], [4, 3, 2, 1]]] * 3
    assert NoiseSchedule("cyclic", noise_levels=3, phase="fixed").choose(states, [4] * 3, RNG) == [4, 2, 0]


@st.composite
def trajectories(draw):
    n = draw(st.integers(2, 6))
    answer = draw(st.lists(st.integers(2, 9), min_size=1, max_size=4 * n))
    blocks = []
    for start in range(0, len(answer), n):
        part = answer[start : start + n]
        fixed = part + [0] * (n - len(part))
        firsts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=n - 1)))
        states = [
            [*fixed[:f], *([99] if f < len(part) else fixed[f : f + 1]), *fixed[f + 1 :]]
            for f in firsts
            if f < len(part)
        ]
        blocks.append([*states, fixed])
    return Trajectory(draw(st.lists(st.integers(2, 9), min_size=1, max_size=4)), answer, blocks)


schedules = st.builds(
    NoiseSchedule,
    kind=st.sampled_from(kinds()),
    noise_levels=st.integers(1, 9),
    end_points=st.sampled_from(END_POINTS),
    phase=st.sampled_from(PHASES),
    noise=st.sampled_from(NOISES),
)


@given(trajectories(), schedules, st.integers(0, 99), st.integers(1, 3))
def test_packed_records_keep_the_format(trajectory, schedule, seed, views):
    row = pack(trajectory, schedule, "name", random.Random(seed), views)
    record = PackedRecord.from_row(row)
    assert row["data_id"] == "name"
    assert record.prompt_P.tolist() == trajectory.prompt_ids
    assert record.views == views
    for number, states in enumerate(trajectory.blocks):
        assert record.clean_Tn[number].tolist() == states[-1]
        assert record.noisy_MTn[0, number].tolist() == states[record.state_T[number]]
        for view in range(views):
            assert record.noisy_MTn[view, number].tolist() in states


@given(trajectories(), st.integers(0, 99))
def test_the_nearest_state_is_taken(trajectory, seed):
    schedule, n = NoiseSchedule("random", noise_levels=5), len(trajectory.blocks[0][0])
    lengths = [min(n, len(trajectory.answer_ids) - n * b) for b in range(len(trajectory.blocks))]
    chosen = schedule.choose(trajectory.blocks, lengths, random.Random(seed))
    rng = random.Random(seed)
    rng.randrange(5)  # the phase
    for states, length, index in zip(trajectory.blocks, lengths, chosen, strict=True):
        target = rng.choice(schedule.levels())
        gaps = [abs(noise_of(state, states[-1], length, "suffix") - target) for state in states]
        assert gaps[index] == min(gaps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "linear"}, "kind='linear'"),
        ({"noise_levels": 0}, "noise_levels=0"),
        ({"noise_levels": True}, "noise_levels=True"),
        ({"min_noise": 0.5, "max_noise": 0.2}, "min_noise=0.5"),
        ({"phase": "any"}, "phase='any'"),
        ({"end_points": "x"}, "end_points='x'"),
        ({"noise": "y"}, "noise='y'"),
    ],
)
def test_bad_schedules_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(**options)
