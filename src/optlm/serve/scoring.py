"""`/v1/score`: log-probabilities of continuations of one context, which is read once."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import Any

from optlm.engine.aio import AsyncLLM
from optlm.engine.prompts import OnePrompt
from optlm.engine.reading import Reading
from optlm.engine.request import as_token_ids, check_token_ids
from optlm.engine.tree import TokenTree
from optlm.errors import RequestError
from optlm.score.continuations import Request, encode_pair, fit_pair
from optlm.score.convention import CONVENTIONS
from optlm.serve.errors import about
from optlm.serve.limits import Cost, Limits
from optlm.serve.logprobs import token_name
from optlm.serve.requests import ScoreRequest
from optlm.serve.served import Served

__all__ = ["ScorePlan", "plan_score", "score", "score_answer"]

CONVENTION = CONVENTIONS["optlm"]


@dataclass(frozen=True, kw_only=True)
class ScorePlan:
    """Attributes: pairs: context and continuation as token ids, in order."""

    model: str
    adapter: str | None
    pairs: list[Request]
    priority: int = 0

    @property
    def cost(self) -> Cost:
        tokens = sum(len(pair.token_ids) for pair in self.pairs)
        return Cost(tokens=tokens, answer_bytes=tokens * 64)

    def tree(self) -> TokenTree:
        """What to read: what all pairs begin with stands in it once."""
        tree = TokenTree()
        for pair in self.pairs:
            tree.add(pair.token_ids, pair.first - 1)
        return tree


def plan_score(request: ScoreRequest, served: Served, limits: Limits) -> ScorePlan:
    """Check and tokenize.

    Raises:
        ApiError, RequestError: it cannot be served.
    """
    adapter = served.adapter_of(request.model)
    with about("context"):
        before = as_token_ids(request.context, served.tokenizer, served.config, room=served.context)
    # The context is encoded anew with each continuation, so first see whether that may be.
    limits.check(Cost(tokens=len(before) * len(request.continuations)))
    pairs = []
    for index, continuation in enumerate(request.continuations):
        with about("continuations", index):
            pairs.append(_pair(request.context, before, continuation, served))
    return ScorePlan(
        model=request.model or served.name,
        adapter=adapter,
        pairs=pairs,
        priority=request.priority or 0,
    )


def _pair(
    context: OnePrompt, before: list[int], continuation: OnePrompt, served: Served
) -> Request:
    """Two texts are encoded as one; ids are taken as they are, and a text beside them by itself.

    Args:
        before: the ids of the context alone.
    """
    if isinstance(continuation, str):
        tokenizer = served.need_tokenizer("give token ids")
        if isinstance(context, str):
            return encode_pair(context, continuation, tokenizer, CONVENTION, limit=served.context)
        continuation = tokenizer.encode(continuation, add_bos=False)
        if not continuation:
            raise RequestError("the continuation is empty; there is nothing to score")
    after = check_token_ids(continuation, served.config.vocab_size)
    return fit_pair(before + after, len(before), CONVENTION, limit=served.context)


async def score(plan: ScorePlan, engine: AsyncLLM, served: Served) -> dict[str, Any]:
    """Read and answer. The numbers are `Scorer`'s."""
    tree = await asyncio.to_thread(plan.tree)  # hundreds of texts must not hold up the others
    reading = await engine.read(tree, adapter=plan.adapter, priority=plan.priority)
    return await asyncio.to_thread(score_answer, plan, reading, served)


def score_answer(plan: ScorePlan, reading: Reading, served: Served) -> dict[str, Any]:
    """The answer, from the plan's tree when it is read."""
    data = []
    for number, pair in enumerate(plan.pairs):
        logprobs, greedy = reading.scores(number)
        ids = pair.continuation_ids
        data.append(
            {
                "object": "score",
                "index": number,
                "logprob": math.fsum(logprobs),
                "is_greedy": bool(greedy.all()),
                "tokens": [token_name(token, served.tokenizer) for token in ids],
                "token_ids": ids,
                "token_logprobs": logprobs.tolist(),
            }
        )
    given = sum(len(pair.token_ids) for pair in plan.pairs)
    usage = {
        "prompt_tokens": given,
        "completion_tokens": 0,
        "total_tokens": given,
        "forward_tokens": reading.num_forward_tokens,
        "prompt_tokens_details": {"cached_tokens": reading.num_cached_tokens},
    }
    return {"object": "list", "model": plan.model, "data": data, "usage": usage}
