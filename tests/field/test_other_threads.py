"""Field reports, other threads: nothing of a call can be seen in the model or its config from outside of it."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from jacobi_hf.drafts.loading import attach
from tests.helpers.drafters import random_drafter
from tests.helpers.models import VOCAB, fresh_model

PLAIN = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
JACOBI = PLAIN | {"decoding": "jacobi_multiblock", "jacobi_schedule": "constant"}


def prompt(rows=1, seed=0):
    return torch.randint(1, VOCAB, (rows, 6), generator=torch.Generator().manual_seed(seed))


class Pauses(BaseStreamer):
    """Stops a call after its first tokens, until the test has looked at the model."""

    def __init__(self):
        self.reached = threading.Event()
        self.go_on = threading.Event()
        self._puts = 0

    def put(self, value):
        self._puts += 1
        if self._puts == 3:
            self.reached.set()
            assert self.go_on.wait(60)

    def end(self):
        self.reached.set()


class DuringACall:
    """A context in which another thread is in the middle of a Jacobi call on a model."""

    def __init__(self, model):
        self._model = model
        self._pauses = Pauses()
        self.output = None

    def __enter__(self):
        self._thread = threading.Thread(target=self._decode)
        self._thread.start()
        assert self._pauses.reached.wait(60)
        return self

    def __exit__(self, *_):
        self._pauses.go_on.set()
        self._thread.join()

    def _decode(self):
        self.output = self._model.generate(prompt(), **JACOBI, streamer=self._pauses)


def attributes(model):
    """Return all plain attributes of a model's modules and config, hooks apart."""
    modules = [
        {name: value for name, value in vars(module).items() if not name.startswith("_")} for module in model.modules()
    ]
    names = [[key for key in one if not isinstance(one[key], torch.nn.Module)] for one in modules]
    return names, copy.deepcopy(vars(model.config)), [type(module) for module in model.modules()]


@pytest.fixture(params=["qwen3", "qwen2-sliding"])
def model(request):
    return fresh_model(request.param)


@pytest.fixture(params=[False, True], ids=["no drafter", "drafter"])
def with_drafter(request, model):
    if request.param:
        attach(model, random_drafter(model, 1))
    return model


def test_the_config_and_the_modules_stay_as_they_are(model):
    """Somebody reads `config._attn_implementation` while a call runs."""
    before = attributes(model)
    hooks = [dict(module._forward_hooks) for module in model.modules()]
    with DuringACall(model):
        assert attributes(model) == before
        assert [dict(module._forward_hooks) for module in model.modules()] == hooks
    assert attributes(model) == before


def test_a_deep_copy_made_during_a_call(with_drafter):
    """A trainer copies the model (EMA, reference model) while it is served."""
    reference = with_drafter.generate(prompt(), **PLAIN)
    with DuringACall(with_drafter) as call:
        copied = copy.deepcopy(with_drafter)
        assert torch.equal(copied.generate(prompt(), **PLAIN), reference)
    assert torch.equal(call.output, reference)
    assert torch.equal(copied.generate(prompt(), **PLAIN), reference)


def test_a_pickle_made_during_a_call_loads_without_this_package(with_drafter, tmp_path):
    """`torch.save(model)` in another thread; the file is loaded where jacobi_hf is not installed."""
    reference = with_drafter.generate(prompt(), **PLAIN)
    with DuringACall(with_drafter):
        saved = io.BytesIO()
        torch.save(with_drafter, saved)
    (tmp_path / "model.pt").write_bytes(saved.getvalue())
    code = (
        "import sys; sys.modules['jacobi_hf'] = None\n"
        "import torch\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        f"print(model.generate(torch.tensor({prompt().tolist()}), **{PLAIN!r}).tolist())"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == str(reference.tolist())


def test_a_checkpoint_saved_during_a_call(model, tmp_path):
    """`save_pretrained` in another thread."""
    reference = model.generate(prompt(), **PLAIN)
    with DuringACall(model):
        model.save_pretrained(tmp_path / "during")
    model.save_pretrained(tmp_path / "after")
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "during" / file).read_text() == (tmp_path / "after" / file).read_text()
    loaded = type(model).from_pretrained(tmp_path / "during")
    assert torch.equal(loaded.generate(prompt(), **PLAIN), reference)


def test_ordinary_forwards_and_calls_during_a_call(with_drafter):
    """Other requests of a server: forwards, ordinary calls, and Jacobi calls of other rows."""
    ids = prompt(2, seed=3)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    logits = with_drafter(ids, attention_mask=mask).logits
    plain = with_drafter.generate(ids, attention_mask=mask, **PLAIN)
    with DuringACall(with_drafter):
        assert torch.equal(with_drafter(ids, attention_mask=mask).logits, logits)
        assert torch.equal(with_drafter.generate(ids, attention_mask=mask, **PLAIN), plain)
        assert torch.equal(with_drafter.generate(ids, attention_mask=mask, **JACOBI), plain)


def test_continuous_batching_beside_jacobi_calls():
    """`generate_batch` on a model that decodes with Jacobi in another thread: it returned truncated answers."""
    model = fresh_model("qwen3")
    config = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=-1)
    # By default, it fills the memory with its cache.
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    inputs = prompt(3, seed=5).tolist()

    def batch():
        found = model.generate_batch(
            inputs=inputs, generation_config=config, continuous_batching_config=small, progress_bar=False
        )
        return [(one.generated_tokens, one.error) for one in found.values()]

    alone = batch()
    assert [len(tokens) for tokens, _ in alone] == [8, 8, 8]
    # `generate_batch` writes its end tokens to the model's generation config.
    jacobi = JACOBI | {"eos_token_id": -1}
    reference = model.generate(prompt(), **jacobi)
    over = threading.Event()
    outputs = []

    def decode():
        while not over.is_set():
            outputs.append(model.generate(prompt(), **jacobi))

    thread = threading.Thread(target=decode)
    thread.start()
    try:
        beside = batch()
    finally:
        over.set()
        thread.join()
    assert beside == alone
    assert outputs
    assert all(torch.equal(one, reference) for one in outputs)


def test_a_hook_of_a_call_is_pickled_as_nothing():
    """The pickle names the standard library alone."""
    model = fresh_model("qwen3")
    drafter = random_drafter(model, 1)
    with drafter.attached(model):
        hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
        assert hooks
        for hook in hooks:
            data = pickle.dumps(hook)
            assert b"jacobi" not in data
            assert pickle.loads(data)(None, (), None) is None
            assert copy.deepcopy(hook)(None, (), None) is None
