"""One call with Jacobi decoding, by a model whose class nobody registered."""

from __future__ import annotations

import copy
import sys
import threading
from functools import partial
from types import FunctionType
from typing import Any

import pytest
import torch
from transformers import FalconForCausalLM, GenerationConfig, LlamaForCausalLM, TextStreamer

import jacobi_hf
from jacobi_hf import JacobiConfig
from jacobi_hf.drafts.loading import drafter_of, using_source
from jacobi_hf.integration import custom_generate as by_default
from jacobi_hf.integration.custom_generate import JacobiByDefault, entry, generate_by_default, generate_with_drafter
from jacobi_hf.output import JacobiDecoderOnlyOutput
from tests.helpers.drafters import random_drafter
from tests.helpers.models import fresh_model, tiny_model

ASKED = {"max_new_tokens": 20, "return_dict_in_generate": True}


class Stop(Exception):
    """Raised by a streamer in the middle of a call."""


class Stops:
    """A streamer that looks at a model, and then stops the call."""

    def __init__(self, model: Any) -> None:
        self.model, self.seen = model, []

    def put(self, value: Any) -> None:
        self.seen.append(type(self.model))
        if len(self.seen) == 3:
            raise Stop

    def end(self) -> None:
        pass


@pytest.fixture
def llama():
    return fresh_model("llama")


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
def test_a_call_decodes_with_jacobi_and_leaves_the_class(kind, prompt):
    model = tiny_model(kind)
    own, plain = type(model), model.generate(**prompt, **ASKED)
    output = generate_by_default(model=model, **prompt, **ASKED)
    assert isinstance(output, JacobiDecoderOnlyOutput)
    assert torch.equal(output.sequences, plain.sequences)
    assert type(model) is own
    assert not isinstance(model, JacobiByDefault)
    again = model.generate(**prompt, **ASKED)
    assert not isinstance(again, JacobiDecoderOnlyOutput)
    assert torch.equal(again.sequences, plain.sequences)


def test_positional_input_and_a_generation_config(llama, prompt):
    ids = prompt["input_ids"][1:]
    config = GenerationConfig(max_new_tokens=9, pad_token_id=0, jacobi_block_size=4)
    plain = llama.generate(ids, max_new_tokens=9, pad_token_id=0)
    assert torch.equal(generate_by_default(ids, config, model=llama), plain)
    # What transformers looks for a repository with is none of a model's business.
    assert torch.equal(
        generate_by_default(ids, model=llama, max_new_tokens=9, pad_token_id=0, revision="v1", token=False), plain
    )


def test_the_call_then_the_model_say_how_to_decode(llama, prompt):
    plain = llama.generate(**prompt, **ASKED)

    def slots(**knobs):
        output = generate_by_default(model=llama, **prompt, **ASKED, **knobs)
        assert torch.equal(output.sequences, plain.sequences)
        return output.jacobi_stats.mean_slots if isinstance(output, JacobiDecoderOnlyOutput) else None

    alone = {"jacobi_schedule": "constant", "jacobi_pool_size": 0, "jacobi_lookup_tokens": 0}
    assert slots(decoding=None) is None
    everything = slots(jacobi_schedule="constant")
    assert slots(**alone, jacobi_block_size=2) < slots(**alone, jacobi_block_size=5) < everything
    JacobiConfig(jacobi_block_size=2, **alone).save_defaults(llama)
    saved = slots()
    assert saved == slots(decoding="jacobi_multiblock") < slots(jacobi_block_size=5)
    assert slots(decoding=None) is None
    with pytest.raises(ValueError, match="jacobi_blok_size"):
        slots(jacobi_blok_size=3)
    with pytest.raises(ValueError, match="has no meaning with decoding='jacobi'"):
        slots(decoding="jacobi", jacobi_max_blocks=3)


def test_what_cannot_be_served_is_decoded_the_ordinary_way_unless_the_call_asks_for_both(llama, prompt):
    beams = llama.generate(**prompt, max_new_tokens=6, num_beams=2)
    with pytest.warns(UserWarning, match="decoding ordinarily"):
        assert torch.equal(generate_by_default(model=llama, **prompt, max_new_tokens=6, num_beams=2), beams)
    with pytest.raises(ValueError, match="drop one of the two"):
        generate_by_default(model=llama, **prompt, max_new_tokens=6, num_beams=2, decoding="jacobi_multiblock")
    assert type(llama) is LlamaForCausalLM


def test_a_call_that_fails_leaves_the_class(llama, prompt):
    streamer = Stops(llama)
    with pytest.raises(Stop):
        generate_by_default(model=llama, **prompt, **ASKED, streamer=streamer)
    assert type(llama) is LlamaForCausalLM
    inside = streamer.seen[0]
    assert issubclass(inside, LlamaForCausalLM)
    assert issubclass(inside, JacobiByDefault)
    assert (inside.__name__, inside.__module__) == (LlamaForCausalLM.__name__, LlamaForCausalLM.__module__)


