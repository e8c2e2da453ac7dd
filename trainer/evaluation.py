"""Decoding of prompts during training, for the metrics of an evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jacobi_hf.config import CONSTANT
from jacobi_hf.evaluation.decoding import measure_decoding, ordinary_outputs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedModel

    from jacobi_hf.trainer.base_config import BaseConfig


class DecodingEvaluation:
    """Prompts of several sets, decoded at each evaluation for tokens per forward and identity with ordinary decoding.

    Args:
        prompts: lists of token ids, by name of their set.
        args: decoding knobs, most new tokens, and most prompts of each set.
    """

    def __init__(self, prompts: Mapping[str, Sequence[Sequence[int]]] | None, args: BaseConfig) -> None:
        self._prompts = dict(prompts or {})
        config = args.decoding_config()
        # The adaptive schedule follows the clock, so its tokens per forward say little of the weights.
        self._config = None if config is None else replace(config, jacobi_schedule=CONSTANT)
        self._max_new_tokens = args.eval_max_new_tokens
        self._prompt_count = args.eval_prompt_count
        self._measured: tuple[Any, dict[str, float]] | None = None

    def __bool__(self) -> bool:
        """Return whether there is anything to decode."""
        return self._config is not None and bool(self._prompts)

    def metrics(self, model: PreTrainedModel, version: Any) -> dict[str, float]:
        """Return `SET_tokens_per_forward` and `SET_identical` of each set of prompts.

        Args:
            model: decodes, in eval mode for the time of the call.
            version: changes whenever the weights do. With the version of the last call, the metrics of that call are
                returned again, so that several evaluation sets cost one decoding.
        """
        if self._measured is None or self._measured[0] != version:
            was_training = model.training
            model.eval()
            self._measured = (version, self._decoded(model))
            model.train(was_training)
        return self._measured[1]

    def _decoded(self, model: PreTrainedModel) -> dict[str, float]:
        assert self._config is not None
        metrics = {}
        for name, prompts in self._prompts.items():
            chosen = list(prompts)[: self._prompt_count]
            report = measure_decoding(model, chosen, self._config, self._max_new_tokens)
            ordinary = ordinary_outputs(model, chosen, self._max_new_tokens)
            same = [a == b for a, b in zip(report.outputs, ordinary, strict=True)]
            label = f"{name}_" if name else ""
            metrics[f"{label}tokens_per_forward"] = report.tokens_per_forward
            metrics[f"{label}identical"] = sum(same) / len(chosen)
        return metrics
