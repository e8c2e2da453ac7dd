"""What a model is worth after forcing: tokens per forward and identity through the real decoder, held-out loss, right answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from jacobi_hf.results.schema import Agreement, Decoder, Measurement, Prompts, Quality

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from jacobi_hf.config import JacobiConfig


@dataclass(frozen=True)
class DecodingReport:
    """What decoding some prompts took.

    Attributes:
        new_tokens, forwards: per prompt, prefill counted.
        mean_slots: positions per decoding forward.
        outputs: new ids of each prompt.
    """

    new_tokens: list[int]
    forwards: list[int]
    mean_slots: float
    outputs: list[list[int]]

    @property
    def tokens_per_forward(self) -> float:
        """New tokens over forwards, all prompts together."""
        return sum(self.new_tokens) / sum(self.forwards)

    @property
    def per_prompt(self) -> list[float]:
        """Tokens per forward of each prompt."""
        return [tokens / forwards for tokens, forwards in zip(self.new_tokens, self.forwards, strict=True)]

    @property
    def looping(self) -> list[int]:
        """Prompts whose output ends in a loop."""
        return [number for number, output in enumerate(self.outputs) if is_looping(output)]

    @property
    def loop_free(self) -> float | None:
        """Tokens per forward of the other prompts together; None when there are none."""
        looping = set(self.looping)
        free = [
            (t, f) for i, (t, f) in enumerate(zip(self.new_tokens, self.forwards, strict=True)) if i not in looping
        ]
        return sum(t for t, _ in free) / sum(f for _, f in free) if free else None


def is_looping(tokens: Sequence[int], tail: int = 48, longest_period: int = 19) -> bool:
    """Whether an output ends in a loop: its last `tail` tokens repeat with a period of at most `longest_period`."""
    last = list(tokens[-tail:])
    return len(last) == tail and any(last[p:] == last[:-p] for p in range(1, longest_period + 1))


def untracked(rows: Iterable[Any], what: str) -> Iterable[Any]:  # noqa: ARG001
    """What a progress bar is given: rows, and what is done with them. This one shows nothing."""
    return rows


def measure_decoding(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    config: JacobiConfig,
    max_new_tokens: int,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = untracked,
    what: str = "",
) -> DecodingReport:
    """Decode prompts (ids) greedily, one at a time, with a registered model in eval mode."""
    tokens, forwards, outputs = [], [], []
    slots = steps = 0
    for prompt in track(prompts, what):
        ids = torch.tensor([list(prompt)], device=model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            **config.to_knobs(),
        )
        stats = output.jacobi_stats
        tokens.append(stats.new_tokens[0])
        forwards.append(stats.forwards)
        slots, steps = slots + stats.slots, steps + stats.slots_by_width.total()
        outputs.append(output.sequences[0, ids.shape[1] :].tolist())
    return DecodingReport(tokens, forwards, slots / max(1, steps), outputs)


def ordinary_outputs(model: PreTrainedModel, prompts: Iterable[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
    """What `generate` writes for each prompt, greedily, one at a time."""
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=model.device)
        sequence = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            decoding=None,
        )
        outputs.append(sequence[0, ids.shape[1] :].tolist())
    return outputs


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
    """Ids of a prompt: a string as it stands, messages through the chat template."""
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt)["input_ids"]
        return ids
    of_messages: list[int] = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=False)
    return of_messages


def measurements(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[Any]],
    decoders: Mapping[str, JacobiConfig],
    max_new_tokens: int,
    drafter: str | None = None,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = untracked,
) -> list[Measurement]:
    """Tokens per forward, slots and identity of each decoder on the prompts (strings, or messages) of each domain.

    Args:
        drafter: what the results call the drafter that the model has.
        track: a progress bar, see `untracked`.
    """
    measured = []
    for domain, texts in prompts.items():
        ids = [prompt_ids(tokenizer, text) for text in texts]
        references = ordinary_outputs(model, track(ids, f"{domain}, generate"), max_new_tokens)
        described = Prompts(domain=domain, source="held-out prompts", count=len(ids), max_new_tokens=max_new_tokens)
        for name, config in decoders.items():
            report = measure_decoding(model, ids, config, max_new_tokens, track, f"{domain}, {name}")
            different = [i for i, (a, b) in enumerate(zip(report.outputs, references, strict=True)) if a != b]
            measured.append(
                Measurement(
                    decoder=Decoder.of(name, config, drafter),
                    prompts=described,
                    new_tokens=sum(report.new_tokens),
                    forwards=sum(report.forwards),
                    tokens_per_forward=report.tokens_per_forward,
                    tokens_per_forward_loop_free=report.loop_free,
                    per_prompt_tokens_per_forward=report.per_prompt,
                    looping=report.looping,
                    mean_slots=report.mean_slots,
                    agreement=Agreement(
                        baseline="generate", identical=len(ids) - len(different), total=len(ids), different=different
                    ),
                )
            )
    return measured


def held_out_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    tokens: int,
    row: int = 512,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = untracked,
) -> tuple[float, int]:
    """Mean next-token loss in nats over the first `tokens` ids of the texts (each closed by end-of-text, cut into rows), and how many."""
    stream: list[int] = []
    for text in texts:
        stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        if len(stream) >= tokens:
            break
    row = min(row, len(stream))
    if row < 2:
        raise ValueError(f"{len(texts)} texts hold {len(stream)} tokens: the held-out loss needs at least two.")
    rows = torch.tensor(stream[: min(tokens, len(stream)) // row * row], device=model.device).view(-1, row)
    total = 0.0
    with torch.no_grad():
        for batch in track(rows.split(8), "held-out loss"):
            total += float(model(input_ids=batch, labels=batch, use_cache=False).loss) * len(batch)
    return total / len(rows), rows.numel()


def right_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Mapping[str, Any]],
    pattern: str,
    max_new_tokens: int,
    batch_size: int = 50,
    track: Callable[[Iterable[Any], str], Iterable[Any]] = untracked,
) -> Quality:
    """Share of problems (`prompt`, `answer`) whose greedy completion has the answer as group 1 of `pattern`, with its 95 % interval."""
    if not problems:
        raise ValueError("problems is empty: there is no share of right answers.")
    right = 0
    for start in track(range(0, len(problems), batch_size), "problems"):
        part = problems[start : start + batch_size]
        inputs = tokenizer(
            [p["prompt"] for p in part],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
        )
        inputs = inputs.to(model.device)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, decoding=None)[
            :, inputs["input_ids"].shape[1] :
        ]
        for text, problem in zip(tokenizer.batch_decode(ids, skip_special_tokens=True), part, strict=True):
            found = re.search(pattern, text)
            right += found is not None and found.group(1) == str(problem["answer"])
    return Quality.of_share("exact_match", right, len(problems))
