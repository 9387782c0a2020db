"""An answer as the model's own continuation: its tokens after a prompt, and samples of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optlm.engine.params import SamplingParams
from optlm.errors import RequestError
from optlm.score import Scorer
from optlm.score.continuations import encode_pair
from optlm.uncertainty.reading import Progress

if TYPE_CHECKING:
    from optlm.engine.llm import LLM

__all__ = [
    "Continuation", "Samples", "continuation", "disagreement", "likelihoods", "normal", "sample",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Token ids of a prompt and an answer; the last `count` are the answer's."""

    ids: list[int]
    count: int


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Answers that a model drew.

    Attributes:
        texts: without blanks at either end.
        logprobs: log-likelihood of each, all its tokens, under the model at temperature 1.
    """

    texts: list[str]
    logprobs: list[float]

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.logprobs):
            raise RequestError(f"{len(self.texts)} texts and {len(self.logprobs)} logprobs")
        if len(self.texts) < 2:
            raise RequestError(
                f"{len(self.texts)} samples cannot disagree; draw at least 2 (10 is usual)"
            )


def continuation(llm: LLM, prompt: str, answer: str) -> Continuation:
    """Tokens of `answer` after `prompt`, under the convention "optlm" of `optlm.score`.

    Both are encoded together; a token across the border belongs to the answer. Without a prompt the
    answer follows the start token.

    Raises:
        RequestError: an empty answer.
        ContextLengthError: both are longer than the context.
    """
    scorer = Scorer(llm)
    found = encode_pair(
        prompt,
        answer,
        scorer.tokenizer,
        scorer.convention,
        limit=llm.config.max_position_embeddings,
    )
    return Continuation(ids=found.token_ids, count=len(found.token_ids) - found.first)


def likelihoods(
    llm: LLM,
    asked: Sequence[tuple[str, str]],
    *,
    adapter: str | None = None,
    progress: Progress = lambda count: None,
) -> list[float]:
    """Log-likelihood of each answer given its prompt; what any texts begin with is read once.

    Raises:
        RequestError: an empty answer.
        ContextLengthError: a text beyond the context.
    """
    scores = Scorer(llm, adapter=adapter).conditional(asked, progress=progress)
    return [each.total for each in scores]


def sample(
    llm: LLM,
    prompts: Sequence[str],
    *,
    count: int = 10,
    temperature: float = 1.0,
    max_tokens: int = 32,
    stop: str | Sequence[str] = "\n",
    seed: int | None = None,
    adapter: str | None = None,
) -> list[Samples]:
    """Draw `count` answers to each prompt; all run together.

    Raises:
        RequestError: fewer than 2 samples, or parameters that cannot be served.
    """
    if count < 2:
        raise RequestError(f"{count} samples cannot disagree; draw at least 2 (10 is usual)")
    params = SamplingParams(
        n=count, temperature=temperature, max_tokens=max_tokens, stop=stop, seed=seed,
        logprobs=0, adapter=adapter,
    )  # fmt: skip
    drawn = []
    for output in llm.generate(list(prompts), params):
        texts = [each.text.strip() for each in output.outputs]
        logprobs = [each.cumulative_logprob or 0.0 for each in output.outputs]
        drawn.append(Samples(texts=texts, logprobs=logprobs))
    return drawn


def normal(text: str) -> str:
    """A text as answers are compared: small letters, single blanks, no marks at its ends."""
    return " ".join(text.lower().split()).strip(" .,;:!?\"'()")


def disagreement(samples: Samples) -> float:
    """Probability that two of the samples differ as answers: 0 all alike, 1 all different."""
    total = len(samples.texts)
    counts = Counter(map(normal, samples.texts)).values()
    alike = sum(count * (count - 1) for count in counts)
    return 1 - alike / (total * (total - 1))
