"""The host's loop where it lags a step behind the device."""

from __future__ import annotations

import pytest
import torch

from jacobi_hf.decoding.cache import JacobiStaticCache
from jacobi_hf.execution.base import Eager
from jacobi_hf.integration.compat import CACHE
from tests.helpers.calls import CALLS, SETTINGS, counts, generate, prompt
from tests.helpers.models import fresh_model, tiny_model
from tests.helpers.schedules import let_the_host_lag


class Watched(Eager):
    """Eager steps that check what the host has prepared for them without knowing where rows are."""

    def run(self, state, forward, selector, plan):
        deepest, new = len(plan.layout.offset_D) - 1, int(state.generated_B.max())
        assert len(plan.key_column_K) >= int(state.cache.lengths_B.max()) + plan.layout.slots
        assert plan.shape.backbone >= int(state.width_B.max())
        if selector.noise is not None:
            assert selector.noise._drawn > new + deepest
            assert len(selector.noise.ring_IBV) > new + deepest - int(state.generated_B.min())
        result = super().run(state, forward, selector, plan)
        assert len(plan.key_column_K) >= int(state.length_B.max())
        return result


@pytest.fixture
def lagging(monkeypatch):
    """A context in which the host lags, and whatever it reserves is tight."""

    def generate_lagging(*arguments, **knobs):
        with monkeypatch.context() as patched:
            let_the_host_lag(patched)
            patched.setattr(JacobiStaticCache, "EXTENT_MULTIPLE", 1)
            patched.setattr("jacobi_hf.execution.choose.Eager", Watched)
            return generate(*arguments, **knobs)

    return generate_lagging


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_host_that_lags_decodes_the_same(setting, call, rows, lagging):
    """Tokens, statistics and cache; there is one forward more, behind the end."""
    model = tiny_model("qwen2-sliding")
    for number in range(3):
        arguments = {**SETTINGS[setting], **CALLS[call], "max_new_tokens": (1, 24, 70)[number]}
        ids = prompt(rows, 4 + number, seed=number)
        plain, lagged = generate(model, ids, **arguments), lagging(model, ids, **arguments)
        assert torch.equal(plain.sequences, lagged.sequences)
        (forwards, *rest), (more_forwards, *other_rest) = counts(plain.jacobi_stats), counts(lagged.jacobi_stats)
        assert rest == other_rest
        assert more_forwards == forwards + (forwards > 1) or (
            call == "ends" and more_forwards <= forwards
        )  # pads come sooner
        assert lagged.jacobi_stats.slots_by_width.total() == more_forwards - 1
        for a, b in zip(plain[CACHE].layers, lagged[CACHE].layers, strict=True):
            torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=1e-5)


def test_noise_is_there_for_all_that_a_step_unknown_to_the_host_may_add(lagging):
    """Where all tokens are alike to the model, each sample is what its noise says, and whole windows are accepted."""
    model, ids = fresh_model("qwen3"), prompt(2, 4)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    arguments = {"do_sample": True, "top_k": 0, **SETTINGS["window"], "max_new_tokens": 90}
    plain, state = generate(model, ids, **arguments), torch.get_rng_state()
    lagged = lagging(model, ids, **arguments)
    assert torch.equal(plain.sequences, lagged.sequences)
    assert torch.equal(state, torch.get_rng_state())
    assert plain.jacobi_stats.mean_tokens_per_forward > 3


@pytest.mark.parametrize("reason", ["scores", "streamer", "stop string"])
def test_nobody_who_looks_at_each_token_sees_it_late(reason, lagging):
    model, ids = tiny_model("qwen3"), prompt(1, 4)
    given = {"output_scores": True} if reason == "scores" else {}
    if reason == "streamer":

        class Streamer:
            def put(self, value): ...
            def end(self): ...

        given = {"streamer": Streamer()}
    if reason == "stop string":
        given = {"max_time": 1e6}
    arguments = {"do_sample": False, **SETTINGS["window"], **given}
    assert counts(generate(model, ids, **arguments).jacobi_stats) == counts(
        lagging(model, ids, **arguments).jacobi_stats
    )
