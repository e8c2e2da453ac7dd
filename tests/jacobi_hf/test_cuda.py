"""The promise on a CUDA device, in all ways to run steps. `examples/benchmarks/gpu.sh` runs these tests."""

from __future__ import annotations

import pytest
import torch
from transformers import CompileConfig

import jacobi_hf
from tests.helpers.models import VOCAB, fresh_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
WAYS = {
    "eager": None,
    "traced": CompileConfig(backend="aot_eager", mode=None),
    "compiled": CompileConfig(mode=None),
    "captured": CompileConfig(mode="reduce-overhead"),
}
CALLS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_k": 10, "repetition_penalty": 1.2},
    "ends": {"do_sample": False, "eos_token_id": list(range(1, 5))},
}
KNOBS = {
    "decoding": "jacobi_multiblock",
    "jacobi_schedule": "constant",
    "jacobi_block_size": 4,
    "jacobi_lookup_tokens": 4,
    "jacobi_pool_size": 1,
    "jacobi_branch_length": 3,
}


def generate(model, ids, **arguments):
    torch.manual_seed(5)
    return model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=32, pad_token_id=0, **arguments)


@pytest.fixture(scope="module")
def cuda_models():
    models = {kind: fresh_model(kind).cuda() for kind in ("qwen3", "qwen2-sliding")}
    yield models
    for model in models.values():
        jacobi_hf.clear_graphs(model)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["qwen3", "qwen2-sliding"])
def test_the_tokens_are_those_of_generate(cuda_models, kind, way, call):
    model, options = cuda_models[kind], {} if WAYS[way] is None else {"compile_config": WAYS[way]}
    ids = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0)).cuda()
    ids[0, :3] = 0
    reference = generate(model, ids, **CALLS[call])
    for _ in range(3):  # one that warms up, one that records, one that replays
        assert torch.equal(generate(model, ids, **CALLS[call], **KNOBS, **options), reference)
    torch.cuda.synchronize()


def test_bfloat16_with_flex_attention(cuda_models):
    """Ties may part them late in the text; that they begin alike is what masks and positions decide."""
    model = fresh_model("qwen3").cuda().bfloat16()
    ids = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0)).cuda()
    reference = generate(model, ids, do_sample=False)
    model.set_attn_implementation("flex_attention")
    try:
        output = generate(model, ids, do_sample=False, **KNOBS, compile_config=WAYS["captured"])
    except ValueError as error:
        pytest.skip(str(error))
    assert torch.equal(output[:, :13], reference[:, :13])
