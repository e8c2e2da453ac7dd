from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

import jacobi_hf
from jacobi_hf.drafts.loading import attach, drafter_of
from jacobi_hf.drafts.lora_format import CONFIG_FILE, WEIGHTS_FILE
from jacobi_hf.trainer import DrafterConfig, DrafterTrainer, JacobiForcingConfig, JacobiForcingTrainer
from jacobi_hf.trainer.drafter.answers import Answers, collate
from jacobi_hf.trainer.drafter.model import ModelWithDrafter
from tests.helpers.drafters import random_drafter
from tests.helpers.models import VOCAB, fresh_model

PROMPTS = [[3, 4, 5, 6], [7, 8, 9], [5, 3, 5, 3, 5], [10, 4], [6, 6, 7], [2, 9, 8, 7]]


def answers(model, tokens=20):
    rows = []
    for prompt in PROMPTS:
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)[
            0
        ].tolist()
        rows.append({"prompt_ids": prompt, "answer_ids": ids[len(prompt) :]})
    return rows


def config(folder, **options):
    defaults = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 3,
        "max_steps": 6,
        "save_strategy": "no",
        "window_width": 4,
        "windows_per_text": 2,
        "steps_per_window": 2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "seed": 3,
    }
    return DrafterConfig(**{**defaults, **options})


def trainer(model, folder, **options):
    lora = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear")
    given = {"train_dataset": answers(model), "peft_config": lora, **options.pop("given", {})}
    return DrafterTrainer(model=model, args=config(folder, **options), **given)


