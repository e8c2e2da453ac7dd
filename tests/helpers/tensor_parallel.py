"""Run by test_integration.py on two gloo processes: one model split over both, decoded ordinarily and ours."""

import inspect
import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, CompileConfig
from transformers.distributed import DistributedConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import jacobi_hf  # noqa: E402, F401

if __name__ == "__main__":
    torch.set_num_threads(1)
    split = {"tp_plan": "auto"}
    if "tp_plan" in inspect.signature(DistributedConfig).parameters:  # not in the oldest releases
        split = {"distributed_config": DistributedConfig(**split)}
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, **split).eval()
    ids = torch.randint(2, model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0))
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    reference = model.generate(ids, **arguments)
    ours = model.generate(ids, **arguments, decoding="jacobi_multiblock", return_dict_in_generate=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.generate(
            ids, **arguments, decoding="jacobi_multiblock", compile_config=CompileConfig(backend="eager", mode=None)
        )
    report = {
        "processes": model.tp_size,
        "equal": torch.equal(reference, ours.sequences),
        "forwards": ours.jacobi_stats.forwards,
        "warned": [str(w.message) for w in caught if "compile_config" in str(w.message)],
    }
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(report), encoding="utf-8")
    dist.barrier()  # a process that leaves while another still sends makes that one abort
    dist.destroy_process_group()
