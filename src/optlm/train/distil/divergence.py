"""How far the student's predictions are from the teacher's, and what pulls them closer.

A term is a function of two distributions over the vocabulary for every prediction, p of the teacher
and q of the student, both at one temperature t:

    forward_kl   KL(p, q): Hinton et al. 2015 (arXiv 1503.02531), section 2
    reverse_kl   KL(q, p), token by token: MiniLLM (arXiv 2306.08543), section 2.1
    jsd          beta KL(p, m) + (1 - beta) KL(q, m) with m = beta p + (1 - beta) q: GKD
                 (arXiv 2306.13649), section 2
    labels       -log q(right token) at temperature 1, which needs no teacher

The first three are multiplied by t^2, so that the size of the gradient does not depend on t (Hinton
et al., section 2). `head_divergence` sums all wanted terms chunk by chunk: (tokens, vocabulary) is
never held whole, neither for the student nor for the teacher. The gradients are taken in closed
form while a chunk's numbers are in the cache, as in `optlm.train.loop.loss`.

Letters: N predictions, C of them in a chunk, V vocabulary, E embedding width, k listed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from optlm.errors import ConfigError
from optlm.train.loop.loss import HALF_LIFT
from optlm.train.run.folder import TrainingError

__all__ = [
    "DIVERGENCES",
    "CachedRows",
    "LiveRows",
    "TeacherRows",
    "TermConfig",
    "expand",
    "head_divergence",
]

_CHUNK = 256  # rows of logits at a time; several arrays of them live at once


@dataclass(frozen=True, kw_only=True)
class TermConfig:
    """Weights of the terms that read the predictions; a weight of 0 leaves the term out.

    Raises:
        ConfigError: a weight that is no number from 0, a temperature or beta out of range.
    """

    labels: float = 0.0
    forward_kl: float = 0.0
    reverse_kl: float = 0.0
    jsd: float = 0.0
    beta: float = 0.5  # of jsd: towards 0 it pulls as forward_kl does, towards 1 as reverse_kl
    temperature: float = 1.0  # of both distributions

    def __post_init__(self) -> None:
        for name in ("labels", *DIVERGENCES, "beta", "temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ConfigError(f"losses: {name} must be a number, not {value!r}")
            if not 0.0 <= value <= 1e6:  # false for NaN too
                raise ConfigError(f"losses: {name} is {value}; it must lie between 0 and 1e6")
        if not 0.01 <= self.temperature <= 100:
            raise ConfigError(
                f"losses: temperature is {self.temperature}; it must lie between 0.01 and 100 "
                "(1 leaves the distributions as they are)"
            )
        if not 0.0 < self.beta < 1.0:
            raise ConfigError(
                f"losses: beta is {self.beta}; it must lie between 0 and 1, both left out "
                "(there the divergence is 0: use forward_kl or reverse_kl)"
            )

    @property
    def divergences(self) -> dict[str, float]:
        """Name and weight of the wanted terms that need the teacher's predictions."""
        weights = {name: float(getattr(self, name)) for name in DIVERGENCES}
        return {name: weight for name, weight in weights.items() if weight > 0}


class _Term(NamedTuple):
    values: Tensor  # (C,)
    gradient: Tensor  # (C, V) with regard to the student's logits divided by the temperature


def _forward_kl(log_p: Tensor, log_q: Tensor, beta: float) -> _Term:
    p = log_p.exp()
    return _Term((p * (log_p - log_q)).sum(1), log_q.exp() - p)


def _reverse_kl(log_p: Tensor, log_q: Tensor, beta: float) -> _Term:
    ratio = log_q - log_p
    return _through_softmax(log_q, ratio)


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> _Term:
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    teachers = (log_p.exp() * (log_p - log_m)).sum(1)
    students = _through_softmax(log_q, log_q - log_m)
    return _Term(beta * teachers + (1 - beta) * students.values, (1 - beta) * students.gradient)


def _through_softmax(log_q: Tensor, ratio: Tensor) -> _Term:
    """Sum of q * ratio, and q * (ratio - that sum): what the softmax leaves of the gradient."""
    q = log_q.exp()
    mean = (q * ratio).sum(1)
    return _Term(mean, q * (ratio - mean[:, None]))


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], _Term]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
}


# ---- where the teacher's distributions come from ------------------------------------------------


class TeacherRows(Protocol):
    """The teacher's distribution for each of N predictions."""

    def log_probs(self, rows: slice, log_q: Tensor) -> Tensor:
        """(C, V) of the predictions `rows`, at the temperature of `log_q`, the student's (C, V)."""
        ...


@dataclass(frozen=True, kw_only=True)
class LiveRows:
    """From a teacher in memory: what its head reads (N, E), the head (V, E), the temperature."""

    states: Tensor
    head: Tensor
    temperature: float

    def log_probs(self, rows: slice, log_q: Tensor) -> Tensor:
        logits = (self.states[rows].to(self.head.dtype) @ self.head.T).float()
        result = (logits / self.temperature).log_softmax(1)
        if not bool(torch.isfinite(result.sum())):
            raise TrainingError(
                "the teacher's logits are no numbers (NaN or infinite); nothing can be learnt from "
                "it. `optlm doctor` lists the faults of a checkpoint"
            )
        return result


