"""The generation of each request: one at a time, with the request's seed and knobs, until it ends or is cancelled."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from transformers import CompileConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.utils import GenerateManager, GenerationState

from jacobi_hf.config import KNOBS
from jacobi_hf.integration.support import fixed_positions
from jacobi_hf.loading import positions_of
from jacobi_hf.serving.errors import FailedError
from jacobi_hf.serving.penalties import Penalties
from jacobi_hf.serving.requests import PENALTIES, SEED, TOKEN_IDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import GenerationConfig

LEAST_DEFAULT = 1024  # new tokens if neither request nor model asks for more, as in `transformers serve`

_log = logging.getLogger(__name__)


class OneQueue(GenerationState):
    """Lets all requests wait in one queue, for the one thread that generates.

    Args:
        generations: generates for one request after another.
    """

    def __init__(self, generations: Generations) -> None:
        super().__init__()
        self._generations = generations

    def get_manager(self, model_id: str, use_cb: bool = False) -> Generations:
        """Return the same manager for every request."""
        return self._generations


class Generations(GenerateManager):
    """transformers' generation manager, with a `Call` for each request instead of the bare model.

    Args:
        compiled: whether steps are compiled.
        max_length: most tokens of prompt and answer together; None for no limit.
    """

    def __init__(self, *, compiled: bool, max_length: int | None = None) -> None:
        super().__init__()
        self._compiled = compiled
        self._max_length = max_length
        self._calls: WeakSet[Call] = WeakSet()
        self._is_stopped = False

    def stop(self) -> None:
        """End all calls, including later ones."""
        self._is_stopped = True
        for call in list(self._calls):
            call.cancel(503, "the server is stopping")

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **options: Any
    ) -> Any:
        """Start to generate, and return the queue of the streamed text with the call that can be cancelled."""
        call = self._call(model, inputs, gen_config)
        queue, call.streamer = super().generate_streaming(call, processor, inputs, gen_config, request_id, **options)
        return queue, call

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        """Return the whole answer; if the request is cancelled, the call is cancelled too."""
        call = self._call(model, inputs, gen_config)
        generation = asyncio.ensure_future(
            super().generate_non_streaming(call, processor, inputs, gen_config, request_id)
        )
        try:
            return await asyncio.shield(generation)
        except asyncio.CancelledError:
            call.cancel()
            generation.add_done_callback(lambda done: done.exception())  # nobody waits for it any more
            raise

    def _call(self, model: Any, inputs: Any, gen_config: GenerationConfig) -> Call:
        """Return the call of a request. If its prompt is token ids, these replace the tokenized text in `inputs`."""
        if ids := vars(gen_config).pop(TOKEN_IDS, None):
            prompt_1P = torch.tensor([ids], device=model.device)
            inputs.update({"input_ids": prompt_1P, "attention_mask": torch.ones_like(prompt_1P)})
        _limit(model, inputs["input_ids"].shape[-1], gen_config, self._max_length)
        call = Call(model, gen_config, compiled=self._compiled)
        self._calls.add(call)
        if self._is_stopped:
            self.stop()
        return call


def _limit(model: Any, tokens: int, gen_config: GenerationConfig, max_length: int | None) -> None:
    """Set the most new tokens of a request that does not say them, and check the server's own limit.

    Answers may go beyond `max_position_embeddings`, as in `generate`: with YaRN, for example, a model serves longer
    texts than its config says.

    Args:
        model: the model that answers.
        tokens: tokens of the prompt.
        gen_config: options of the request; its `max_new_tokens` may be set.
        max_length: most tokens of prompt and answer together; None for no limit.

    Raises:
        ValueError: prompt and answer may be longer than the limit, or than the model's table of positions.
    """
    if gen_config.max_new_tokens is None:
        limits = (positions_of(model), math.inf if max_length is None else max_length)
        rooms = [limit - tokens for limit in limits if limit > tokens]
        gen_config.max_new_tokens = int(min([max(LEAST_DEFAULT, model.generation_config.max_new_tokens or 0), *rooms]))
    if max_length is not None and tokens + gen_config.max_new_tokens > max_length:
        raise ValueError(
            f"the prompt has {tokens} tokens and the answer may have {gen_config.max_new_tokens}, together more than "
            f"the {max_length} that this server allows (--max-length): shorten the prompt or lower max_tokens."
        )
    needed = tokens + gen_config.max_new_tokens - 1  # the last token is not read again
    if (positions := fixed_positions(model, needed)) is not None:  # on a GPU, one more would end the server
        raise ValueError(f"prompt and answer may need {needed} positions, and the model has a table of {positions}.")


class Call:
    """The model for one request: `generate` uses the request's seed and knobs, and can be cancelled.

    Args:
        model: the model that answers.
        generation_config: options of the request, with its knobs, seed and penalties; the last two are removed from
            it.
        compiled: whether steps are compiled.

    Attributes:
        streamer: transformers' streamer of the answer; None for an answer that is not streamed.
    """

    def __init__(self, model: Any, generation_config: GenerationConfig, *, compiled: bool) -> None:
        self._model = model
        self.streamer: Any = None
        self._failure: FailedError | None = None
        self._knobs = {name: getattr(generation_config, name) for name in KNOBS if hasattr(generation_config, name)}
        self._seed: int | None = vars(generation_config).pop(SEED, None)
        self._penalties: list[float] = vars(generation_config).pop(PENALTIES, [0, 0])
        if compiled:
            generation_config.compile_config = CompileConfig()

    @property
    def total_tokens(self) -> int:
        """New tokens that were streamed so far."""
        return 0 if self.streamer is None else self.streamer.total_tokens

    def cancel(self, status: int = 400, reason: str = "the client has left") -> None:
        """Let the generation fail at its next token, or before it starts."""
        self._failure = FailedError(status, reason)

    def generate(self, **arguments: Any) -> torch.Tensor:
        """Return the ids that the model generates. Only one call generates at a time, so the seed holds for this call
        alone.

        Raises:
            FailedError: the call was cancelled or failed; the error has the status and the message for the client.
        """
        self._check()
        if self._seed is not None:
            torch.manual_seed(self._seed)
        try:
            criteria = StoppingCriteriaList([_EachToken(self._check)])
            processors = self._processors(arguments["input_ids"].shape[-1])
            ids: torch.Tensor = self._model.generate(
                **arguments, **self._knobs, stopping_criteria=criteria, logits_processor=processors
            )
        except FailedError:
            raise
        except ValueError as error:
            raise FailedError(400, str(error)) from error
        except Exception as error:
            _log.exception("generation failed")
            raise FailedError(500, f"generation failed: {type(error).__name__}: {error}") from error
        return ids

    def _processors(self, prompt_tokens: int) -> LogitsProcessorList:
        penalties = [Penalties(prompt_tokens, *self._penalties)] if any(self._penalties) else []
        return LogitsProcessorList(penalties)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure


class _EachToken(StoppingCriteria):
    """Stopping criterion that calls a function at each token and never stops."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._action()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
