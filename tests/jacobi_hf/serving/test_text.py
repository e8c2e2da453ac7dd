from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from jacobi_hf.serving.text import StopCutter

letters = st.text("ab", max_size=4)


@given(st.lists(letters, max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@example(["a", "b", "a"], ["abb", "ba"])
@example(["aba"], ["b", "aba"])
def test_pieces_add_up_to_the_text_before_the_first_stop_string(pieces, stops):
    text = "".join(pieces)
    cutter = StopCutter(stops)
    out = [cutter.feed(piece) for piece in pieces]
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    if ends:  # what ordinary generation would have written when the first of them was complete
        done = text[: ends[0]]
        assert "".join(out) + cutter.rest() == done[: min(done.find(stop) for stop in stops if stop in done)]
        assert cutter.stopped
    else:
        assert "".join(out) + cutter.rest() == text
        assert not cutter.stopped


@given(st.lists(letters, max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_no_more_is_held_back_than_a_stop_string_could_need(pieces, stops):
    cutter = StopCutter(stops)
    sent = ""
    seen = ""
    for piece in pieces:
        seen += piece
        sent += cutter.feed(piece)
        held = seen[len(sent) :]
        assert cutter.stopped or not held or any(stop.startswith(held) for stop in stops)
