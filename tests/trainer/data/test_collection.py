"""Collection and packing: prompts of every kind, interruptions, damage, other settings, filters and shares."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tqdm.std import tqdm
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from jacobi_hf.resume import ResumeError
from jacobi_hf.trainer import NoiseSchedule, collect_trajectories, load_packed
from jacobi_hf.trainer.data.collect_options import CollectConfig
from jacobi_hf.trainer.data.collection import collect, read_prompts
from jacobi_hf.trainer.data.pack_options import PackConfig, wanted_buckets
from jacobi_hf.trainer.data.packing import pack_trajectories, select, shares
from jacobi_hf.trainer.data.shards import ManifestError, load_trajectories, read_manifest, tokenizer_fingerprint
from tests.helpers.models import fresh_model
from tests.helpers.tiny import CHECKPOINT

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def tiny():
    """A random model with the tiny tokenizer's vocabulary."""
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=4096,
            head_dim=8,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=1,
            **shape,
        )
    )
    return model.eval()


def settings(tmp_path, **options) -> CollectConfig:
    defaults = {
        "model": "tiny",
        "dataset": "none",
        "output_dir": str(tmp_path / "out"),
        "block_size": 4,
        "max_new_tokens": 8,
        "shard_size": 3,
    }
    return CollectConfig(**(defaults | options))


ROWS = [
    {"prompt": text}
    for text in ("def f(x):", "class A:\n    pass", "Question: how many?", "import os", "x = 1", "return", "yes no")
]


def test_collected_rows_are_the_trajectories_in_order(tiny, tokenizer, tmp_path):
    counts = collect(tiny, tokenizer, settings(tmp_path), ROWS)
    rows = load_trajectories(tmp_path / "out", tokenizer, 4)
    assert counts["prompts"] == 7
    assert counts["rows"] == len(rows) == 7
    assert [row["prompt_ids"] for row in rows] == [tokenizer(r["prompt"])["input_ids"] for r in ROWS]
    for row in rows:
        (alone,) = collect_trajectories(tiny, [row["prompt_ids"]], 4, settings(tmp_path).answers())
        assert (row["answer_ids"], row["blocks"]) == (alone.answer_ids, alone.blocks)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["complete"]
    assert len(manifest["shards"]) == 3
    assert {"model", "block_size", "seed", "weights", "tokenizer", "prompts"} <= manifest["settings"].keys()
    assert {"torch", "transformers", "jacobi-hf"} <= manifest["versions"].keys()


def test_prompts_of_every_kind(tokenizer):
    config = CollectConfig(prompt_tokens=2, system_prompt=None)
    turns = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]
    rows = [{"messages": turns}, {"prompt": turns[:1]}, {"prompt": "two and"}, {"text": "two and two make four"}]
    prompts, dropped = read_prompts(rows, tokenizer, config)
    assert dropped == 0
    assert tokenizer.decode(prompts[0]) == tokenizer.decode(prompts[1]) == "Question: two and two?\nAnswer:"
    assert tokenizer.decode(prompts[2]) == "two and"
    assert prompts[3] == tokenizer("two and two make four")["input_ids"][:2]
    asked, _ = read_prompts([{"question": "two and two?"}, {"turns": ["two and two?", "x"]}], tokenizer, config)
    assert asked == [prompts[0], prompts[0]]
    long = [{"text": "two and two make four", "test_list": []}]  # a question is not cut
    assert tokenizer.decode(read_prompts(long, tokenizer, config)[0][0]) == "Question: two and two make four\nAnswer:"
    own, _ = read_prompts([{"mine": "two and", "prompt": "x"}], tokenizer, CollectConfig(column="mine"))
    assert own == [prompts[2]]


def test_system_prompt_and_template(tokenizer, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    config = CollectConfig(system_prompt="be brief", chat_template=str(template))
    turns = [{"role": "user", "content": "hi"}]
    own = [{"role": "system", "content": "mine"}, *turns]
    prompts, _ = read_prompts([{"messages": turns}, {"messages": own}], tokenizer, config)
    assert [tokenizer.decode(p) for p in prompts] == ["<system>be brief<user>hi", "<system>mine<user>hi"]


def test_long_prompts_are_dropped_or_truncated(tokenizer):
    rows = [{"prompt": "def f(x): return x + x + x + x"}, {"prompt": "x = 1"}]
    prompts, dropped = read_prompts(rows, tokenizer, CollectConfig(max_prompt_tokens=5))
    assert (len(prompts), dropped) == (1, 1)
    prompts, dropped = read_prompts(rows, tokenizer, CollectConfig(max_prompt_tokens=5, long_prompts="truncate"))
    assert prompts[0] == tokenizer(rows[0]["prompt"])["input_ids"][-5:]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"quest": "x"}, "row 1 of data does not have any of the columns messages, .*; it has quest"),
        ({"prompt": ""}, "row 1 of data is not a prompt"),
        ({"messages": []}, "row 1 of data is not a prompt"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "row 1 of data has no turn"),
    ],
)
def test_rows_that_are_no_prompts_are_named(tokenizer, row, message):
    with pytest.raises(ValueError, match=message):
        read_prompts([row], tokenizer, CollectConfig(dataset="data"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "block_size=1"),
        ({"max_new_tokens": 10}, "max_new_tokens=10 must be a multiple of block_size=4"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"long_prompts": "cut"}, "long_prompts='cut'"),
        ({"do_sample": True, "temperature": 0.0}, "temperature=0"),
    ],
)
def test_bad_settings_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **options)


