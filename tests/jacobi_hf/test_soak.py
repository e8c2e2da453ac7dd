"""Hundreds of calls of all lengths and batches on one model: memory does not grow, nothing is compiled twice."""

from __future__ import annotations

import gc
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, Qwen3ForCausalLM

import jacobi_hf
from jacobi_hf.decoding.layout import build_layout
from tests.helpers.models import VOCAB, fresh_model

CALLS, CYCLE = 500, 100  # the calls of a cycle all differ, and every cycle has the same ones
KNOBS = {
    "decoding": "jacobi_multiblock",
    "jacobi_schedule": "constant",
    "jacobi_block_size": 2,
    "jacobi_max_blocks": 1,
}
WAYS = {
    "eager": {"jacobi_lookup_tokens": 3, "jacobi_pool_size": 2, "jacobi_branch_length": 2},
    # A window alone: each source of branches doubles the shapes, and a shape takes a second to trace.
    "compiled": {
        "jacobi_lookup_tokens": 0,
        "jacobi_pool_size": 0,
        "compile_config": CompileConfig(backend="aot_eager", mode=None),
    },
}
RESIDENT_SLACK = 16 * 2**20  # what the allocator may do; one call's cache kept per call would be more


def _storage(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Return address and bytes of a tensor's memory; None for tensors of torch.func, which have none."""
    try:
        return tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
    except NotImplementedError:
        return None


@dataclass(frozen=True)
class Held:
    """Return what the process holds: tensors and their bytes, objects of the garbage collector, resident bytes."""

    tensors: int
    bytes: int
    objects: int
    resident: int

    @classmethod
    def now(cls) -> Held:
        gc.collect()
        objects = gc.get_objects()
        tensors = [
            o for o in objects if type(o) in (torch.Tensor, torch.nn.Parameter)
        ]  # not the compiler's, which have no memory
        storages = dict(filter(None, map(_storage, tensors)))
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return cls(len(tensors), sum(storages.values()), len(objects), pages * os.sysconf("SC_PAGE_SIZE"))

    def growth_since(self, before: Held) -> list[str]:
        """What there is more of."""
        found = [name for name in ("tensors", "bytes") if getattr(self, name) > getattr(before, name)]
        found += (
            ["objects"] if self.objects - before.objects > CALLS - CYCLE else []
        )  # a lazy import is some 200 in all
        return found + (["resident"] if self.resident - before.resident > RESIDENT_SLACK else [])


def call(model, number, **arguments):
    """Make the call of that number: rows, prompt and new tokens change; if uncompiled, sampling and end tokens too."""
    if "compile_config" not in arguments:
        arguments |= {"do_sample": number % 3 == 0, "eos_token_id": [1] if number % 5 else None}
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(1, VOCAB, (1 + number % 2, 1 + 7 * number % 31), generator=generator)
    torch.manual_seed(number)
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=1 + 5 * number % 23,
        pad_token_id=0,
        return_dict_in_generate=True,
        **KNOBS,
        **arguments,
    )


def small_model():
    """One layer, so that a call takes little."""
    config = fresh_model("qwen3").config
    config.num_hidden_layers, config.layer_types = 1, config.layer_types[:1]
    return Qwen3ForCausalLM(config).eval()


def soak(model, calls=CALLS, after_each=lambda output: None, **arguments):
    """Make calls; return what was held after the first cycle and at the end, and what was compiled in between."""
    compiled = 0
    build_layout.cache_clear()  # what other tests have left in it gives way to this one's
    for number in range(calls):
        if number == CYCLE:
            before, compiled = Held.now(), 0
            counters.clear()
        output = call(model, number % CYCLE, **arguments)
        compiled += output.jacobi_stats.compiled_steps
        after_each(output)
        del output
    return before, Held.now(), compiled, counters["stats"]["unique_graphs"]


def soaked(way):
    """What a soak has left behind."""
    torch.set_num_threads(1)
    model = small_model()
    before, after, compiled, graphs = soak(model, **WAYS[way])
    jacobi_hf.clear_graphs(model)
    return after.growth_since(before), compiled, graphs


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_hundreds_of_calls_leave_nothing_behind_and_compile_nothing_anew(way):
    """In a process of its own: what other tests have imported, started or left to be collected is not counted."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        growth, compiled, graphs = apart.submit(soaked, way).result()
    assert growth == []
    assert (compiled, graphs) == (0, 0)


@pytest.mark.slow
def test_a_leak_of_one_tensor_a_call_is_seen():
    kept = []
    before, after, _, _ = soak(small_model(), 2 * CYCLE, lambda output: kept.append(output.sequences), **WAYS["eager"])
    assert after.growth_since(before)[:2] == ["tensors", "bytes"]
