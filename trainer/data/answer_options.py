"""Options of how a model answers. transformers is imported where it is used, so that help texts come at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel


@dataclass(frozen=True)
class AnswerConfig:
    """How the model answers.

    Parameters:
        max_new_tokens: longest answer in tokens, a multiple of the block size.
        do_sample: sample the answers instead of decoding greedily. Each position keeps its sampling noise in every
            Jacobi iteration, so the fixed point is exactly the sampled answer.
        temperature, top_k, top_p, min_p: options of sampling. None leaves a filter out. Other processors of the
            model's generation config, such as a repetition penalty, are not applied.

    Raises:
        ValueError: max_new_tokens is below 1, or temperature is not above 0.
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1.")
        if self.do_sample and self.temperature <= 0:
            raise ValueError(
                f"temperature={self.temperature} must be above 0. For greedy answers set do_sample=False."
            )

    def generation_config(self, model: PreTrainedModel) -> GenerationConfig:
        """Return the generation config with which ordinary `generate` answers like this."""
        from transformers import GenerationConfig

        own = model.generation_config
        assert own is not None
        sampling: dict[str, Any] = {"do_sample": False}
        if self.do_sample:
            # Neutral values, not None: `generate` fills None from the model's own config.
            sampling = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_k": self.top_k or 0,
                "top_p": 1.0 if self.top_p is None else self.top_p,
                "min_p": 0.0 if self.min_p is None else self.min_p,
            }
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            repetition_penalty=1.0,
            eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id,
            **sampling,
        )

    def warpers(self) -> LogitsProcessorList:
        """Return the processors that `generate` applies to the scores under this config, in its order."""
        from transformers import LogitsProcessorList
        from transformers.generation import (
            MinPLogitsWarper,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        warpers = LogitsProcessorList()
        if not self.do_sample:
            return warpers
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            warpers.append(MinPLogitsWarper(self.min_p))
        return warpers
