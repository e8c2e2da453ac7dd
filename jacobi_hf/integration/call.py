"""One call of `generate`: build its parts in the order in which data meets them, decode, return the output.

Shapes: B rows, P prompt columns, V vocabulary, I indices of new tokens, E end tokens.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from jacobi_hf.decoding.loop import Decoder
from jacobi_hf.decoding.noise import SamplingNoise
from jacobi_hf.decoding.prompt import NotServedError, read_prompt
from jacobi_hf.decoding.selection import Selector
from jacobi_hf.decoding.shapes import AdaptiveSchedule, ConstantSchedule
from jacobi_hf.decoding.stopping import Scores, StoppingRules, token_limit
from jacobi_hf.drafts.sources import sources_of
from jacobi_hf.execution.buffers import CallBuffers, acquire
from jacobi_hf.execution.choose import execution_for
from jacobi_hf.execution.kept import kept_for
from jacobi_hf.integration.compat import CACHE
from jacobi_hf.integration.forward import ModelForward, unknown_layers
from jacobi_hf.integration.support import cannot_compile, fixed_positions, is_shared_by_processes
from jacobi_hf.output import JacobiDecoderOnlyOutput

if TYPE_CHECKING:
    from transformers import Cache, CompileConfig, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
    from transformers.generation import BaseStreamer

    from jacobi_hf.config import JacobiConfig
    from jacobi_hf.decoding.shapes import Schedule
    from jacobi_hf.drafts.sources import Sources
    from jacobi_hf.execution.base import Execution


class GenerateCall:
    """One call of `generate` that decodes with Jacobi, from its prepared arguments to its output.

    Args:
        model: the model.
        config: the knobs.
        generation_config: as `generate` prepared it.
        input_ids: the prompt, `(B, P)`.
        model_kwargs: mask, cache and embeddings, as `generate` prepared them.
        criteria: stopping criteria.
        own_cache: whether the cache is the caller's, to be continued and to be given back.

    Raises:
        ValueError: a prompt or a cache that cannot be decoded, in the ordinary way neither.
        NotServedError: a prompt or a cache that only ordinary decoding takes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: JacobiConfig,
        generation_config: GenerationConfig,
        input_ids: torch.Tensor,
        model_kwargs: dict[str, Any],
        criteria: StoppingCriteriaList,
        *,
        own_cache: bool,
    ) -> None:
        self._model = model
        self._config = config
        self._options = generation_config
        self._criteria = criteria
        self._input_BP = input_ids.long()
        self._cache: Cache | None = model_kwargs.get(CACHE)
        self._own_cache = self._cache if own_cache else None
        text_config = model.config.get_text_config(decoder=True)
        if reason := unknown_layers(self._cache):
            raise NotServedError(reason)
        shared = getattr(text_config, "num_kv_shared_layers", 0) or 0  # these read the keys of layers before them
        layers = text_config.num_hidden_layers
        past = cached_tokens(self._own_cache, len(input_ids), {0, layers, layers - shared})
        self._prompt = read_prompt(
            input_ids,
            model_kwargs.get("attention_mask"),
            model_kwargs.get("inputs_embeds"),
            past,
            getattr(generation_config, "_mask_length", None),
            getattr(model.get_input_embeddings(), "num_embeddings", text_config.vocab_size),
        )
        self._limit = token_limit(criteria, generation_config.max_length, input_ids.shape[1])
        self._check_room()

    def _check_room(self) -> None:
        """Check that the caller's StaticCache and the model's table of positions have room for the call.

        Raises:
            ValueError: the prompt does not fit into the StaticCache.
            NotServedError: the new tokens may not fit into the StaticCache or into the table of positions.
        """
        prompt = self._prompt
        last = prompt.total + self._limit - 1  # columns of all tokens but the last one
        if isinstance(self._own_cache, StaticCache):
            full = [layer for layer in self._own_cache.layers if type(layer) is StaticLayer]
            room = min((int(layer.max_cache_len) for layer in full), default=last)
            if prompt.total > room:
                raise ValueError(f"{CACHE} holds {room} tokens, the prompt has {prompt.total}: give a larger cache.")
            if last > room:
                raise NotServedError(f"a {CACHE} of {room} tokens where prompt and new tokens may need {last}")
        positions = fixed_positions(self._model, last)
        if positions is not None and int(prompt.tokens_B.max()) + self._limit - 1 > positions:
            raise NotServedError(f"text that may be longer than the model's table of {positions} positions")

    def decode(
        self, processors: LogitsProcessorList, streamer: BaseStreamer | None, *, synced_gpus: bool
    ) -> JacobiDecoderOnlyOutput | torch.Tensor:
        """Decode, and return what `_sample` returns.

        Args:
            processors: logits processors.
            streamer: gets the tokens, or None.
            synced_gpus: whether other processes wait for a forward of this one in every step.
        """
        model = self._model
        prompt = self._prompt
        rows, _ = self._input_BP.shape
        device = self._input_BP.device
        sources = sources_of(self._config, model)
        wanted = self._compile_config(reads_features=bool(sources.taps))
        slots = sources.slots(self._limit if wanted is None else None)
        # What prompt and one step need; a step has at most as many tokens as slots.
        columns = max(prompt.total, prompt.text_BL.shape[1]) + slots
        if wanted is None:
            buffers = CallBuffers(model, sources, rows, columns, device, most=columns + self._limit)
            return self._decode(buffers, None, processors, streamer, synced_gpus=synced_gpus)
        with acquire(model, self._config, sources, rows, columns, device) as buffers:
            return self._decode(buffers, wanted, processors, streamer, synced_gpus=synced_gpus)

    def _compile_config(self, *, reads_features: bool) -> CompileConfig | None:
        """Return the caller's, unless the call disables compiling or the model does not allow it."""
        wanted: CompileConfig | None = self._options.compile_config
        if wanted is None or self._options.disable_compile:
            return None
        reason = "a draft source reads hidden states" if reads_features else cannot_compile(self._model)
        if reason:
            warnings.warn(f"compile_config is ignored: {reason}. The steps run uncompiled.", UserWarning, stacklevel=2)
            return None
        return wanted

    def _decode(
        self,
        buffers: CallBuffers,
        wanted: CompileConfig | None,
        processors: LogitsProcessorList,
        streamer: BaseStreamer | None,
        *,
        synced_gpus: bool,
    ) -> JacobiDecoderOnlyOutput | torch.Tensor:
        """Decode with these buffers, which are kept for later calls if steps are compiled (`wanted`)."""
        options = self._options
        prompt = self._prompt
        state = buffers.state
        returns_dict = bool(options.return_dict_in_generate)
        scores = Scores() if returns_dict and options.output_scores else None
        logits = Scores() if returns_dict and options.output_logits else None
        noise = self._noise(processors, buffers, keeps=wanted is not None) if options.do_sample else None
        selector = Selector(processors, noise, self._input_BP, None if wanted is None else buffers.store)
        pad = None if options._pad_token_tensor is None else int(options._pad_token_tensor)
        one_by_one = not selector.is_vectorised
        stopping = StoppingRules(
            self._input_BP, self._criteria, streamer, self._limit, pad, scores, one_by_one=one_by_one
        )
        if prompt.past and self._cache is not None:
            buffers.cache.load(self._cache, prompt.place_BL)
        returns_cache = returns_dict or self._own_cache is not None
        wants_more = one_by_one or scores is not None or logits is not None
        fills = returns_cache or wants_more
        eos_E = buffers.store("end tokens", stopping.eos_E)
        state.open(prompt, self._limit, stopping.pad, eos_E, fills=fills)
        # The last token is chosen at the position before its own.
        last_position_B1 = buffers.store("last position", prompt.tokens_B[:, None] + self._limit - 2)
        try:
            with contextlib.ExitStack() as during_call:
                for source in state.sources.all:
                    during_call.enter_context(source.during_call(self._model))
                gapped = prompt.total + self._limit - 1 if prompt.has_gaps else 0
                forward = ModelForward(
                    self._model, buffers.cache, state.sources, last_position_B1, self._cache, gapped=gapped
                )
                during_call.enter_context(forward.tapping())
                execution = execution_for(self._model, self._config, None if wants_more else wanted, buffers)
                decoder = Decoder(
                    forward,
                    state,
                    selector,
                    stopping,
                    self._schedule(state.sources, execution),
                    execution,
                    scores,
                    logits,
                    fills=fills,
                )
                decoder.run(prompt, lambda done: self._has_unfinished_peers(done, synced_gpus))
        finally:
            if noise is not None:
                noise.rewind(stopping.generated)
                buffers.ring_IBV = noise.ring_IBV
        if returns_cache and self._cache is not None:
            place_BN = prompt.new_places(stopping.generated - 1)
            buffers.cache.append_to(self._cache, place_BN, frees=wanted is None)
        if streamer is not None:
            streamer.end()
        if not returns_dict:
            return stopping.sequences.clone()
        return JacobiDecoderOnlyOutput(
            sequences=stopping.sequences.clone(),
            scores=None if scores is None else tuple(scores.steps[: stopping.generated]),
            logits=None if logits is None else tuple(logits.steps[: stopping.generated]),
            jacobi_stats=decoder.stats,
            **{CACHE: self._cache},
        )

    def _schedule(self, sources: Sources, execution: Execution) -> Schedule:
        """Return what chooses the shape of each step.

        Processes that share each forward (tensor parallelism) must agree on its shape, and their clocks do not.
        """
        model = self._model
        if not self._config.is_adaptive or is_shared_by_processes(model):
            return ConstantSchedule(sources, self._config, self._limit)
        rows = len(self._input_BP)
        context = (self._prompt.total - 1).bit_length()
        how = type(execution).__name__, torch.get_num_threads(), torch.is_autocast_enabled(self._input_BP.device.type)
        return AdaptiveSchedule(
            sources,
            self._config,
            self._limit,
            kept_for(model).memory,
            key=(rows, context, model.dtype, self._input_BP.device, how, sources.draft_slots > 0),
            sampled=bool(self._options.do_sample),
            few=execution.few_shapes,
        )

    def _noise(self, processors: LogitsProcessorList, buffers: CallBuffers, *, keeps: bool) -> SamplingNoise:
        """Return the sampling noise of the call; `keeps` says that all noise of a step must be kept."""
        # A processor from elsewhere may draw from torch's generator between two tokens.
        ahead = all(type(processor).__module__.startswith("transformers.") for processor in processors)
        device = self._input_BP.device
        return SamplingNoise(
            device,
            ahead=ahead,
            room=buffers.state.sources.depths if ahead else 1,
            redraws=device.type == "cpu" and not keeps,
            ring_IBV=buffers.ring_IBV,
        )

    def _has_unfinished_peers(self, done: bool, synced_gpus: bool) -> bool:
        return bool(self._model._has_unfinished_sequences(done, synced_gpus, device=self._input_BP.device))


def cached_tokens(cache: Cache | None, rows: int, layers: set[int]) -> int:
    """Return how many columns a caller's cache holds; 0 without one.

    Args:
        cache: the caller's, or None.
        rows: rows of the prompt.
        layers: how many layers a cache of the model may have.

    Raises:
        ValueError: a cache of another batch.
        NotServedError: a cache that only ordinary decoding continues.
    """
    if cache is None:
        return 0
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        kind = "an offloaded" if getattr(cache, "offloading", False) else "a"
        raise NotServedError(
            f"{kind} {type(cache).__name__} as {CACHE} (only a DynamicCache or StaticCache is continued)"
        )
    past = int(cache.get_seq_length())
    held = [len(layer.keys) for layer in cache.layers if layer.is_initialized and layer.keys is not None]
    if held and held[0] != rows and (past or isinstance(cache, StaticCache)):
        raise ValueError(f"{CACHE} holds a batch of {held[0]} rows, the prompt has {rows}.")
    if len(cache.layers) not in layers:
        raise NotServedError(f"a {CACHE} of {len(cache.layers)} layers for a model of {max(layers)}")
    return past
