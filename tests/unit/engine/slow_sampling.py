"""Every sampling option from its definition, in Python numbers: the twin of `sampling.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from optlm.engine.params import SamplingParams


def log_softmax(logits: Sequence[float]) -> list[float]:
    highest = max(logits)
    total = math.fsum(math.exp(x - highest) for x in logits)
    return [x - highest - math.log(total) for x in logits]


def process(
    logits: Sequence[float],
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    stop_ids: Sequence[int],
) -> list[float]:
    """Steps 1 to 4: bias, minimum length, repetition penalty, frequency and presence penalty."""
    bias: Mapping[int, float] = params.logit_bias or {}
    values = [x + bias.get(i, 0.0) for i, x in enumerate(logits)]
    if len(output) < params.min_tokens:
        values = [-math.inf if i in stop_ids else x for i, x in enumerate(values)]
    r = params.repetition_penalty
    seen = {*prompt, *output}
    values = [(x / r if x > 0 else x * r) if i in seen else x for i, x in enumerate(values)]
    for i in set(output):
        count = list(output).count(i)
        values[i] -= params.frequency_penalty * count + params.presence_penalty
    return values


def probabilities(values: Sequence[float], params: SamplingParams) -> dict[int, float]:
    """Steps 5 to 8: temperature, min_p, top_k, top_p. Probability of every token kept, by id."""
    highest = max(values)
    if params.temperature == 0:
        return {list(values).index(highest): 1.0}
    kept = _normal({i: math.exp((x - highest) / params.temperature) for i, x in enumerate(values)})
    if params.min_p:
        least = params.min_p * max(kept.values())
        kept = _normal({i: p for i, p in kept.items() if p >= least})
    # Among equal logits the lowest id comes first.
    order = sorted(kept, key=lambda i: (-values[i], i))
    if params.top_k:
        kept = _normal({i: kept[i] for i in order[: params.top_k]})
        order = order[: params.top_k]
    if params.top_p < 1:
        mass, chosen = 0.0, []
        for i in order:
            chosen.append(i)
            mass += kept[i]
            if mass >= params.top_p - 1e-12:  # 300 times 1/600 is a half
                break
        kept = _normal({i: kept[i] for i in chosen})
    return dict(sorted(kept.items()))


def draw(kept: Mapping[int, float], uniform: float) -> int:
    """Step 9: the first token, by id, at which the cumulative probability exceeds `uniform`."""
    mass = 0.0
    for i, p in kept.items():
        mass += p
        if mass > uniform:
            return i
    return max(i for i, p in kept.items() if p > 0)


def _normal(weights: Mapping[int, float]) -> dict[int, float]:
    total = math.fsum(weights.values())
    return {i: w / total for i, w in weights.items()}
