"""The packed record against an oracle that writes the layout down slot by slot."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jacobi_hf.trainer import BadRecordError, PackedRecord
from jacobi_hf.trainer.data.record import COLUMNS, interleave
from tests.helpers.records import records

N = 4


@st.composite
def parts(draw):
    """Draw a prompt, noisy blocks of each view and clean blocks. All ids differ, except the first ones of a pair."""
    prompt_length, views, blocks, n = (
        draw(st.integers(1, 5)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
        draw(st.integers(2, 5)),
    )
    fresh = iter(range(1000))
    prompt = [next(fresh) for _ in range(prompt_length)]
    clean = [[next(fresh) for _ in range(n)] for _ in range(blocks)]
    noisy = [[[clean[j][0], *(next(fresh) for _ in range(n - 1))] for j in range(blocks)] for _ in range(views)]
    return prompt, noisy, clean


def built(prompt, noisy, clean):
    return PackedRecord.build(prompt, noisy, clean, states=[0] * len(clean))


def published(prompt, noisy, clean):
    """The published order: the prompt, then for each block its noisy and its clean version."""
    sequence = list(prompt)
    for noisy_block, clean_block in zip(noisy[0], clean, strict=True):
        sequence += noisy_block
        sequence += clean_block
    return sequence


@given(parts())
def test_a_record_is_the_layout_written_down_slot_by_slot(sample):
    prompt, noisy, clean = sample
    record = built(prompt, noisy, clean)
    row = record.to_row()
    assert row["prompt_ids"] == prompt
    assert row["prompt_ids_len"] == len(prompt)
    assert row["complete_training_sequence_ids"] == record.sequence.tolist() == published(prompt, noisy, clean)
    assert row["traj_position_indices"] == [0] * len(clean)
    assert row.get("more_noisy_ids", []) == [[token for block in view for token in block] for view in noisy[1:]]
    json.dumps(row)  # plain lists and numbers


@given(parts())
def test_sizes_are_those_of_the_lists(sample):
    prompt, noisy, clean = sample
    record = built(prompt, noisy, clean)
    assert (record.views, record.blocks, record.block_size) == (len(noisy), len(clean), len(clean[0]))
    assert len(record.sequence) == len(prompt) + 2 * record.block_size * record.blocks
    everything = [
        *prompt,
        *(t for view in noisy for block in view for t in block),
        *(t for block in clean for t in block),
    ]
    assert record.slots == len(everything)
    assert record.answer.tolist() == [token for block in clean for token in block]


@given(parts())
def test_both_blocks_of_a_pair_stand_where_the_answer_does(sample):
    """The clean blocks and their positions are those of the ordinary text `prompt + answer`."""
    prompt, noisy, clean = sample
    record = built(prompt, noisy, clean)
    text = [*prompt, *record.answer.tolist()]
    assert [text[position] for position in record.position_Tn.flat] == record.answer.tolist()
    assert record.position_Tn.flat[0] == len(prompt)


@given(parts())
def test_rows_and_records_convert_into_each_other(sample):
    prompt, noisy, clean = sample
    row = built(prompt, noisy, clean).to_row()
    as_arrays = {name: np.array(value) if name != "more_noisy_ids" else value for name, value in row.items()}
    in_two_dimensions = {**row, "prompt_ids": [row["prompt_ids"]], "prompt_ids_len": [len(prompt)]}
    for stored in (
        row,
        as_arrays,
        in_two_dimensions,
        {**row, "data_id": "a", "more_noisy_ids": row.get("more_noisy_ids")},
    ):
        record = PackedRecord.from_row(stored, block_size=len(clean[0]), vocab_size=1000)
        assert record.to_row() == row
        assert record.noisy_MTn.tolist() == noisy
        assert record.clean_Tn.tolist() == clean


@given(parts(), st.integers(0, 99))
def test_shortened_records_are_those_of_fewer_blocks(sample, slots):
    prompt, noisy, clean = sample
    record = built(prompt, noisy, clean)
    for count in range(1, len(clean) + 1):
        fewer = built(prompt, [view[:count] for view in noisy], clean[:count])
        assert record.first_blocks(count).to_row() == fewer.to_row()
    fitting = [count for count in range(1, len(clean) + 1) if record.first_blocks(count).slots <= slots]
    assert record.blocks_within(slots) == max(fitting, default=0)


@given(st.integers(0, 3), st.integers(1, 4), st.integers(2, 5))
def test_interleave_puts_the_first_view_before_and_the_others_after_the_clean_block(views, blocks, n):
    names_MTn = np.array([[[f"k{v}.{j}.{t}" for t in range(n)] for j in range(blocks)] for v in range(views)])
    clean_Tn = np.array([[f"l.{j}.{t}" for t in range(n)] for j in range(blocks)])
    expected = []
    for j in range(blocks):
        block_names = [f"k{v}.{j}" for v in range(views)]
        block_names.insert(min(1, views), f"l.{j}")
        expected += [f"{name}.{t}" for name in block_names for t in range(n)]
    assert interleave(names_MTn.reshape(views, blocks, n), clean_Tn).tolist() == expected


@given(parts(), st.data())
def test_a_row_that_lost_or_gained_a_token_is_refused(sample, data):
    row = built(*sample).to_row()
    sequence = list(row["complete_training_sequence_ids"])
    place = data.draw(st.integers(0, len(sequence) - 1))
    if data.draw(st.booleans()):
        del sequence[place]
    else:
        sequence.insert(place, 7)
    with pytest.raises(BadRecordError):
        PackedRecord.from_row({**row, "complete_training_sequence_ids": sequence}, block_size=len(sample[2][0]))


@given(parts(), st.data())
def test_a_prompt_or_first_token_that_was_changed_is_refused(sample, data):
    """Other ids of the blocks are free: any change of those gives another valid record."""
    prompt, _, clean = sample
    n, row = len(clean[0]), built(*sample).to_row()
    sequence = list(row["complete_training_sequence_ids"])
    place = data.draw(st.integers(0, len(sequence) - 1))
    sequence[place] += 5000
    changed = {**row, "complete_training_sequence_ids": sequence}
    if place < len(prompt) or (place - len(prompt)) % n == 0:
        with pytest.raises(BadRecordError):
            PackedRecord.from_row(changed)
    else:
        assert PackedRecord.from_row(changed).to_row() == changed


def test_each_kind_of_damage_is_named():
    good = records(1, N, blocks=3, prompt=5, views=2)[0]
    sequence = good["complete_training_sequence_ids"]
    views = good["more_noisy_ids"]
    length = good["prompt_ids_len"]
    order = [*sequence[:5], *([1] * 4), *([2] * 4), *([1] * 4), *([2] * 4), *([1] * 8)]
    cases = [
        ({"complete_training_sequence_ids": None}, "complete_training_sequence_ids are missing"),
        ({"traj_position_indices": 3}, "traj_position_indices are missing"),
        ({"prompt_ids_len": length + 1}, f"prompt_ids_len is {length + 1}, but there are {length}"),
        ({"prompt_ids": [], "prompt_ids_len": 0}, "0 prompt ids"),
        ({"traj_position_indices": []}, "0 blocks"),
        ({"complete_training_sequence_ids": sequence[:-1]}, r"28 ids are not P \+ 2 n T"),
        ({"prompt_ids": [t + 1 for t in good["prompt_ids"]]}, "does not begin with the prompt"),
        (
            {"complete_training_sequence_ids": order},
            "noisy and clean block 0 begin with different tokens: the blocks are not in",
        ),
        ({"more_noisy_ids": [views[0][:-1]]}, "a view in more_noisy_ids does not have 3 blocks of 4"),
        (
            {"more_noisy_ids": [[views[0][0], *views[0][1:4], views[0][4] + 1, *views[0][5:]]]},
            "a view in more_noisy_ids does not begin",
        ),
        ({"complete_training_sequence_ids": [*sequence[:-1], None]}, "ids that are no integers"),
        ({"complete_training_sequence_ids": [*sequence[:-1], "x"]}, "ids that are no integers"),
        ({"complete_training_sequence_ids": [*sequence[:-1], True]}, "ids that are no integers"),
        ({"complete_training_sequence_ids": [*sequence[:-1], 2.5]}, "ids that are no integers"),
        ({"complete_training_sequence_ids": [*sequence[:-1], 2**70]}, "64 bits"),
        ({"complete_training_sequence_ids": [*sequence[:-1], -1]}, "id -1 is negative"),
    ]
    for changes, message in cases:
        with pytest.raises(BadRecordError, match=f"row 3: .*{message}"):
            PackedRecord.from_row({**good, **changes}, "row 3")
    for column in COLUMNS:
        with pytest.raises(BadRecordError, match=f"row 3: the columns {column} are missing"):
            PackedRecord.from_row({name: value for name, value in good.items() if name != column}, "row 3")


def test_records_of_another_block_size_or_vocabulary_are_refused():
    (row,) = records(1, N)
    with pytest.raises(BadRecordError, match="row 3: its blocks have 4 tokens, but block_size=8: set block_size=4"):
        PackedRecord.from_row(row, "row 3", block_size=8)
    with pytest.raises(BadRecordError, match="outside the model's vocabulary of 2"):
        PackedRecord.from_row(row, "row 3", vocab_size=2)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (([], [[[1, 2]]], [[1, 2]]), "0 prompt ids"),
        (([5], [[]], []), "0 blocks"),
        (([5], [], [[1, 2]]), "do not fit"),
        (([5], [[[1]]], [[1]]), "blocks have 1 tokens"),
        (([5], [[[1, 2], [1]]], [[1, 2], [1, 2]]), "differ in length"),
        (([5], [[[1, 2]]], [[1, 2], [1, 2]]), "differ in the number of blocks"),
        (([5], [[[3, 2]]], [[1, 2]]), "begin with different tokens"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(sample, message):
    with pytest.raises(BadRecordError, match=message):
        built(*sample)


def test_each_block_needs_the_index_of_its_state():
    with pytest.raises(BadRecordError, match="2 blocks, but 1 indices"):
        PackedRecord.build([5], [[[1, 2], [3, 4]]], [[1, 2], [3, 4]], states=[0])
