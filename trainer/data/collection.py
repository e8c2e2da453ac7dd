"""Collection of trajectories from a data set of prompts, in shards, which several processes may share.

Shard k has the trajectories of prompts `k * shard_size` to `(k + 1) * shard_size - 1`. Its rows depend on the settings
alone: neither on the process that collects it nor on interruptions, since batches and seeds belong to the shard.
"""

from __future__ import annotations

import json
import logging
import time
import zlib
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jacobi_hf.io import read_text
from jacobi_hf.prompts import Question, column_of, encode_messages, is_turn, prompt_of
from jacobi_hf.trainer.data.answers import end_ids, pad_id
from jacobi_hf.trainer.data.loading import open_dataset
from jacobi_hf.trainer.data.shards import (
    ShardFolder,
    processes,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from jacobi_hf.trainer.data.trajectories import Trajectory, collect_trajectories

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from jacobi_hf.trainer.data.collect_options import CollectConfig

logger = logging.getLogger(__name__)

# Prompt tokens of one length bucket, whose number is in a row's data_id.
BUCKET_TOKENS = 32


def read_prompts(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, config: CollectConfig
) -> tuple[list[list[int]], int]:
    """Return the token ids of each prompt, and how many rows were dropped because their prompt is too long.

    Messages, and questions if the model has a chat template, go through the template; a last turn of the assistant is
    left out. Of a `text`, the first `prompt_tokens` tokens are the prompt.

    Args:
        rows: rows as `jacobi_hf.prompts.prompt_of` reads them.
        tokenizer: tokenizer of the model.
        config: column, lengths and templates.

    Raises:
        ValueError: a row holds no prompt, or an empty one. The error has the number of the row, from 1 on.
    """
    options = json.loads(config.chat_template_options) if config.chat_template_options else {}
    if config.chat_template:
        options["chat_template"] = read_text(config.chat_template)
    prompts = []
    dropped = 0
    for number, row in enumerate(rows, 1):
        if config.limit is not None and number > config.limit:
            break
        where = f"row {number} of {config.dataset}"
        prompt = prompt_of(row, where, config.column)
        if not isinstance(prompt, str) or is_turn(prompt, tokenizer):
            turns = [{"role": "user", "content": str(prompt)}] if isinstance(prompt, str) else prompt
            ids = encode_messages(turns, tokenizer, where, system_prompt=config.system_prompt, **options)
        else:
            is_text = column_of(row, where, config.column) == "text" and not isinstance(prompt, Question)
            cut = config.prompt_tokens if is_text else None
            ids = tokenizer(prompt)["input_ids"][:cut]
        if not ids:
            raise ValueError(f"{where} is an empty prompt.")
        if len(ids) > config.max_prompt_tokens:
            if config.long_prompts == "drop":
                dropped += 1
                continue
            ids = ids[-config.max_prompt_tokens :]
        prompts.append(list(ids))
    return prompts, dropped


def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: CollectConfig,
    rows: Iterable[Mapping[str, Any]] | None = None,
) -> Counter[str]:
    """Write the trajectories of all prompts to `config.output_dir`. A second call continues an interrupted one.

    Under `accelerate launch`, or `torchrun` on CPUs, process r of R collects shards r, r + R, r + 2R, and so on.

    Args:
        model: the model, in eval mode and on its device.
        tokenizer: its tokenizer.
        config: what to collect.
        rows: rows with prompts, instead of those of `config.dataset`.

    Returns:
        Sums over the whole folder: "prompts", "rows", "tokens" and "forwards", and how many prompts were "too_long"
        and how many answers "too_short".

    Raises:
        ResumeError: the folder was begun under other settings.
        ValueError: there are no prompts, or a row has none.
    """
    from tqdm.auto import tqdm

    state = processes()
    prompts, too_long = read_prompts(
        open_dataset(config.dataset, config.split) if rows is None else rows, tokenizer, config
    )
    if not prompts:
        raise ValueError(
            f"{config.dataset} holds no prompt of at most {config.max_prompt_tokens} tokens ({too_long} are longer)."
        )
    folder = ShardFolder(config.output_dir, _settings(config, model, tokenizer, prompts))
    starts = range(0, len(prompts), config.shard_size)
    names = [f"shard-{number:05d}-of-{len(starts):05d}.parquet" for number in range(len(starts))]
    done = folder.finished()
    mine = range(state.process_index, len(starts), state.num_processes)
    before = sum(done[names[s]]["prompts"] for s in mine if names[s] in done)
    total = sum(min(config.shard_size, len(prompts) - starts[s]) for s in mine)
    with tqdm(
        total=total,
        initial=before,
        unit=" prompts",
        desc=f"collect {config.name}",
        disable=not state.is_local_main_process,
    ) as bar:
        speed = _Speed(bar)
        for shard in mine:
            if names[shard] not in done:
                first = starts[shard]
                part = prompts[first : first + config.shard_size]
                trajectories = _collect_shard(model, config, shard, part, speed)
                # An answer of one token has nothing to draft.
                kept = {first + i: t for i, t in enumerate(trajectories) if len(t.answer_ids) > 1}
                rows_of_shard = [_row(config, number, trajectory) for number, trajectory in kept.items()]
                folder.write(names[shard], rows_of_shard, _counts(part, list(kept.values())))
    state.wait_for_everyone()
    finished = folder.finished()
    if state.is_main_process and len(finished) == len(names):
        folder.complete()
    totals = Counter({"too_long": too_long})
    for counts in finished.values():
        totals.update({name: value for name, value in counts.items() if isinstance(value, int)})
    if too_long or totals["too_short"]:
        logger.warning(
            "left out: %d prompts over max_prompt_tokens, %d answers of one token", too_long, totals["too_short"]
        )
    return totals


