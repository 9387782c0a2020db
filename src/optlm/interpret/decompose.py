"""A logit as an exact sum of what embeddings, heads, feed-forward units and biases wrote into it.

The residual stream is a sum, and the head is linear, so a logit of a pre-norm model is a sum over
all that wrote to the stream, once the scale of the final norm is taken as it was in this pass
(frozen). In the 350M every block ends with a norm: what was written earlier passes all later norms,
each of which is linear with its scale frozen. So the direction that the head reads is carried back,
layer by layer, and met with what each part wrote. Behind the units' own activation a feed-forward
block is a sum over units. The parts of a token's logit are those written at its own position; what
a head took from other positions is inside the head's part.

Source: "A Mathematical Framework for Transformer Circuits" (Elhage and others, 2021), direct logit
attribution; the frozen norms for the norm after the residual are ours.

Letters: L layers, H heads, K head width, F feed-forward width, D hidden size, N positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from optlm.config import POSITION_OFFSET
from optlm.errors import RequestError
from optlm.interpret.subject import check_finite, token_rows
from optlm.model import OPT, Layer, hooked

__all__ = ["DirectAttribution", "LogitParts", "Part", "decompose_logit", "direct_attribution"]

_KINDS = (
    "hook_resid_pre", "self_attn.hook_heads", "hook_attn_out", "hook_resid_mid", "hook_ffn_act",
    "hook_ffn_out",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Part:
    """One summand of a logit, such as ``layers.3.head.1`` or ``layers.0.unit.17``."""

    name: str
    value: float


@dataclass(frozen=True, kw_only=True, eq=False)
class LogitParts:
    """The logit of `token` at `position`, less that of `against` if there is one, as a sum.

    `norm_bias` are the biases of norms inside the layers; 0 where norms come before blocks.
    """

    tokens: tuple[int, ...]
    position: int
    token: int
    against: int | None
    logit: float  # the model's own
    token_embedding: float
    position_embedding: float
    heads: NDArray[np.float64]  # (L, H)
    attention_bias: NDArray[np.float64]  # (L,) out_proj's
    units: NDArray[np.float64]  # (L, F)
    ffn_bias: NDArray[np.float64]  # (L,) fc2's
    norm_bias: NDArray[np.float64]  # (L, 2) after attention, after the feed-forward block
    final_norm_bias: float

    @property
    def total(self) -> float:
        """The sum of all parts."""
        arrays = (self.heads, self.attention_bias, self.units, self.ffn_bias, self.norm_bias)
        single = self.token_embedding + self.position_embedding + self.final_norm_bias
        return float(single + sum(values.sum() for values in arrays))

    @property
    def gap(self) -> float:
        """What the sum misses of the model's logit: the rounding of its forward pass."""
        return self.total - self.logit

    def largest(self, count: int = 20) -> list[Part]:
        """The parts with the greatest absolute value."""
        return sorted(self._parts(), key=lambda part: -abs(part.value))[:count]

    def _parts(self) -> list[Part]:
        parts = [
            Part(name="token_embedding", value=self.token_embedding),
            Part(name="position_embedding", value=self.position_embedding),
            Part(name="final_norm_bias", value=self.final_norm_bias),
        ]
        for name, values in (
            ("layers.{}.head.{}", self.heads),
            ("layers.{}.unit.{}", self.units),
            ("layers.{}.norm_bias.{}", self.norm_bias),
        ):
            rows, columns = np.nonzero(values)
            parts += [
                Part(name=name.format(i, j), value=float(values[i, j]))
                for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
            ]
        for name, bias in (("attention", self.attention_bias), ("ffn", self.ffn_bias)):
            parts += [
                Part(name=f"layers.{i}.{name}_bias", value=float(value))
                for i, value in enumerate(bias)
            ]
        return parts


@dataclass(frozen=True, kw_only=True, eq=False)
class DirectAttribution:
    """What each head and block wrote, at every position, into the logit of the next token.

    Values are of the next token's logit less the mean logit of the vocabulary, which a softmax
    does not see. Row t is about `tokens[t + 1]`.
    """

    tokens: tuple[int, ...]
    logits: NDArray[np.float64]  # (T - 1,) the model's own, less the mean
    heads: NDArray[np.float64]  # (T - 1, L, H)
    ffn: NDArray[np.float64]  # (T - 1, L) all units of the block
    embeddings: NDArray[np.float64]  # (T - 1, 2) token, position
    biases: NDArray[np.float64]  # (T - 1,) all together

    @property
    def gap(self) -> float:
        """The largest difference between the sum of a row and the model's own value."""
        total = self.heads.sum((1, 2)) + self.ffn.sum(1) + self.embeddings.sum(1) + self.biases
        return float(np.abs(total - self.logits).max())


