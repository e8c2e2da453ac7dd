"""Write docs/results.md from the JSON documents under examples/benchmarks/results.

    python examples/benchmarks/report.py

Every figure of the page is read from a document; a test fails when page and documents differ.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable
from pathlib import Path

import report_lossless

from jacobi_hf.results.schema import Measurement, Results

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "results.md"
TIMES = HERE.parent / "tiny_qwen3" / "forced" / "times.tsv"

HEAD = """# Measured results

Written by `python examples/benchmarks/report.py` from the JSON documents under `examples/benchmarks/results`; each names the command that
wrote it. Terms: *TPF*, new tokens over forwards, prefill counted, so ordinary decoding is 1.0; *slots*, positions that one decoding
forward computes; *loop-free*, the same over prompts whose output does not end in a loop (the last 48 tokens periodic with a period under
20): a small model loops often when decoded greedily, and lookup lives on repetition, so quote that column for it.
"""


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; all columns but the first two are aligned right."""
    head = list(head)
    lines = [
        "| " + " | ".join(head) + " |",
        "|" + "|".join("---" if i < 2 else "---:" for i in range(len(head))) + "|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"


def setting(results: Results) -> str:
    """Where and with what a document was measured."""
    packages = results.software.packages
    return (
        f"`{results.command}` on {results.hardware.cpu} ({results.device}, {results.threads} thread{'s' * (results.threads != 1)}), "
        f"{results.dtype}, {results.attention}, torch {packages['torch']}, transformers {packages['transformers']}, "
        f"revision {results.software.git_revision}, {results.created[:10]}. Model: {results.model}, {results.parameters / 1e6:.1f} M parameters.\n"
    )


def factor(m: Measurement, baseline: str) -> str:
    """Speed-up over a baseline, or a dash."""
    return next((f"{s.factor:.2f}" for s in m.speedups if s.baseline == baseline), "-")


def compare(results: Results) -> str:
    """Decoders side by side."""
    rows = []
    for m in results.measurements:
        equal, free = m.agreement, m.tokens_per_forward_loop_free
        rows.append(
            [
                m.prompts.domain,
                m.decoder.name,
                f"{m.tokens_per_forward:.2f}",
                "-" if free is None else f"{free:.2f}",
                f"{m.mean_slots:.1f}",
                f"{m.tokens_per_second:.0f}",
                factor(m, "generate"),
                factor(m, "generate-static-compiled"),
                "-" if equal is None else f"{equal.identical} of {equal.total}",
            ]
        )
    first = results.measurements[0].prompts
    looping = {m.prompts.domain: len(m.looping or []) for m in results.measurements}
    return (
        f"## Decoders side by side\n\n{setting(results)}\n{first.count} held-out prompts per domain, up to {first.max_new_tokens} new tokens, greedy, "
        "batch 1, all decoders in one process, prompt by prompt in turn. Prompt lookup is transformers' own, with n-grams of up to 3 tokens as "
        "our lookup. `multiblock-window` has no candidates, `-pool` the pool alone, `-lookup` lookup alone, `-both` is the default setting. "
        f"Outputs that end in a loop: {', '.join(f'{n} of {first.count} {d}' for d, n in looping.items())}.\n\n"
        + table(
            [
                "domain",
                "decoder",
                "TPF",
                "loop-free",
                "slots",
                "tok/s",
                "x eager generate",
                "x compiled generate",
                "identical to generate",
            ],
            rows,
        )
        + "\n"
        + losers(results)
    )


def losers(results: Results) -> str:
    """Prompts on which the default setting needs more forwards than another decoder."""
    lines = []
    for domain in dict.fromkeys(m.prompts.domain for m in results.measurements):
        mine = {m.decoder.name: m for m in results.measurements if m.prompts.domain == domain}
        both = mine["multiblock-both"].per_prompt_tokens_per_forward or []
        others = ("jacobi", "multiblock-window", "multiblock-pool", "multiblock-lookup", "prompt-lookup-16")
        best = max(mine[name].tokens_per_forward or 0 for name in others)
        lost = [
            f"{i} ({both[i]:.2f} against {max((mine[n].per_prompt_tokens_per_forward or [])[i] for n in others):.2f})"
            for i in range(len(both))
            if both[i] < max((mine[n].per_prompt_tokens_per_forward or [])[i] for n in others)
        ]
        ratio = (mine["multiblock-both"].tokens_per_forward or 0) / best
        lines.append(
            f"- {domain}: {ratio:.2f} of the best of the others; behind on {len(lost)} prompts"
            + (": " + ", ".join(lost) if lost else "")
            + "."
        )
    return (
        "A step of the default setting never accepts less than its window or its branches alone would; over a whole prompt another decoder "
        "can still need fewer forwards, because one more accepted token changes what is looked up next. Tokens per forward of "
        "`multiblock-both` against the best of `jacobi`, window, pool, lookup and prompt lookup of 16 tokens:\n\n"
        + "\n".join(lines)
        + "\n"
    )


def widths(results: Results) -> str:
    """What a forward costs by its slots."""
    rows = []
    for name in (
        "generate",
        "generate-static-compiled",
        "jacobi",
        "prompt-lookup-16",
        "multiblock-window",
        "multiblock-both",
        "paper",
    ):
        times: dict[int, list[float]] = {}
        for m in results.measurements:
            if m.decoder.name == name:
                for width, value in (m.ms_per_forward or {}).items():
                    times.setdefault(width, []).append(value)
        for width in [w for w in sorted(times) if w in (1, 2, 8, 11, 16, 17, 32, 33, 49, 57, 65) or w == max(times)]:
            rows.append([name, width, f"{statistics.median(times[width]):.2f}"])  # noqa: PERF401
    return (
        "## Milliseconds per forward, by slots\n\nMedian wall time from one forward to the next, everything around it included, of the runs above "
        "(some widths; all are in the document).\n\n" + table(["decoder", "slots", "ms"], rows)
    )


def grid(results: Results, best: int = 8) -> str:
    """The sweep, the best by speed and the best by TPF."""
    text = f"## n, K, r, pool, lookup\n\n{setting(results)}\nThe {best} fastest settings of each domain, and the {best // 2} with the highest TPF.\n\n"
    for domain in dict.fromkeys(m.prompts.domain for m in results.measurements):
        mine = [
            m for m in results.measurements if m.prompts.domain == domain and m.decoder.kind == "jacobi_multiblock"
        ]
        fastest = sorted(mine, key=lambda m: -(m.tokens_per_second or 0))[:best]
        highest = sorted(mine, key=lambda m: (-(m.tokens_per_forward or 0), m.mean_slots or 0))[: best // 2]
        rows = [
            [
                domain,
                m.decoder.name,
                f"{m.tokens_per_forward:.2f}",
                f"{m.mean_slots:.1f}",
                f"{m.tokens_per_second:.0f}",
                factor(m, "generate"),
            ]
            for m in (*fastest, *highest)
        ]
        text += table(["domain", "setting", "TPF", "slots", "tok/s", "x eager generate"], rows) + "\n"
    wrong = sum((m.agreement.total - m.agreement.identical) for m in results.measurements if m.agreement)
    return text + f"Outputs that differ from `generate`, over all {len(results.measurements)} measurements: {wrong}.\n"


def overhead(results: Results) -> str:
    """Step against bare forward."""
    rows = [
        [
            m.decoder.block_size,
            "compiled" if m.decoder.name.endswith("-compiled") else "eager",
            f"{m.mean_slots:.1f}",
            f"{m.extra['ms_per_step']:.2f}",
            f"{m.extra['ms_bare_forward']:.2f}",
            f"{100 * m.extra['overhead']:.1f} %",
        ]
        for m in results.measurements
    ]
    return (
        f"## What a step costs beside its forward\n\n{setting(results)}\nDrafts replayed from the true continuation, so that every guess is confirmed; "
        "the bare forward is the same module with the same arguments, compiled too beside the compiled step, alternating with the steps. "
        "Times are medians; the overhead is the median of what each step took more than its own bare forward.\n\n"
        + table(["n", "step", "mean slots", "ms per step", "ms bare forward", "overhead"], rows)
    )


def bf16(results: Results) -> str:
    """Mismatch rates."""
    rows = [
        [
            m.prompts.domain,
            m.decoder.name,
            f"{m.agreement.total - m.agreement.identical} of {m.agreement.total}",
            m.extra["mismatches_per_1000_tokens"],
        ]
        for m in results.measurements
        if m.agreement
    ]
    return (
        f"## Equality in bf16\n\n{setting(results)}\nTexts that differ from `generate` at batch 1. The row `generate, batch 4` is ordinary decoding against "
        "itself: what a user accepts already when batching.\n\n"
        + table(["domain", "decoder", "texts that differ", "per 1000 tokens"], rows)
    )


def memory(results: Results) -> str:
    """Peak memory in units of one cache."""
    rows = [
        [m.decoder.name, m.forwards, f"{m.extra['bytes'] / 2**20:.0f}", f"{m.extra['share_of_one_cache']:.3f}"]
        for m in results.measurements
    ]
    cache = results.measurements[0].extra["one_cache"] / 2**20
    return (
        f"## Memory\n\n{setting(results)}\n{results.measurements[0].prompts.max_new_tokens} new tokens; one cache of prompt and new tokens is {cache:.0f} MiB; "
        "highest resident memory of the generation beyond the model.\n\n"
        + table(["decoder", "forwards", "MiB", "in units of one cache"], rows)
    )


def quality(results: Results, domain: str) -> tuple[str, str]:
    """Held-out loss and exact match of a domain."""
    loss = next(
        (m.held_out_loss for m in results.measurements if m.prompts.domain == domain and m.held_out_loss is not None),
        None,
    )
    right = next(
        (m.quality for m in results.measurements if m.prompts.domain == domain and m.quality is not None), None
    )
    share = "-" if right is None else f"{right.value:.3f} [{right.low:.3f}, {right.high:.3f}] of {right.samples}"
    return "-" if loss is None else f"{loss:.3f}", share


def minutes_of_the_recipe() -> str:
    """How long each part of force.sh took, from the times at which they ended, over all of its starts."""
    if not TIMES.is_file():
        return ""
    lines = [line.split("\t") for line in TIMES.read_text(encoding="utf-8").splitlines()]
    ended = [(name, int(second)) for name, second in lines]
    minutes: dict[str, float] = {}
    for (_, before), (name, at) in itertools.pairwise(ended):
        if name != "start":  # what lies in front of a start is the pause before it
            minutes[name] = minutes.get(name, 0) + (at - before) / 60
    parts = ", ".join(f"{name} {value:.1f}" for name, value in minutes.items())
    return f"\nMinutes of the recipe by `examples/tiny_qwen3/force.sh` on two cores: **{sum(minutes.values()):.1f}** ({parts}).\n"


def forcing(documents: dict[str, Results]) -> str:
    """The tiny model before and after Jacobi Forcing."""
    text = "## Jacobi Forcing of the tiny model\n\n"
    for name, results in documents.items():
        text += f"- **{name}**: {setting(results)}"
        if results.training:
            t = results.training[-1]
            text += (
                f"  Trained by `{t.command}`, {t.steps} steps, {t.slots / 1e6:.2f} M slots, {t.minutes:.1f} minutes on {t.threads} "
                f"thread{'s' * (t.threads != 1)}, seed {t.seed}.\n"
            )
    decoded = {name: [m for m in r.measurements if m.tokens_per_forward is not None] for name, r in documents.items()}
    rows = []
    for domain, decoder in dict.fromkeys(
        (m.prompts.domain, m.decoder.name) for found in decoded.values() for m in found
    ):
        for name, found in decoded.items():
            for m in (
                m for m in found if (m.prompts.domain, m.decoder.name) == (domain, decoder) and m.agreement is not None
            ):
                free, equal = m.tokens_per_forward_loop_free, m.agreement
                rows.append(
                    [
                        domain,
                        decoder,
                        name,
                        f"{m.tokens_per_forward:.2f}",
                        "-" if free is None else f"{free:.2f}",
                        f"{m.mean_slots:.1f}",
                        f"{equal.identical} of {equal.total}",
                    ]
                )
    text += "\n" + table(["domain", "decoder", "model", "TPF", "loop-free", "slots", "identical to generate"], rows)
    domains = dict.fromkeys(m.prompts.domain for r in documents.values() for m in r.measurements)
    scores = [[domain, name, *quality(results, domain)] for domain in domains for name, results in documents.items()]
    text += "\n" + table(["domain", "model", "held-out loss, nats per token", "exact match, 95 % interval"], scores)
    return text + minutes_of_the_recipe()


def ablations(documents: dict[str, Results]) -> str:
    """Variations of the short recipe."""
    text = "## Ablations of the training recipe\n\n"
    first = next(iter(documents.values()))
    text += (
        f"{setting(first)}\nEach row changes what its name says of `short` (examples/recipes/tiny_qwen3_short.yaml), as written in "
        "examples/tiny_qwen3/ablations.py; fixed-phase and reference-bundle have one view, so one-view is what they compare with. Window of 16, "
        "no candidates. One seed. Minutes are those of the last stage's training, on one of two cores that were not always idle. Rows were run "
        "as the code grew, at the revisions they name.\n\n"
    )
    rows = []
    for name, results in documents.items():
        by_domain = {m.prompts.domain: m for m in results.measurements if m.tokens_per_forward is not None}
        code, arithmetic = by_domain["code"], by_domain["arithmetic"]
        rows.append(
            [
                name,
                results.software.git_revision or "-",
                f"{results.training[-1].minutes:.1f}",
                f"{arithmetic.tokens_per_forward:.2f}",
                f"{code.tokens_per_forward:.2f}",
                f"{code.tokens_per_forward_loop_free or 0:.2f}",
                quality(results, "arithmetic")[1],
                quality(results, "code")[0],
            ]
        )
    head = [
        "variation",
        "revision",
        "minutes",
        "TPF arithmetic",
        "TPF code",
        "code, loop-free",
        "exact match",
        "held-out code, nats",
    ]
    return text + table(head, rows)


def peers(results: Results) -> str:
    """Ours as autotuned against transformers' own ways."""
    rows = []
    for model, domain in dict.fromkeys((m.model, m.prompts.domain) for m in results.measurements):
        for compiled in (False, True):
            found = [
                m
                for m in results.measurements
                if (m.model, m.prompts.domain, m.decoder.compiled) == (model, domain, compiled)
            ]
            ours = next(m for m in found if m.decoder.name.startswith("autotuned"))
            best = max((m for m in found if m is not ours), key=lambda m: m.tokens_per_second or 0)
            equal = ours.agreement
            chosen = "ordinary decoding" if ours.decoder.kind.startswith("generate") else ours.extra["setting"]
            rows.append(
                [
                    model,
                    domain,
                    "compiled" if compiled else "eager",
                    chosen,
                    f"{ours.tokens_per_second:.0f}",
                    factor(ours, "generate-compiled" if compiled else "generate"),
                    best.decoder.name,
                    f"{best.tokens_per_second:.0f}",
                    factor(ours, best.decoder.name),
                    "-" if equal is None else f"{equal.identical} of {equal.total}",
                ]
            )
    first = results.measurements[0]
    others = ", ".join(
        dict.fromkeys(m.decoder.name for m in results.measurements if not m.decoder.name.startswith("autotuned"))
    )
    if any(m.decoder.name == "assisted-compiled" for m in results.measurements):
        title, compiles = (
            " on transformers 5.24",
            "which compiles the forwards of prompt lookup and assisted decoding too",
        )
    else:
        title, compiles = "", "where transformers compiles ordinary decoding alone"
    head = [
        "model",
        "domain",
        "",
        "autotuned",
        "tok/s",
        "x generate",
        "best of theirs",
        "tok/s",
        "x best of theirs",
        "identical to generate",
    ]
    return (
        f"## Against transformers' own ways{title}\n\n{setting(results)}\nThe setting that `jacobi_hf.autotune` found on 12 other prompts of the domain, against "
        f"all of {others}, on {first.prompts.count} prompts, {first.prompts.max_new_tokens} new tokens, batch 1; eager against eager, compiled against "
        f"compiled, {compiles}. Assisted decoding has a draft model of 1.1 M parameters, which autotune was given too. `generate` is ordinary decoding, whatever the checkpoint is saved with. "
        "Every ratio is in the JSON.\n\n" + table(head, rows)
    )


def acceptance(results: Results) -> str:
    """How many tokens a forward yields."""
    lengths = ((1, 1), (2, 3), (4, 7), (8, 15), (16, 1024))
    rows = []
    for m in results.measurements:
        found = m.accepted_lengths or {}
        shares = [
            sum(n for length, n in found.items() if low <= length <= high) / sum(found.values())
            for low, high in lengths
        ]
        rows.append(
            [
                m.prompts.domain,
                m.decoder.name,
                m.model,
                f"{m.tokens_per_forward:.2f}",
                *(f"{100 * share:.0f} %" for share in shares),
            ]
        )
    names = [
        str(low) if low == high else f"{low} to {high}" if high < 1024 else f"{low} and more" for low, high in lengths
    ]
    return (
        f"## Tokens that a forward yields\n\n{setting(results)}\nShare of the decoding forwards that commit so many tokens, on "
        f"{results.measurements[0].prompts.count} prompts a domain; `base` is the tiny checkpoint, `forced` the one after Jacobi Forcing. "
        "Every length is in the document.\n\n"
        + table(["domain", "decoder", "model", "TPF", *names], rows)
        + "\n![Tokens that a forward commits](images/acceptance.png)\n"
    )


def growth(results: Results) -> str:
    """Parts of a step, and memory, along three axes."""
    parts = list(max((m.extra["ms"] for m in results.measurements), key=len))  # ours; ordinary decoding has fewer
    rows = [
        [
            m.prompts.domain,
            f"{m.extra['at']}, {m.decoder.name}",
            *(f"{m.extra['ms'][p]:.2f}" if p in m.extra["ms"] else "" for p in parts),
            "" if m.extra["mib"] is None else m.extra["mib"],
        ]
        for m in results.measurements
    ]
    return (
        f"## Growth\n\n{setting(results)}\nMedian milliseconds of a step and of its parts, and the highest memory of the call beyond the model, while one of "
        f"context, batch and new tokens grows. Every Jacobi step has its full width of {max(m.mean_slots or 0 for m in results.measurements):.0f} slots. "
        "*Forward* and *mask* are attention, and grow with what is cached; *lookup* is one scan over the ids of the text; *choice* is the argmax over the "
        "vocabulary and what it confirms; *commit* moves keys and values where a branch has won. With more cached tokens, given or new, nothing else grows.\n\n"
        + table(["axis", "at", *parts, "MiB"], rows)
        + "\n![Parts of a step](images/growth.png)\n"
    )


def step_cost(results: Results) -> str:
    """Milliseconds by width, and the replay."""
    found = [m for m in results.measurements if m.ms_per_forward]
    widths, on_gpu = (
        sorted({width for m in found for width in m.ms_per_forward or {}}),
        results.hardware.gpu is not None,
    )
    rows = [
        [
            m.prompts.batch_size,
            m.extra["context"],
            m.decoder.name,
            *(f"{(m.ms_per_forward or {}).get(w, 0):.1f}" if w in (m.ms_per_forward or {}) else "" for w in widths),
            m.extra["mbu_of_width_1"],
            *([m.extra.get("host_ms", {}).get("1", "")] if on_gpu else []),
        ]
        for m in found
    ]
    copied = results.measurements[0].extra["copy_gigabytes_per_second"]
    text = (
        f"## Cost of a step by its width\n\n{setting(results)}\nMilliseconds per step over random cached tokens. MBU is of one slot, against a copy measured "
        f"at {copied} GB/s.\n\n"
        + ("Host is the time until a step of one slot has been handed to the device.\n\n" if on_gpu else "")
        + table(["batch", "context", "", *map(str, widths), "MBU", *(["host"] if on_gpu else [])], rows)
        + f"\n![Cost by width](images/cost-{results.model}.png)\n"
    )
    replayed = [m for m in results.measurements if m.prompts.domain == "replay"]
    if not replayed:
        return text
    rows = [
        [
            m.decoder.name,
            f"{m.tokens_per_forward:.2f}",
            f"{m.mean_slots:.1f}",
            f"{m.tokens_per_second:.1f}",
            f"{m.speedups[0].factor:.2f}" if m.speedups else "",
            m.extra.get("conversion", ""),
            *([m.extra.get("idle", "")] if on_gpu else []),
        ]
        for m in replayed
    ]
    return (
        text
        + "\n**Replay**: a recorded text is the draft, spoilt so that each forward yields just so many tokens. What the engine makes of them, no model's "
        "speed. Conversion is speed-up over tokens per forward, against ordinary decoding run the same way (eager, compiled).\n\n"
        + table(["", "TPF", "slots", "tok/s", "speed-up", "conversion", *(["device idle"] if on_gpu else [])], rows)
        + f"\n![Speed-up against tokens per forward](images/replay-{results.model}.png)\n"
    )


def costs(results: Results) -> str:
    """What collecting and training take."""
    rows = [
        [c.name, f"{c.value:.4g} {c.unit}", "-" if c.factor is None else f"{c.factor:.2f} x {c.baseline}", c.repeats]
        for c in results.costs
    ]
    return f"## What collecting and training cost\n\n{setting(results)}\n" + table(
        ["what", "measured", "against", "repeats"], rows
    )


def lossless(documents: dict[str, Results]) -> str:
    """The base with its drafters."""
    text = (
        "## Lossless forcing of the tiny model\n\nThe base checkpoint, untouched, verifies what a drafter proposes ([how](lossless.md)). "
        "Slots count both streams.\n\n"
    )
    for name, results in documents.items():
        text += f"- **{name}**: {setting(results)}  Trained by {report_lossless.training(results)}.\n"
    head = ["domain", "decoder", "drafter", "TPF", "loop-free", "slots", "identical to generate"]
    text += "\n" + table(head, report_lossless.drafter_rows(documents))
    varied, peers_file = group("control-", "drafter"), HERE / "results" / "peers.json"
    if varied:
        text += (
            "\n### Controls\n\nEach row changes what its name says of `short`, 250 steps of the recipe (examples/tiny_qwen3/drafter_controls.py). "
            "Window of 14 to 16, all of it or 8 verified, no candidates, 32 prompts, one seed. Minutes on one of two cores that were not idle.\n\n"
        )
        head = ["variation", "minutes", "arithmetic", "8 verified", "code", "8 verified", "code, loop-free"]
        text += table(head, report_lossless.control_rows(varied))
    sources_file, clock_file = (HERE / "results" / f"lossless_{name}.json" for name in ("sources", "clock"))
    if sources_file.is_file():
        sources = Results.read(sources_file)
        text += (
            f"\n### Sources of drafts\n\n{setting(sources)}\n{sources.measurements[0].prompts.count} prompts a domain, up to 128 new tokens. Tokens per forward, loop-free in brackets. "
            "The window is of 14 to 16 guesses (n=2, K=8), which a drafter makes where there is one; as many of them are verified as acceptance "
            "suggests, unless the name says otherwise. `lookup` is the branch of n-gram lookup alone, without a window.\n\n"
        )
        head = [
            "domain",
            "drafted from",
            *dict.fromkeys(str(m.model) for m in sources.measurements),
            "slots",
            "identical to generate",
        ]
        text += table(head, report_lossless.source_rows(sources))
    if clock_file.is_file():
        clock = Results.read(clock_file)
        text += f"\n### Windows by the clock\n\n{setting(clock)}\nArithmetic, 24 prompts, medians of 5 passes, eager, without branches.\n\n"
        text += table(
            ["model", "decoder", "TPF", "slots", "tok/s", "x generate", "identical to generate"],
            report_lossless.clock_rows(clock),
        )
    with_drafter = peers_file.is_file() and any(
        m.model == "base + drafter" for m in Results.read(peers_file).measurements
    )
    if with_drafter:
        forced, base = (group(name)[name] for name in ("forced-seed42", "base"))
        drafted = documents["drafter-seed42"]
        text += (
            "\n### Ways to be faster\n\nFrom *Against transformers' own ways* above, eager; the loss is that of held-out text in nats per token, "
            "over the base's; training is minutes x threads. As autotuned, the drafter is out of use where something else is faster; its windows by "
            "themselves are timed above.\n\n"
        )
        head = ["domain", "way", "setting", "TPF", "tok/s", "x generate", "loss", "MB to publish", "training"]
        text += table(head, report_lossless.way_rows(Results.read(peers_file), forced, base, drafted))
    return text


def group(prefix: str, folder: str = "forcing") -> dict[str, Results]:
    """The documents of a folder whose names begin so."""
    files = sorted((HERE / "results" / folder).glob(f"{prefix}*.json"))
    return {file.stem.removeprefix("ablation-"): Results.read(file) for file in files}


def page() -> str:
    """The whole page, from the documents that are there."""
    parts = [HEAD]
    for name, sections in {
        "decode_compare": (compare, widths),
        "decode_grid": (grid,),
        "overhead": (overhead,),
        "bf16": (bf16,),
        "memory": (memory,),
        "growth": (growth,),
        "acceptance": (acceptance,),
        "peers": (peers,),
        "peers-5.24": (peers,),
        **{path.stem: (step_cost,) for path in sorted((HERE / "results").glob("step_cost-*.json"))},
        "training": (costs,),
    }.items():
        path = HERE / "results" / f"{name}.json"
        if path.is_file():
            results = Results.read(path)
            parts += [section(results) for section in sections]
    if models := {**group("base"), **group("forced"), **group("control")}:
        parts.append(forcing(models))
    if varied := group("ablation-"):
        parts.append(ablations(varied))
    if drafters := group("drafter-", "drafter"):
        parts.append(lossless(drafters))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE)