class _Speed:
    """Tokens per second and tokens per forward of this process, shown in the progress bar."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._began = time.perf_counter()
        self._tokens = 0
        self._forwards = 0

    def add(self, batch: Sequence[Trajectory]) -> None:
        """Count and show a batch."""
        self._tokens += sum(len(trajectory.answer_ids) for trajectory in batch)
        self._forwards += sum(trajectory.forwards for trajectory in batch)
        self._bar.update(len(batch))
        tokens_per_second = self._tokens / (time.perf_counter() - self._began)
        self._bar.set_postfix(tok_s=f"{tokens_per_second:.0f}", TPF=f"{self._tokens / self._forwards:.2f}")


def _collect_shard(
    model: PreTrainedModel, config: CollectConfig, shard: int, prompts: Sequence[Sequence[int]], speed: _Speed
) -> list[Trajectory]:
    """Return the trajectories of a shard's prompts, in their order."""
    trajectories: dict[int, Trajectory] = {}
    # Prompts of like length go together, since a batch is as wide as its longest prompt.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    for first in range(0, len(order), config.batch_size):
        chosen = order[first : first + config.batch_size]
        seed = zlib.crc32(f"{config.seed}/{shard}/{first}".encode())
        begins = [_start(config, shard * config.shard_size + i) for i in chosen]
        batch = collect_trajectories(
            model, [prompts[i] for i in chosen], config.block_size, config.answers(), seed, begins
        )
        trajectories |= zip(chosen, batch, strict=True)
        speed.add(batch)
    return [trajectories[i] for i in range(len(prompts))]


def _start(config: CollectConfig, number: int) -> int:
    """Return how many tokens of an answer come before its first block."""
    return zlib.crc32(f"{config.seed}/start/{number}".encode()) % config.block_size if config.random_start else 0


def _settings(
    config: CollectConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Return everything that determines the rows: a hash of the prompts stands for the options that choose them."""
    without = {
        "output_dir",
        "chat_template",
        "chat_template_options",
        "system_prompt",
        "limit",
        "prompt_tokens",
        "max_prompt_tokens",
        "long_prompts",
        "split",
    }
    kept = {name: value for name, value in asdict(config).items() if name not in without}
    return {
        **kept,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights_fingerprint(model),
        "end_and_pad": [sorted(end_ids(model)), pad_id(model)],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "prompts": len(prompts),
        "prompts_fingerprint": f"{zlib.crc32(json.dumps(prompts).encode()):08x}",
    }


def _row(config: CollectConfig, number: int, trajectory: Trajectory) -> dict[str, Any]:
    """Return the stored row of the trajectory of prompt `number`."""
    bucket = len(trajectory.prompt_ids) // BUCKET_TOKENS
    return {
        "data_id": f"{config.name}_bucket_{bucket}_data_{number}",
        "prompt_ids": trajectory.prompt_ids,
        "answer_ids": trajectory.answer_ids,
        "blocks": trajectory.blocks,
    }


def _counts(prompts: Sequence[Sequence[int]], kept: Sequence[Trajectory]) -> dict[str, int]:
    """Return the numbers about a shard that its manifest has."""
    return {
        "prompts": len(prompts),
        "rows": len(kept),
        "too_short": len(prompts) - len(kept),
        "tokens": sum(len(t.answer_ids) for t in kept),
        "forwards": sum(t.forwards for t in kept),
    }
