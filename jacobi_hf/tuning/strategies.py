"""Strategies: the ways to decode that `autotune` compares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

from jacobi_hf.config import JacobiConfig
from jacobi_hf.drafts.sources import sources_of as draft_sources

if TYPE_CHECKING:
    from transformers import CompileConfig, PreTrainedModel

ASSISTED: Final = "assisted decoding"
# Jacobi decoding with a config, transformers' assisted decoding with the caller's draft model, or ordinary decoding.
Strategy = JacobiConfig | Literal["assisted decoding"] | None


def describe(strategy: Strategy, *, drafted: bool = False) -> str:
    """Return a strategy in a few words.

    Args:
        strategy: what to describe.
        drafted: whether the model has a drafter in use.
    """
    if not isinstance(strategy, JacobiConfig):
        return strategy or "ordinary decoding"
    parts = [f"n={strategy.jacobi_block_size} K={strategy.jacobi_max_blocks}"] if strategy.jacobi_max_blocks else []
    if strategy.jacobi_verify_width:
        parts.append(f"drafter verifying {strategy.jacobi_verify_width}")
    elif drafted and strategy.jacobi_max_blocks:
        parts.append("drafter")
    parts += [f"lookup {strategy.jacobi_lookup_tokens}"] if strategy.jacobi_lookup_tokens else []
    parts += [f"pool {strategy.jacobi_pool_size}x{strategy.jacobi_branch_length}"] if strategy.jacobi_pool_size else []
    parts += [f"topk {strategy.jacobi_topk_branches}"] if strategy.jacobi_topk_branches else []
    return ("adaptive: " if strategy.is_adaptive else "") + ", ".join(parts)


def sources_of(strategy: Strategy, model: Any) -> tuple[str, ...]:
    """Return the names of the draft sources of a strategy; none for strategies other than Jacobi decoding.

    Args:
        strategy: how to decode.
        model: the model, with a drafter or without.
    """
    if not isinstance(strategy, JacobiConfig):
        return ()
    return tuple(source.name for source in draft_sources(strategy, model).all)


def knobs_of(
    strategy: Strategy, assistant_model: PreTrainedModel | None = None, compile_config: CompileConfig | None = None
) -> dict[str, Any]:
    """Return the arguments of `generate` that select a strategy.

    Args:
        strategy: how to decode.
        assistant_model: draft model for `ASSISTED`.
        compile_config: how to compile Jacobi and ordinary decoding; None runs them eagerly. Compiled ordinary decoding
            is transformers' own, with a static cache. Assisted decoding is never compiled.
    """
    if strategy == ASSISTED:
        return {"decoding": None, "assistant_model": assistant_model}
    if isinstance(strategy, JacobiConfig):
        return strategy.to_knobs() | ({} if compile_config is None else {"compile_config": compile_config})
    static = {} if compile_config is None else {"cache_implementation": "static", "compile_config": compile_config}
    return {"decoding": None, **static}
