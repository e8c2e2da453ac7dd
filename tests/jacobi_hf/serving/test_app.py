"""The server answers the real `openai` client on the local machine."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from fastapi.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer

from jacobi_hf.serving.app import Server, build_app
from tests.helpers.tiny import EXAMPLE

NAME = "tiny/forced"
QUESTION = "Anna has 12 apples and buys 30 more. How many apples does Anna have now?"
PROMPT = f"Question: {QUESTION}\nAnswer:"
MESSAGES = [{"role": "user", "content": QUESTION}]


class Served:
    """A served model with its tokenizer, a client, and the number of its forwards so far."""

    def __init__(self, model, tokenizer, port):
        self.model = model
        self.tokenizer = tokenizer
        self.url = f"http://127.0.0.1:{port}/v1"
        self.client = openai.OpenAI(base_url=self.url, api_key="unused", max_retries=0, timeout=60)
        self.forwards = 0
        model.register_forward_pre_hook(self._count)

    def _count(self, *_):
        self.forwards += 1

    def generated(self, prompt, **options):
        """Return the text of ordinary `generate`."""
        inputs = self.tokenizer(prompt, return_tensors="pt")
        ids = self.model.generate(**inputs, **{"do_sample": False, "max_new_tokens": 64, "decoding": None, **options})
        return self.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def complete(self, prompt=PROMPT, **options):
        return self.client.completions.create(**{"model": NAME, "prompt": prompt, "max_tokens": 64, **options})

    def chat(self, messages=MESSAGES, **options):
        return self.client.chat.completions.create(
            **{"model": NAME, "messages": messages, "max_tokens": 64, **options}
        )

    def text(self, prompt=PROMPT, stream=False, **options):
        answer = self.complete(prompt, stream=stream, **options)
        return "".join(streamed(answer)[0]) if stream else answer.choices[0].text


@pytest.fixture(scope="module")
def tiny():
    """The forced checkpoint, whose generation config asks for Jacobi decoding."""
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE / "forced", dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(EXAMPLE / "forced")


@contextlib.contextmanager
def running(model, tokenizer):
    """Run a server in a thread; yield it and its port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = Server(build_app(model, tokenizer, NAME))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield server, listener.getsockname()[1]
        server.handle_exit(signal.SIGINT, None)
        thread.join()


@pytest.fixture(scope="module")
def served(tiny):
    with running(*tiny) as (_, port):
        yield Served(*tiny, port)


def streamed(stream):
    """Return the texts, the last finish reason and the usage of a stream of either kind."""
    chunks = list(stream)
    choices = [chunk.choices[0] for chunk in chunks]
    texts = [choice.delta.content if hasattr(choice, "delta") else choice.text for choice in choices]
    return [text for text in texts if text], choices[-1].finish_reason, chunks[-1].usage


@pytest.mark.parametrize("prompt", [PROMPT, "def main(", "Hällo, 3 + 4 ="])
def test_a_completion_is_what_generate_writes(served, prompt):
    answer = served.complete(prompt)
    assert answer.choices[0].text == served.generated(prompt)
    assert answer.usage.prompt_tokens == len(served.tokenizer(prompt)["input_ids"])


def test_a_chat_is_what_generate_writes_after_the_template(served):
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": "It is 42."},
        {"role": "user", "content": "Ben has 3 boxes with 4 nuts each."},
    ]
    for conversation in (MESSAGES, messages, [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]):
        plain = [{**m, "content": m["content"] if isinstance(m["content"], str) else QUESTION} for m in conversation]
        prompt = served.tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
        answer = served.chat(conversation).choices[0]
        assert answer.message.content == served.generated(prompt)
        assert answer.finish_reason == "stop"


@pytest.mark.parametrize("kind", ["complete", "chat"])
def test_a_stream_comes_token_by_token_and_adds_up(served, kind):
    whole = getattr(served, kind)()
    texts, finish, usage = streamed(getattr(served, kind)(stream=True))
    choice = whole.choices[0]
    assert "".join(texts) == (choice.text if kind == "complete" else choice.message.content)
    assert (finish, usage) == (choice.finish_reason, whole.usage)
    assert len(texts) >= usage.completion_tokens - 2


def test_a_stream_ends_as_the_protocol_says(served):
    body = {"model": NAME, "prompt": PROMPT, "stream": True, "max_tokens": 3}
    text = httpx.post(f"{served.url}/completions", json=body, timeout=60).text
    assert text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("kind", ["complete", "chat"])
@pytest.mark.parametrize("stop", ["30 =", ["nowhere", " The ans"], "12 apples. Anna b"])
def test_the_text_ends_before_a_stop_string(served, kind, stop):
    stops = [stop] if isinstance(stop, str) else stop
    wanted = min((served.generated(PROMPT).split(one)[0] for one in stops), key=len)
    whole = getattr(served, kind)(stop=stop).choices[0]
    texts, finish, _ = streamed(getattr(served, kind)(stop=stop, stream=True))
    assert (whole.text if kind == "complete" else whole.message.content) == "".join(texts) == wanted
    assert whole.finish_reason == finish == "stop"


