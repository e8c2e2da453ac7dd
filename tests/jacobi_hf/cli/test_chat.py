"""The verb `chat`: the cache of a conversation, commands, and Ctrl-C."""

from __future__ import annotations

import functools
import signal

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from jacobi_hf import loading
from jacobi_hf.cli import app
from jacobi_hf.cli._conversation import Conversation, StopOnInterrupt
from tests.helpers.models import fresh_model
from tests.helpers.tiny import EXAMPLE

run = CliRunner().invoke
FORCED = str(EXAMPLE / "forced")
QUESTIONS = [
    "Anna has 12 apples and buys 30 more. How many apples does Anna have now?",
    "Tom has 5 pens and buys 4 more. How many now?",
]
KNOBS = {"decoding": "jacobi_multiblock", "jacobi_schedule": "constant"}
WAYS = [KNOBS, {"decoding": "jacobi", "jacobi_block_size": 4}, {"decoding": None}]


@pytest.fixture(scope="module")
def load():
    return functools.cache(loading.load)


@pytest.fixture
def tiny(load):
    return load(FORCED, "float32", None)


@pytest.fixture
def say(load, monkeypatch):
    """Run the verb with lines as its input."""
    monkeypatch.setattr(loading, "load", load)

    def run_with(*lines, options=()):
        arguments = ["chat", "--model", FORCED, "--dtype", "float32", "--max-new-tokens", "48", *options]
        return run(app, arguments, input="".join(f"{line}\n" for line in lines))

    return run_with


