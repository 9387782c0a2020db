"""What a request of a batch may ask for, by the server's own code: it reads bodies, words answers.

What would differ from run to run does not: ids have the number of the row, `created` is 0, and what
the cache had a part in (tokens found there, tokens computed) is left out of the usage. A body that
samples without a seed gets that of its row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from optlm.batch.settings import BatchSettings, row_seed
from optlm.batch.work import Job
from optlm.engine.generation import Generation
from optlm.engine.llm import LLM
from optlm.engine.reading import normalizers
from optlm.serve.chat import ChatWords, make_template, plain_chat, plan_chat
from optlm.serve.completions import Completions
from optlm.serve.embeddings import embedding_answer, plan_embedding
from optlm.serve.errors import ApiError
from optlm.serve.fields import read_fields
from optlm.serve.limits import Cost, Limits
from optlm.serve.plan import CompletionPlan, plan_completion
from optlm.serve.requests import ChatRequest, CompletionRequest, EmbeddingRequest, ScoreRequest
from optlm.serve.scoring import plan_score, score_answer
from optlm.serve.served import Served

__all__ = ["Asked", "Endpoints"]

_COUNTED = ("prompt_tokens", "completion_tokens", "total_tokens")


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A request in the engine: its jobs, and what makes its answer when all are finished."""

    jobs: list[Job]
    answer: Callable[[], dict[str, Any]]


class Endpoints:
    """Attributes: urls: what there is, by URL."""

    def __init__(self, llm: LLM, settings: BatchSettings) -> None:
        self._llm = llm
        self._seed = settings.seed
        self._limits = Limits()
        self._served = Served.of(llm, settings.model_name, 0)
        given = settings.chat_template
        self._template = plain_chat if given is None else make_template(given)
        self.urls: Mapping[str, Callable[[int, Any], Asked]] = {
            "/v1/completions": self._completion,
            "/v1/chat/completions": self._chat,
            "/v1/embeddings": self._embedding,
            "/v1/score": self._score,
        }

    def ask(self, url: str, row: int, body: Any) -> Asked:
        """Submit a request; `url` is one of `urls`.

        Raises:
            ApiError, OptlmError: it cannot be served, and nothing of it was submitted.
        """
        return self.urls[url](row, body)

    def _completion(self, row: int, body: Any) -> Asked:
        plan = plan_completion(read_fields(CompletionRequest, body), self._served)
        words = Completions(plan, self._served, id=f"cmpl-{row}", created=0)
        return self._generate(row, plan, words)

    def _chat(self, row: int, body: Any) -> Asked:
        plan = plan_chat(read_fields(ChatRequest, body), self._served, self._template)
        words = ChatWords(plan, self._served, id=f"chatcmpl-{row}", created=0)
        return self._generate(row, plan, words)

    def _generate(self, row: int, plan: CompletionPlan, words: Completions | ChatWords) -> Asked:
        if plan.stream:
            raise ApiError(
                400, "rows are not streamed; leave stream out", param="stream", code="invalid_value"
            )
        self._check(plan.cost(self._served.context))
        params = plan.params
        if params.seed is None and not params.is_greedy:
            params = replace(params, seed=row_seed(self._seed, row))
        jobs = self._submit(lambda ids: self._llm.submit(ids, params), plan.prompts)
        return Asked([*jobs], lambda: _counted(words.response([job.output() for job in jobs])))

    def _embedding(self, row: int, body: Any) -> Asked:
        plan = plan_embedding(read_fields(EmbeddingRequest, body), self._served)
        self._check(plan.cost)
        pooling = plan.request.pooling
        jobs = self._submit(
            lambda ids: self._llm.submit_embed(ids, pooling, plan.adapter), plan.inputs
        )
        return Asked([*jobs], lambda: embedding_answer(plan, [job.embedding() for job in jobs]))

    def _score(self, row: int, body: Any) -> Asked:
        plan = plan_score(read_fields(ScoreRequest, body), self._served, self._limits)
        self._check(plan.cost)
        reading = self._llm.submit_reading(
            plan.tree(), normalizers, plan.adapter, priority=plan.priority
        )
        return Asked([reading], lambda: _counted(score_answer(plan, reading, self._served)))

    def _check(self, cost: Cost) -> None:
        self._limits.check(cost)

    def _submit(
        self, submit: Callable[[list[int]], Generation], prompts: list[list[int]]
    ) -> list[Generation]:
        """Queue all prompts of a row, or none."""
        jobs: list[Generation] = []
        try:
            for ids in prompts:
                jobs.append(submit(ids))
        except BaseException:
            for job in jobs:
                self._llm.abort(job)
            raise
        return jobs


def _counted(body: dict[str, Any]) -> dict[str, Any]:
    """The answer, its usage without what the cache decides."""
    return body | {"usage": {name: body["usage"][name] for name in _COUNTED}}