def test_max_tokens(served):
    answer = served.complete(max_tokens=7)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (7, "length")
    assert answer.choices[0].text == served.generated(PROMPT, max_new_tokens=7)
    assert served.chat(max_tokens=openai.omit, max_completion_tokens=7).usage.completion_tokens == 7


def test_without_max_tokens_the_answer_may_fill_the_models_positions(served):
    prompt = "1 + 2 = 3\n" * 250
    room = 2048 - len(served.tokenizer(prompt)["input_ids"])
    answer = served.complete(prompt, max_tokens=openai.omit, logit_bias=openai.omit)
    assert answer.usage.completion_tokens == room < 1024


def test_temperature_and_seed(served):
    torch.manual_seed(5)
    wanted = served.generated(PROMPT, do_sample=True, temperature=1.5)
    assert served.text(temperature=1.5, seed=5) == wanted
    assert served.text(temperature=1.5, seed=5, stream=True) == wanted
    assert len({served.text(temperature=1.5, seed=seed) for seed in (5, 6, 7)}) > 1
    assert served.text(temperature=0, seed=5) == served.generated(PROMPT)


def test_more_options_of_generation(served):
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 20}
    body = {"generation_config": json.dumps({**options, "max_new_tokens": 30})}
    assert served.text(max_tokens=openai.omit, extra_body=body) == served.generated(
        PROMPT, max_new_tokens=30, **options
    )


def test_clients_at_once_get_their_own_answers(served):
    requests = [{"seed": seed, "temperature": 1.5} for seed in (1, 2)] + [
        {"stop": " more"},
        {"extra_body": {"decoding": None}},
    ] * 2
    alone = [served.text(**request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: served.text(stream=True, **request), requests))
    assert together == alone


def test_clients_that_leave_end_their_generation(served):
    """One client leaves in the middle of its stream, one in the queue, one while it waits for a whole answer."""
    long = {"max_tokens": 1500, "extra_body": {"decoding": None}, "logit_bias": openai.omit}
    before = served.forwards
    stream = served.complete("def", **long, stream=True)
    next(iter(stream))
    with pytest.raises(openai.APITimeoutError):
        served.client.with_options(timeout=0.1).completions.create(model=NAME, prompt="class", **long)
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        served.client.with_options(timeout=0.3).completions.create(model=NAME, prompt="class", **long)
    assert served.text() == served.generated(PROMPT)
    assert served.forwards - before < 1400


@pytest.mark.parametrize("stream", [False, True])
def test_knobs_of_a_request(served, stream):
    wanted = served.generated(PROMPT)
    forwards = {}
    knobs = {
        "served": {},
        "ordinary": {"decoding": None},
        "one block": {"decoding": "jacobi", "jacobi_block_size": 4},
        "lookup alone": {"jacobi_max_blocks": 0},
        "in the generation config": {"generation_config": json.dumps({"decoding": None})},
    }
    for name, body in knobs.items():
        before = served.forwards
        assert served.text(extra_body=body, stream=stream) == wanted
        forwards[name] = served.forwards - before
    assert forwards["ordinary"] == forwards["in the generation config"] == served.complete().usage.completion_tokens
    assert forwards["served"] < forwards["one block"] < forwards["ordinary"]
    assert forwards["served"] < forwards["lookup alone"] < forwards["ordinary"]


BAD = [
    ({"jacobi_blok_size": 4}, 400, "did you mean 'jacobi_block_size'"),
    ({"jacobi_block_size": 5000}, 400, "an integer from 2 to 1024"),
    ({"decoding": "jacoby"}, 400, "did you mean 'jacobi'"),
    ({"decoding": None, "jacobi_block_size": 8}, 400, "given without decoding"),
    ({"decoding": "jacobi", "jacobi_pool_size": 8}, 400, "no meaning with decoding='jacobi'"),
    ({"jacobi_schedule": "adaptiv"}, 400, "did you mean 'adaptive'"),
    ({"jacobi_schedule": 3}, 400, "allowed: 'adaptive', 'constant'"),
    ({"jacobi_verify_width": 4}, 400, "load_drafter"),
    ({"generation_config": '{"num_beams": 2}'}, 400, "generation_config.num_beams is not served"),
    (
        {"generation_config": '{"forced_eos_token_id": 99999}'},
        400,
        "generation_config.forced_eos_token_id is not served",
    ),
    ({"generation_config": '{"jacobi_blok_size": 2}'}, 400, "did you mean 'jacobi_block_size'"),
    (
        {"generation_config": '{"top_k": "x"}'},
        400,
        "generation_config.top_k: input should be a valid integer; it is 'x'",
    ),
    ({"generation_config": '{"max_new_tokens": 3.5}', "max_tokens": None}, 400, "generation_config.max_new_tokens"),
    ({"generation_config": "{"}, 400, "generation_config is not JSON"),
    ({"generation_config": "[1]"}, 400, "generation_config is not a JSON object but"),
    ({"model": "other"}, 404, "'other' is not served"),
    ({"max_tokens": -1}, 400, "max_tokens: input should be greater than or equal to 1; it is -1"),
    ({"max_tokens": 2.5}, 400, "max_tokens"),
    ({"temperature": "hot"}, 400, "temperature: input should be a valid number; it is 'hot'"),
    ({"temperature": -1}, 400, "temperature"),
    ({"top_p": 2}, 400, "top_p"),
    ({"seed": "x"}, 400, "seed"),
    ({"stop": ["a", ""]}, 400, "stop"),
    ({"n": 0}, 400, "n: input should be greater than or equal to 1"),
    ({"unknown": 1}, 400, "unknown is no field of a request"),
]
BAD_PROMPTS = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": 5}, "prompt must be a text"),
    ({}, "prompt is missing"),
]
BAD_MESSAGES = [
    ({"messages": []}, "messages"),
    ({"messages": "x"}, "messages"),
    ({}, "messages is missing"),
    ({"messages": ["x"]}, "messages.0"),
    ({"messages": [{"content": "x"}]}, "messages.0.role is missing"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "should be 'text'; it is 'image_url'"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "property name",
    ),
    ({"messages": MESSAGES, "logit_bias": {"x": 1}}, "logit_bias"),
    ({"messages": MESSAGES, "logit_bias": {"9999999": 1}}, "9999999"),
]


