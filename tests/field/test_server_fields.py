"""Requests of the clients that people point at an OpenAI-compatible server, field by field."""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path

import openai
import pytest
import torch
from fastapi.testclient import TestClient
from openai.types import chat, completion_create_params
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
)

from jacobi_hf.config import KNOBS
from jacobi_hf.serving.app import build_app
from jacobi_hf.serving.fields import NEUTRAL, REFUSED
from jacobi_hf.serving.generation import _limit
from jacobi_hf.serving.messages import Message, for_template
from jacobi_hf.serving.requests import ChatRequest, CompletionRequest
from tests.helpers.tiny import EXAMPLE

NAME = "tiny/forced"
PROMPT = "Question: Anna has 12 apples and buys 30 more. How many apples does Anna have now?\nAnswer:"
OTHER = "Question: Ben has 3 boxes with 4 nuts each. How many nuts does Ben have?\nAnswer:"
LOOP = "def main("
MESSAGES = [{"role": "user", "content": "What is 17 + 25?"}]
KINDS = {
    "chat/completions": (ChatRequest, {"messages": MESSAGES}),
    "completions": (CompletionRequest, {"prompt": PROMPT}),
}
PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"

# What vLLM's server adds to the OpenAI API, in its own requests and those of its benchmarks.
VLLM_CHAT = {
    "add_generation_prompt",
    "add_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "cache_salt",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "documents",
    "guided_choice",
    "guided_decoding_backend",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "guided_whitespace_pattern",
    "ignore_eos",
    "include_reasoning",
    "include_stop_str_in_output",
    "kv_transfer_params",
    "length_penalty",
    "logits_processors",
    "media_io_kwargs",
    "min_p",
    "min_tokens",
    "mm_processor_kwargs",
    "priority",
    "prompt_logprobs",
    "repetition_penalty",
    "request_id",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "stop_token_ids",
    "structured_outputs",
    "top_k",
    "truncate_prompt_tokens",
    "use_beam_search",
    "vllm_xargs",
}
VLLM_COMPLETION = {*VLLM_CHAT, "prompt_embeds"} - {
    "add_generation_prompt",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "documents",
    "include_reasoning",
}


def keys(kind):
    return kind.__required_keys__ | kind.__optional_keys__


CLIENT = {
    "chat/completions": keys(chat.completion_create_params.CompletionCreateParamsStreaming),
    "completions": keys(completion_create_params.CompletionCreateParamsStreaming),
}


class Served:
    def __init__(self, model, tokenizer, **options):
        self.model, self.tokenizer = model, tokenizer
        self.http = TestClient(build_app(model, tokenizer, NAME, **options), raise_server_exceptions=False)
        self.client = openai.OpenAI(base_url="http://testserver/v1", api_key="-", http_client=self.http, max_retries=0)

    def post(self, path, **body):
        return self.http.post(f"/v1/{path}", json={**KINDS[path][1], "max_tokens": 12, **body})

    def choices(self, path="completions", **body):
        """Return the texts of the choices, from a whole answer and from a stream, which must agree."""
        answer = self.post(path, **body)
        assert answer.status_code == 200, answer.text
        choices = answer.json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        texts = [choice["message"]["content"] if "message" in choice else choice["text"] for choice in choices]
        pieces = [""] * len(texts)
        events = self.events(path, **body)
        for event in events:
            choice = event["choices"][0]
            pieces[choice["index"]] += (
                choice.get("delta", choice).get("content" if "delta" in choice else "text") or ""
            )
        assert pieces == texts
        assert events[-1]["usage"] == answer.json()["usage"]
        assert len({event["id"] for event in events}) == 1
        return texts

    def events(self, path, **body):
        lines = self.post(path, stream=True, **body).text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    def refusal(self, path, **body):
        answer = self.post(path, **body)
        assert answer.status_code == 400, (body, answer.text)
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error["message"]

    def generated(self, prompt=PROMPT, **options):
        ids = torch.tensor([self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt])
        options = {"do_sample": False, "max_new_tokens": 12, "decoding": None, **options}
        new = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return self.tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def tiny():
    return AutoModelForCausalLM.from_pretrained(EXAMPLE / "forced", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def served(tiny):
    return Served(tiny, AutoTokenizer.from_pretrained(EXAMPLE / "forced"))


QWEN_LIKE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m | tojson }}{% endfor %}"
    "{% if enable_thinking %}think{% endif %}{{ '<|im_start|>assistant\\n' }}"
)


