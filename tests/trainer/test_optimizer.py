"""One optimizer of two: each weight moves as it would alone with its own."""

import pytest
import torch
from torch.optim import AdamW, Muon

from jacobi_hf.trainer.optimizer import muon_and_adamw
from tests.helpers.models import fresh_model
from tests.trainer.forcing.test_trainer import config


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_matrices_move_by_muon_and_the_rest_by_adamw(tmp_path, kind):
    args = config(tmp_path, learning_rate=1e-3, weight_decay=0.1, muon_learning_rate=5e-3)
    joint_model, muon_model, adamw_model = (fresh_model(kind) for _ in range(3))
    outside = [joint_model.get_input_embeddings(), joint_model.get_output_embeddings()]
    names = {name for name, _ in joint_model.named_parameters()}
    joint = muon_and_adamw(joint_model, args, 5e-3, {name for name in names if "norm" not in name}, outside)
    by_muon = {name for name in names if ".layers." in name and "proj.weight" in name}
    muon = Muon(
        [p for n, p in muon_model.named_parameters() if n in by_muon], 5e-3, 0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = AdamW(
        [
            {
                "params": [p for n, p in adamw_model.named_parameters() if n not in by_muon and "norm" not in n],
                "weight_decay": 0.1,
            },
            {"params": [p for n, p in adamw_model.named_parameters() if "norm" in n], "weight_decay": 0.0},
        ],
        lr=1e-3,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)) for o in (joint, muon, adamw)]
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        if step == 2:  # a checkpoint in between changes nothing
            joint.load_state_dict(joint.state_dict())
        for parameters in zip(*(model.parameters() for model in (joint_model, muon_model, adamw_model)), strict=True):
            gradient = torch.randn(parameters[0].shape, generator=generator)
            for parameter in parameters:
                parameter.grad = gradient.clone()
        for optimizer, schedule in zip((joint, muon, adamw), schedules, strict=True):
            optimizer.step()
            schedule.step()
    expected = dict(adamw_model.named_parameters()) | {n: p for n, p in muon_model.named_parameters() if n in by_muon}
    for name, parameter in joint_model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-5)
