"""Painted generations hold the text, and text is escaped."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from types import SimpleNamespace

import pytest

from jacobi_hf.demo import paint
from jacobi_hf.demo.race import Lane, Pieces
from jacobi_hf.streaming import Candidate, StepEvent

HOSTILE = '<script>window.pwned = 1</script><img src=x onerror="window.pwned=1">&amp;\'{{ value }}${window.pwned = 1}'


class Letters:
    def decode(self, ids, **_):
        return bytes(ids).decode(errors="replace")


def runner_of(steps, title="lane", error=""):
    pieces = Pieces(Letters())
    for step in steps:
        pieces.add(step)
    return SimpleNamespace(
        lane=Lane(title, None, Letters()),
        steps=steps,
        pieces=pieces,
        seconds=2.0,
        tokens=len(pieces.token_ids),
        error=error,
        tokens_per_forward=len(pieces.token_ids) / max(1, len(steps)),
    )


def text_of(html):
    return unescape(re.sub("<[^>]*>", "", html))


def steps_of(*parts):
    return [StepEvent(tuple(part.encode()), drafts) for part, drafts in parts]


def draft(source, text, verified=None):
    verified = len(text) if verified is None else verified
    return Candidate(source, tuple(text.encode()), verified, is_backbone=source == "window")


def test_a_pane_has_each_forward_in_its_colour_and_counts():
    html = paint.pane(runner_of(steps_of(("a", ()), ("bcd", ()), ("e\n", ()))), "prompt ")
    spans = re.findall(r'<span class="f(\d)" title="forward (\d)">([^<]*)</span>', html)
    assert spans == [("1", "1", "a"), ("2", "2", "bcd"), ("3", "3", "e\n")]
    counts = dict(re.findall(r'data-count="([^"]*)">([^<]*)<', html))
    assert counts == {"tokens": "6", "forwards": "3", "tokens per forward": "2.00", "tok/s": "3"}
    assert "prompt abcde\n" in text_of(html)


def test_whatever_is_written_is_escaped():
    runner = runner_of(
        steps_of((HOSTILE, (draft("window", HOSTILE), draft("lookup", HOSTILE)))), title=HOSTILE, error=HOSTILE
    )
    for html in (
        paint.pane(runner, HOSTILE),
        paint.Replay(runner).at(1),
        paint.message(HOSTILE, is_error=True),
        paint.empty_pane(HOSTILE),
    ):
        assert "<script" not in html
        assert "<img" not in html
    assert text_of(paint.pane(runner, HOSTILE)).count(HOSTILE) == 4  # title, error, prompt, text


STEPS = steps_of(
    ("a", ()),
    ("bc", (draft("window", "bXde", 3), draft("pool", "Xb"))),
    ("def", (draft("window", "ZZ"), draft("lookup", "de Z"))),
    ("g", (draft("window", "ZZ"),)),
)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (1, "Forward 1 of 4: the prompt, and the first token."),
        (2, "Forward 2 of 4: 5 guesses verified, 1 accepted (the window), 2 tokens."),
        (3, "Forward 3 of 4: 6 guesses verified, 2 accepted (lookup), 3 tokens."),
        (4, "Forward 4 of 4: 2 guesses verified, 0 accepted, 1 token."),
    ],
)
def test_a_replay_says_what_a_forward_did(number, said):
    html = paint.Replay(runner_of(STEPS)).at(number)
    assert f'data-forward="{number}"' in html
    assert said in html
    written = "".join(piece for piece in ("a", "bc", "def", "g")[:number])
    assert text_of(html).endswith(written)


def test_a_replay_says_the_shape_of_a_step():
    steps = [STEPS[0], *(replace(step, shape="window 16 + lookup 8") for step in STEPS[1:])]
    assert "Forward 2 of 4 (window 16 + lookup 8): 5 guesses verified" in paint.Replay(runner_of(steps)).at(2)


def test_a_replay_has_a_row_for_each_window_and_a_class_for_each_guess():
    html = paint.Replay(runner_of(STEPS)).at(4)
    rows = [re.findall(r'<td class="([^"]*)">([^<]*)</td>', row) for row in re.findall("<tr>.*?</tr>", html)]
    known = [("known", letter) for letter in "bcdef"]  # text after the forward of the first row
    assert rows == [
        [("accepted", "b"), ("wrong", "X"), ("early", "d"), ("early unverified", "e")],
        [*known[:2], ("wrong", "Z"), ("wrong", "Z")],
        [*known, ("wrong", "Z"), ("wrong", "Z")],
    ]


def test_a_replay_shows_the_last_windows_only():
    steps = steps_of(("a", ()), *[("b", (draft("window", "c"),))] * 20)
    for number in range(1, 22):
        html = paint.Replay(runner_of(steps)).at(number)
        numbers = [int(found) for found in re.findall(r"<th>(\d+)</th>", html)]
        assert numbers == list(range(max(2, number - paint.ROWS + 1), number + 1))


def test_a_number_beyond_the_forwards_is_the_last_one():
    assert paint.Replay(runner_of(STEPS)).at(99) == paint.Replay(runner_of(STEPS)).at(4)
    assert paint.Replay(runner_of(STEPS)).at(-1) == paint.Replay(runner_of(STEPS)).at(1)


def test_ordinary_decoding_has_no_guesses_to_show():
    html = paint.Replay(runner_of(steps_of(("a", ()), ("b", ())))).at(2)
    assert "Forward 2 of 2: no guesses, 1 token." in html
