"""Which tokens of the text a prediction rests on, by captum's methods, with a completeness check.

Source: integrated gradients (arXiv 1703.01365), gradient SHAP (arXiv 1705.07874), feature ablation
and Shapley sampling as captum (https://captum.ai) has them. Tokens are attributed through their
embeddings; position embeddings stay as they are. The value explained is the log-probability of a
token.

Letters: T tokens, D hidden size, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optlm.errors import BackendError, RequestError
from optlm.interpret.cache import array
from optlm.interpret.subject import check_finite, token_rows
from optlm.model import OPT, hooked

__all__ = ["BASELINES", "METHODS", "TokenAttribution", "attribute_tokens"]

# Whether the method promises that its values sum to the difference from the baseline.
METHODS = {
    "integrated_gradients": True,
    "shapley": True,
    "occlusion": False,
    "input_x_gradient": False,
}
BASELINES = ("mean", "zero", "end")


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenAttribution:
    """What each token of the text adds to the log-probability of `target` after it, in nats."""

    method: str
    baseline: str
    tokens: tuple[int, ...]
    target: int
    values: NDArray[np.float32]  # (T,)
    explained: float  # log-probability on the text less that on the baseline
    delta: float  # sum of values less `explained`: the completeness error
    complete: bool  # whether the method promises completeness (and kept to it)
    tolerance: float


def attribute_tokens(
    model: OPT,
    tokens: Sequence[int],
    *,
    target: int | None = None,
    method: str = "integrated_gradients",
    baseline: str = "mean",
    steps: int = 64,
    tolerance: float = 0.05,
    seed: int = 0,
) -> TokenAttribution:
    """Attribute the log-probability of `target` (None: the likeliest) after `tokens` to them.

    The baseline keeps the start token, so that gets 0.

    Args:
        method: one of `METHODS`. "occlusion" puts one token after the other to the baseline.
        baseline: the embedding that stands for an absent token: the "mean" of the vocabulary,
            "zero", or that of the "end" token.
        steps: points on the path of integrated gradients; permutations for "shapley".
        tolerance: largest |delta|, as a share of |explained| (at least of 1 nat), with which a
            method that promises completeness is believed.

    Raises:
        RequestError: an unknown method, baseline or target, or a delta above the tolerance.
        BackendError: captum is not installed.
        CheckpointError: weights hold NaN.
    """
    if method not in METHODS:
        raise RequestError(f"no method {method!r}; there are {', '.join(METHODS)}")
    if baseline not in BASELINES:
        raise RequestError(f"no baseline {baseline!r}; there are {', '.join(BASELINES)}")
    if steps < 1 or not tolerance > 0:
        raise RequestError(
            f"steps ({steps}) must be at least 1 and tolerance ({tolerance}) above 0"
        )
    ids = token_rows(model, tokens)
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    check_finite(logits)
    chosen = int(logits.argmax()) if target is None else target
    if not 0 <= chosen < len(logits):
        raise RequestError(f"token id {chosen} is not in 0..{len(logits) - 1}")
    explain = _Explained(model, ids, chosen, baseline)
    torch.manual_seed(seed)  # captum draws permutations from PyTorch's own generator
    present = torch.ones(1, ids.shape[1], device=ids.device)
    values = _run(method, explain, present, steps)
    with torch.no_grad():
        explained = float(explain(present) - explain(torch.zeros_like(present)))
    delta = float(values.sum()) - explained
    if METHODS[method] and abs(delta) > tolerance * max(1.0, abs(explained)):
        raise RequestError(
            f"{method} misses completeness by {delta:.4f} nats of {explained:.4f} (tolerance "
            f"{tolerance:g}); raise steps above {steps}"
        )
    return TokenAttribution(
        method=method,
        baseline=baseline,
        tokens=tuple(tokens),
        target=chosen,
        values=array(values),
        explained=explained,
        delta=delta,
        complete=METHODS[method],
        tolerance=tolerance,
    )


class _Explained:
    """How present each token is (B, T), 1 or 0 or between, to the target's log-probability (B,).

    Between the two an embedding lies on the line from the baseline's to the token's, so the
    integral of the gradient over that line is integrated gradients, summed over the embedding.
    """

    def __init__(self, model: OPT, ids: Tensor, target: int, baseline: str) -> None:
        self.model, self.ids, self.target = model, ids, target
        self.baseline, self.step = _embeddings(model, ids, baseline)

    def __call__(self, present: Tensor) -> Tensor:
        embeddings = self.baseline + present[..., None].to(self.step.dtype) * self.step
        with hooked(self.model, {"hook_embed": lambda _: embeddings}):
            final = self.model.hidden(self.ids.expand(len(present), -1))[:, -1]
        logits = torch.nn.functional.linear(final, self.model.head_weight)
        return logits.float().log_softmax(dim=-1)[:, self.target]


@torch.no_grad()
def _embeddings(model: OPT, ids: Tensor, baseline: str) -> tuple[Tensor, Tensor]:
    """Embeddings (1, T, D) of the baseline, and the steps from there to the text's."""
    decoder = model.decoder
    table = decoder.embed_tokens.weight
    absent = {
        "mean": table.mean(dim=0),
        "zero": torch.zeros_like(table[0]),
        "end": table[model.config.eos_token_id],
    }[baseline]
    inputs = decoder.embed_tokens(ids)
    if decoder.project_in is not None:
        inputs, absent = decoder.project_in(inputs), decoder.project_in(absent)
    start = absent.expand_as(inputs).clone()
    start[:, 0] = inputs[:, 0]
    return start, inputs - start


def _run(method: str, explain: _Explained, present: Tensor, steps: int) -> Tensor:
    """Values (T,), by captum."""
    try:
        from captum import attr
    except ImportError:
        raise BackendError(
            "attributions need captum; install it with: pip install 'optlm[interpret]'"
        ) from None
    if method == "integrated_gradients":
        found = attr.IntegratedGradients(explain).attribute(
            present, n_steps=steps, internal_batch_size=16
        )
    elif method == "input_x_gradient":
        found = attr.InputXGradient(explain).attribute(present.requires_grad_())
    else:
        with torch.no_grad():
            if method == "shapley":
                found = attr.ShapleyValueSampling(explain).attribute(present, n_samples=steps)
            else:
                found = attr.FeatureAblation(explain).attribute(present)
    values: Tensor = found.detach()[0]
    return values
