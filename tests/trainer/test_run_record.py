"""The record of a run, from its arguments and the manifest of its data."""

from __future__ import annotations

import pytest

from jacobi_hf.results.training import Training, TrainingData, TrainingDrafts
from jacobi_hf.trainer import DrafterConfig, JacobiForcingConfig
from jacobi_hf.trainer.run_record import training_facts

PACKED = {
    "schedule": "reverse",
    "noise_levels": 4,
    "min_noise": 0.1,
    "max_noise": 0.9,
    "phase": "fixed",
    "visits": 1,
    "views": 1,
    "of": {
        "a": {"name": "code", "dataset": "code.jsonl", "prompts": 7},
        "b": {"name": "math", "dataset": "user/math", "prompts": 5},
    },
}
FACTS = {
    "base_model": "tiny",
    "train_dataset": "packed",
    "steps": 3,
    "epochs": 0.5,
    "slots": 9,
    "minutes": 1.5,
    "weights_dtype": "float32",
}


@pytest.fixture
def config(tmp_path):
    return lambda kind=JacobiForcingConfig, **kwargs: kind(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, **kwargs
    )


@pytest.mark.parametrize(
    ("arguments", "method"),
    [
        ({}, "finetune"),
        ({"consistency_loss_weight": 0, "ar_loss_weight": 1}, "sft"),
        ({"kind": DrafterConfig}, "drafter"),
    ],
)
def test_the_method_follows_config_and_weights(config, arguments, method):
    facts = training_facts(config(**arguments), **FACTS)
    assert facts.method == method
    assert (facts.loss_weights is None) == (method == "drafter")


def test_data_and_strategy_come_from_the_manifest(config):
    facts = training_facts(config(block_size=8), packed=PACKED, replay_dataset="replay.jsonl", **FACTS)
    assert facts.data == [
        TrainingData(name="code", source="code.jsonl", samples=7),
        TrainingData(name="math", source="user/math", samples=5),
        TrainingData(name="replay", source="replay.jsonl"),
    ]
    noise = {"noise_levels": 4, "min_noise": 0.1, "max_noise": 0.9, "phase": "fixed", "visits": 1, "views": 1}
    assert facts.strategy == TrainingDrafts(schedule="reverse", block_size=8, **noise)


def test_without_a_manifest_the_records_are_the_data(config):
    facts = training_facts(config(), **FACTS)
    assert facts.data == [TrainingData(name="packed", source="packed")]
    assert facts.strategy is None


def test_a_drafters_strategy_ignores_the_packed_noise(config):
    facts = training_facts(
        config(DrafterConfig, window_width=6, windows_per_text=2, steps_per_window=5), packed=PACKED, **FACTS
    )
    assert facts.strategy == TrainingDrafts(schedule="drafter", window_width=6, windows_per_text=2, steps_per_window=5)


def test_it_survives_being_written(config):
    args = config(muon_learning_rate=1e-3, bf16=True, gradient_accumulation_steps=4)
    facts = training_facts(
        args, packed=PACKED, arguments={"seed": 1, "warmup_steps": 5, "context_window": None}, **FACTS
    )
    assert facts.arguments == {"warmup_steps": 5}
    assert (facts.optimizer, facts.precision, facts.schedule, facts.batch.accumulation) == (
        "muon",
        "bf16",
        "cosine",
        4,
    )
    assert Training.model_validate_json(facts.model_dump_json(exclude_none=True)) == facts
