"""Terms between student and teacher, against autograd on whole arrays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from optlm.errors import ConfigError
from optlm.train.distil.divergence import (
    DIVERGENCES,
    CachedRows,
    LiveRows,
    TermConfig,
    expand,
    head_divergence,
)
from optlm.train.distil.teacher_cache import top_k
from optlm.train.run.folder import TrainingError

N, E, V = 600, 8, 23  # N is more than two chunks


@pytest.fixture
def parts() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    return {
        "hidden": normal(N, E).requires_grad_(),
        "weight": normal(V, E).requires_grad_(),
        "targets": torch.randint(V, (N,), generator=random),
        "states": normal(N, 5),
        "head": normal(V, 5),
    }


def slow(name: str, log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """The definitions, written down once more."""
    p, q = log_p.exp(), log_q.exp()
    if name == "forward_kl":
        return (p * (log_p - log_q)).sum()
    if name == "reverse_kl":
        return (q * (log_q - log_p)).sum()
    m = (beta * p + (1 - beta) * q).log()
    return beta * (p * (log_p - m)).sum() + (1 - beta) * (q * (log_q - m)).sum()


def gradients(total: Tensor, parts: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(total, [parts["hidden"], parts["weight"]]))


def live(parts: dict[str, Tensor], temperature: float = 1.0) -> LiveRows:
    return LiveRows(states=parts["states"], head=parts["head"], temperature=temperature)


def fast(parts: dict[str, Tensor], teacher: Any, terms: TermConfig) -> Tensor:
    return head_divergence(
        parts["hidden"], parts["weight"], parts["targets"], teacher=teacher, terms=terms
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_term_is_its_definition(parts: dict[str, Tensor], name: str, temperature: float) -> None:
    terms = TermConfig(**{name: 0.7}, beta=0.3, temperature=temperature)
    ours = fast(parts, live(parts, temperature), terms)
    log_q = (parts["hidden"] @ parts["weight"].T / temperature).log_softmax(1)
    log_p = (parts["states"] @ parts["head"].T / temperature).log_softmax(1)
    wanted = 0.7 * temperature**2 * slow(name, log_p, log_q, 0.3)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(
        gradients(ours, parts), gradients(wanted, parts), rtol=1e-4, atol=1e-4
    )


def test_labels_are_cross_entropy_and_terms_add_up(parts: dict[str, Tensor]) -> None:
    labels = torch.nn.functional.cross_entropy(
        parts["hidden"] @ parts["weight"].T, parts["targets"], reduction="sum"
    )
    ours = fast(parts, None, TermConfig(labels=1.0))
    torch.testing.assert_close(ours, labels)
    torch.testing.assert_close(
        gradients(ours, parts), gradients(labels, parts), rtol=1e-4, atol=1e-4
    )
    pulled = fast(parts, live(parts), TermConfig(reverse_kl=2.0))
    both = fast(parts, live(parts), TermConfig(labels=3.0, reverse_kl=2.0))
    torch.testing.assert_close(both, 3 * ours + pulled)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_nothing_is_lost_between_equals(parts: dict[str, Tensor], name: str) -> None:
    same = LiveRows(states=parts["hidden"].detach(), head=parts["weight"].detach(), temperature=1.0)
    total = fast(parts, same, TermConfig(**{name: 1.0}))
    assert abs(float(total.detach())) < 1e-3
    assert all(float(gradient.abs().max()) < 1e-3 for gradient in gradients(total, parts))


def cached(parts: dict[str, Tensor], k: int, temperature: float = 1.0) -> CachedRows:
    log_p = (parts["states"] @ parts["head"].T / temperature).log_softmax(1)
    ids, logs, rest = (torch.from_numpy(array) for array in top_k(log_p, k))
    return CachedRows(ids=ids, logs=logs, rest=rest)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_cache_of_the_whole_vocabulary_equals_the_teacher(
    parts: dict[str, Tensor], name: str
) -> None:
    terms = TermConfig(**{name: 1.0}, labels=0.5, temperature=2.0)
    a = fast(parts, live(parts, 2.0), terms)
    b = fast(parts, cached(parts, V, 2.0), terms)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(gradients(a, parts), gradients(b, parts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_part_of_the_vocabulary_means_k_tokens_and_all_others(
    parts: dict[str, Tensor], name: str
) -> None:
    """Value and gradient are those of distributions over k + 1 outcomes."""
    rows = cached(parts, 4)
    ours = fast(parts, rows, TermConfig(**{name: 1.0}))
    log_q = (parts["hidden"] @ parts["weight"].T).log_softmax(1)
    others = log_q.scatter(1, rows.ids, -math.inf).logsumexp(1, keepdim=True)
    lumped_q = torch.cat([log_q.gather(1, rows.ids), others], dim=1)
    lumped_p = torch.cat([rows.logs, rows.rest.log()[:, None]], dim=1)
    wanted = slow(name, lumped_p, lumped_q, 0.5)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(
        gradients(ours, parts), gradients(wanted, parts), rtol=1e-4, atol=1e-4
    )


def test_expanded_rows_are_distributions(parts: dict[str, Tensor]) -> None:
    rows = cached(parts, 3)
    log_q = (parts["hidden"].detach() @ parts["weight"].detach().T).log_softmax(1)
    halves = rows.logs.half().float()  # as an f16 cache rounds them
    total = expand(rows.ids, halves, rows.rest, log_q).exp().sum(1)
    torch.testing.assert_close(total, torch.ones(N))
    nothing_left = expand(rows.ids, rows.logs, torch.zeros(N), log_q)
    assert bool(torch.isfinite(nothing_left).all())


def test_frozen_head_gets_no_gradient(parts: dict[str, Tensor]) -> None:
    frozen = parts | {"weight": parts["weight"].detach()}
    total = fast(frozen, live(parts), TermConfig(forward_kl=1.0))
    (ours,) = torch.autograd.grad(total, [parts["hidden"]])
    both = fast(parts, live(parts), TermConfig(forward_kl=1.0))
    torch.testing.assert_close(ours, gradients(both, parts)[0])


def test_half_precision_is_near(parts: dict[str, Tensor]) -> None:
    terms = TermConfig(forward_kl=1.0, labels=1.0)
    exact = gradients(fast(parts, live(parts), terms), parts)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            near = gradients(fast(parts, live(parts), terms), parts)
        for a, b in zip(near, exact, strict=True):
            assert float((a - b).norm() / b.norm()) < 0.02


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_teacher_that_is_no_number_is_refused(parts: dict[str, Tensor], value: float) -> None:
    parts["states"][7, 2] = value
    with pytest.raises(TrainingError, match="teacher's logits are no numbers"):
        fast(parts, live(parts), TermConfig(forward_kl=1.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"beta": 0.0}, "use forward_kl or reverse_kl"),
        ({"beta": 1.0}, "use forward_kl or reverse_kl"),
        ({"forward_kl": -0.5}, "forward_kl is -0.5"),
        ({"jsd": math.nan}, "jsd is nan"),
        ({"labels": True}, "labels must be a number"),
    ],
)
def test_bad_weights_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TermConfig(**values)