@dataclass(frozen=True, kw_only=True)
class CachedRows:
    """From a cache: the k likeliest tokens, their log-probabilities, and the mass of all others."""

    ids: Tensor  # (N, k) int64, all different in a row
    logs: Tensor  # (N, k) float32
    rest: Tensor  # (N,) float32

    def log_probs(self, rows: slice, log_q: Tensor) -> Tensor:
        return expand(self.ids[rows], self.logs[rows], self.rest[rows], log_q)


def expand(ids: Tensor, logs: Tensor, rest: Tensor, log_q: Tensor) -> Tensor:
    """(C, V) log-probabilities from k listed ones and the mass of the others.

    The tokens that are not listed share their mass in the student's own proportions. So a
    divergence against the result has the value and the gradient of the divergence between the
    two distributions over k + 1 outcomes, the last being "any other token": the teacher says how
    much mass lies there, and nothing about how it is spread. With k = V nothing is left to spread.

    Args:
        ids, logs, rest: as in `CachedRows`; they are brought to a sum of 1 first.
        log_q: (C, V) the student's.
    """
    total = (logs.exp().sum(1) + rest).log()[:, None]
    listed = logs - total
    if ids.shape[1] == log_q.shape[1]:
        return torch.empty_like(log_q).scatter_(1, ids, listed)
    others = log_q.scatter(1, ids, -math.inf)
    tiny = torch.finfo(torch.float32).tiny
    share = rest.clamp_min(tiny).log()[:, None] - total - others.logsumexp(1, keepdim=True)
    return (others + share).scatter_(1, ids, listed)


# ---- head and terms in one ----------------------------------------------------------------------


class _HeadDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher: TeacherRows | None,
        terms: TermConfig,
    ) -> Tensor:
        kind = hidden.device.type
        cast = torch.is_autocast_enabled(kind)
        work = weight.to(torch.get_autocast_dtype(kind)) if cast else weight
        lift = HALF_LIFT if work.dtype == torch.float16 else 1.0
        states = hidden.to(work.dtype)
        need_states, need_weight = ctx.needs_input_grad[:2]
        grad_states = torch.empty_like(states) if need_states else None
        grad_weight = torch.zeros_like(weight) if need_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(kind, enabled=False):
            for begin in range(0, len(targets), _CHUNK):
                rows = slice(begin, begin + _CHUNK)
                logits = (states[rows] @ work.T).float()
                value, full = _chunk(logits, targets[rows], teacher, rows, terms)
                total += value
                grad = (full * lift if lift != 1.0 else full).to(work.dtype)
                if grad_states is not None:
                    torch.mm(grad, work, out=grad_states[rows])
                if grad_weight is not None:
                    grad_weight += grad.T @ states[rows]
        ctx.save_for_backward(grad_states, grad_weight)
        ctx.hidden_dtype = hidden.dtype
        ctx.lift = lift
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        states, weight = ctx.saved_tensors
        scale = scale / ctx.lift
        return (
            None if states is None else (states * scale).to(ctx.hidden_dtype),
            None if weight is None else weight * scale,
            None,
            None,
            None,
        )


def _chunk(
    logits: Tensor, targets: Tensor, teacher: TeacherRows | None, rows: slice, terms: TermConfig
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the terms over some rows, and its gradient with regard to `logits` (C, V)."""
    total = torch.zeros((), device=logits.device)
    gradient = torch.zeros_like(logits)
    if terms.labels:
        log_probs = logits.log_softmax(1)
        wanted = targets[:, None]
        total -= terms.labels * log_probs.gather(1, wanted).sum()
        gradient += terms.labels * log_probs.exp()
        gradient.scatter_add_(1, wanted, torch.full_like(wanted, -terms.labels, dtype=torch.float))
    if terms.divergences:
        assert teacher is not None
        t = terms.temperature
        log_q = (logits / t).log_softmax(1)
        log_p = teacher.log_probs(rows, log_q)
        for name, weight in terms.divergences.items():
            term = DIVERGENCES[name](log_p, log_q, terms.beta)
            total += weight * t * t * term.values.sum()
            gradient += weight * t * term.gradient
    return total, gradient


def head_divergence(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    teacher: TeacherRows | None,
    terms: TermConfig,
) -> Tensor:
    """Sum over predictions of the weighted terms, in nats.

    Args:
        hidden: (N, E) what the student's head reads.
        weight: (V, E) the student's head.
        targets: (N,) the right next tokens; only `labels` looks at them.
        teacher: not needed when only `labels` is wanted.

    Raises:
        TrainingError: the teacher's logits are NaN or infinite.
    """
    total: Tensor = _HeadDivergence.apply(hidden, weight, targets, teacher, terms)  # type: ignore[no-untyped-call]
    return total