class Widths:
    """How many tokens each forward of a model was given."""

    def __init__(self, model):
        self.seen = []
        self._handle = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, _, args, kwargs):
        self.seen.append((kwargs.get("input_ids") if kwargs.get("input_ids") is not None else args[0]).shape[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._handle.remove()


def answer_alone(model, tokenizer, messages, **options):
    """What ordinary `generate` answers to a conversation that it has never seen."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    arguments = {"max_new_tokens": 48, "do_sample": False, "decoding": None, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("knobs", WAYS)
def test_a_later_turn_prefills_only_new_tokens_and_answers_as_without_a_cache(tiny, knobs):
    model, tokenizer = tiny
    conversation = Conversation(model, tokenizer)
    arguments = {"max_new_tokens": 48, "do_sample": False, **knobs}
    for turn, question in enumerate(QUESTIONS):
        history = [*conversation.messages, {"role": "user", "content": question}]
        whole = len(tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=False))
        with Widths(model) as widths:
            answer = conversation.ask(question, arguments)
        assert widths.seen[0] == conversation.prefilled
        assert answer.ids == answer_alone(model, tokenizer, history)
        new = len(tokenizer(f"Question: {question}\nAnswer:")["input_ids"])
        assert conversation.prefilled == (whole if turn == 0 else new + 1)  # the last token written is in no cache yet
    assert [turn["role"] for turn in conversation.messages] == ["user", "assistant"] * 2


def test_a_changed_history_is_computed_again_from_the_change_on(tiny):
    model, tokenizer = tiny
    conversation = Conversation(model, tokenizer)
    conversation.ask(QUESTIONS[0], {"max_new_tokens": 48, "do_sample": False, **KNOBS})
    conversation.messages[1]["content"] = "Anna starts with 13."  # as a template that drops thoughts would
    history = [*conversation.messages, {"role": "user", "content": QUESTIONS[1]}]
    answer = conversation.ask(QUESTIONS[1], {"max_new_tokens": 48, "do_sample": False, **KNOBS})
    assert answer.ids == answer_alone(model, tokenizer, history)
    whole = len(tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=False))
    assert len(tokenizer(QUESTIONS[1])["input_ids"]) < conversation.prefilled < whole


class Letters:
    """A tokenizer of a tiny random model: a character is an id."""

    chat_template = None

    def __call__(self, text):
        return {"input_ids": [1 + ord(letter) % 20 for letter in text]}

    def decode(self, ids, **_):
        return "".join(chr(99 + int(i)) for i in ids)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3-sliding"])
def test_a_sliding_window_that_dropped_needed_tokens_is_computed_again(kind):
    model = fresh_model(kind)
    model.generation_config.pad_token_id = 0
    conversation = Conversation(model, Letters())
    arguments = {"max_new_tokens": 9, "do_sample": False, **KNOBS}
    conversation.ask("what is the first", arguments)
    conversation.messages[0]["content"] = "what is the other"
    answer = conversation.ask("and the next", arguments)
    prompt = torch.tensor([Letters()("".join(turn["content"] for turn in conversation.messages[:-1]))["input_ids"]])
    wanted = model.generate(prompt, max_new_tokens=9, do_sample=False, attention_mask=torch.ones_like(prompt))
    assert answer.ids == wanted[0, prompt.shape[1] :].tolist()
    assert (conversation.prefilled == prompt.shape[1]) == (kind == "qwen3-sliding")


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(tiny, monkeypatch):
    model, tokenizer = tiny
    conversation = Conversation(model, tokenizer)
    arguments = {"max_new_tokens": 48, "do_sample": False, **KNOBS}
    conversation.ask(QUESTIONS[0], arguments)
    before = list(conversation.messages)
    with pytest.raises(ValueError, match="beam"):
        conversation.ask(QUESTIONS[1], {**arguments, "num_beams": 2})
    with pytest.raises(ValueError, match="/clear starts a new one"):
        conversation.ask("1 2" * 3000, arguments)
    assert conversation.messages == before
    wanted = answer_alone(model, tokenizer, [*before, {"role": "user", "content": QUESTIONS[1]}])
    assert conversation.ask(QUESTIONS[1], arguments).ids == wanted


def test_the_positions_that_are_left_limit_an_answer(tiny, monkeypatch):
    model, tokenizer = tiny
    conversation = Conversation(model, tokenizer)
    asked = len(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTIONS[0]}], add_generation_prompt=True, return_dict=False
        )
    )
    monkeypatch.setattr(model.config, "max_position_embeddings", asked + 3)
    assert len(conversation.ask(QUESTIONS[0], {"max_new_tokens": 48, "do_sample": False, **KNOBS}).ids) == 3


def test_the_verb_talks(say, tiny):
    result = say(*QUESTIONS)
    assert result.exit_code == 0, result.output
    model, tokenizer = tiny
    first = tokenizer.decode(
        answer_alone(model, tokenizer, [{"role": "user", "content": QUESTIONS[0]}]), skip_special_tokens=True
    )
    history = [{"role": "user", "content": QUESTIONS[0]}, {"role": "assistant", "content": first.strip()}]
    second = answer_alone(model, tokenizer, [*history, {"role": "user", "content": QUESTIONS[1]}])
    assert result.stdout == f"{first}\n{tokenizer.decode(second, skip_special_tokens=True)}\n"
    assert result.stderr.count("tokens per forward") == 2


def test_clear_forgets(say):
    told = say(QUESTIONS[0], "", "/clear", QUESTIONS[0], "/exit", "never read")
    answers = told.stdout.splitlines()
    assert (told.exit_code, len(answers), answers[0]) == (0, 2, answers[1])
    prefilled = [line.rpartition(";")[2] for line in told.stderr.splitlines() if "prefilled" in line]
    assert prefilled[0] == prefilled[1]


def test_knobs_are_shown_and_changed_and_nothing_else(say):
    told = say(
        "/knobs", "/knobs decoding=none", QUESTIONS[0], "/knobs decoding=jacobi jacobi_block_size=4", QUESTIONS[0]
    )
    lines = told.stderr.splitlines()
    assert any(
        line.startswith("decoding=jacobi_multiblock jacobi_schedule=adaptive jacobi_block_size=16") for line in lines
    )
    assert "decoding=none" in lines
    assert "decoding=jacobi jacobi_block_size=4" in lines
    ordinary, jacobi = [line for line in lines if "prefilled" in line]
    assert " 1.00 tokens per forward" in ordinary
    assert " 1.00 tokens per forward" not in jacobi
    told = say(
        "/knobs jacobi_blok_size=4",
        "/knobs jacobi_block_size=x",
        "/knobs jacobi_block_size=[",
        "/knobs fast",
        "/help",
        "/knobs",
    )
    assert all(
        part in told.stderr
        for part in (
            "did you mean 'jacobi_block_size'",
            "an integer from 2",
            "=[ cannot be read",
            "no change of a knob",
            "no command",
        )
    )
    assert "jacobi_block_size=16" in told.stderr.splitlines()[-1]


@pytest.mark.parametrize(("presses", "exit_code"), [(1, 0), (2, 130)])
def test_ctrl_c_stops_an_answer_and_a_second_one_leaves(say, tiny, presses, exit_code):
    forwards = []

    def press(*_):
        forwards.append(1)
        if len(forwards) == 3:
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)

    handle = tiny[0].register_forward_pre_hook(press)
    try:
        told = say(QUESTIONS[0], "/knobs", options=["--decoding", "none"])
    finally:
        handle.remove()
    assert (told.exit_code, len(forwards)) == (exit_code, 3)
    assert ("[stopped; 3 tokens in 3 forwards" in told.stderr) == (presses == 1)
    assert ("interrupted" in told.stderr) == (presses == 2)


def test_ctrl_c_at_the_prompt_leaves_the_second_time_in_a_row(say, monkeypatch):
    inputs = iter([KeyboardInterrupt, "/knobs", KeyboardInterrupt, KeyboardInterrupt])

    def answer(*_):
        one = next(inputs)
        if one is KeyboardInterrupt:
            raise KeyboardInterrupt
        return one

    monkeypatch.setattr("builtins.input", answer)
    told = say()
    assert (told.exit_code, told.stderr.count("Ctrl-C again leaves."), next(inputs, None)) == (130, 2, None)


def test_after_an_interrupt_signals_are_as_they_were():
    before = signal.getsignal(signal.SIGINT)
    stop = StopOnInterrupt()
    with stop.watching():
        signal.raise_signal(signal.SIGINT)
        assert stop.is_stopped
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_without_a_template_turns_are_concatenated(say, load, monkeypatch):
    model, _ = load(FORCED, "float32", None)
    tokenizer = AutoTokenizer.from_pretrained(FORCED)
    tokenizer.chat_template = None
    monkeypatch.setattr(loading, "load", lambda *_: (model, tokenizer))
    told = say("def add(a, b):", "    return a")
    assert "has no chat template: turns are concatenated without one" in told.stderr
    arguments = {"max_new_tokens": 48, "do_sample": False, "decoding": None}
    text = "def add(a, b):"
    for turn in ("", "    return a"):
        text += turn
        inputs = tokenizer(text, return_tensors="pt")
        new = tokenizer.decode(
            model.generate(**inputs, **arguments)[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        assert new in told.stdout
        text += new
    assert say("x", options=["--system", "be brief"]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere/at/all"], "nowhere/at/all is no model"),
        (["--temperature", "-1"], "temperature=-1"),
        (["--jacobi-block-size", "1"], "from 2 to 1024"),
        (["--drafter", "nowhere/at/all"], "nowhere/at/all"),
    ],
)
def test_errors_are_one_line(arguments, message):
    result = run(app, ["chat", "--model", FORCED, *arguments], input="never read\n")
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("jacobi-hf")]
    assert line.startswith("jacobi-hf chat: ")
    assert message in line