@pytest.fixture(scope="module")
def caller(tiny):
    """A server whose template shows all that it reads, with transformers' response template of Qwen."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "forced")
    tokenizer.chat_template = QWEN_LIKE
    return Served(tiny, tokenizer)


def decisions(name):
    kinds = [kind for kind, _ in KINDS.values()]
    served = name in KNOBS or any(name in kind.model_fields for kind in kinds)
    return [
        word
        for word, is_it in (("served", served), ("neutral", name in NEUTRAL), ("refused", name in REFUSED))
        if is_it
    ]


@pytest.mark.parametrize("path", KINDS)
def test_every_field_that_a_client_may_send_has_one_decision(path):
    """A release of the openai package adds a field, or vLLM has one: somebody decides what the server does with it."""
    vllm = VLLM_CHAT if path == "chat/completions" else VLLM_COMPLETION
    for name in {*CLIENT[path], *vllm}:
        assert len(decisions(name)) == 1, name
        if decisions(name) == ["served"]:
            assert name in KINDS[path][0].model_fields, (path, name)


def test_no_field_has_two_decisions_and_the_page_has_the_same_ones():
    known = {*ChatRequest.model_fields, *CompletionRequest.model_fields, *NEUTRAL, *REFUSED}
    wanted = {name: decisions(name) for name in known}
    assert all(len(found) == 1 for found in wanted.values())
    words = {"served": "served", "refused": "refused", "no effect": "neutral"}
    page = {}
    for fields, text in re.findall(r"^\| (`.*?) \| (.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE):
        for name in re.findall(r"`(\w+)`", fields):
            page[name] = [word for start, word in words.items() if text.startswith(start)]
    assert page == wanted


@pytest.mark.parametrize("path", KINDS)
def test_refused_fields_are_named_in_a_sentence_and_harmless_values_pass(served, path):
    """A client asks for what the server cannot do: an error of the API, not an answer without it."""
    plain = served.choices(path)
    accepted = {}
    for name, refusal in REFUSED.items():
        message = served.refusal(path, **{name: {"x": 1}})
        assert message.startswith(f"{name}={{'x': 1}} is not served: ")
        assert message.endswith(".")
        accepted[name] = [None, *refusal.harmless]
    for number in range(max(map(len, accepted.values()))):
        assert (
            served.choices(path, **{name: values[min(number, len(values) - 1)] for name, values in accepted.items()})
            == plain
        )


@pytest.mark.parametrize("path", KINDS)
def test_fields_without_effect_leave_the_answer_alone(served, path):
    """Gateways and tracing libraries add fields about the user, the tier or the store to every request."""
    assert served.choices(path, **{name: {"any": "value"} for name in NEUTRAL}) == served.choices(path)


@pytest.mark.parametrize("path", KINDS)
def test_null_is_the_same_as_leaving_a_field_out(served, path):
    """Generated clients send every optional field, most of them null."""
    names = {*CLIENT[path]} - {"model", "messages", "prompt", "stream"}
    assert served.choices(path, **{**dict.fromkeys(names), "max_tokens": 12}) == served.choices(path)


@pytest.mark.parametrize("path", KINDS)
def test_unknown_fields_are_refused_with_the_nearest_name(served, path):
    """A typing error in a field must not change the answer silently."""
    assert "did you mean temperature?" in served.refusal(path, temprature=0.5)
    assert "leave it out" in served.refusal(path, zzzzz=1)


@pytest.mark.parametrize(
    ("path", "name", "value", "nothing"),
    [
        ("chat/completions", "echo", True, False),
        ("chat/completions", "best_of", 3, None),
        ("completions", "tools", [{}], []),
        ("completions", "parallel_tool_calls", True, False),
    ],
)
def test_a_field_of_the_other_endpoint_is_refused_if_it_asks_for_something(served, path, name, value, nothing):
    assert f"{name}={value} is for the other endpoint" in served.refusal(path, **{name: value})
    assert served.post(path, **{name: nothing}).status_code == 200


BODIES = {
    "langchain": {
        "best_of": 1,
        "frequency_penalty": 0,
        "logit_bias": {},
        "logprobs": None,
        "max_tokens": 12,
        "n": 1,
        "presence_penalty": 0,
        "prompt": [PROMPT, OTHER],
        "seed": None,
        "temperature": 0.0,
        "top_p": 1,
    },
    "a benchmark of vLLM": {
        "ignore_eos": False,
        "logprobs": None,
        "max_tokens": 12,
        "prompt": [PROMPT, OTHER],
        "repetition_penalty": 1.0,
        "temperature": 0.0,
    },
    "lm-evaluation-harness": {
        "max_tokens": 12,
        "prompt": [PROMPT, OTHER],
        "seed": 1234,
        "stop": ["<|endoftext|>", "\n\n\n"],
        "temperature": 0,
    },
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_whole_requests_of_known_clients(served, body):
    """The bodies that these clients send, with all their defaults spelt out."""
    assert served.choices(**body) == [served.generated(PROMPT), served.generated(OTHER)]


@pytest.mark.parametrize(
    "forms",
    [
        lambda encode: ([PROMPT], [PROMPT]),
        lambda encode: (encode(PROMPT), [PROMPT]),
        lambda encode: ([encode(PROMPT)], [PROMPT]),
        lambda encode: ([PROMPT, OTHER], [PROMPT, OTHER]),
        lambda encode: ([encode(OTHER), PROMPT], [OTHER, PROMPT]),
    ],
    ids=["list of one text", "token ids", "list of token ids", "several texts", "several kinds"],
)
def test_prompts_have_every_form_of_the_api(served, forms):
    """langchain sends a list of one string, evaluation harnesses send batches and token ids."""
    prompt, texts = forms(lambda text: served.tokenizer(text)["input_ids"])
    assert served.choices(prompt=prompt) == [served.generated(text) for text in texts]
    usage = served.post("completions", prompt=prompt).json()["usage"]
    assert usage["prompt_tokens"] == sum(len(served.tokenizer(text)["input_ids"]) for text in texts)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_token_ids_are_taken_as_they_are(served):
    """Ids that no text is tokenized to: the prompt must not go through text and back."""
    ids = [token for letter in "Question: 1 + 1" for token in served.tokenizer(letter)["input_ids"]]
    assert served.tokenizer(served.tokenizer.decode(ids))["input_ids"] != ids
    assert served.choices(prompt=ids, max_tokens=5) == [served.generated(ids, max_new_tokens=5)]
    assert served.post("completions", prompt=ids).json()["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("prompt", [[], [[]], [""], ["a", []], [1, "a"], [1.5], [True], {"a": 1}, [4096], [[-1]]])
def test_bad_prompts_are_refused(served, prompt):
    assert served.refusal("completions", prompt=prompt).startswith("prompt")


def test_a_later_prompt_that_is_bad_ends_a_stream_with_an_error(served):
    limited = Served(served.model, served.tokenizer, max_length=30)
    events = limited.events("completions", prompt=["1 + 1 =", PROMPT])
    assert "max-length" in events[-1]["error"]["message"]
    assert "max-length" in limited.refusal("completions", prompt=["1 + 1 =", PROMPT])


@pytest.mark.parametrize("path", KINDS)
def test_several_choices_are_those_of_successive_seeds(served, path):
    """Self-consistency and pass@k ask for n answers at once."""
    sampled = {"temperature": 3.0, "max_tokens": 8}
    wanted = [served.choices(path, seed=seed, **sampled)[0] for seed in (3, 4, 5)]
    assert len(set(wanted)) > 1
    assert served.choices(path, seed=3, n=3, **sampled) == wanted
    one, three = (served.post(path, seed=3, n=n, **sampled).json()["usage"] for n in (1, 3))
    assert one["prompt_tokens"] == three["prompt_tokens"]
    assert three["completion_tokens"] > one["completion_tokens"]
    assert "n: " in served.refusal(path, n=129)


def test_best_of_and_echo(served):
    assert served.choices(best_of=2, n=2) == 2 * [served.generated()]
    assert "best_of=3" in served.refusal("completions", best_of=3, n=2)
    assert served.choices(prompt=[PROMPT, OTHER], echo=True) == [
        text + served.generated(text) for text in (PROMPT, OTHER)
    ]
    assert served.choices(echo=True, stop=["Anna"]) == [PROMPT + served.generated().split("Anna")[0]]


class Slowly(LogitsProcessor):
    """Penalties by the definition of the API, token by token."""

    def __init__(self, prompt_tokens, frequency, presence):
        self.prompt_tokens, self.frequency, self.presence = prompt_tokens, frequency, presence

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        for row, ids in enumerate(input_ids.tolist()):
            answer = ids[self.prompt_tokens :]
            for token in set(answer):
                scores[row, token] -= answer.count(token) * self.frequency + self.presence
        return scores


@pytest.mark.parametrize(
    "penalties",
    [{"frequency_penalty": 1.5}, {"presence_penalty": 2}, {"frequency_penalty": -0.1, "presence_penalty": 2}],
)
@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.2, "seed": 7}])
def test_penalties_are_those_of_the_openai_api(served, penalties, sampled):
    """A user moves a prompt from another provider, penalties included."""
    frequency, presence = penalties.get("frequency_penalty", 0), penalties.get("presence_penalty", 0)
    slowly = Slowly(len(served.tokenizer(LOOP)["input_ids"]), frequency, presence)
    options = {"do_sample": True, "temperature": 1.2} if sampled else {}
    torch.manual_seed(7)
    wanted = served.generated(LOOP, max_new_tokens=24, logits_processor=[slowly], **options)
    assert served.choices(prompt=LOOP, max_tokens=24, **penalties, **sampled) == [wanted]
    torch.manual_seed(7)
    assert wanted != served.generated(LOOP, max_new_tokens=24, **options)


SAMPLED = {"do_sample": True, "temperature": 1.0}


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"top_k": 3}, {**SAMPLED, "top_k": 3}),
        ({"top_k": -1, "temperature": 1.4}, {**SAMPLED, "top_k": 0, "temperature": 1.4}),
        ({"min_p": 0.3}, {**SAMPLED, "min_p": 0.3}),
        ({"top_p": 0.7}, {**SAMPLED, "top_p": 0.7}),
        ({"top_k": 3, "temperature": 0}, {}),
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"min_tokens": 40, "max_tokens": 45}, {"min_new_tokens": 40, "max_new_tokens": 45}),
        ({"logit_bias": {"70": 100}}, {"sequence_bias": [[[70], 100.0]]}),
    ],
    ids=str,
)
def test_sampling_fields_are_those_of_generate(served, fields, options):
    """vLLM's clients send more sampling fields than the OpenAI API has."""
    torch.manual_seed(7)
    wanted = served.generated(**options)
    assert served.choices(seed=7, **fields) == [wanted]