def test_a_folder_of_other_settings_is_refused(tiny, tokenizer, tmp_path):
    collect(tiny, tokenizer, settings(tmp_path), ROWS)
    with pytest.raises(ResumeError, match=r"begun under other settings \(block_size: 4, now 2"):
        collect(tiny, tokenizer, settings(tmp_path, block_size=2), ROWS)
    other = Qwen3ForCausalLM(tiny.config).eval()
    with pytest.raises(ResumeError, match="weights: "):
        collect(other, tokenizer, settings(tmp_path), ROWS)
    with pytest.raises(ManifestError, match="block_size=4, not 8"):
        load_trajectories(tmp_path / "out", tokenizer, 8)


def test_another_tokenizers_trajectories_are_refused(tiny, tokenizer, tmp_path):
    collect(tiny, tokenizer, settings(tmp_path), ROWS)
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(tokenizer_fingerprint(tokenizer), "0123456789abcdef"))
    with pytest.raises(ManifestError, match="collected with another tokenizer"):
        load_trajectories(tmp_path / "out", tokenizer)


def test_damage_is_named(tiny, tokenizer, tmp_path):
    collect(tiny, tokenizer, settings(tmp_path), ROWS)
    shard = next((tmp_path / "out").glob("shard-00001*"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ManifestError, match=r"shard-00001-of-00003.parquet is damaged .* delete it and run"):
        load_trajectories(tmp_path / "out")
    shard.unlink()
    with pytest.raises(ManifestError, match=r"shard-00001-of-00003.parquet is missing"):
        load_trajectories(tmp_path / "out")
    collect(tiny, tokenizer, settings(tmp_path), ROWS)
    assert len(load_trajectories(tmp_path / "out")) == 7
    with pytest.raises(ManifestError, match="does not exist"):
        load_trajectories(tmp_path)
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(ManifestError, match=r"manifest.json is not JSON: .* damaged: delete it"):
        load_trajectories(tmp_path / "out")


def test_bytes_that_changed_are_named(tiny, tokenizer, tmp_path):
    collect(tiny, tokenizer, settings(tmp_path), ROWS)
    shard = next((tmp_path / "out").glob("shard-00001*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 255
    shard.write_bytes(content)
    with pytest.raises(ManifestError, match=r"shard-00001-of-00003.parquet is damaged \(its checksum"):
        load_trajectories(tmp_path / "out")


def test_another_end_token_is_another_setting(tiny, tokenizer, tmp_path):
    collect(tiny, tokenizer, settings(tmp_path), ROWS)
    former, tiny.generation_config.eos_token_id = tiny.generation_config.eos_token_id, 77
    try:
        with pytest.raises(ResumeError, match=r"end_and_pad: \[\[0\], 1\], now \[\[77\], 1\]"):
            collect(tiny, tokenizer, settings(tmp_path), ROWS)
    finally:
        tiny.generation_config.eos_token_id = former


def test_template_options_reach_the_template(tokenizer, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text("{{ 'quick' if not think else 'slow' }} {{ messages[0].content }}")
    config = CollectConfig(chat_template=str(template), chat_template_options='{"think": false}')
    prompts, _ = read_prompts([{"messages": [{"role": "user", "content": "hi"}]}], tokenizer, config)
    assert tokenizer.decode(prompts[0]) == "quick hi"
    with pytest.raises(ValueError, match="chat_template_options='think' is not JSON"):
        CollectConfig(chat_template_options="think")
    with pytest.raises(ValueError, match="chat_template_options='3' is not a JSON object"):
        CollectConfig(chat_template_options="3")
    assert CollectConfig(chat_template_options={"think": False}).chat_template_options == '{"think": false}'


def test_one_token_answers_are_left_out_and_counted(tiny, tokenizer, tmp_path):
    prompt = tokenizer("x = 1")["input_ids"]
    (answer,) = collect_trajectories(tiny, [prompt], 4, settings(tmp_path).answers())
    former, tiny.generation_config.eos_token_id = tiny.generation_config.eos_token_id, answer.answer_ids[0]
    try:
        counts = collect(tiny, tokenizer, settings(tmp_path), ROWS)
    finally:
        tiny.generation_config.eos_token_id = former
    assert counts["too_short"] >= 1
    assert counts["rows"] == 7 - counts["too_short"]


@pytest.fixture(scope="module")
def job(tmp_path_factory, tokenizer, tiny):
    """Return a folder with a model and prompts."""
    folder = tmp_path_factory.mktemp("job")
    tiny.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(0)
    words = [
        "def",
        "class",
        "return",
        "import",
        "self",
        "x",
        "y",
        "for",
        "in",
        "if",
        "else",
        "not",
        "and",
        "or",
        "None",
        "True",
    ]
    prompts = [{"prompt": " ".join(rng.choices(words, k=rng.randint(1, 9)))} for _ in range(60)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    return folder


def command(job, out, *options):
    return [
        sys.executable,
        "-m",
        "jacobi_hf.cli",
        "collect",
        "--model",
        str(job / "model"),
        "--dtype",
        "float32",
        "--dataset",
        str(job / "prompts.jsonl"),
        "--output_dir",
        str(out),
        "--block_size",
        "4",
        "--max_new_tokens",
        "32",
        "--shard_size",
        "3",
        "--batch_size",
        "2",
        "--do_sample",
        "True",
        *options,
    ]


def run(arguments):
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def collect_with_own_lock(*arguments):
    """Collect in a forked process, with locks of tqdm of its own.

    A forked process shares tqdm's locks with its parent. If it is killed while it holds one, the parent waits forever.
    """
    lock, kinds = threading.RLock(), [tqdm]
    for kind in kinds:  # grows: each class of bars may have a lock of its own
        kind.set_lock(lock)
        kinds += kind.__subclasses__()
    collect(*arguments)


@pytest.mark.slow
def test_a_collector_that_is_killed_20_times_writes_the_same_rows(job, tmp_path, tiny, tokenizer):
    """Sampled answers; a forked collector gets kill -9 at 20 random moments, and then runs to the end."""
    import multiprocessing

    config = CollectConfig(
        model="tiny",
        dataset=str(job / "prompts.jsonl"),
        output_dir=str(tmp_path / "killed"),
        block_size=4,
        max_new_tokens=32,
        shard_size=3,
        batch_size=2,
        do_sample=True,
    )
    rows = [json.loads(line) for line in (job / "prompts.jsonl").read_text().splitlines()]
    whole = CollectConfig(**{**vars(config), "output_dir": str(tmp_path / "whole")})
    started = time.perf_counter()
    collect(tiny, tokenizer, whole, rows)
    seconds = time.perf_counter() - started
    rng, context, kills = random.Random(5), multiprocessing.get_context("fork"), 0
    while kills < 20:
        process = context.Process(target=collect_with_own_lock, args=(tiny, tokenizer, config, rows))
        process.start()
        process.join(rng.uniform(0, seconds / 4))
        if process.is_alive():
            process.kill()
            kills += 1
            process.join()
        else:  # it came to its end first: once more from the beginning
            assert load_trajectories(tmp_path / "killed").to_list() == load_trajectories(tmp_path / "whole").to_list()
            shutil.rmtree(tmp_path / "killed")
        for shard in (tmp_path / "killed").glob("shard-*.parquet"):
            Dataset.from_parquet(str(shard))  # never half-written
    collect(tiny, tokenizer, config, rows)
    assert load_trajectories(tmp_path / "killed").to_list() == load_trajectories(tmp_path / "whole").to_list()
    assert not list((tmp_path / "killed").glob(".*.part"))


@pytest.mark.slow
def test_a_killed_command_continues_and_two_processes_share_the_work(job, tmp_path):
    process = run(command(job, tmp_path / "killed"))
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("shard-*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not read_manifest(tmp_path / "killed")["complete"]
    with pytest.raises(ManifestError, match="not finished"):
        load_trajectories(tmp_path / "killed")
    assert run(command(job, tmp_path / "killed")).wait() == 0
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        *command(job, tmp_path / "two")[1:],
    ]
    assert run(launcher).wait() == 0
    assert load_trajectories(tmp_path / "two").to_list() == load_trajectories(tmp_path / "killed").to_list()


def test_packing_filters_mixes_and_writes_the_published_format(tiny, tokenizer, tmp_path):
    for name, rows in (("code", ROWS), ("math", ROWS[:4])):
        collect(
            tiny, tokenizer, settings(tmp_path, output_dir=str(tmp_path / name), name=name, max_new_tokens=16), rows
        )
    sources = [f"{tmp_path / 'code'}=0.6", f"{tmp_path / 'math'}=0.4"]
    config = PackConfig(sources=sources, output_dir=str(tmp_path / "packed"), visits=2, rows=5, noise_levels=4)
    amounts = pack_trajectories(config, tokenizer)
    assert list(amounts.values()) == [3, 2]
    packed = load_packed(str(tmp_path / "packed"), block_size=4)
    assert len(packed) == 10
    assert set(packed.column_names) == {
        "data_id",
        "prompt_ids",
        "prompt_ids_len",
        "complete_training_sequence_ids",
        "traj_position_indices",
    }
    first = packed.to_list()
    pack_trajectories(config, tokenizer)
    assert load_packed(str(tmp_path / "packed")).to_list() == first
    manifest = tmp_path / "packed" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"noise_levels"', '"window"'))  # as an earlier version wrote it
    pack_trajectories(config, tokenizer)
    assert load_packed(str(tmp_path / "packed")).to_list() == first
    with pytest.raises(ResumeError, match="begun under other settings"):
        pack_trajectories(
            PackConfig(sources=sources, output_dir=str(tmp_path / "packed"), visits=1, rows=5, noise_levels=4),
            tokenizer,
        )
    with pytest.raises(ValueError, match=r"rows=50 is too many: .* at most 10"):
        pack_trajectories(PackConfig(sources=sources, output_dir=str(tmp_path / "more"), rows=50), tokenizer)
    with pytest.raises(ValueError, match="no trajectory passes max_blocks=0"):
        pack_trajectories(PackConfig(sources=sources, output_dir=str(tmp_path / "none"), max_blocks=0), tokenizer)


def test_packed_records_cannot_be_packed_again(tiny, tokenizer, tmp_path):
    collect(tiny, tokenizer, settings(tmp_path), ROWS)
    pack_trajectories(
        PackConfig(sources=str(tmp_path / "out"), output_dir=str(tmp_path / "packed"), views=2), tokenizer
    )
    assert len(load_packed(str(tmp_path / "packed"), tokenizer=tokenizer)[0]["more_noisy_ids"]) == 1
    with pytest.raises(ManifestError, match="holds packed records, not trajectories"):
        pack_trajectories(
            PackConfig(sources=[str(tmp_path / "packed")], output_dir=str(tmp_path / "again")), tokenizer
        )
    with pytest.raises(ValueError, match="rows=-1"):
        PackConfig(rows=-1)
    manifest = tmp_path / "packed" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(tokenizer_fingerprint(tokenizer), "0123456789abcdef"))
    with pytest.raises(ManifestError, match="packed with another tokenizer"):
        load_packed(str(tmp_path / "packed"), tokenizer=tokenizer)


def test_sources_of_two_block_sizes_are_refused(tiny, tokenizer, tmp_path):
    for n in (2, 4):
        collect(tiny, tokenizer, settings(tmp_path, output_dir=str(tmp_path / str(n)), block_size=n), ROWS)
    with pytest.raises(ManifestError, match="the sources differ in block_size"):
        pack_trajectories(
            PackConfig(sources=[str(tmp_path / "2"), str(tmp_path / "4")], output_dir=str(tmp_path / "packed"))
        )


def test_filters_and_shares():
    rows = {"data_id": ["a_bucket_3_data_0", "a_bucket_8_data_1", "x"], "blocks": [[1], [1, 2, 3, 4], [1]]}
    assert select(rows) == [0, 1, 2]
    assert select(rows, max_blocks=3) == [0, 2]
    assert select(rows, buckets="3-5") == [0]
    assert wanted_buckets("8-11") == {8, 9, 10, 11}
    assert shares(["a", "b"]) == {"a": None, "b": None}
    assert shares(["x/y=0.25", "b=3"]) == {"x/y": 0.25, "b": 3.0}
    for sources, message in (
        (["a=0.5", "b"], "every folder"),
        (["a=x"], "'x' is no share"),
        ([], "is empty"),
        (["a=0"], "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            shares(sources)
    with pytest.raises(ValueError, match="buckets='eight'"):
        PackConfig(buckets="eight")
    with pytest.raises(ValueError, match="visits=0"):
        PackConfig(visits=0)
    with pytest.raises(ValueError, match="views=3 would repeat one noisy version"):
        PackConfig(phase="fixed", views=3)
    with pytest.raises(ValueError, match=r"visits=2 .* would repeat"):
        PackConfig(schedule="constant", visits=2)
    PackConfig(schedule="random", phase="fixed", views=3)
    with pytest.raises(ValueError, match="kind='linear'"):
        PackConfig(schedule="linear")
    assert PackConfig(schedule="reverse", noise_levels=3).noise_schedule() == NoiseSchedule("reverse", noise_levels=3)


def test_different_weights_have_different_fingerprints():
    from jacobi_hf.trainer.data.shards import weights_fingerprint

    assert weights_fingerprint(fresh_model("qwen3")) == weights_fingerprint(fresh_model("qwen3"))
    assert weights_fingerprint(fresh_model("qwen3")) != weights_fingerprint(fresh_model("qwen3", seed=1))
