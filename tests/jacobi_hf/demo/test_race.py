"""A generation that takes turns with others writes the same text as alone."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from jacobi_hf.demo import race as races
from jacobi_hf.demo.race import Lane, Pieces, Race, Runner, twin
from jacobi_hf.streaming import StepEvent
from tests.helpers.models import VOCAB, tiny_model

PROMPT = [5, 6, 7, 8]
OPTIONS = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}


class Letters:
    """A tokenizer whose ids are bytes, so that a character may have several ids."""

    def decode(self, ids, **_):
        return bytes(ids).decode(errors="replace")


def lane(title="lane", decoding="jacobi_multiblock", model=None):
    return Lane(title, model or tiny_model("qwen3"), Letters(), decoding)


def runner(one, **options):
    return Runner(one, PROMPT, OPTIONS | {"decoding": one.decoding} | options)


def threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith("runner ")}


def assert_all_end(before):
    until = time.monotonic() + 20
    while threads() - before and time.monotonic() < until:
        time.sleep(0.01)
    assert not threads() - before


def test_each_lane_writes_what_it_writes_alone():
    alone = tiny_model("qwen3").generate(torch.tensor([PROMPT]), **OPTIONS)[0, 4:].tolist()
    before = threads()
    with Race([runner(lane("a", None)), runner(lane("b", model=twin(tiny_model("qwen3"))))]) as race:
        while not race.is_over:
            race.advance(0.01)
        ordinary, jacobi = race.runners
    assert [one.pieces.token_ids for one in race.runners] == [alone, alone]
    assert (ordinary.tokens_per_forward, len(ordinary.steps)) == (1.0, 20)
    assert jacobi.tokens_per_forward == 20 / len(jacobi.steps) >= 1.0
    assert not ordinary.error + jacobi.error
    assert_all_end(before)


def test_the_next_turn_goes_to_the_runner_with_the_least_time():
    turns = []

    class Clocked:
        is_done = False

        def __init__(self, name, cost):
            self.name = name
            self.cost = cost
            self.seconds = 0.0

        def turn(self):
            turns.append(self.name)
            self.seconds += self.cost
            self.is_done = self.seconds >= 6

        def stop(self):
            pass

    Race([Clocked("slow", 3), Clocked("quick", 1)]).advance(1.0)
    assert turns == ["slow", "quick", "quick", "quick", "slow", "quick", "quick", "quick"]


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_a_stop_ends_the_threads_and_is_no_error(turns):
    before = threads()
    race = Race([runner(lane()), runner(lane("other", None))])
    for one in race.runners:
        for _ in range(turns):
            one.turn()
    race.stop()
    assert race.is_over
    assert_all_end(before)
    assert [(len(one.steps), one.error) for one in race.runners] == [(turns, "")] * 2


def test_a_race_that_nobody_watches_ends(monkeypatch):
    monkeypatch.setattr(races, "PATIENCE", 0.05)
    before = threads()
    Race([runner(lane())])
    assert_all_end(before)


def test_an_error_of_generate_is_reported():
    race = Race([runner(lane(), max_new_tokens=-3)])
    race.advance(20)
    (one,) = race.runners
    assert one.is_done
    assert "max_new_tokens" in one.error
    assert "\n" not in one.error


def test_a_twin_shares_weights_and_nothing_else():
    model = tiny_model("qwen3")
    other = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert other.config is not model.config
    assert other.model.layers[0] is not model.model.layers[0]
    assert torch.equal(other(torch.arange(VOCAB)[None]).logits, model(torch.arange(VOCAB)[None]).logits)


def test_a_character_of_several_forwards_belongs_to_the_last_one():
    pieces = Pieces(Letters())
    euro = tuple("€".encode())
    for ids in ((*b"a", euro[0]), euro[1:2], (euro[2], *b"b"), euro[:1]):
        pieces.add(StepEvent(ids))
    assert pieces.of_step == ["", "", "a€b", ""]
    pieces.finish()
    assert pieces.of_step == ["", "", "a€b", "\ufffd"]


def test_no_steps_have_no_pieces():
    pieces = Pieces(SimpleNamespace(decode=lambda *_, **__: ""))
    pieces.finish()
    assert not pieces.of_step