def test_a_bias_counts_for_chats_too(served):
    token = served.tokenizer(" more")["input_ids"][0]
    assert served.choices("chat/completions", logit_bias={str(token): 100}, max_tokens=3) == [3 * " more"]


def test_a_stream_may_end_with_its_usage_alone(served):
    """The openai client and langchain count the tokens of a stream with stream_options."""
    whole = served.post("completions", n=2).json()
    events = served.events("completions", n=2, stream_options={"include_usage": True})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert not any("usage" in event for event in events[:-1])
    assert not any("usage" in event for event in served.events("completions", stream_options={"include_usage": False}))
    assert "add stream=true" in served.refusal("completions", stream_options={"include_usage": True})
    assert "stream_options.continuous_usage_stats" in served.refusal(
        "completions", stream=True, stream_options={"continuous_usage_stats": True}
    )
    assert keys(chat.ChatCompletionStreamOptionsParam) <= set(
        ChatRequest.model_fields["stream_options"].annotation.__args__[0].model_fields
    )


TOOL = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}
CALLS = "\n".join(f'<tool_call>\n{{"name": "add", "arguments": {{"a": {number}}}}}\n</tool_call>' for number in (1, 2))


@pytest.fixture
def seen(caller, monkeypatch):
    """The prompts that the model reads; its answer is two tool calls."""
    prompts = []

    def generate(input_ids, streamer=None, **_):
        prompts.append(caller.tokenizer.decode(input_ids[0]))
        answer = torch.tensor([caller.tokenizer(CALLS)["input_ids"]])
        if streamer:
            streamer.put(input_ids)
            for token in answer[0]:
                streamer.put(token[None])
            streamer.end()
        return torch.cat([input_ids, answer], dim=1)

    monkeypatch.setattr(caller.model, "generate", generate)
    return prompts


