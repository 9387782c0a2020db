"""Which units of the feed-forward blocks are active: the inputs of fc2 that are not zero.

Behind a ReLU an inactive unit is exactly 0, so its row of fc2 adds nothing and need not be read.
The engine's sparse decoding lives on that (docs/interpretability.md, "Sparsity"). GELU has no exact
zeros: there `sparsity_profile` refuses, and `neuron_activity` still tells means and maxima.

Letters: L layers, F feed-forward width, T tokens of all texts together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optlm.errors import RequestError
from optlm.interpret.cache import array
from optlm.interpret.subject import check_finite, token_rows
from optlm.model import OPT, hooked

__all__ = ["NeuronActivity", "SparsityProfile", "neuron_activity", "sparsity_profile"]


@dataclass(frozen=True, kw_only=True, eq=False)
class NeuronActivity:
    """Each unit over all tokens of some texts."""

    tokens: int
    positive: NDArray[np.float32]  # (L, F) share of tokens on which the unit is above 0
    mean: NDArray[np.float32]  # (L, F)
    peak: NDArray[np.float32]  # (L, F) greatest value


@dataclass(frozen=True, kw_only=True, eq=False)
class SparsityProfile:
    """How many inputs of fc2 are not zero, by layer, by unit and by token.

    `never` and `always` count units that no token or every token of the texts made active; they say
    little on short texts.
    """

    tokens: int
    active_share: NDArray[np.float32]  # (L,) mean share of units active on a token
    least_share: NDArray[np.float32]  # (L,) on the token with the fewest
    most_share: NDArray[np.float32]  # (L,) on the token with the most
    unit_share: NDArray[np.float32]  # (L, F) share of tokens on which the unit is active
    by_token: NDArray[np.float32]  # (L, T) share of units active on each token, texts end to end
    never: NDArray[np.int64]  # (L,)
    always: NDArray[np.int64]  # (L,)

    @property
    def mean_share(self) -> float:
        """Share of all fc2 inputs that are not zero: what the sparse path has to read of fc2."""
        return float(self.active_share.mean())


def sparsity_profile(model: OPT, texts: Sequence[Sequence[int]]) -> SparsityProfile:
    """Count the active units on every token of `texts`.

    Raises:
        RequestError: the activation has no exact zeros, no text, or a text that is empty or long.
        CheckpointError: weights hold NaN.
    """
    if model.config.activation_function != "relu":
        raise RequestError(
            f"{model.config.activation_function} has no exact zeros, so there is no sparsity to "
            "profile; neuron_activity tells means and maxima"
        )
    counts = _zeros(model)
    shares: list[list[NDArray[np.float32]]] = [[] for _ in range(len(counts))]

    def count(layer: int, units: Tensor) -> None:
        active = units > 0
        counts[layer] += active.sum(dim=0)
        shares[layer].append(array(active.float().mean(dim=-1)))

    tokens = _visit_units(model, texts, count)
    by_token = np.stack([np.concatenate(layer) for layer in shares])
    return SparsityProfile(
        tokens=tokens,
        active_share=by_token.mean(axis=1),
        least_share=by_token.min(axis=1),
        most_share=by_token.max(axis=1),
        unit_share=array(counts / tokens),
        by_token=by_token,
        never=(counts == 0).sum(dim=1).cpu().numpy(),
        always=(counts == tokens).sum(dim=1).cpu().numpy(),
    )


def neuron_activity(model: OPT, texts: Sequence[Sequence[int]]) -> NeuronActivity:
    """Mean, greatest value and share of positive values of every unit; any activation.

    Raises:
        RequestError: no text, or a text that is empty or too long.
        CheckpointError: weights hold NaN.
    """
    positive, total = _zeros(model), _zeros(model)
    peak = torch.full_like(total, -torch.inf)

    def add(layer: int, units: Tensor) -> None:
        positive[layer] += (units > 0).sum(dim=0)
        total[layer] += units.sum(dim=0, dtype=torch.float64)
        peak[layer] = torch.maximum(peak[layer], units.amax(dim=0))

    tokens = _visit_units(model, texts, add)
    return NeuronActivity(
        tokens=tokens,
        positive=array(positive / tokens),
        mean=array(total / tokens),
        peak=array(peak),
    )


@torch.no_grad()
def _visit_units(
    model: OPT, texts: Sequence[Sequence[int]], visit: Callable[[int, Tensor], None]
) -> int:
    """Call `visit(layer, units (T, F))` for each layer of each text; the number of tokens."""
    if not texts:
        raise RequestError("there are no texts; give at least one")
    hooks = {
        f"layers.{i}.hook_ffn_act": lambda units, i=i: visit(i, units[0])
        for i in range(model.config.num_hidden_layers)
    }
    with hooked(model, hooks):
        for text in texts:
            check_finite(model.hidden(token_rows(model, text)))
    return sum(map(len, texts))


def _zeros(model: OPT) -> Tensor:
    config = model.config
    shape = (config.num_hidden_layers, config.ffn_dim)
    return torch.zeros(shape, dtype=torch.float64, device=model.head_weight.device)
