"""Where Jacobi decoding meets `generate`: the only file that touches transformers' private hooks.

`JacobiGenerationMixin` goes into the bases of a model class and overrides three inner stages of `GenerationMixin.generate`:
`_prepare_generation_config` (takes the knobs), `_validate_generation_mode` (refuses or falls back) and `_sample` (decodes).
`generate` itself stays transformers' own, so inputs, processors, criteria and streamers arrive prepared.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    StaticCache,
)

from jacobi_hf.attention.interface import OURS, StepMasks, attention_of
from jacobi_hf.config import KNOBS, JacobiConfig, reject_misspelt, reject_pointless
from jacobi_hf.decoding.loop import Decoder
from jacobi_hf.decoding.noise import SamplingNoise
from jacobi_hf.decoding.prompt import read_prompt
from jacobi_hf.decoding.selection import Selector
from jacobi_hf.decoding.step import step_slots
from jacobi_hf.decoding.stopping import Scores, StoppingRules, token_limit
from jacobi_hf.drafts.loading import drafter_of
from jacobi_hf.execution.base import Eager, cannot_compile, whole_steps
from jacobi_hf.execution.buffers import Arena, borrowed
from jacobi_hf.integration.compat import CACHE, CACHE_NAMES, is_tested, kept_logits, logits_to_keep, parameters_of
from jacobi_hf.integration.support import contradiction_in, unserved_in
from jacobi_hf.output import JacobiDecoderOnlyOutput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import Cache, CompileConfig, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
    from transformers.generation import BaseStreamer

    from jacobi_hf.decoding.cache import JacobiStaticCache
    from jacobi_hf.decoding.layout import Layout
    from jacobi_hf.drafts.lora import LoraDrafter
    from jacobi_hf.execution.base import Execution

_REQUEST = "_jacobi_request"
_HANDLED = {
    "attention_mask",
    "position_ids",
    *CACHE_NAMES,
    "use_cache",
    "logits_to_keep",
    "inputs_embeds",
    "cache_position",
    "tokenizer",
}


@dataclass(frozen=True)
class _Request:
    """A request for Jacobi decoding.

    Attributes:
        in_call: whether it came from the call's arguments rather than from a saved generation config.
        own_positions, own_cache: whether the caller gave position ids, or a cache.
    """

    config: JacobiConfig
    in_call: bool
    own_positions: bool
    own_cache: bool


class JacobiGenerationMixin:
    """Adds `decoding="jacobi"` and `decoding="jacobi_multiblock"` to `generate`."""

    _unless_told: str | None = None  # the decoding where neither call nor generation config names one

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        given = {name: kwargs.pop(name) for name in KNOBS if name in kwargs}
        reject_misspelt([*kwargs, *(vars(generation_config) if generation_config is not None else ())])
        persisted = getattr(self.generation_config, "decoding", None) or self._unless_told  # type: ignore[attr-defined]
        in_call = given.get("decoding") is not None or getattr(generation_config, "decoding", None) not in (
            None,
            persisted,
        )
        prepared, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)  # type: ignore[misc]
        knobs = {name: getattr(prepared, name, None) for name in KNOBS}
        config = JacobiConfig.from_knobs(knobs | {"decoding": knobs["decoding"] or self._unless_told} | given)
        if persisted is None and "decoding" not in given:
            given = {name: getattr(generation_config, name, None) for name in KNOBS} | given
        reject_pointless(given, config)
        if given.get("jacobi_verify_width") and drafter_of(self) is None:
            raise ValueError(
                "jacobi_verify_width is for drafters, and none is in use: call jacobi_hf.load_drafter, or drop it."
            )
        if config is not None:
            reject_misspelt(name for name in vars(self.generation_config) if name.startswith("jacobi_"))  # type: ignore[attr-defined]
            own_positions = kwargs.get("position_ids") is not None
            own_cache = any(kwargs.get(name) is not None for name in CACHE_NAMES)
            setattr(prepared, _REQUEST, _Request(config, in_call, own_positions, own_cache))
        return prepared, model_kwargs

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, generation_mode_kwargs: Any
    ) -> None:
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)  # type: ignore[misc]
        request: _Request | None = getattr(generation_config, _REQUEST, None)
        if request is None:
            return
        contradiction = contradiction_in(self, generation_mode, generation_config)
        if contradiction and request.in_call:
            raise ValueError(
                f"decoding={request.config.decoding!r} does not work with {contradiction}; drop one of the two."
            )
        reason = contradiction or unserved_in(self, generation_config, own_positions=request.own_positions)
        if reason:
            _fall_back(generation_config, request, reason)

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Any:
        request: _Request | None = getattr(generation_config, _REQUEST, None)
        extra = sorted(name for name in model_kwargs if name not in _HANDLED and model_kwargs[name] is not None)
        if request is not None and extra:
            _fall_back(generation_config, request, f"the additional model arguments {', '.join(extra)}")
            request = None
        if request is None:
            return super()._sample(  # type: ignore[misc]
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **model_kwargs,
            )
        model: Any = self
        try:
            call = _Call(model, request, generation_config, input_ids, model_kwargs, stopping_criteria)
        except ValueError as error:
            if request.in_call:
                raise
            _fall_back(generation_config, request, f"this call ({error})")
            return self._sample(
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **model_kwargs,
            )
        return call.decode(logits_processor, streamer, synced_gpus)


def _fall_back(generation_config: GenerationConfig, request: _Request, reason: str) -> None:
    delattr(generation_config, _REQUEST)
    warnings.warn(
        f"decoding={request.config.decoding!r} does not serve {reason}: decoding ordinarily.",
        UserWarning,
        stacklevel=2,
    )


class _Call:
    """One call of `generate` between `_sample` and the decoder: inputs in, caches and outputs out."""

    def __init__(
        self,
        model: PreTrainedModel,
        request: _Request,
        generation_config: GenerationConfig,
        input_ids: torch.Tensor,
        model_kwargs: dict[str, Any],
        criteria: StoppingCriteriaList,
    ) -> None:
        self._model, self._config, self._generation_config, self._input_BP = (
            model,
            request.config,
            generation_config,
            input_ids.long(),
        )
        self._criteria, self._drafter = criteria, drafter_of(model)
        self._target: Cache | None = model_kwargs.get(CACHE)
        self._own_cache = self._target if request.own_cache else None
        past = _past_length(
            self._own_cache, len(input_ids), model.config.get_text_config(decoder=True).num_hidden_layers
        )
        embeddings = model.get_input_embeddings()
        vocab_size = getattr(embeddings, "num_embeddings", model.config.get_text_config(decoder=True).vocab_size)
        self._prompt = read_prompt(
            input_ids,
            model_kwargs.get("attention_mask"),
            model_kwargs.get("inputs_embeds"),
            past,
            getattr(generation_config, "_mask_length", None),
            vocab_size,
        )
        positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        longest = int((self._prompt.total - self._prompt.pad_B).max())
        if positions is not None and longest > positions:
            raise ValueError(f"the prompt has {longest} tokens, more than the model's {positions} positions.")
        self._limit = token_limit(criteria, generation_config.max_length, input_ids.shape[1])
        self._check_room()

    def _check_room(self) -> None:
        """A StaticCache of the caller's has to hold the whole call."""
        if isinstance(self._own_cache, StaticCache):
            needed = self._prompt.total + self._limit - 1
            room = min(
                (int(layer.max_cache_len) for layer in self._own_cache.layers if not layer.is_sliding), default=needed
            )
            if needed > room:
                raise ValueError(
                    f"{CACHE} holds {room} tokens, but prompt and new tokens need {needed}: give a larger cache or fewer new tokens."
                )

    def decode(
        self, processors: LogitsProcessorList, streamer: BaseStreamer | None, synced_gpus: bool
    ) -> JacobiDecoderOnlyOutput | torch.Tensor:
        """Run the decoder and hand everything back as `_sample` does."""
        wanted, model, config, prompt, device = (
            self._compile_config(),
            self._model,
            self._config,
            self._prompt,
            self._input_BP.device,
        )
        rows, text_columns = len(self._input_BP), prompt.text_BL.shape[1] + self._limit
        slots = step_slots(config, self._limit if wanted is None else None, drafts_apart=self._drafter is not None)
        capacity = prompt.total + self._limit + slots
        if wanted is None:
            return self._decode(
                Arena(model, config, rows, text_columns, capacity, device), None, processors, streamer, synced_gpus
            )
        with borrowed(model, config, rows, max(capacity, text_columns), device) as arena:
            return self._decode(arena, wanted, processors, streamer, synced_gpus)

    def _decode(
        self,
        arena: Arena,
        wanted: CompileConfig | None,
        processors: LogitsProcessorList,
        streamer: BaseStreamer | None,
        synced_gpus: bool,
    ) -> JacobiDecoderOnlyOutput | torch.Tensor:
        options, input_BP, prompt, is_kept = self._generation_config, self._input_BP, self._prompt, wanted is not None
        wants_dict = bool(options.return_dict_in_generate)
        scores = Scores() if wants_dict and options.output_scores else None
        logits = Scores() if wants_dict and options.output_logits else None
        # Somebody else's processor may draw from torch's generator between two tokens.
        foreign = any(not type(p).__module__.startswith("transformers.") for p in processors)
        noise = None
        if options.do_sample:
            noise = SamplingNoise(input_BP.device, ahead=not foreign, room=arena.step.depths, ring_IBV=arena.ring_IBV)
        selector = Selector(processors, noise, input_BP, arena.hold if is_kept else None)
        pad = None if options._pad_token_tensor is None else int(options._pad_token_tensor)
        one_by_one = not selector.is_vectorised
        stopping = StoppingRules(input_BP, self._criteria, streamer, self._limit, pad, scores, one_by_one=one_by_one)
        if prompt.past and self._target is not None:
            arena.cache.load(self._target, prompt.pad_B)
        hands_out_cache = wants_dict or self._own_cache is not None
        fills = bool(hands_out_cache or scores or logits or one_by_one)
        arena.step.open(prompt, self._limit, stopping.pad, arena.hold("end tokens", stopping.eos_E), fills=fills)
        last_position = arena.hold(
            "last position", torch.tensor(prompt.total + self._limit - 1, device=input_BP.device)
        )
        drafter = self._drafter
        is_alone = all(_is_known(each) for each in (*self._criteria, streamer) if each is not None)
        try:
            with _our_attention(self._model), drafter.attached(self._model) if drafter else contextlib.nullcontext():
                forward, execution = (
                    _Forward(self._model, arena.cache, last_position, drafter),
                    self._execution(wanted, arena, is_alone),
                )
                decoder = Decoder(
                    forward,
                    arena.step,
                    selector,
                    stopping,
                    scores,
                    logits,
                    fills,
                    execution,
                    drafts_apart=drafter is not None,
                )
                decoder.run(
                    prompt,
                    lambda done: self._model._has_unfinished_sequences(done, synced_gpus, device=input_BP.device),
                )
        finally:
            if noise is not None:
                noise.rewind(stopping.generated)
                arena.ring_IBV = noise.ring_IBV
        if hands_out_cache and self._target is not None:
            arena.cache.append_to(
                self._target, prompt.past, prompt.total + stopping.generated - 1, prompt.pad_B, frees=not is_kept
            )
        if streamer is not None:
            streamer.end()
        if not wants_dict:
            return stopping.sequences
        return JacobiDecoderOnlyOutput(
            sequences=stopping.sequences,
            scores=None if scores is None else tuple(scores.steps[: stopping.generated]),
            logits=None if logits is None else tuple(logits.steps[: stopping.generated]),
            jacobi_stats=decoder.stats,
            **{CACHE: self._target},
        )

    def _compile_config(self) -> CompileConfig | None:
        """The caller's, unless there is a `disable_compile` or the model does not allow it."""
        wanted: CompileConfig | None = self._generation_config.compile_config
        if wanted is None or self._generation_config.disable_compile:
            return None
        reason = cannot_compile(self._model)
        if reason:
            warnings.warn(
                f"compile_config is without effect: {reason}. The steps run uncompiled.", UserWarning, stacklevel=2
            )
            return None
        return wanted

    def _execution(self, wanted: CompileConfig | None, arena: Arena, is_alone: bool) -> Execution:
        return Eager() if wanted is None else whole_steps(self._model, self._config, wanted, arena, is_alone=is_alone)