def calls_of(caller, **body):
    """Return the arguments of the tool calls, from a whole answer and from a stream, which must agree."""
    answer = caller.post("chat/completions", tools=[TOOL], **body).json()["choices"][0]
    found = [call["function"]["arguments"] for call in answer["message"].get("tool_calls", [])]
    events = caller.events("chat/completions", tools=[TOOL], **body)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert [call["function"]["arguments"] for delta in deltas for call in delta.get("tool_calls", [])] == found
    assert answer["finish_reason"] == events[-1]["choices"][0]["finish_reason"] == "tool_calls"
    return [json.loads(arguments)["a"] for arguments in found]


def test_tools_and_their_choice(caller, seen):
    """Agents say whether a tool must, may or must not be called, and whether several may be."""
    assert (
        calls_of(caller)
        == calls_of(caller, tool_choice="auto")
        == calls_of(caller, parallel_tool_calls=True)
        == [1, 2]
    )
    assert calls_of(caller, parallel_tool_calls=False) == [1]
    assert all('"name": "add"' in prompt for prompt in seen)
    seen.clear()
    caller.post("chat/completions", tools=[TOOL], tool_choice="none")
    assert not any("add" in prompt for prompt in seen)
    named = {"type": "function", "function": {"name": "add"}}
    for choice in ("required", named, {"type": "allowed_tools", "allowed_tools": {}}):
        assert caller.refusal("chat/completions", tools=[TOOL], tool_choice=choice).startswith("tool_choice=")


