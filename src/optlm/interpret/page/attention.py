"""Attention maps in few bytes: whole where they are small, the strongest keys where they are not.

All maps of 2,048 tokens in 144 heads are 300 million numbers; a page can carry some ten million
bytes. Of every query token the page gets the keys with the most attention, and what the others
get in sum follows from them. A small picture of the whole map shows where the rest lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optlm.interpret.attention import visit_attention
from optlm.model import OPT

__all__ = ["PackedAttention", "pack_attention", "unpack_row"]

BUDGET = 12_000_000  # bytes of all heads before compression
THUMBNAIL = 64  # pixels of a side
FEWEST, MOST = 6, 512  # keys of a query token


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedAttention:
    """The strongest keys of every query token of every head, and a picture of each map.

    Attributes:
        keys: (L, H, T, k) uint16, the key tokens, strongest first; beyond a token's own number of
            keys (token t has t + 1) any number, of weight 0.
        weights: (L, H, T, k) uint8; the attention is (weight / 255) squared, so that small ones
            keep some precision: the error is at most 0.004.
        pictures: (L, H, P, P) uint8, the largest attention of each field, on the same scale.
    """

    keys: NDArray[np.uint16]
    weights: NDArray[np.uint8]
    pictures: NDArray[np.uint8]

    @property
    def whole(self) -> bool:
        """Every key is here."""
        return bool(self.keys.shape[-1] >= self.keys.shape[-2])


def pack_attention(model: OPT, tokens: Sequence[int], *, budget: int = BUDGET) -> PackedAttention:
    """Run the model once, and keep of each layer's maps what fits `budget` bytes in all.

    At least 6 keys of every token are kept, whatever the budget.

    Raises:
        RequestError: no tokens, or too many.
        CheckpointError: weights hold NaN.
    """
    config = model.config
    layers, heads, count = config.num_hidden_layers, config.num_attention_heads, len(tokens)
    kept = budget // (3 * layers * heads * max(1, count))
    kept = min(max(kept, FEWEST), MOST, count)
    side = min(THUMBNAIL, count)
    keys = np.zeros((layers, heads, count, kept), np.uint16)
    weights = np.zeros((layers, heads, count, kept), np.uint8)
    pictures = np.zeros((layers, heads, side, side), np.uint8)

    def keep(layer: int, maps: NDArray[np.float32]) -> None:
        for head, attention in enumerate(maps):
            keys[layer, head], weights[layer, head] = _strongest(attention, kept)
            pictures[layer, head] = _picture(attention, side)

    visit_attention(model, tokens, keep)
    return PackedAttention(keys=keys, weights=weights, pictures=pictures)


def unpack_row(packed: PackedAttention, layer: int, head: int, token: int) -> NDArray[np.float32]:
    """(T,) what `token` gives each token, 0 where it is not known: what the page computes too."""
    row = np.zeros(packed.keys.shape[2], np.float32)
    weights = (packed.weights[layer, head, token] / np.float32(255)) ** 2
    known = weights > 0
    row[packed.keys[layer, head, token][known]] = weights[known]
    return row


def _strongest(
    attention: NDArray[np.float32], kept: int
) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Keys and quantised weights (T, kept) of one map (T, T), the strongest first."""
    last = attention.shape[1] - kept
    chosen = np.argpartition(attention, last, axis=1)[:, last:] if last else None
    values = attention if chosen is None else np.take_along_axis(attention, chosen, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    keys = order if chosen is None else np.take_along_axis(chosen, order, axis=1)
    return keys.astype(np.uint16), _quantised(np.take_along_axis(values, order, axis=1))


def _picture(attention: NDArray[np.float32], side: int) -> NDArray[np.uint8]:
    """(side, side) the largest value of each field of one map."""
    edges = np.linspace(0, len(attention), side + 1).astype(int)[:-1]
    rows = np.maximum.reduceat(attention, edges, axis=0)
    return _quantised(np.maximum.reduceat(rows, edges, axis=1))


def _quantised(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    quantised: NDArray[np.uint8] = np.rint(255 * np.sqrt(values)).astype(np.uint8)
    return quantised
