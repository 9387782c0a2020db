"""Attention maps of any layer and head, formed from its queries and keys when asked for.

Letters: H heads, T tokens, K head width, N rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optlm.interpret.cache import array
from optlm.interpret.points import check_head, check_layer
from optlm.interpret.subject import check_finite, token_rows
from optlm.model import OPT, hooked

__all__ = ["AttentionMaps", "attention_maps", "probabilities", "visit_attention", "watching_heads"]


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionMaps:
    """Attention probabilities: `maps[i, j, t, s]` is what token t gives token s.

    i counts `layers`, j counts `heads`. Rows sum to 1; s > t is 0.
    """

    tokens: tuple[int, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    maps: NDArray[np.float32]  # (layers, heads, T, T)

    def map_of(self, layer: int, head: int) -> NDArray[np.float32]:
        """(T, T) of one head.

        Raises:
            ValueError: it is not among `layers` and `heads`.
        """
        found: NDArray[np.float32] = self.maps[self.layers.index(layer), self.heads.index(head)]
        return found


def attention_maps(
    model: OPT,
    tokens: Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> AttentionMaps:
    """Attention of the chosen layers and heads (None: all) over `tokens`.

    A map of 2,048 tokens takes 16.8 MB; all 144 of a 125M model take 2.4 GB, for which
    `visit_attention` hands out one layer at a time.

    Raises:
        RequestError: no such layer or head; no tokens, or too many.
        CheckpointError: weights hold NaN.
    """
    config = model.config
    chosen = _chosen(layers, config.num_hidden_layers)
    wanted = _chosen(heads, config.num_attention_heads)
    maps = np.empty((len(chosen), len(wanted), len(tokens), len(tokens)), dtype=np.float32)

    def keep(layer: int, found: NDArray[np.float32]) -> None:
        maps[chosen.index(layer)] = found

    visit_attention(model, tokens, keep, layers=chosen, heads=wanted)
    return AttentionMaps(tokens=tuple(tokens), layers=chosen, heads=wanted, maps=maps)


@torch.no_grad()
def visit_attention(
    model: OPT,
    tokens: Sequence[int],
    visit: Callable[[int, NDArray[np.float32]], None],
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> None:
    """Call `visit(layer, maps)` for each chosen layer in turn, with maps (heads, T, T).

    One layer's maps are in memory at a time. Raises as `attention_maps`.
    """
    config = model.config
    chosen = [check_layer(i, config) for i in _chosen(layers, config.num_hidden_layers)]
    wanted = [check_head(i, config) for i in _chosen(heads, config.num_attention_heads)]
    ids = token_rows(model, tokens)

    def read(layer: int, q: Tensor, k: Tensor) -> None:
        if layer in chosen:
            visit(layer, array(probabilities(q[wanted], k[wanted])))

    with watching_heads(model, read):
        check_finite(model(ids).logits)


@contextmanager
def watching_heads(model: OPT, read: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """While the block runs, `read(layer, q, k)` gets queries and keys (H, T, K) of each layer.

    Queries are scaled already. The forward pass keeps its fused attention.
    """
    queries: dict[int, Tensor] = {}

    def hook_q(layer: int, value: Tensor) -> None:
        queries[layer] = value[0]

    def hook_k(layer: int, value: Tensor) -> None:
        read(layer, queries.pop(layer), value[0])

    hooks = {}
    for i in range(model.config.num_hidden_layers):
        hooks[f"layers.{i}.self_attn.hook_q"] = lambda value, i=i: hook_q(i, value)
        hooks[f"layers.{i}.self_attn.hook_k"] = lambda value, i=i: hook_k(i, value)
    with hooked(model, hooks):
        yield


def probabilities(q: Tensor, k: Tensor, first: int = 0) -> Tensor:
    """Causal attention (H, N, T) to keys (H, T, K) of queries (H, N, K), rows `first` and on."""
    scores = q @ k.transpose(1, 2)
    rows = torch.arange(first, first + q.shape[1], device=q.device)[:, None]
    later = torch.arange(k.shape[1], device=q.device) > rows
    return scores.masked_fill_(later, torch.finfo(scores.dtype).min).softmax(
        dim=-1, dtype=torch.float32
    )


def _chosen(given: Sequence[int] | None, count: int) -> tuple[int, ...]:
    return tuple(range(count)) if given is None else tuple(given)