def test_tools_that_the_server_cannot_offer_are_refused(served, caller):
    assert "no place for tools" in served.refusal("chat/completions", tools=[TOOL])
    strict = {**TOOL, "function": {**TOOL["function"], "strict": True}}
    assert "tools.0.function.strict" in caller.refusal("chat/completions", tools=[strict])
    assert "tools.0.type" in caller.refusal("chat/completions", tools=[{"type": "custom", "custom": {"name": "x"}}])


def test_options_of_the_chat_template(caller, seen):
    """Qwen3's thinking is switched with an option of its template; other templates do not have it."""
    caller.post("chat/completions", chat_template_kwargs={"enable_thinking": True})
    assert "think" in seen[0]
    assert "no such option" in caller.refusal("chat/completions", chat_template_kwargs={"enable_thought": True})
    for name in ("tokenize", "add_generation_prompt", "return_dict", "tools"):
        assert "no option of a chat template" in caller.refusal("chat/completions", chat_template_kwargs={name: False})


MESSAGE_TYPES = {
    "system": chat.ChatCompletionSystemMessageParam,
    "developer": chat.ChatCompletionDeveloperMessageParam,
    "user": chat.ChatCompletionUserMessageParam,
    "assistant": chat.ChatCompletionAssistantMessageParam,
    "tool": chat.ChatCompletionToolMessageParam,
    "function": chat.ChatCompletionFunctionMessageParam,
}


