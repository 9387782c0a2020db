"""The residual stream of a teacher in fewer numbers: which directions to keep, and what the
matrices that read and write it become.

A stream h of width D becomes c = a B'h of width d, with the basis B (D, d) of orthonormal columns
and a scale a. A matrix W that writes into the stream becomes a B'W. With norms before the blocks,
every reader sees norm(h) = sqrt(D) Mh / |Mh|, M taking off the mean. If the columns of B have sum
0 and B maps onto numbers of sum 0, the student's own norm takes nothing more off, and

    W (g norm(h) + b)  =  W diag(g) B sqrt(D / d) norm(c)  +  W b

for all h in the span of B: the norm's weights move into the matrix that reads it (the idea of
SliceGPT, arXiv 2401.15024, section 3, without turning LayerNorm into RMSNorm). With norms after the
residual the weights of a norm act inside the stream and cannot be moved, so B picks coordinates
instead of turning them (width pruning as in Minitron, arXiv 2407.14679, section 2).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from optlm.config import OPTConfig
from optlm.model import OPT, hooked
from optlm.train.distil.weights_of import Weights

__all__ = ["Stream", "activation_moments", "choose_basis", "top_directions", "weight_moments"]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """How the student's residual stream stands for the teacher's.

    Attributes:
        basis: (D, d); None keeps the width and every number.
        folded: whether the norms' weights move into the matrices that read them.
        gain: sqrt(D / d), by which the student's normed states are too small, where it is folded.
        scale: a, by which the student's stream is larger.
    """

    basis: Tensor | None
    folded: bool
    scale: float = 1.0

    @property
    def gain(self) -> float:
        assert self.basis is not None
        return float((self.basis.shape[0] / self.basis.shape[1]) ** 0.5) if self.folded else 1.0

    def written(self, weight: Tensor) -> Tensor:
        """(D, n), or a bias (D,): for the student."""
        return weight if self.basis is None else self.scale * (self.basis.T @ weight)

    def read(
        self, weight: Tensor, bias: Tensor | None, norm: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """(n, D) and (n,) that read the stream through the norm with these weights."""
        if self.basis is None:
            return weight, bias
        if not self.folded:
            return weight @ self.basis, bias
        gained, shift = (weight, None) if norm is None else (weight * norm[0], weight @ norm[1])
        if bias is not None and shift is not None:
            bias = bias + shift
        return gained @ self.basis * self.gain, bias

    def norm(self, norm: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor] | None:
        """Weight and bias (d,) of the student's norm."""
        if norm is None or self.basis is None:
            return norm
        weight, bias = norm
        width = self.basis.shape[1]
        if self.folded:
            return torch.ones(width), torch.zeros(width)
        return self.basis.T @ weight, self.basis.T @ bias


def choose_basis(moments: Tensor, width: int, *, pick: bool) -> Tensor:
    """(D, d) with orthonormal columns that keep the most of E[h h'] = `moments` (D, D).

    Args:
        pick: keep coordinates as they are; else turn them, and lose the mean over coordinates.
    """
    full = moments.shape[0]
    if pick:
        kept = moments.diagonal().topk(width).indices.sort().values
        return torch.eye(full)[:, kept]
    mean_off = torch.eye(full) - 1 / full
    directions = top_directions(mean_off @ moments @ mean_off, width - 1)
    directions = directions - directions.mean(0)  # exact, whatever the eigenvectors' rounding
    turned: Tensor = torch.linalg.qr(directions).Q @ _sum_zero(width)
    return turned


def top_directions(moments: Tensor, count: int) -> Tensor:
    """(D, count): eigenvectors of the greatest eigenvalues, greatest first."""
    vectors: Tensor = torch.linalg.eigh(moments.double()).eigenvectors
    return vectors[:, -count:].flip(1).float()


def _sum_zero(width: int) -> Tensor:
    """(d - 1, d): orthonormal rows, each of sum 0."""
    square = torch.cat([torch.ones(width, 1), torch.eye(width)[:, 1:]], dim=1)
    rotation: Tensor = torch.linalg.qr(square).Q
    return rotation[:, 1:].T


@torch.no_grad()
def activation_moments(teacher: OPT, batches: Iterable[Tensor]) -> Tensor:
    """(D, D): E[h h'] of what enters and leaves the layers, every h at length 1 as norms see it.

    Args:
        batches: tokens (B, S), few thousands in all.
    """
    width = teacher.config.hidden_size
    moments = torch.zeros(width, width)

    def add(states: Tensor) -> None:
        nonlocal moments
        flat = states.float().flatten(0, 1)
        flat = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)
        moments += flat.T @ flat

    last = teacher.config.num_hidden_layers - 1
    hooks = {f"layers.{i}.hook_resid_pre": add for i in range(last + 1)}
    with hooked(teacher, {**hooks, f"layers.{last}.hook_resid_post": add}):
        for tokens in batches:
            teacher.hidden(tokens)
    return moments / moments.trace()


def weight_moments(config: OPTConfig, weights: Weights) -> Tensor:
    """(D, D): the same guessed from the weights that write into the stream, each counted equally.

    The left singular vectors of all these matrices side by side are its eigenvectors.
    """
    embedding = weights("model.decoder.embed_tokens.weight")
    if config.has_projections:
        embedding = embedding @ weights("model.decoder.project_in.weight").T
    written = [embedding.T, weights("model.decoder.embed_positions.weight").T]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.decoder.layers.{layer}."
        written += [weights(prefix + "self_attn.out_proj.weight"), weights(prefix + "fc2.weight")]
    grams = [matrix @ matrix.T for matrix in written]
    return sum((gram / gram.trace().clamp_min(1e-12) for gram in grams), torch.zeros(()))