def _is_known(caller: Any) -> bool:
    """Whether what is called between steps is transformers' code or ours: by its class, and with none of its methods replaced."""
    kind, own = type(caller), getattr(caller, "__dict__", {})
    return kind.__module__.startswith(("transformers.", "jacobi_hf.")) and not any(
        callable(getattr(kind, name, None)) for name in own
    )


_switched: dict[int, tuple[str, int]] = {}  # by the config's id: two models may share one
_switching = threading.Lock()


@contextlib.contextmanager
def _our_attention(model: Any) -> Iterator[None]:
    """Run a model with our implementation of its attention, which to everybody else's forwards is its own.

    The config is switched, since attention modules look there; and back by the last of the calls that overlap.
    """
    config = model.config.get_text_config(decoder=True)
    with _switching:
        own, calls = _switched.get(id(config), (attention_of(config), 0))
        _switched[id(config)], config._attn_implementation = (own, calls + 1), OURS.get(own, own)
    try:
        yield
    finally:
        with _switching:
            own, calls = _switched.pop(id(config))
            if calls > 1:
                _switched[id(config)] = own, calls - 1
            else:
                config._attn_implementation = own


def _past_length(cache: Cache | None, batch_size: int, layers: int) -> int:
    """Tokens in a cache of the caller's, checked to be one that this call can continue."""
    if cache is None:
        return 0
    if type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
        raise ValueError(
            f"{CACHE} is a {type(cache).__name__}; Jacobi decoding continues a DynamicCache or StaticCache that is not offloaded."
        )
    past = int(cache.get_seq_length())
    held = [len(layer.keys) for layer in cache.layers if layer.is_initialized and layer.keys is not None]
    if held and held[0] != batch_size and (past or isinstance(cache, StaticCache)):
        raise ValueError(f"{CACHE} holds a batch of {held[0]} rows, the prompt has {batch_size}.")
    if len(cache.layers) not in (0, layers):
        raise ValueError(f"{CACHE} has {len(cache.layers)} layers, the model {layers}: it belongs to another model.")
    return past