@torch.no_grad()
def decompose_logit(
    model: OPT,
    tokens: Sequence[int],
    *,
    token: int | None = None,
    against: int | None = None,
    position: int = -1,
) -> LogitParts:
    """Split the logit of `token` (None: the likeliest) after `tokens[:position + 1]`.

    Args:
        against: split the difference to this token's logit; what both share drops out.
        position: of the last token read; negative counts from the end.

    Raises:
        RequestError: no such token or position; no tokens, or too many.
        CheckpointError: weights hold NaN.
    """
    ids = token_rows(model, tokens)
    position = _position(position, len(tokens))
    run = _Run(model, ids, torch.tensor([position]))
    chosen = int(run.logits[0].argmax()) if token is None else token
    direction, logit = run.head_row(chosen)
    if against is not None:
        other, less = run.head_row(against)
        direction, logit = direction - other, logit - less
    found = run.split(direction[None])
    return LogitParts(
        tokens=tuple(tokens),
        position=position,
        token=chosen,
        against=against,
        logit=logit,
        token_embedding=float(found.embeddings[0, 0]),
        position_embedding=float(found.embeddings[0, 1]),
        heads=found.heads[0].numpy(),
        attention_bias=found.attention_bias[0].numpy(),
        units=found.units[0].numpy(),
        ffn_bias=found.ffn_bias[0].numpy(),
        norm_bias=found.norm_bias[0].numpy(),
        final_norm_bias=float(found.final_norm_bias[0]),
    )


@torch.no_grad()
def direct_attribution(model: OPT, tokens: Sequence[int]) -> DirectAttribution:
    """What every head and block adds to each next token's logit, over the whole text.

    Holds the units of all layers and positions once: 0.3 GB for 2,048 tokens of a 125M model.

    Raises:
        RequestError: fewer than two tokens, or too many.
        CheckpointError: weights hold NaN.
    """
    if len(tokens) < 2:
        raise RequestError(f"{len(tokens)} tokens predict nothing; give at least two")
    ids = token_rows(model, tokens)
    run = _Run(model, ids, torch.arange(len(tokens) - 1))
    head = model.head_weight.double()
    targets = ids[0, 1:]
    found = run.split(head[targets] - head.mean(dim=0))
    logits = run.logits.double()
    own = logits.gather(1, targets[:, None])[:, 0] - logits.mean(dim=1)
    biases = found.attention_bias + found.ffn_bias + found.norm_bias.sum(dim=2)
    return DirectAttribution(
        tokens=tuple(tokens),
        logits=own.cpu().numpy(),
        heads=found.heads.numpy(),
        ffn=found.units.sum(dim=2).numpy(),
        embeddings=found.embeddings.numpy(),
        biases=(biases.sum(dim=1) + found.final_norm_bias).numpy(),
    )


@dataclass(frozen=True, kw_only=True)
class _Split:
    """Parts for N directions, on the CPU in float64."""

    embeddings: Tensor  # (N, 2)
    heads: Tensor  # (N, L, H)
    attention_bias: Tensor  # (N, L)
    units: Tensor  # (N, L, F)
    ffn_bias: Tensor  # (N, L)
    norm_bias: Tensor  # (N, L, 2)
    final_norm_bias: Tensor  # (N,)