def test_calls_may_overlap(llama, prompt):
    plain, outputs, both = llama.generate(**prompt, **ASKED), [], threading.Barrier(2, timeout=60)

    class Waits(TextStreamer):
        def __init__(self):
            self.waited = False

        def put(self, value):
            if not self.waited:
                self.waited = True
                both.wait()

        def end(self):
            pass

    one = {name: value[1:] if torch.is_tensor(value) else value for name, value in prompt.items()}

    def call(tokens):
        outputs.append(
            generate_by_default(
                model=llama, **one, max_new_tokens=tokens, streamer=Waits(), return_dict_in_generate=True
            )
        )

    threads = [threading.Thread(target=call, args=(tokens,)) for tokens in (4, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(output, JacobiDecoderOnlyOutput) for output in outputs)
    assert sorted(output.sequences.shape[1] for output in outputs) == [10, 26]
    assert all(torch.equal(output.sequences[0], plain.sequences[1, : output.sequences.shape[1]]) for output in outputs)
    assert type(llama) is LlamaForCausalLM


def test_a_class_can_be_registered_afterwards(llama, prompt):
    plain = llama.generate(**prompt, **ASKED)
    generate_by_default(model=llama, **prompt, **ASKED)
    jacobi_hf.register(LlamaForCausalLM)
    try:
        for output in (
            generate_by_default(model=llama, **prompt, **ASKED),
            llama.generate(**prompt, **ASKED, decoding="jacobi"),
        ):
            assert isinstance(output, JacobiDecoderOnlyOutput)
            assert torch.equal(output.sequences, plain.sequences)
    finally:
        jacobi_hf.unregister(LlamaForCausalLM)
    assert isinstance(generate_by_default(model=llama, **prompt, **ASKED), JacobiDecoderOnlyOutput)
    assert not isinstance(llama.generate(**prompt, **ASKED), JacobiDecoderOnlyOutput)


def test_a_model_with_the_function_as_its_generate_can_be_copied(llama, prompt):
    """As `from_pretrained(..., trust_remote_code=True)` leaves it."""
    llama.generate = partial(generate_by_default, model=llama)
    twin = copy.deepcopy(llama)
    assert twin.generate.keywords["model"] is twin
    assert torch.equal(
        twin.generate(**prompt, **ASKED).sequences, LlamaForCausalLM.generate(llama, **prompt, **ASKED).sequences
    )


def test_a_model_that_cannot_be_served_is_refused():
    model = FalconForCausalLM.__new__(FalconForCausalLM)
    with pytest.raises(TypeError, match="Falcon"):
        generate_by_default(model=model)
    assert type(model) is FalconForCausalLM


def test_another_custom_generate_is_left_alone(llama, prompt):
    def mine(model, input_ids, **kwargs):
        return type(model)

    assert generate_by_default(model=llama, **prompt, custom_generate=mine) is LlamaForCausalLM


def test_a_drafter_is_loaded_once_and_another_one_comes_back(tmp_path, prompt, monkeypatch):
    model = fresh_model("qwen3")
    plain = model.generate(**prompt, **ASKED)
    for number, name in enumerate(("own", "theirs")):
        random_drafter(model, number).save_pretrained(tmp_path / name)
    loads = []
    read = jacobi_hf.LoraDrafter.from_pretrained
    monkeypatch.setattr(
        jacobi_hf.LoraDrafter, "from_pretrained", lambda folder: loads.append(folder.name) or read(folder)
    )

    def custom(custom_generate):  # transformers calls the function from a frame with this argument
        output = generate_with_drafter(model=model, **prompt, **ASKED)
        assert torch.equal(output.sequences, plain.sequences)
        return drafter_of(model)

    theirs = custom(str(tmp_path / "theirs"))
    assert custom(str(tmp_path / "theirs")) is theirs
    assert loads == ["theirs"]
    jacobi_hf.load_drafter(model, tmp_path / "own")
    own = drafter_of(model)
    assert custom(str(tmp_path / "theirs")) is own
    with using_source(model, str(tmp_path / "theirs")):
        assert drafter_of(model) is theirs
    assert drafter_of(model) is own
    assert loads == ["theirs", "own"]
    with pytest.raises(jacobi_hf.DrafterError, match="no folder"):
        custom("./nowhere")
    assert drafter_of(model) is own
    with pytest.raises(TypeError, match="custom_generate='user/repository'"):
        generate_with_drafter(model=model, **prompt)


def test_what_is_installed_decodes_and_a_difference_is_told(monkeypatch, recwarn):
    assert entry("model") is generate_by_default
    assert entry("drafter") is generate_with_drafter
    assert not recwarn.list
    # The same functions as they lie in a repository made by another version.
    theirs = dict(vars(by_default), __version__="0.0.1")
    for function in (entry, generate_by_default):
        theirs[function.__name__] = FunctionType(
            function.__code__, theirs, function.__name__, closure=function.__closure__
        )
    with pytest.warns(UserWarning, match=rf"jacobi_hf {jacobi_hf.__version__} is installed.*0\.0\.1"):
        assert theirs["entry"]("model") is generate_by_default
    monkeypatch.setattr(sys, "meta_path", [])
    monkeypatch.delitem(sys.modules, "jacobi_hf")
    assert theirs["entry"]("model") is theirs["generate_by_default"]
