"""Run by test_trainer.py, alone and under `accelerate launch`: five steps of training, then the weights of the first process."""

import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jacobi_hf.trainer import JacobiForcingTrainer  # noqa: E402

from tests.models import fresh_model  # noqa: E402
from tests.trainer.records import records  # noqa: E402
from tests.trainer.test_trainer import config  # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        args = config(Path(folder), per_device_train_batch_size=int(sys.argv[2]))
        trainer = JacobiForcingTrainer(fresh_model("qwen3"), args, records(20, 4, seed=1))
        trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model)
        if trainer.is_world_process_zero():
            flat = torch.cat([p.detach().flatten() for p in model.parameters()])
            torch.save({"weights": flat, "processes": args.world_size}, sys.argv[1])