class _Forward:
    """A forward of the model over a layout's slots, with our cache, positions and masks.

    Slots behind the position `last` are those of rows that need fewer slots than others; what comes of them is never used.
    """

    def __init__(
        self, model: Any, cache: JacobiStaticCache, last: torch.Tensor, drafter: LoraDrafter | None = None
    ) -> None:
        self._model, self._cache, self._last = model, cache, last
        self._drafter = drafter
        # With weights offloaded the model has no device of its own, and accelerate's hooks move the inputs.
        self._device = cache.lengths_B.device if model.device.type == "meta" else model.device
        self._masks = StepMasks(model, self._device)

    def __call__(
        self,
        token_BQ: torch.Tensor | None,
        embeds_BQH: torch.Tensor | None,
        layout: Layout,
        key_column_K: torch.Tensor,
        keep_BN: torch.Tensor | None,
    ) -> torch.Tensor:
        """Logits `(B, Q, V)`, or `(B, N, V)` of the slots `keep_BN`; `key_column_K` as `cache.columns` gives them."""
        self._cache.open_step(layout.slots, key_column_K, layout.draft_slots)
        if self._drafter is not None and layout.draft_slots and token_BQ is not None:
            token_BQ = self._drafter.shown(token_BQ, layout.draft_slots)
        arguments = self.arguments(token_BQ, embeds_BQH, layout, key_column_K, keep_BN)
        if self._drafter is not None and layout.draft_slots:
            with self._drafter.drafting(layout.slots - layout.draft_slots, layout.slots, len(self._cache.lengths_B)):
                outputs = self._model(**arguments)
            outputs.logits[
                :, -layout.draft_slots :
            ].nan_to_num_()  # a broken drafter is no reason for a processor to give up
        else:
            outputs = self._model(**arguments)
        logits: torch.Tensor = outputs.logits.to(self._cache.lengths_B.device)
        return kept_logits(logits, keep_BN, layout.slots)

    def needs_mask(self, slots: int, *, without_past: bool) -> bool:
        """Whether a chain of `slots` slots has a mask as large as their square; see `StepMasks.is_causal`."""
        return not (without_past and self._masks.is_causal(slots))

    def arguments(
        self,
        token_BQ: torch.Tensor | None,
        embeds_BQH: torch.Tensor | None,
        layout: Layout,
        key_column_K: torch.Tensor,
        keep_BN: torch.Tensor | None,
    ) -> dict[str, Any]:
        """What the model is called with, the cache's step being open."""
        lengths_B = self._cache.lengths_B
        position_BQ = self._cache.slot_BQ if layout.is_chain else lengths_B[:, None] + layout.depth_Q
        return {
            "input_ids": None if token_BQ is None else token_BQ.to(self._device),
            "inputs_embeds": embeds_BQH,
            "attention_mask": self._masks.of_step(layout, lengths_B, key_column_K),
            "position_ids": position_BQ.clamp(max=self._last).to(self._device),
            CACHE: self._cache,
            "use_cache": True,
            "logits_to_keep": logits_to_keep(None if keep_BN is None else keep_BN.to(self._device), layout.slots),
            "return_dict": True,
        }


