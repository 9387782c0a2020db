"""Exact scoring: log-probabilities by token, word, sentence, byte and document.

    scorer = Scorer(LLM())
    scorer.tokens(["A text."])                    -> [ScoredText]
    scorer.continuations("2 + 2 =", [" 4", " 5"]) -> [ContinuationScore], their context read once
    scorer.rank("2 + 2 =", [" 4", " 5"]).best     -> 0, perhaps
    scorer.pairs([("good", "bad")])               -> [PairScore]

`word_scores`, `sentence_scores` and `byte_scores` cut a ScoredText into spans; `document` sums
several up.
Every result knows its `Convention`: start token, windows, stride, what was counted.
"""

from optlm.score.convention import CONVENTIONS, Convention
from optlm.score.levels import byte_scores, sentence_scores, word_scores
from optlm.score.ranking import Ranking
from optlm.score.results import (
    ContinuationScore,
    DocumentScore,
    PairScore,
    ScoredText,
    SpanScore,
    document,
)
from optlm.score.scorer import Scorer

__all__ = [
    "CONVENTIONS",
    "ContinuationScore",
    "Convention",
    "DocumentScore",
    "PairScore",
    "Ranking",
    "ScoredText",
    "Scorer",
    "SpanScore",
    "byte_scores",
    "document",
    "sentence_scores",
    "word_scores",
]
