"""The vocabulary of hook points: every value of the forward pass that can be watched or replaced.

Names follow the modules of `optlm.model`: those of layer i begin with ``layers.i.``. Shapes are
those a hook sees: B sequences, T new tokens, S all tokens, D hidden size, H heads, K head width, F
feed-forward width, E embedding width. What `run_with_cache` keeps has no B.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from optlm.config import OPTConfig
from optlm.errors import ConfigError, RequestError, did_you_mean

__all__ = ["POINTS", "Point", "check_head", "check_layer", "hook_names", "select"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One kind of hook point."""

    name: str  # without ``layers.i.``
    of_layer: bool
    shape: str
    value: str
    transformer_lens: str  # TransformerLens' name of the same value, without ``blocks.i.``


def _layer(name: str, shape: str, value: str, transformer_lens: str) -> Point:
    return Point(
        name=name, of_layer=True, shape=shape, value=value, transformer_lens=transformer_lens
    )


def _model(name: str, shape: str, value: str, transformer_lens: str) -> Point:
    return Point(
        name=name, of_layer=False, shape=shape, value=value, transformer_lens=transformer_lens
    )


# In the order of the forward pass; docs/interpretability.md shows this table.
POINTS = (
    _model("hook_embed", "(B, T, D)", "token embedding, after project_in", "hook_embed"),
    _model("hook_pos_embed", "(B, T, D)", "position embedding", "hook_pos_embed"),
    _layer("hook_resid_pre", "(B, T, D)", "residual stream before the layer", "hook_resid_pre"),
    _layer(
        "self_attn.hook_in",
        "(B, T, D)",
        "what queries, keys and values read",
        "ln1.hook_normalized",
    ),
    _layer("self_attn.hook_q", "(B, H, T, K)", "query, scaled by K**-0.5", "attn.hook_q"),
    _layer("self_attn.hook_k", "(B, H, T, K)", "key of the new tokens", "attn.hook_k"),
    _layer("self_attn.hook_v", "(B, H, T, K)", "value of the new tokens", "attn.hook_v"),
    _layer("self_attn.hook_probs", "(B, H, T, S)", "attention probabilities", "attn.hook_pattern"),
    _layer("self_attn.hook_heads", "(B, T, H, K)", "heads before out_proj", "attn.hook_z"),
    _layer("hook_attn_out", "(B, T, D)", "what attention adds", "hook_attn_out"),
    _layer("hook_resid_mid", "(B, T, D)", "residual stream inside the layer", "hook_resid_mid"),
    _layer("hook_ffn_in", "(B, T, D)", "what fc1 reads", "ln2.hook_normalized"),
    _layer("hook_ffn_pre", "(B, T, F)", "units before the activation", "mlp.hook_pre"),
    _layer("hook_ffn_act", "(B, T, F)", "units after it: what fc2 reads", "mlp.hook_post"),
    _layer("hook_ffn_out", "(B, T, D)", "what the feed-forward block adds", "hook_mlp_out"),
    _layer("hook_resid_post", "(B, T, D)", "residual stream after the layer", "hook_resid_post"),
    _model(
        "hook_final",
        "(B, T, E)",
        "what the head reads (project_out done)",
        "ln_final.hook_normalized",
    ),
)


def hook_names(config: OPTConfig) -> tuple[str, ...]:
    """Full names of all hook points of a model, in the order of the forward pass."""
    first, *rest = (point for point in POINTS if not point.of_layer)
    inside = [point.name for point in POINTS if point.of_layer]
    layers = [f"layers.{i}.{name}" for i in range(config.num_hidden_layers) for name in inside]
    return (first.name, rest[0].name, *layers, rest[1].name)


def select(patterns: str | Iterable[str], config: OPTConfig) -> tuple[str, ...]:
    """Names that match any of `patterns`, in the order of the forward pass.

    Args:
        patterns: full names (``layers.0.hook_resid_mid``), kinds (``hook_resid_mid``: of every
            layer), or either with ``*`` and ``?`` (``layers.*.self_attn.*``).

    Raises:
        ConfigError: a pattern matches no hook point; the nearest name is told.
    """
    names = hook_names(config)
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        found |= {name for name in names if fnmatchcase(_kind(name), pattern)}
        if not found:
            raise ConfigError(f"no hook point {pattern!r}{_nearest(pattern, names, config)}")
        chosen |= found
    return tuple(name for name in names if name in chosen)


def check_layer(layer: int, config: OPTConfig) -> int:
    """`layer` itself, counted from 0.

    Raises:
        RequestError: the model has no such layer.
    """
    return _check(layer, config.num_hidden_layers, "layer")


def check_head(head: int, config: OPTConfig) -> int:
    """`head` itself, counted from 0.

    Raises:
        RequestError: a layer of the model has no such head.
    """
    return _check(head, config.num_attention_heads, "head")


def _check(index: int, count: int, what: str) -> int:
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        raise RequestError(f"no {what} {index!r}; the model has {what}s 0 to {count - 1}")
    return index


def _kind(name: str) -> str:
    return name.split(".", 2)[2] if name.startswith("layers.") else name


def _nearest(pattern: str, names: Sequence[str], config: OPTConfig) -> str:
    parts = pattern.split(".")
    if len(parts) > 2 and parts[0] == "layers" and parts[1].isdecimal():
        last = config.num_hidden_layers - 1
        if int(parts[1]) > last:
            return f"; the model has layers 0 to {last}"
        return did_you_mean(pattern, names)
    return did_you_mean(pattern, {*names, *map(_kind, names)})
