"""Causal tracing: where in the model a fact about a subject is recalled.

Source: ROME, Meng and others, "Locating and Editing Factual Associations in GPT" (arXiv
2202.05262), section 2. Noise on the embeddings of the subject's tokens makes the model forget; then
one state of the clean run is put back, at one layer and token at a time, and the probability of the
answer tells how much of the fact that state carries.

Letters: L layers, T tokens, B noisy copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optlm.errors import RequestError
from optlm.interpret.subject import check_finite, token_rows
from optlm.model import OPT, hooked

__all__ = ["CausalTrace", "trace_fact"]

_POINTS = {"state": "hook_resid_post", "attention": "hook_attn_out", "ffn": "hook_ffn_out"}


@dataclass(frozen=True, kw_only=True, eq=False)
class CausalTrace:
    """Probabilities of the answer after the text; means over the noisy copies."""

    tokens: tuple[int, ...]
    subject: tuple[int, int]  # first token, and the one after the last
    answer: int
    clean: float
    corrupted: float
    restored: NDArray[np.float64]  # (L, T) with the clean value put back at that layer and token
    noise: float  # standard deviation that was added

    @property
    def effects(self) -> NDArray[np.float64]:
        """(L, T) indirect effects: what putting back gains over the corrupted run."""
        return self.restored - self.corrupted


@torch.no_grad()
def trace_fact(
    model: OPT,
    tokens: Sequence[int],
    subject: tuple[int, int],
    *,
    answer: int | None = None,
    part: str = "state",
    window: int = 1,
    strength: float = 3.0,
    samples: int = 10,
    seed: int = 0,
) -> CausalTrace:
    """Trace the answer after `tokens` to the states that carry it.

    Args:
        subject: positions [first, after the last) of the subject's tokens.
        answer: the token whose probability is watched; None is the clean run's likeliest.
        part: what is put back: "state" (the residual stream after a layer), "attention" or "ffn"
            (what the block adds).
        window: so many layers around each are put back together; the paper takes 10 for blocks.
        strength: noise in standard deviations of the text's own token embeddings.
        samples: copies with noise of their own; all restorations see the same ones.

    Raises:
        RequestError: a subject outside the text, no such part, or a number out of range.
        CheckpointError: weights hold NaN.
    """
    first, last = subject
    if not 0 <= first < last <= len(tokens):
        raise RequestError(
            f"subject {subject} does not lie in the {len(tokens)} tokens of the text"
        )
    if part not in _POINTS:
        raise RequestError(f"no part {part!r}; there are {', '.join(_POINTS)}")
    if samples < 1 or window < 1 or not strength > 0:
        raise RequestError(
            f"samples ({samples}) and window ({window}) must be at least 1, strength ({strength}) "
            "above 0"
        )
    ids = token_rows(model, tokens)
    layers = model.config.num_hidden_layers
    names = [f"layers.{i}.{_POINTS[part]}" for i in range(layers)]
    values: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> None:
        values[name] = value[0]

    with hooked(model, {name: partial(keep, name) for name in (*names, "hook_embed")}):
        clean = _last(model, ids)[0]
    chosen = int(clean.argmax()) if answer is None else answer
    if not 0 <= chosen < len(clean):
        raise RequestError(f"token id {chosen} is not in 0..{len(clean) - 1}")
    scale = strength * float(values["hook_embed"].float().std())
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(samples, last - first, model.config.hidden_size, generator=random) * scale
    rows = ids.expand(samples, -1)

    def forget(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, first:last] += noise.to(value)
        return value

    def restore(name: str, position: int, value: Tensor) -> Tensor:
        value = value.clone()
        value[:, position] = values[name][position]
        return value

    def probability(changes: dict[str, partial[Tensor]]) -> float:
        with hooked(model, {"hook_embed": forget, **changes}):
            return float(_last(model, rows)[:, chosen].double().mean())

    restored = np.empty((layers, len(tokens)))
    for i in range(layers):
        start = max(0, min(i - window // 2, layers - window))
        near = names[start : start + window]
        for t in range(len(tokens)):
            restored[i, t] = probability({name: partial(restore, name, t) for name in near})
    return CausalTrace(
        tokens=tuple(tokens),
        subject=(first, last),
        answer=chosen,
        clean=float(clean[chosen]),
        corrupted=probability({}),
        restored=restored,
        noise=scale,
    )


def _last(model: OPT, ids: Tensor) -> Tensor:
    """Probabilities (B, V) after the last token."""
    logits = torch.nn.functional.linear(model.hidden(ids)[:, -1], model.head_weight)
    check_finite(logits)
    return logits.float().softmax(dim=-1)
