"""Ablation and activation patching: what a model does when a part of it says something else.

Ablation replaces a part's value with zeros, with its mean over reference texts, or with its value
on another text. Patching replaces it with its value in another run. Sweeps do so for one part after
the other. `trace_fact` is causal tracing in ROME's manner (arXiv 2202.05262, section 2).

Letters: L layers, H heads, T tokens, V vocabulary, B noisy copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optlm.errors import RequestError
from optlm.interpret.points import check_head, select
from optlm.interpret.subject import check_finite, token_rows
from optlm.model import OPT, hooked

__all__ = [
    "Metric", "Site", "ablate", "logit_difference", "patch", "sites_of",
    "sweep_ablation", "sweep_patching",
]  # fmt: skip

How = Literal["zero", "mean", "resample"]
Metric = Callable[[Tensor], float]  # of logits (T, V)

_HEADS_FIRST = ("hook_q", "hook_k", "hook_v", "hook_probs")  # (B, H, T, ...)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A part of the value at a hook point: all of it, or one head, unit or position of it."""

    point: str  # a full name, such as layers.0.self_attn.hook_heads
    head: int | None = None
    position: int | None = None
    unit: int | None = None  # the last dimension

    def of(self, value: Tensor) -> Tensor:
        """The site's view into a value of its hook point."""
        heads_first = self.point.endswith(_HEADS_FIRST)
        head_axis, position_axis = (1, 2) if heads_first else (2, 1)
        if self.unit is not None:
            value = value[..., self.unit : self.unit + 1]
        if self.position is not None:
            value = value.narrow(position_axis, self.position, 1)
        return value if self.head is None else value.narrow(head_axis, self.head, 1)


def sites_of(model: OPT, kind: str) -> list[list[Site]]:
    """All sites of a kind, one list a layer: of "heads", "attention" or "ffn".

    Raises:
        RequestError: no such kind.
    """
    config = model.config
    points = {
        "heads": "self_attn.hook_heads", "attention": "hook_attn_out", "ffn": "hook_ffn_out"
    }  # fmt: skip
    if kind not in points:
        raise RequestError(f"no kind of sites {kind!r}; there are {', '.join(points)}")
    heads = range(config.num_attention_heads) if kind == "heads" else [None]
    return [
        [Site(point=f"layers.{i}.{points[kind]}", head=head) for head in heads]
        for i in range(config.num_hidden_layers)
    ]


@torch.no_grad()
def ablate(
    model: OPT,
    tokens: Sequence[int],
    sites: Iterable[Site],
    how: How = "zero",
    *,
    reference: Sequence[Sequence[int]] = (),
) -> NDArray[np.float32]:
    """Logits (T, V) with the values of `sites` replaced.

    Args:
        how: "zero"; "mean" over all positions of the reference texts; or "resample": what the first
            reference text has at the same positions.
        reference: token rows; for "resample" the first must be at least as long as `tokens`.

    Raises:
        RequestError: a site that is not there, or a reference that does not serve.
        ConfigError: no such hook point.
        CheckpointError: weights hold NaN.
    """
    ids = token_rows(model, tokens)
    chosen = [_checked(site, model, len(tokens)) for site in sites]
    values = _substitutes(model, chosen, how, len(tokens), reference)
    return _logits(model, ids, chosen, values).float().cpu().numpy()


@torch.no_grad()
def patch(
    model: OPT, clean: Sequence[int], corrupted: Sequence[int], sites: Iterable[Site]
) -> NDArray[np.float32]:
    """Logits (T, V) of `corrupted` with the values of `sites` taken from `clean`.

    Raises:
        RequestError: the two have different numbers of tokens; else as `ablate`.
    """
    _same_length(clean, corrupted)
    ids = token_rows(model, corrupted)
    chosen = [_checked(site, model, len(clean)) for site in sites]
    values = _values(model, token_rows(model, clean), {site.point for site in chosen})
    return _logits(model, ids, chosen, values).float().cpu().numpy()


@torch.no_grad()
def sweep_ablation(
    model: OPT,
    texts: Sequence[Sequence[int]],
    kind: str = "heads",
    how: How = "zero",
    *,
    reference: Sequence[Sequence[int]] = (),
) -> NDArray[np.float64]:
    """How much the loss of `texts` grows without each head (L, H), attention or ffn block (L, 1).

    In nats per predicted token; negative where the model is better off without the part.

    Raises:
        RequestError: a text of fewer than two tokens; no such kind; else as `ablate`.
    """
    if not texts or min(map(len, texts)) < 2:
        raise RequestError("give at least one text, each of at least two tokens")
    sites = sites_of(model, kind)
    grown = np.zeros((len(sites), len(sites[0])))
    for text in texts:
        ids = token_rows(model, text)
        flat = [site for layer in sites for site in layer]
        values = _substitutes(model, flat, how, len(text), reference)
        plain = _loss(_logits(model, ids, [], {}), ids)
        for i, layer in enumerate(sites):
            for j, site in enumerate(layer):
                grown[i, j] += _loss(_logits(model, ids, [site], values), ids) - plain
    return grown / sum(len(text) - 1 for text in texts)