def refusal(served, path, stream, body):
    response = httpx.post(f"{served.url}/{path}", json={"stream": stream, **body}, timeout=60)
    assert set(response.json()) == {"error"}, response.text
    assert "Traceback" not in response.text
    return response.status_code, response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_refused_with_a_message(served, stream):
    for path, body in (("completions", {"prompt": PROMPT}), ("chat/completions", {"messages": MESSAGES})):
        for change, wanted, part in BAD:
            status, message = refusal(served, path, stream, {**body, **change})
            assert (status, part in message) == (wanted, True), (path, change, status, message)
    for path, bad in (("completions", BAD_PROMPTS), ("chat/completions", BAD_MESSAGES)):
        for body, part in bad:
            status, message = refusal(served, path, stream, body)
            assert (status, part in message) == (400, True), (path, body, status, message)
    assert served.text() == served.generated(PROMPT)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\0", '{"prompt": "x", "temperature": NaN}'])
def test_a_body_that_is_no_request_is_refused(served, content):
    response = httpx.post(f"{served.url}/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_the_client_raises_its_own_errors(served):
    with pytest.raises(openai.BadRequestError, match="jacobi_block_size"):
        served.chat(extra_body={"jacobi_block_size": 1})
    with pytest.raises(openai.NotFoundError, match="not served"):
        served.chat(model="other", stream=True)


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_reported_and_the_server_goes_on(served, monkeypatch, stream):
    def fail(**_):
        raise RuntimeError('out of "memory"\n')

    monkeypatch.setattr(served.model, "generate", fail)
    with pytest.raises(openai.InternalServerError, match="RuntimeError: out of"):
        served.complete(stream=stream)
    monkeypatch.undo()
    assert served.text() == served.generated(PROMPT)


def test_a_failure_in_the_middle_of_a_stream_ends_it_with_an_error(served):
    last = served.forwards + 6

    def fail(*_):
        if served.forwards > last:
            raise ZeroDivisionError

    handle = served.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(openai.APIError, match="ZeroDivisionError"):
            list(served.complete(stream=True, extra_body={"decoding": None}))
    finally:
        handle.remove()
    assert served.text() == served.generated(PROMPT)


def test_a_server_that_stops_ends_answers_with_an_error(served, tiny):
    with running(*tiny) as (server, port):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0)
        stream = client.completions.create(model=NAME, prompt="def", max_tokens=1500, stream=True)
        next(iter(stream))
        server.handle_exit(signal.SIGINT, None)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)


def test_models_and_health_and_nothing_else(served):
    assert [model.id for model in served.client.models.list()] == [NAME]
    root = served.url.removesuffix("/v1")
    assert httpx.get(f"{root}/health").json() == {"status": "ok"}
    for path in ("/load_model", "/reset", "/v1/audio/transcriptions", "/v1/responses"):
        assert httpx.post(f"{root}{path}", json={"model": "other"}).status_code == 404


def test_a_model_without_a_chat_template_serves_completions(tiny):
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "forced")
    tokenizer.chat_template = None
    client = TestClient(build_app(tiny[0], tokenizer, NAME))
    refused = client.post("/v1/chat/completions", json={"messages": MESSAGES})
    assert (refused.status_code, "no chat template" in refused.text) == (400, True)
    assert (
        client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 3}).json()["usage"]["completion_tokens"]
        == 3
    )


def test_answers_after_qwens_own_template_are_parsed_by_transformers(tiny):
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "forced")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '<|im_start|>assistant\\n' }}"
    build_app(tiny[0], tokenizer, NAME)
    assert tokenizer.response_template is None


def test_steps_are_compiled_on_request(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(
        tiny[0],
        "generate",
        lambda generation_config, **arguments: seen.append(generation_config) or arguments["input_ids"],
    )
    for compiled in (False, True):
        TestClient(build_app(*tiny, NAME, compiled=compiled)).post("/v1/completions", json={"prompt": PROMPT})
    assert [config.compile_config is None for config in seen] == [True, False]