@pytest.mark.slow
def test_the_drafter_learns_and_the_model_stays_the_same(tmp_path):
    model = fresh_model("qwen3")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = answers(model)
    mine = trainer(
        model,
        tmp_path,
        max_steps=60,
        given={"eval_dataset": rows, "eval_prompts": {"own": PROMPTS}},
        jacobi_block_size=2,
        jacobi_max_blocks=2,
        jacobi_pool_size=0,
        jacobi_lookup_tokens=0,
        eval_max_new_tokens=20,
    )
    first = mine.evaluate()
    mine.train()
    last = mine.evaluate()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert last["eval_loss"] < first["eval_loss"]
    for name in ("eval_tokens_per_forward", "eval_own_tokens_per_forward"):
        assert last[name] > 1.2 * first[name]
    assert last["eval_own_identical"] == 1.0
    logged = mine.state.log_history[-3]
    assert {"agreement", "accepted_per_step", "kept_positions", "slots_per_second"} <= logged.keys()
    assert drafter_of(model) is None
    mine.save_model(str(tmp_path / "final"))
    assert sorted(p.name for p in (tmp_path / "final").iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    jacobi_hf.load_drafter(model, tmp_path / "final")
    output = model.generate(
        torch.tensor([PROMPTS[0]]),
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
        decoding="jacobi_multiblock",
        return_dict_in_generate=True,
    )
    assert output.sequences[0].tolist() == rows[0]["prompt_ids"] + rows[0]["answer_ids"]


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = trainer(fresh_model("qwen3"), tmp_path / "whole", max_steps=6)
    whole.train()
    halted = trainer(fresh_model("qwen3"), tmp_path / "halted", max_steps=6, save_strategy="steps", save_steps=3)

    class Halt(Exception):
        pass

    def halt(*_):
        raise Halt

    log = halted.log
    halted.log = lambda logs, *rest: halt() if halted.state.global_step == 5 else log(logs, *rest)
    with pytest.raises(Halt):
        halted.train()
    resumed = trainer(fresh_model("qwen3"), tmp_path / "halted", max_steps=6, save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=True)
    for name, value in whole._trained_model().drafter.weights().items():
        torch.testing.assert_close(value, resumed._trained_model().drafter.weights()[name])


def test_every_step_weighs_its_batches_alike(tmp_path, monkeypatch):
    """Also an epoch's last one, of fewer batches than are accumulated."""
    model = fresh_model("qwen3")
    rows = answers(model)[:5]
    mine = trainer(
        model,
        tmp_path,
        given={"train_dataset": rows},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=-1,
        num_train_epochs=1,
    )
    monkeypatch.setattr(
        ModelWithDrafter, "forward", lambda self, **_: (self.drafter.embedding.sum() * 0 + 1.0, torch.ones(4))
    )
    compute, losses = mine.compute_loss, []
    monkeypatch.setattr(
        mine, "compute_loss", lambda *args, **kwargs: losses.append(compute(*args, **kwargs)) or losses[-1]
    )
    mine.train()
    assert [float(loss) for loss in losses] == [0.25, 0.25, 0.25, 0.25, 1.0]


def test_evaluations_are_alike_and_leave_everything_as_it_was(tmp_path):
    model = fresh_model("qwen3")
    attach(model, random_drafter(model), "training")
    own = drafter_of(model)
    mine = trainer(
        model,
        tmp_path,
        given={"eval_dataset": answers(model), "eval_prompts": {"": PROMPTS[:1]}},
        eval_max_new_tokens=4,
    )
    assert mine.evaluate()["eval_loss"] == mine.evaluate()["eval_loss"]
    assert drafter_of(model) is own
    assert not model.lm_head._forward_pre_hooks
    jacobi_hf.unload_drafter(model)


def test_each_trainer_takes_the_config_of_its_name(tmp_path):
    model = fresh_model("qwen3")
    finetune = JacobiForcingConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(TypeError, match="args is a JacobiForcingConfig; DrafterTrainer takes a DrafterConfig"):
        DrafterTrainer(model, finetune, answers(model))
    with pytest.raises(TypeError, match="args is a DrafterConfig; JacobiForcingTrainer takes a JacobiForcingConfig"):
        JacobiForcingTrainer(model, config(tmp_path), [])


def test_without_args_the_output_folder_is_named_after_the_model(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model = fresh_model("qwen3")
    model.config._name_or_path = "user/tiny"
    mine = DrafterTrainer(model, train_dataset=answers(model))
    assert type(mine.args) is DrafterConfig
    assert mine.args.output_dir == "tiny-drafter"


def test_answers_of_packed_records_and_of_rows():
    """Clean blocks up to the first end, cut at the longest text."""
    n, prompt, clean = 3, [5, 6], [[7, 8, 9], [10, 0, 1]]
    record = {
        "data_id": "a",
        "prompt_ids": prompt,
        "prompt_ids_len": 2,
        "traj_position_indices": [0, 1],
        "complete_training_sequence_ids": [*prompt, 7, 2, 2, *clean[0], 10, 3, 3, *clean[1]],
    }
    assert n == len(clean[0])
    rows = Answers([record, {"prompt_ids": [4], "answer_ids": [9, 8, 7, 6]}], 6, [0])
    assert rows[0]["answer_ids"] == [7, 8, 9, 10]
    assert rows[1]["answer_ids"] == [9, 8, 7, 6]
    assert Answers([record], 9, [0])[0]["answer_ids"] == [7, 8, 9, 10, 0]
    batch = collate([rows[0], rows[1]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10], [4, 9, 8, 7, 6, 0]]
    assert batch["length"].tolist() == [6, 5]
    assert batch["prompt_length"].tolist() == [2, 1]


class TestBadInput:
    def test_what_has_no_meaning(self, tmp_path):
        model = fresh_model("qwen3")
        with pytest.raises(TypeError, match="ref_model"):
            trainer(model, tmp_path, given={"ref_model": fresh_model("qwen3")})
        with pytest.raises(ValueError, match="activation_checkpointing=True would drop the keys and values"):
            config(tmp_path, activation_checkpointing=True)

    def test_peft_config(self, tmp_path):
        model = fresh_model("qwen3")
        for options, named in (
            ({"lora_dropout": 0.1}, "lora_dropout"),
            ({"use_dora": True}, "use_dora"),
            ({"bias": "all"}, "bias"),
        ):
            with pytest.raises(ValueError, match=f"peft_config sets {named}, which a drafter does not have"):
                trainer(model, tmp_path, given={"peft_config": LoraConfig(r=2, **options)})

    def test_data(self, tmp_path):
        model = fresh_model("qwen3")
        with pytest.raises(
            ValueError, match=f"row 0 of train_dataset is empty or has ids outside the model's vocabulary of {VOCAB}"
        ):
            trainer(model, tmp_path, given={"train_dataset": [{"prompt_ids": [1], "answer_ids": [2, 99]}]})
        with pytest.raises(ValueError, match="train_dataset is empty"):
            trainer(model, tmp_path, given={"train_dataset": []})
        with pytest.raises(
            ValueError, match="none of 1 records has an answer of at least two tokens within max_length=4"
        ):
            trainer(
                model,
                tmp_path,
                given={"train_dataset": [{"prompt_ids": [1, 2, 3], "answer_ids": [2, 3]}]},
                max_length=4,
            )

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("targets", "firm"),
            ("window_width", 0),
            ("windows_per_text", 0),
            ("steps_per_window", 0),
            ("position_decay", 0.0),
            ("position_decay", 1.5),
            ("constant_draft", -1),
        ],
    )
    def test_arguments(self, tmp_path, name, value):
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            config(tmp_path, **{name: value})