_registered: list[type] = []


def check_can_decode(model_class: type) -> None:
    """Refuse a class whose models Jacobi decoding cannot serve.

    Raises:
        TypeError: it is not a causal language model of transformers whose forward takes what a Jacobi step needs.
    """
    forward = getattr(model_class, "forward", None)
    if not issubclass(model_class, GenerationMixin) or not issubclass(model_class, PreTrainedModel) or forward is None:
        raise TypeError(
            f"{model_class.__name__} is not a transformers model that generates: it needs PreTrainedModel and GenerationMixin as bases."
        )
    missing = {CACHE, "position_ids", "logits_to_keep"} - parameters_of(forward)
    if missing:
        raise TypeError(
            f"{model_class.__name__}.forward does not take {', '.join(sorted(missing))}, which Jacobi decoding passes."
        )
    if not getattr(model_class, "_supports_attention_backend", False):
        raise TypeError(
            f"{model_class.__name__} does not use transformers' attention interface, through which the mask of a step is passed."
        )


def register(model_class: type) -> type:
    """Give a decoder-only class with full or sliding attention the `decoding` argument; returns the class.

    Idempotent; subclasses made before and after have it too. Usable as a decorator. `unregister` takes it back. A class must take
    its mask and positions from outside; one that builds a bias of its own (ALiBi, GPT-Neo) is refused where it can be told.

    Raises:
        TypeError: the class is not a causal language model of transformers whose forward takes what a Jacobi step needs.
    """
    if JacobiGenerationMixin in model_class.__mro__:
        return model_class
    check_can_decode(model_class)
    for subclass in [known for known in _registered if issubclass(known, model_class)]:
        unregister(subclass)  # it inherits from now on
    model_class.__bases__ = (JacobiGenerationMixin, *model_class.__bases__)
    _registered.append(model_class)
    return model_class


def unregister(model_class: type | None = None) -> None:
    """Take Jacobi decoding out of a class, or of all registered ones. A class that never had it is left alone."""
    for known in [c for c in _registered if model_class in (None, c)]:
        known.__bases__ = tuple(base for base in known.__bases__ if base is not JacobiGenerationMixin)
        _registered.remove(known)


def registered() -> list[type]:
    """The classes that `register` was called for, Qwen2 and Qwen3 among them; their subclasses decode too."""
    return list(_registered)


def register_defaults() -> None:
    """Register Qwen2 and Qwen3, as importing jacobi_hf does.

    On a release of transformers that is newer than the tests, a class that cannot be registered is left out with a
    warning, so that the import succeeds.
    """
    for model_class in (Qwen2ForCausalLM, Qwen3ForCausalLM):
        try:
            register(model_class)
        except TypeError as error:
            if is_tested():
                raise
            warnings.warn(f"{model_class.__name__} is not registered: {error}", UserWarning, stacklevel=2)