class _Run:
    """One forward pass, with what was written at some positions."""

    def __init__(self, model: OPT, ids: Tensor, positions: Tensor) -> None:
        self.model = model
        self.values: dict[str, Tensor] = {}
        rows = positions.to(ids.device)

        def keep(name: str, value: Tensor) -> None:
            self.values[name] = value[0, rows]

        last = model.config.num_hidden_layers - 1
        names = [f"layers.{i}.{kind}" for i in range(last + 1) for kind in _KINDS]
        names += ["hook_embed", f"layers.{last}.hook_resid_post", "hook_final"]
        with hooked(model, {name: partial(keep, name) for name in names}):
            model.hidden(ids)
        places = model.decoder.embed_positions(rows + POSITION_OFFSET)
        self.values["hook_pos_embed"] = places
        self.logits = F.linear(self.values["hook_final"], model.head_weight)  # (N, V)
        check_finite(self.logits)

    def head_row(self, token: int) -> tuple[Tensor, float]:
        """The direction (E,) that reads `token`'s logit from hook_final, and the logit of row 0."""
        count = self.model.config.vocab_size
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < count:
            raise RequestError(f"token id {token!r} is not in 0..{count - 1}")
        return self.model.head_weight[token].double(), float(self.logits[0, token])

    def split(self, direction: Tensor) -> _Split:
        """Carry directions (N, E) back through the model, float64, and meet what was written."""
        decoder, config = self.model.decoder, self.model.config
        g = direction
        if decoder.project_out is not None:
            g = g @ decoder.project_out.weight.double()
        final_bias = torch.zeros(len(g), dtype=torch.float64)
        if decoder.final_layer_norm is not None:
            last = f"layers.{config.num_hidden_layers - 1}.hook_resid_post"
            g, final_bias = _through(decoder.final_layer_norm, g, self.values[last])
        layers: list[tuple[Tensor, ...]] = []
        for i in reversed(range(config.num_hidden_layers)):
            layer = decoder.layers[i]
            assert isinstance(layer, Layer)
            g, parts = self._layer(i, layer, g)
            layers.append(parts)
        heads, attention_bias, units, ffn_bias, norm_bias = (
            torch.stack(column[::-1], dim=1) for column in zip(*layers, strict=True)
        )
        written = (self.values["hook_embed"], self.values["hook_pos_embed"])
        embeddings = [(value.double() * g).sum(dim=-1).cpu() for value in written]
        return _Split(
            embeddings=torch.stack(embeddings, dim=-1),
            heads=heads,
            attention_bias=attention_bias,
            units=units,
            ffn_bias=ffn_bias,
            norm_bias=norm_bias,
            final_norm_bias=final_bias,
        )

    def _layer(self, index: int, layer: Layer, g: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The direction (N, D) before the layer, and the layer's parts as `_Split` names them."""
        before, heads, attn_out, middle, units, ffn_out = (
            self.values[f"layers.{index}.{kind}"] for kind in _KINDS
        )
        after_attention = after_ffn = torch.zeros(len(g), dtype=torch.float64)
        if not layer.norm_before:
            g, after_ffn = _through(layer.final_layer_norm, g, middle + ffn_out)
        unit_parts = units.double() * (g @ layer.fc2.weight.double())
        ffn_bias = _bias(layer.fc2, g)
        if not layer.norm_before:
            g, after_attention = _through(layer.self_attn_layer_norm, g, before + attn_out)
        out = layer.self_attn.out_proj
        reads = (g @ out.weight.double()).view(heads.shape)
        head_parts = (heads.double() * reads).sum(dim=-1)
        norm_bias = torch.stack([after_attention, after_ffn], dim=-1)
        return g, (head_parts.cpu(), _bias(out, g), unit_parts.cpu(), ffn_bias, norm_bias)


def _through(norm: nn.LayerNorm, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Carry directions (N, D) back through a norm of x (N, D) whose scale stays as it is.

    Returns the directions before it and what its bias adds (N,).
    """
    bias = torch.zeros(len(g), dtype=torch.float64)
    if norm.elementwise_affine:
        bias = (g @ norm.bias.double()).cpu()
        g = g * norm.weight.double()
    scale = (x.double().var(dim=-1, correction=0, keepdim=True) + norm.eps).rsqrt()
    g = g * scale
    return g - g.mean(dim=-1, keepdim=True), bias


def _bias(linear: nn.Linear, g: Tensor) -> Tensor:
    """What the bias of `linear` adds along directions (N, D): (N,)."""
    if linear.bias is None:
        return torch.zeros(len(g), dtype=torch.float64)
    return (g @ linear.bias.double()).cpu()


def _position(position: int, length: int) -> int:
    if isinstance(position, bool) or not isinstance(position, int):
        raise RequestError(f"position is {position!r}; it must be a whole number")
    if not -length <= position < length:
        raise RequestError(f"no position {position}; the text has {length} tokens")
    return position % length
