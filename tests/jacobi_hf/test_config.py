from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from jacobi_hf import JacobiConfig
from jacobi_hf.config import KNOBS, reject_misspelt, reject_pointless
from tests.helpers.models import fresh_model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"decoding": "jacobi_multibloc"},
            r"decoding='jacobi_multibloc' is not known \(did you mean 'jacobi_multiblock'\?\)",
        ),
        ({"jacobi_block_size": 1}, "jacobi_block_size=1 cannot be used; it must be an integer from 2 to 1024"),
        ({"jacobi_block_size": 4.0}, "must be an integer"),
        ({"jacobi_block_size": True}, "must be an integer"),
        ({"jacobi_max_blocks": -1}, "jacobi_max_blocks=-1"),
        ({"jacobi_max_blocks": 0, "jacobi_lookup_tokens": 0}, "leaves nothing to guess from"),
        ({"jacobi_activation_ratio": 1.5}, "must be a number from 0.0 to 1.0"),
        ({"jacobi_activation_ratio": float("nan")}, "jacobi_activation_ratio=nan"),
        ({"jacobi_pool_size": -1}, "jacobi_pool_size=-1"),
        ({"jacobi_lookup_tokens": "16"}, "jacobi_lookup_tokens='16'"),
        (
            {"jacobi_schedule": "adaptiv"},
            r"jacobi_schedule='adaptiv' is not known \(did you mean 'adaptive'\?\); allowed: 'adaptive', 'constant'",
        ),
        ({"jacobi_schedule": True}, "jacobi_schedule=True is not known; allowed"),
        ({"jacobi_schedule": ["constant"]}, r"jacobi_schedule=\['constant'\] is not known"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        JacobiConfig(**changes)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("jacobi_blocksize", "jacobi_block_size"), ("jacobi_pool", "jacobi_pool_size"), ("decodng", "decoding")],
)
def test_misspelt_names_are_caught(name, nearest):
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        reject_misspelt([name])


def test_other_names_pass():
    reject_misspelt(["max_new_tokens", "do_sample", "encoding", *KNOBS])


def test_paper_setting():
    paper = JacobiConfig.paper()
    assert (paper.jacobi_block_size, paper.jacobi_max_blocks, paper.jacobi_activation_ratio) == (64, 2, 0.85)
    assert (paper.jacobi_pool_size, paper.jacobi_lookup_tokens) == (4, 0)
    assert not paper.is_adaptive


def test_the_default_adapts_and_the_plain_method_does_not():
    assert JacobiConfig().is_adaptive
    assert not JacobiConfig(jacobi_schedule="constant").is_adaptive
    assert not JacobiConfig(decoding="jacobi").is_adaptive


def test_a_schedule_has_no_meaning_for_the_plain_method():
    plain = JacobiConfig(decoding="jacobi")
    with pytest.raises(ValueError, match="jacobi_schedule has no meaning with decoding='jacobi'"):
        reject_pointless({"decoding": "jacobi", "jacobi_schedule": "constant"}, plain)
    with pytest.raises(ValueError, match="jacobi_schedule given without decoding"):
        reject_pointless({"jacobi_schedule": "constant"}, None)
    reject_pointless({"decoding": "jacobi_multiblock", "jacobi_schedule": "constant"}, JacobiConfig())


def test_jacobi_persists_its_block_size_only():
    assert JacobiConfig(decoding="jacobi", jacobi_block_size=8).to_knobs() == {
        "decoding": "jacobi",
        "jacobi_block_size": 8,
    }


@pytest.mark.parametrize(
    "hub_config", [{}, {"do_sample": True, "temperature": 0.7, "top_p": 0.8}, {"temperature": 0.7, "top_k": 20}]
)
def test_defaults_survive_save_and_reload(tmp_path, prompt, hub_config):
    """Also if the config was derived from the model config, or has sampling fields that a repository came with."""
    model = fresh_model("qwen3")
    if hub_config:
        model.generation_config = GenerationConfig(**hub_config)
    config = JacobiConfig(jacobi_schedule="constant", jacobi_block_size=4, jacobi_pool_size=0)
    config.save_defaults(model)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded).__name__ == "Qwen3ForCausalLM"
    assert reloaded.config.architectures == ["Qwen3ForCausalLM"]
    assert JacobiConfig.from_generation_config(reloaded.generation_config) == config
    output = reloaded.generate(**prompt, max_new_tokens=12, return_dict_in_generate=True)
    assert output.jacobi_stats.forwards > 0
    assert torch.equal(output.sequences, reloaded.generate(**prompt, max_new_tokens=12, decoding=None))


def test_saving_again_forgets_the_former_setting():
    model = fresh_model("qwen3")
    JacobiConfig.paper().save_defaults(model)
    JacobiConfig(decoding="jacobi").save_defaults(model)
    assert not hasattr(model.generation_config, "jacobi_pool_size")
