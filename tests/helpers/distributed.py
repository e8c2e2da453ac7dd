"""Five steps of training in each of several ways, and the weights that come out.

test_trainer.py calls `train` itself, and runs this file once on two gloo processes:

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/helpers/distributed.py FOLDER

`plain` is `trainer.train()`. `fsdp` shards the model with torch's `fully_shard`, since accelerate shards on
accelerators only, and makes each step with `compute_loss` and SGD. `drafter` trains a drafter.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jacobi_hf.trainer import DrafterTrainer, JacobiForcingTrainer  # noqa: E402
from jacobi_hf.trainer.data.batch import counts_of  # noqa: E402
from jacobi_hf.trainer.data.shards import processes  # noqa: E402
from tests.helpers.models import VOCAB, fresh_model  # noqa: E402
from tests.helpers.records import records  # noqa: E402
from tests.trainer.drafter.test_trainer import config as drafter_config  # noqa: E402
from tests.trainer.forcing.test_trainer import config  # noqa: E402

WAYS = ("plain", "fsdp", "drafter")
ROWS_PER_STEP = 4
# Plain SGD, as for the model itself.
DRAFTER = {
    "steps_per_window": 3,
    "learning_rate": 2e-2,
    "optim": "sgd",
    "weight_decay": 0.0,
    "max_steps": 5,
    "max_length": 128,
    "seed": 42,
}


def train(way: str, folder: Path) -> dict:
    """Return the weights after five steps of four rows, over all processes, and whether they were sharded."""
    batch = ROWS_PER_STEP // (dist.get_world_size() if dist.is_initialized() else 1)
    # Chunks of ten rows, each with a backward of its own through the sharded head.
    options = {"kl_loss_weight": 2.0, "loss_chunk_numbers": 10 * VOCAB}
    model, rows = fresh_model("qwen3"), records(20, 4, seed=1)
    if way == "drafter":
        args = drafter_config(folder, per_device_train_batch_size=batch, **DRAFTER)
        trainer = DrafterTrainer(model, args, rows)
    else:
        trainer = JacobiForcingTrainer(model, config(folder, per_device_train_batch_size=batch, **options), rows)
    if way == "fsdp":
        step_by_step(trainer)
    else:
        trainer.train()
    parameters = list(trainer.model.parameters())
    sharded = any(hasattr(p, "full_tensor") for p in parameters)
    weights = torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().flatten() for p in parameters])
    return {"weights": weights, "processes": trainer.args.world_size, "sharded": sharded}


def step_by_step(trainer: JacobiForcingTrainer) -> None:
    """Take five steps over the rows in their order, each process with its part of every batch."""
    from torch.distributed.fsdp import fully_shard

    model, args = trainer.model, trainer.args
    size, rank, part = (
        trainer.accelerator.num_processes,
        trainer.accelerator.process_index,
        args.per_device_train_batch_size,
    )
    if size > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate)
    model.train()
    for step in range(5):
        whole = [trainer.train_dataset[ROWS_PER_STEP * step + i] for i in range(ROWS_PER_STEP)]
        counts = counts_of(trainer.data_collator(whole))
        batch = trainer.data_collator(whole[rank * part : (rank + 1) * part])
        trainer.compute_loss(model, batch, num_items_in_batch=counts).backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    known = processes()
    Path(sys.argv[1], f"process {known.process_index} of {known.num_processes}").touch()
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            found = train(way, Path(folder))
        if not found["sharded"]:
            others = [torch.empty_like(found["weights"]) for _ in range(found["processes"])]
            dist.all_gather(others, found["weights"])
            assert all(torch.equal(found["weights"], other) for other in others)
        if dist.get_rank() == 0:
            torch.save(found, Path(sys.argv[1], f"{way}.pt"))
    dist.barrier()  # a process that leaves while another still sends makes that one abort
    dist.destroy_process_group()
