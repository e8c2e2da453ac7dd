"""Run by test_trainer.py, alone and on two gloo processes: five steps of training, then the weights of the first process.

    python tests/trainer/distributed.py OUT.pt BATCH_SIZE {plain,fsdp,gated}

`plain` is `trainer.train()`. `fsdp` shards the model with torch's `fully_shard` (accelerate shards on accelerators only) and goes through
`compute_loss` and SGD step by step. `gated` trains a drafter.
"""

import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from jacobi_hf.trainer import JacobiForcingTrainer  # noqa: E402
from jacobi_hf.trainer.collator import counts_of  # noqa: E402
from tests.models import VOCAB, fresh_model  # noqa: E402
from tests.trainer.records import records  # noqa: E402
from tests.trainer.test_trainer import config  # noqa: E402


def step_by_step(args, data):
    """Five steps over `data` in its order, each process with its part of every batch of four."""
    from torch.distributed.fsdp import fully_shard

    model = fresh_model("qwen3")
    trainer = JacobiForcingTrainer(model, args, data)
    size, rank, part = trainer.accelerator.num_processes, trainer.accelerator.process_index, args.per_device_train_batch_size
    if size > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.learning_rate)
    model.train()
    for step in range(5):
        whole = [trainer.train_dataset[i] for i in range(4 * step, 4 * step + 4)]
        counts = counts_of(trainer.data_collator(whole))
        batch = trainer.data_collator(whole[rank * part : (rank + 1) * part])
        trainer.compute_loss(model, batch, num_items_in_batch=counts).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        # Chunks of ten rows, each with a backward of its own through the sharded head.
        options = {"kl_loss_weight": 2.0, "loss_chunk_numbers": 10 * VOCAB}
        args = config(Path(folder), per_device_train_batch_size=int(sys.argv[2]), **options)
        data = records(20, 4, seed=1)
        if sys.argv[3] == "gated":
            args = config(Path(folder), per_device_train_batch_size=int(sys.argv[2]), method="gated", gated_width=4, gated_windows=2)
        if sys.argv[3] == "fsdp":
            model = step_by_step(args, data)
        else:
            trainer = JacobiForcingTrainer(fresh_model("qwen3"), args, data)
            trainer.train()
            model = trainer.model
        sharded = any(hasattr(p, "full_tensor") for p in model.parameters())
        weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
        flat = torch.cat([p.detach().flatten() for p in weights])
        if args.world_size > 1 and not sharded:
            others = [torch.empty_like(flat) for _ in range(args.world_size)]
            dist.all_gather(others, flat)
            assert all(torch.equal(flat, other) for other in others)
        if args.process_index == 0:
            torch.save({"weights": flat, "processes": args.world_size, "sharded": sharded}, sys.argv[1])
        if dist.is_initialized():
            dist.barrier()  # a process that leaves while another still sends makes that one abort
            dist.destroy_process_group()