def test_every_role_and_field_of_a_message_has_a_decision(served):
    roles = {
        typing.get_args(typing.get_type_hints(kind)["role"])[0]
        for kind in typing.get_args(chat.ChatCompletionMessageParam)
    }
    assert roles == {*MESSAGE_TYPES}
    for role, kind in MESSAGE_TYPES.items():
        assert keys(kind) <= {*Message.model_fields}, role
    for message, part in (
        ({"role": "function", "name": "f", "content": "3"}, "messages.0.role"),
        ({"role": "critic", "content": "3"}, "messages.0.role"),
        ({"role": "assistant", "audio": {"id": "a"}}, "messages.0.audio"),
        ({"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}, "messages.0.function_call"),
        ({"role": "assistant", "refusal": "no"}, "messages.0.refusal"),
        ({"role": "user", "content": "x", "zzz": 1}, "messages.0.zzz"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.0.content"),
        ({"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}, "messages.0.tool_calls.0"),
    ):
        assert served.refusal("chat/completions", messages=[message, *MESSAGES]).startswith(part)


def test_messages_reach_the_template_with_all_that_they_say(caller, seen):
    """An agent's history: text beside a tool call, the call's id, a developer, an answer sent back as it came."""
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    back = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
    }
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "1 + 1?", "name": "anna"},
        {**back, "content": "I add.", "reasoning": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
        back,
    ]
    caller.post("chat/completions", messages=messages)
    wanted = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?", "name": "anna"},
        {
            "role": "assistant",
            "content": "I add.",
            "reasoning_content": "hm",
            "tool_calls": [{**call, "function": {"name": "add", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
        {"role": "assistant", "content": ""},
    ]
    assert for_template(messages) == wanted
    assert seen[0] == caller.tokenizer.apply_chat_template(wanted, tokenize=False)


def test_the_openai_client_lists_and_retrieves_the_model(served):
    """Front ends ask for the model by name before they offer it."""
    assert [model.id for model in served.client.models.list()] == [NAME]
    assert served.client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="not served"):
        served.client.models.retrieve("other")


def test_the_openai_client_reads_several_choices_and_a_stream_with_usage(served):
    answer = served.client.completions.create(model=NAME, prompt=[PROMPT, OTHER], max_tokens=12, n=2)
    assert [choice.text for choice in answer.choices] == [
        text for one in (PROMPT, OTHER) for text in 2 * [served.generated(one)]
    ]
    chunks = list(
        served.client.chat.completions.create(
            model=NAME,
            messages=MESSAGES,
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
            store=True,
        )
    )
    assert chunks[-1].usage.completion_tokens > 0
    assert chunks[-1].choices == []


def test_texts_may_be_longer_than_the_positions_of_the_config():
    """Long-context users switch YaRN on as the model's card says, which leaves max_position_embeddings alone."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 2048}
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE / "forced", dtype=torch.float32, rope_parameters=rope).eval()
    server = Served(model, AutoTokenizer.from_pretrained(EXAMPLE / "forced"))
    ids = (server.tokenizer("1 + 2 = 3\n" * 400)["input_ids"])[:2100]
    assert len(ids) == 2100 > model.config.max_position_embeddings
    new = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, decoding=None)[0, 2100:]
    body = {"max_tokens": 4, "decoding": None}
    assert server.post("completions", prompt=ids, **body).json()["choices"][0]["text"] == server.tokenizer.decode(new)


@pytest.mark.parametrize(
    ("prompt_tokens", "max_length", "wanted"),
    [(10, None, 1024), (2000, None, 48), (2048, None, 1024), (5000, None, 1024), (10, 500, 490), (2000, 2010, 10)],
)
def test_an_answer_without_a_limit_fills_the_positions_or_has_the_default(tiny, prompt_tokens, max_length, wanted):
    options = GenerationConfig()
    _limit(tiny, prompt_tokens, options, max_length)
    assert options.max_new_tokens == wanted


def test_a_table_of_positions_is_a_limit():
    """GPT-2 reads positions from a table: one after its end would be an error, on a GPU the end of the server."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=8, n_layer=1, n_head=1))
    _limit(model, 30, GenerationConfig(max_new_tokens=3), None)
    with pytest.raises(ValueError, match="table of 32"):
        _limit(model, 30, GenerationConfig(max_new_tokens=4), None)


def test_a_server_may_have_a_limit_of_its_own(served):
    limited = Served(served.model, served.tokenizer, max_length=100)
    prompt = served.tokenizer(PROMPT)["input_ids"]
    answer = limited.post("completions", prompt=prompt, max_tokens=None, min_tokens=75).json()
    assert answer["usage"]["total_tokens"] == 100
    assert "the 100 that this server allows" in limited.refusal("completions", prompt=prompt, max_tokens=99)
    assert "the 100 that this server allows" in limited.refusal("completions", prompt=4 * prompt, max_tokens=None)
