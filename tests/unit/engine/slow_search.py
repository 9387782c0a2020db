"""Beam and contrastive search from their definitions: no cache, no batches, lists and floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from slow_sampling import log_softmax

Logits = Callable[[list[int]], Sequence[float]]
Hidden = Callable[[list[int]], Sequence[float]]
Found = tuple[float, float, list[int]]  # score, total log-probability, output tokens


def beam(
    logits: Logits,
    prompt: list[int],
    *,
    width: int,
    length_penalty: float,
    max_tokens: int,
    stops: set[int],
) -> list[Found]:
    """The best `width` outputs, best first."""

    def score(total: float, output: list[int]) -> float:
        return total / len(output) ** length_penalty

    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    found: list[Found] = []
    for _ in range(max_tokens):
        extensions = []
        for place, (total, output) in enumerate(beams):
            for token, logprob in enumerate(log_softmax(logits(prompt + output))):
                extensions.append((-(total + logprob), place, token))
        extensions.sort()
        beams_before, beams = beams, []
        for rank, (cost, place, token) in enumerate(extensions):
            output = [*beams_before[place][1], token]
            if token in stops:
                if rank < width:
                    found.append((score(-cost, output), -cost, output))
            elif len(beams) < width:
                beams.append((-cost, output))
        found = sorted(found, key=lambda f: -f[0])[:width]
        best_live = max(score(total, output) for total, output in beams)
        if len(found) == width and best_live <= found[-1][0]:
            return found
    found += [(score(total, output), total, output) for total, output in beams]
    return sorted(found, key=lambda f: -f[0])[:width]


def contrastive(
    logits: Logits,
    hidden: Hidden,
    prompt: list[int],
    *,
    alpha: float,
    k: int,
    max_tokens: int,
    stops: set[int],
) -> list[int]:
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        logprobs = log_softmax(logits(tokens))
        candidates = sorted(range(len(logprobs)), key=lambda i: (-logprobs[i], i))[:k]
        earlier = [hidden(tokens[: i + 1]) for i in range(len(tokens))]
        scores = []
        for token in candidates:
            vector = hidden([*tokens, token])
            likeness = max(_cosine(vector, other) for other in earlier)
            scores.append((1 - alpha) * math.exp(logprobs[token]) - alpha * likeness)
        tokens.append(candidates[scores.index(max(scores))])
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))