@torch.no_grad()
def sweep_patching(
    model: OPT,
    clean: Sequence[int],
    corrupted: Sequence[int],
    metric: Metric,
    point: str = "hook_resid_pre",
) -> NDArray[np.float64]:
    """How far each site's clean value brings `metric` back: 0 as corrupted, 1 as clean.

    Args:
        metric: of logits (T, V), such as `logit_difference(answer, foil)`.
        point: a kind of hook point of the layers. "self_attn.hook_heads" is patched head by head,
            at all positions (L, H); any other position by position (L, T).

    Raises:
        RequestError: different lengths, or runs that the metric does not tell apart.
        ConfigError: no such kind of point.
    """
    _same_length(clean, corrupted)
    names = [name for name in select(point, model.config) if name.startswith("layers.")]
    if len(names) != model.config.num_hidden_layers:
        raise RequestError(f"{point!r} is not one point of each layer; sweeps go over the layers")
    by_head = point.endswith("hook_heads")
    ids = token_rows(model, corrupted)
    values = _values(model, token_rows(model, clean), names)
    best = metric(_logits(model, token_rows(model, clean), [], {}))
    worst = metric(_logits(model, ids, [], {}))
    if abs(best - worst) < 1e-6:
        raise RequestError(
            f"the metric is {best:.6g} on both runs, so nothing can be brought back; choose "
            "prompts or a metric that differ"
        )
    columns = model.config.num_attention_heads if by_head else len(clean)
    found = np.empty((len(names), columns))
    for i, name in enumerate(names):
        for j in range(columns):
            site = Site(point=name, head=j) if by_head else Site(point=name, position=j)
            found[i, j] = metric(_logits(model, ids, [site], values))
    return (found - worst) / (best - worst)


def logit_difference(answer: int, foil: int, position: int = -1) -> Metric:
    """The metric that most patching studies use: how far `answer` is ahead of `foil`."""
    return lambda logits: float(logits[position, answer] - logits[position, foil])


def _checked(site: Site, model: OPT, length: int) -> Site:
    (name, *more) = select(site.point, model.config)
    if more or name != site.point:
        raise RequestError(f"a site needs the full name of one point, not {site.point!r}")
    kind = name.rsplit(".", 1)[1] if "." in name else name
    if site.head is not None:
        check_head(site.head, model.config)
        if kind not in (*_HEADS_FIRST, "hook_heads"):
            raise RequestError(f"{name} has no heads; self_attn.hook_heads has")
    if site.position is not None and not 0 <= site.position < length:
        raise RequestError(f"no position {site.position}; the text has {length} tokens")
    if site.unit is not None:
        widths = {"hook_ffn_pre": model.config.ffn_dim, "hook_ffn_act": model.config.ffn_dim}
        width = widths.get(kind)
        if width is None:
            raise RequestError(f"{name} has no units; hook_ffn_act has")
        if not 0 <= site.unit < width:
            raise RequestError(f"no unit {site.unit}; a layer has units 0 to {width - 1}")
    return site


def _substitutes(
    model: OPT,
    sites: Sequence[Site],
    how: How,
    length: int,
    reference: Sequence[Sequence[int]],
) -> dict[str, Tensor]:
    """What to put at each point; a mean has one position for all."""
    points = {site.point for site in sites}
    if how == "zero":
        return dict.fromkeys(points, torch.zeros(()))
    if how not in ("mean", "resample"):
        raise RequestError(f"how is {how!r}; it must be zero, mean or resample")
    if not reference:
        raise RequestError(f"{how} ablation needs reference texts")
    if how == "resample":
        if len(reference[0]) < length:
            raise RequestError(
                f"the reference has {len(reference[0])} tokens; resampling needs {length}, as many "
                "as the text"
            )
        return _values(model, token_rows(model, reference[0][:length]), points)
    if any(point.endswith("hook_probs") for point in points):
        raise RequestError("attention probabilities of different texts have no mean; use zero")
    return _means(model, points, reference)


def _means(
    model: OPT, points: Iterable[str], reference: Sequence[Sequence[int]]
) -> dict[str, Tensor]:
    totals: dict[str, Tensor] = {}
    for text in reference:
        for name, value in _values(model, token_rows(model, text), points).items():
            axis = 2 if name.endswith(_HEADS_FIRST) else 1
            total = value.double().sum(dim=axis, keepdim=True)
            totals[name] = totals[name] + total if name in totals else total
    count = sum(map(len, reference))
    return {name: (total / count).to(model.head_weight.dtype) for name, total in totals.items()}


def _values(model: OPT, ids: Tensor, points: Iterable[str]) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        values[name] = value

    with hooked(model, {name: partial(keep, name) for name in points}):
        check_finite(model.hidden(ids))
    return values


def _logits(model: OPT, ids: Tensor, sites: Sequence[Site], values: dict[str, Tensor]) -> Tensor:
    """Logits (T, V) of the row `ids` with the sites' values put in."""

    def put(name: str, value: Tensor) -> Tensor:
        value = value.clone()
        new = values[name].to(value).expand_as(value)
        for site in sites:
            if site.point == name:
                site.of(value).copy_(site.of(new))
        return value

    points = {site.point for site in sites}
    with hooked(model, {name: partial(put, name) for name in points}):
        logits: Tensor = model(ids).logits[0]
    check_finite(logits)
    return logits


def _loss(logits: Tensor, ids: Tensor) -> float:
    """Summed loss of the row `ids` (1, T), nats."""
    return float(
        torch.nn.functional.cross_entropy(logits[:-1].float(), ids[0, 1:], reduction="sum")
    )


def _same_length(clean: Sequence[int], corrupted: Sequence[int]) -> None:
    if len(clean) != len(corrupted):
        raise RequestError(
            f"the clean text has {len(clean)} tokens and the corrupted one {len(corrupted)}; "
            "patching needs equally many, or positions would not correspond"
        )
