"""Tiny random models in fp32, on one thread."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

import jacobi_hf  # noqa: F401  (registers classes of models)
from tests.helpers.models import TINY, tiny_model

torch.set_num_threads(1)
if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # so a shell starts what it runs in the background; Ctrl-C is tested all the same
    signal.signal(signal.SIGINT, signal.default_int_handler)
# `make test` draws the same cases every time; `make test-deep` many more, and others each time.
_ANY_SPEED = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
CASES = os.environ.get("JACOBI_HF_CASES")
hypothesis.settings.register_profile("fixed", max_examples=int(CASES or 100), derandomize=True, **_ANY_SPEED)
hypothesis.settings.register_profile("deep", max_examples=int(CASES or 2000), database=None, **_ANY_SPEED)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(params=TINY, scope="session")
def any_model(request):
    """Each of the tiny models in turn."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def model():
    """One tiny model, where the kind does not matter."""
    return tiny_model("qwen3")


@pytest.fixture
def prompt():
    """A prompt of two rows, the first with two pads on the left."""
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 3, 4, 9, 3, 4]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "pad_token_id": 0, "do_sample": False}
