"""`jacobi-hf bench`: measure a model with the decoder, on prompts by domain."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from jacobi_hf.cli._errors import check_file
from jacobi_hf.cli._options import Options, option, required, switch, verb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from jacobi_hf.cli._recipes import Call
    from jacobi_hf.config import JacobiConfig
    from jacobi_hf.results.schema import Measurement, Results
    from jacobi_hf.resume import Progress

    Bar = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass
class BenchConfig(Options):
    """What is measured of a model."""

    model: str = required("Model name or path.")
    drafter: str | None = option(None, "Folder or Hub repository of a drafter to decode with.")
    name: str | None = option(None, "Name of the model in the results.")
    dtype: str = option("float32", "dtype of the model; texts are compared token for token in float32.")
    output: str = required("JSON file of the results.")
    prompts: str = required("File of prompts, or JSON with prompts by domain.")
    column: str | None = option(None, "Column of the prompts, if it has another name; its texts are no questions.")
    chat: bool | None = switch("Put all texts through the chat template, or none. The default is questions only.")
    domains: str | None = option(None, "Domains to measure, separated by commas.")
    prompt_count: int = option(64, "Prompts of each domain.", low=1)
    max_new_tokens: int = option(128, "New tokens per prompt.", low=1)
    decoders: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Knobs of each decoder, by name. If not given, the model decodes with its own knobs, once with "
            "the constant schedule and once adaptively. Given knobs are constant unless they say adaptive, because "
            "adaptive counts depend on the machine."
        },
    )
    held_out: str | None = option(None, "JSONL with domain and text, for the held-out loss.")
    held_out_tokens: int = option(120_000, "Tokens of each domain for that loss.", low=1)
    problems: str | None = option(None, "JSONL with prompt and answer.")
    problem_domain: str = option("arithmetic", "Domain that the problems belong to.")
    problem_count: int = option(1000, "Problems to solve.", low=1)
    answer_pattern: str = option(r"The answer is (-?\d+)", "Regular expression; group 1 is the answer.")


@verb(lambda: (BenchConfig,), json=True)
def bench(call: Call) -> None:
    """Measure speed, tokens per forward and identity with ordinary decoding, on prompts by domain.

    `eval` scores answers to benchmark questions instead, and `autotune` looks for the fastest knobs.

    Prompts come from JSONL, JSON, parquet or text files, or from the Hub: with messages, prompt, question, turns,
    instruction or text, such as the files of GSM8K, HumanEval and MT-bench. JSON may have them by domain:
    {"prompts": {"code": ["def f():"]}}. An interrupted run goes on after the last finished domain when it is run
    again.
    """
    (config,) = call.parse()
    file = unfinished(config)
    call.ending.kept = lambda: (
        f"finished domains are kept in {file}; the same command goes on from there"
        if file.is_file()
        else "nothing was finished yet"
    )
    results = run(config, quiet=call.as_json)
    if call.as_json:
        typer.echo(results.model_dump_json(indent=1, exclude_none=True))
    else:
        _show(results, config.output)


def unfinished(config: BenchConfig) -> Path:
    """Return the file that keeps measurements until all of them are finished."""
    return Path(f"{config.output}.unfinished.json")


def run(config: BenchConfig, *, quiet: bool = False) -> Results:
    """Measure a model and write the results to `config.output`.

    Args:
        config: What is measured.
        quiet: Whether to show no progress.

    Raises:
        ValueError: Options or files cannot be used. Nothing was measured.
    """
    from rich.console import Console
    from rich.progress import track

    from jacobi_hf.loading import load
    from jacobi_hf.results.schema import Results
    from jacobi_hf.resume import Progress
    from jacobi_hf.trainer.data.shards import weights_fingerprint
    from jacobi_hf.trainer.run_record import stages_of

    prompts, texts, problems = _read(config)
    decoders = _decoders(config)
    training = stages_of(config.drafter or config.model)
    model, tokenizer = load(config.model, config.dtype, config.drafter)
    if not decoders:
        decoders = _own(model)
    results = Results.start("Tokens per forward, held-out loss, right answers", model, config.name or config.model)
    settings = {
        "config": asdict(config),
        "prompts": prompts,
        "weights": weights_fingerprint(model),
        "training": [stage.model_dump() for stage in training],
    }
    progress = Progress(unfinished(config), settings)

    def bar(rows: Any, what: str) -> Any:
        return track(rows, what, console=Console(stderr=True), disable=quiet)

    parts: dict[str, Callable[[], list[Measurement]]] = {}
    for domain in texts:
        parts[f"loss of {domain}"] = partial(_loss, model, tokenizer, texts[domain], domain, config, bar)
    if problems:
        parts["problems"] = partial(_solved, model, tokenizer, problems, config, bar)
    for domain in prompts:
        asked = {domain: prompts[domain]}
        parts[f"decoding of {domain}"] = partial(_decoded, model, tokenizer, asked, decoders, config, bar)
    measured = [one for name, measure in parts.items() for one in _kept(progress, name, measure)]
    results = results.model_copy(update={"measurements": measured, "training": training})
    results.write(Path(config.output))
    progress.remove()
    return results


def _read(config: BenchConfig) -> tuple[dict[str, list[Any]], dict[str, list[str]], list[dict[str, Any]]]:
    """Return prompts by domain, held-out texts by domain, and problems."""
    from jacobi_hf.io import read_jsonl
    from jacobi_hf.prompts import read_prompts_by_domain

    by_domain = read_prompts_by_domain(config.prompts, config.column)
    domains = [domain.strip() for domain in config.domains.split(",")] if config.domains else list(by_domain)
    if unknown := [domain for domain in domains if domain not in by_domain]:
        raise ValueError(f"{config.prompts} has no domain {', '.join(unknown)}; it has {', '.join(by_domain)}.")
    texts = _held_out(config.held_out, domains) if config.held_out else {}
    problems = read_jsonl(config.problems)[: config.problem_count] if config.problems else []
    if bad := [number for number, problem in enumerate(problems, 1) if not {"prompt", "answer"} <= problem.keys()]:
        raise ValueError(f"{config.problems}, row {bad[0]} has no prompt or no answer.")
    check_file(config.output)
    return {domain: by_domain[domain][: config.prompt_count] for domain in domains}, texts, problems


def _held_out(file: str, domains: list[str]) -> dict[str, list[str]]:
    """Return the held-out texts of each domain."""
    from jacobi_hf.io import read_jsonl

    rows = read_jsonl(file)
    texts = {domain: [str(row.get("text", "")) for row in rows if row.get("domain") == domain] for domain in domains}
    if missing := [domain for domain in domains if not texts[domain]]:
        raise ValueError(
            f"{file} has no text of {', '.join(missing)}: name the --domains that it has, or leave held_out out."
        )
    return texts


def _decoders(config: BenchConfig) -> dict[str, JacobiConfig]:
    from jacobi_hf.cli._models import check_decoder, check_knobs
    from jacobi_hf.config import CONSTANT, JacobiConfig

    for name, knobs in config.decoders.items():
        check_decoder(name, knobs)
    schedule = {"jacobi_schedule": CONSTANT}
    return {name: JacobiConfig(**schedule | check_knobs(knobs)) for name, knobs in config.decoders.items()}


def _own(model: Any) -> dict[str, JacobiConfig]:
    from jacobi_hf.cli._models import decoding_of
    from jacobi_hf.config import CONSTANT

    own = decoding_of(model, {})
    if not own:
        return {}
    found = {own.decoding: replace(own, jacobi_schedule=CONSTANT)}
    return found | ({"adaptive": own} if own.is_adaptive else {})


def _kept(progress: Progress, name: str, measure: Callable[[], list[Measurement]]) -> list[Measurement]:
    """Return the measurements that are kept under a name, or measure and keep them."""
    from jacobi_hf.results.schema import Measurement

    if name not in progress.parts:
        progress.add(name, [one.model_dump(mode="json", exclude_none=True) for one in measure()])
    return [Measurement.model_validate(one) for one in progress.parts[name]]


def _loss(
    model: Any, tokenizer: Any, texts: list[str], domain: str, config: BenchConfig, bar: Bar
) -> list[Measurement]:
    from jacobi_hf.evaluation.quality import held_out_loss
    from jacobi_hf.results.schema import Decoder, Measurement, Prompts

    loss, tokens = held_out_loss(model, tokenizer, texts, config.held_out_tokens, track=bar)
    described = Prompts(domain=domain, source="held-out text", count=tokens, max_new_tokens=0)
    return [Measurement(decoder=Decoder(name="generate", kind="generate"), prompts=described, held_out_loss=loss)]


def _solved(
    model: Any, tokenizer: Any, problems: list[dict[str, Any]], config: BenchConfig, bar: Bar
) -> list[Measurement]:
    from jacobi_hf.evaluation.quality import right_answers
    from jacobi_hf.results.schema import Decoder, Measurement, Prompts

    quality = right_answers(model, tokenizer, problems, config.answer_pattern, config.max_new_tokens, track=bar)
    described = Prompts(
        domain=config.problem_domain,
        source="held-out problems",
        count=len(problems),
        max_new_tokens=config.max_new_tokens,
    )
    return [Measurement(decoder=Decoder(name="generate", kind="generate"), prompts=described, quality=quality)]


def _decoded(
    model: Any,
    tokenizer: Any,
    prompts: dict[str, list[Any]],
    decoders: dict[str, JacobiConfig],
    config: BenchConfig,
    bar: Bar,
) -> list[Measurement]:
    from jacobi_hf.evaluation.decoding import measurements

    return measurements(
        model, tokenizer, prompts, decoders, config.max_new_tokens, config.drafter, bar, chat=config.chat
    )


def _show(results: Results, output: str) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    columns: dict[str, Callable[[Measurement], str]] = {
        "domain": lambda m: m.prompts.domain,
        "decoder": lambda m: m.decoder.name,
        "tok/s": lambda m: _number(m.tokens_per_second, 1),
        "speed-up": lambda m: _number(m.speedups[0].factor) if m.speedups else "",
        "identical": lambda m: f"{m.agreement.identical}/{m.agreement.total}" if m.agreement else "",
        "TPF": lambda m: _number(m.tokens_per_forward),
        "loop-free\nTPF": lambda m: _number(m.tokens_per_forward_loop_free),
        "slots": lambda m: _number(m.mean_slots, 1),
        "loss": lambda m: _number(m.held_out_loss, 4),
        "right\nanswers": lambda m: (
            f"{m.quality.value:.3f} ({m.quality.low:.2f}\u2013{m.quality.high:.2f})" if m.quality else ""
        ),
    }
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    filled = {name: cells for name, of in columns.items() if any(cells := [of(m) for m in results.measurements])}
    for name in filled:
        justify: Literal["left", "right"] = "left" if name in ("domain", "decoder") else "right"
        table.add_column(name, justify=justify, no_wrap=justify == "right", overflow="fold")  # texts make room
    for row in zip(*filled.values(), strict=True):
        table.add_row(*row)
    Console().print(table)
    Console().print(
        "One prompt at a time, greedily; the decoders take turns. speed-up and identical: to eager generate(). "
        "TPF: tokens per forward.",
        style="dim",
    )
    Console().print(output, style="dim")


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
