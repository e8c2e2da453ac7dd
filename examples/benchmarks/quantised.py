"""Equality with quantised activations: how often Jacobi decoding differs from `generate`, and `generate` from itself.

    OMP_NUM_THREADS=1 python examples/benchmarks/quantised.py

Activations are quantised to int8 while the model runs. Some kinds take one scale for all tokens of a forward, so
guesses change the logits of the tokens beside them, as the other rows of a batch do in ordinary decoding. Others take
a scale for each token. Their rounding to int8 still makes much of a little: a last digit of a float can become a whole
step of int8. In float64 that does not happen here, so what differs there depends on the other tokens.

torch's dynamic quantisation is torch's own. The other kinds are written here in a few lines after the libraries that
have them, because these libraries need other hardware.

Baseline: ordinary `generate` of the same quantised model at batch 1. The last line on stdout is the path of the JSON
document.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer
from agreement import compared, outputs, until_difference
from torch import nn

from jacobi_hf.results.schema import Results

THRESHOLD = 6.0  # the default of bitsandbytes' llm_int8_threshold
# By name: how many tokens share a scale, and the dtype that everything else is computed in.
SCHEMES = {
    "not quantised": (None, torch.float32),
    "torch dynamic int8": ("torch", torch.float32),
    "a scale for each tensor, float64": ("tensor", torch.float64),
    "a scale for each token, float32": ("token", torch.float32),
    "a scale for each token, float64": ("token", torch.float64),
    f"LLM.int8, threshold {THRESHOLD:g}, float32": ("outliers", torch.float32),
    f"LLM.int8, threshold {THRESHOLD:g}, float64": ("outliers", torch.float64),
}


class Int8Linear(nn.Module):
    """Linear layer that multiplies int8 activations with int8 weights; each output feature has a scale.

    Args:
        linear: the layer whose weights it quantises.
        shares: what shares a scale of the activations: `"tensor"`, all tokens of a forward; `"token"`, the features of
            a token; `"outliers"`, the same, but features that reach `THRESHOLD` in any token of the forward are
            multiplied unquantised (LLM.int8).
    """

    def __init__(self, linear: nn.Linear, shares: str) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.shares = shares
        self.scale_O1 = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.integer_OI = (linear.weight.detach() / self.scale_O1).round().double()  # sums of products are exact
        self.rounded_OI = self.integer_OI.to(linear.weight.dtype) * self.scale_O1

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output features of hidden states `(.., I)`."""
        hidden_RI = hidden.reshape(-1, hidden.shape[-1])
        output_RO = 0 if self.bias is None else self.bias
        if self.shares == "outliers":
            is_outlier_I = (hidden_RI.abs() >= THRESHOLD).any(0)
            output_RO = output_RO + hidden_RI[:, is_outlier_I] @ self.rounded_OI[:, is_outlier_I].T
            hidden_RI = hidden_RI.masked_fill(is_outlier_I, 0.0)
        size_RI = hidden_RI.abs()
        largest = size_RI.amax() if self.shares == "tensor" else size_RI.amax(1, keepdim=True)
        scale = largest.clamp(min=1e-8) / 127
        product_RO = (hidden_RI / scale).round().double() @ self.integer_OI.T
        output_RO = output_RO + product_RO.to(hidden.dtype) * scale * self.scale_O1.T
        return output_RO.view(*hidden.shape[:-1], -1)


def quantise(model: Any, shares: str | None) -> Any:
    """Return the model with quantised linear layers; None leaves it unchanged, `"torch"` is torch's dynamic int8."""
    if shares == "torch":
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    for module in list(model.modules()) if shares else ():
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child, shares))
    return model


def references(
    model: Any, tokenizer: Any, texts: list[str], max_new_tokens: int
) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Return ordinary greedy continuations at batch 1, and the logits `(new tokens, V)` of each."""
    found = []
    logits = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            decoding=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        found.append(output.sequences[0, inputs["input_ids"].shape[1] :].tolist())
        logits.append(torch.cat(output.logits).float())
    return found, logits


def gaps(firsts: list[list[int]], seconds: list[list[int]], logits: list[torch.Tensor]) -> list[float]:
    """Return, for each pair of texts that differ, by how much the logits of the first prefer its token."""
    found = []
    for first, second, logits_TV in zip(firsts, seconds, logits, strict=True):
        place = until_difference(first, second) - 1
        if first != second and place < len(second):
            found.append(float(logits_TV[place, first[place]] - logits_TV[place, second[place]]))
    return found


def main(
    output: Annotated[Path, typer.Option(help="Path of the JSON document to write.")] = common.RESULTS
    / "quantised.json",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per domain.")] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    scheme: Annotated[list[str] | None, typer.Option(help="A name of SCHEMES; without, all of them.")] = None,
) -> None:
    """Count the prompts whose text differs: Jacobi decoding at batch 1, and ordinary decoding in a batch of 8."""
    contenders = [(common.jacobi("jacobi_multiblock"), 1), (common.ordinary(), 8)]
    loaded, _, model_name = common.load(None)
    results = Results.start("Equality with quantised activations", loaded, model_name)
    measurements = []
    for name in scheme or SCHEMES:
        shares, dtype = SCHEMES[name]
        loaded, tokenizer, _ = common.load(None, dtype)
        model = quantise(loaded, shares)
        for domain, texts in common.prompts(prompts).items():
            first, logits = references(model, tokenizer, texts, max_new_tokens)
            for contender, batch in contenders:
                second = outputs(model, tokenizer, texts, batch, max_new_tokens, **contender.arguments)
                gap = max(gaps(first, second, logits), default=0.0)
                extra = {"scheme": name, "largest_gap": round(gap, 4)}
                measured = compared(contender, second, first, domain, max_new_tokens, batch, **extra)
                print(domain, measured.decoder.name, measured.agreement, measured.extra)
                measurements.append(measured)
    results.with_measurements(measurements).write(output)
    print(output)


if __name__ == "__main__":
    typer.run(main)
