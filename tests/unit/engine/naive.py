"""An engine over hashed logits, and the naive loop that it must equal."""

from __future__ import annotations

from typing import Any

import slow_sampling as slow

from engine_fakes import FakeRunner, hashed_logits, tiny_config
from optlm.engine.llm import LLM
from optlm.engine.params import SamplingParams
from optlm.engine.sampling import uniform

V = 97
RULE = hashed_logits(V)
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


PROMPTS = [[2], [2, 5, 6], [2, *range(5, 25)], [9] * 16, [2, 5, 6], list(range(3, 35))]


def hashed(**options: Any) -> LLM:
    return LLM.from_runner(FakeRunner(RULE, tiny_config(V), **options))


def naive(prompt: list[int], params: SamplingParams, sample: int = 0) -> list[int]:
    """What the engine must equal: one token at a time, every option from its definition."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < params.max_tokens:
        output = tokens[len(prompt) :]
        stops = [*params.stop_token_ids] + ([] if params.ignore_eos else [2])
        logits = slow.process([float(x) for x in RULE(tokens)], params, prompt, output, stops)
        kept = slow.probabilities(logits, params)
        u = uniform(params.seed, sample, len(tokens)) if params.seed is not None else 0.0
        tokens.append(slow.draw(kept, u))
        if tokens[-1] in stops and len(tokens) - len(prompt) >= params.min_tokens:
            break
    return tokens[len(prompt) :]
