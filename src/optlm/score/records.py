"""Results as records for files and pages, and what many of them sum up to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from optlm.errors import RequestError
from optlm.score.convention import Convention
from optlm.score.items import Item, Kind
from optlm.score.levels import byte_scores, sentence_scores, word_scores
from optlm.score.ranking import Normalize, Ranking
from optlm.score.results import (
    ContinuationScore,
    PairScore,
    ScoredText,
    document,
    exp_or_inf,
    window_weights,
)
from optlm.score.scorer import Scorer
from optlm.tokenizer import Tokenizer

__all__ = [
    "LEVELS",
    "Level",
    "Summary",
    "continuation_record",
    "score_batch",
    "text_record",
    "wilson",
]

Level = Literal["token", "word", "sentence", "byte", "document"]
LEVELS: tuple[Level, ...] = ("token", "word", "sentence", "byte", "document")
_SPANS = {"word": word_scores, "sentence": sentence_scores, "byte": byte_scores}


def score_batch(
    scorer: Scorer,
    kind: Kind,
    items: Sequence[Item],
    *,
    level: Level = "document",
    normalize: Normalize = "sum",
    answer: str = "gold",
) -> list[dict[str, Any]]:
    """Score items of one kind together; one record each, with where it came from.

    Args:
        level: of "texts", what is listed besides the sums.
        normalize: of "endings", what is compared.
        answer: of "endings", the field that holds the place of the right one, if there is one.

    Raises:
        RequestError: an item that cannot be scored, named by its place.
    """
    try:
        return _score_batch(scorer, kind, items, level, normalize, answer)
    except RequestError:
        for item in items:
            try:
                _score_batch(scorer, kind, [item], level, normalize, answer)
            except RequestError as error:
                raise type(error)(f"{item.place}: {error}") from None
        raise


def _score_batch(
    scorer: Scorer,
    kind: Kind,
    items: Sequence[Item],
    level: Level,
    normalize: Normalize,
    answer: str,
) -> list[dict[str, Any]]:
    if kind == "pairs":
        pairs = scorer.pairs([(item.values[0], item.values[1]) for item in items])
        return [_pair_record(i, pair) for i, pair in zip(items, pairs, strict=True)]
    if kind == "endings":
        questions = [(item.values[0], item.values[1]) for item in items]
        rankings = scorer.rank_all(questions, normalize=normalize)
        return [_ranking_record(i, r, answer) for i, r in zip(items, rankings, strict=True)]
    texts = [item.values[0] for item in items]
    corrects = level == "word" and scorer.convention.corrects_words
    full = [text for text in texts if text]
    found = iter(scorer.tokens(full, words=corrects, by_byte=level == "byte") if full else ())
    scored = [next(found) if text else _empty(scorer.convention) for text in texts]
    return [
        {"place": item.place, **item.others, **text_record(text, level), "text": item.values[0]}
        for item, text in zip(items, scored, strict=True)
    ]


def _empty(convention: Convention) -> ScoredText:
    """An empty line of a text that is scored line by line."""
    return ScoredText(
        text="", tokens=[], logprobs=[], greedy=[], windows=[], convention=convention,
        word_starts=[None], byte_logprobs=[],
    )  # fmt: skip


def text_record(scored: ScoredText, level: Level) -> dict[str, Any]:
    """The sums of a text, and its tokens, words, sentences or bytes."""
    weights = window_weights(scored.windows, scored.convention)
    means = [window.total / window.num_scored for window in scored.windows]
    nll = -math.fsum(mean * weight for mean, weight in zip(means, weights, strict=True))
    record = document([scored]).told() | {
        "greedy": scored.is_greedy,
        "windows": len(scored.windows),
        "average": [sum(weights), nll],  # of which perplexities of several texts are made
    }
    if level == "token":
        record["token_logprobs"] = [
            {"id": token.id, "token": token.text, "logprob": logprob, "greedy": greedy}
            for token, logprob, greedy in zip(
                scored.tokens, scored.logprobs, scored.greedy, strict=True
            )
            if logprob is not None
        ]
    elif level in _SPANS:
        record[f"{level}_logprobs"] = [span._asdict() for span in _SPANS[level](scored)]
    return record


def continuation_record(
    scored: ContinuationScore, tokenizer: Tokenizer, level: Level
) -> dict[str, Any]:
    """The sums of a continuation, and its tokens if they are the `level`."""
    text, nll = scored.continuation or "", -scored.total
    record: dict[str, Any] = {
        "context": scored.context,
        "text": text,
        "nll": nll,
        "tokens": len(scored.logprobs),
        "words": len(text.split()),
        "bytes": scored.num_bytes,
        "bits_per_byte": nll / math.log(2) / scored.num_bytes,
        "perplexity": _ratio(nll, len(scored.logprobs), exp=True),
        "greedy": scored.is_greedy,
        "average": [len(scored.logprobs), nll],
    }
    if level == "token":
        record["token_logprobs"] = [
            {"id": token, "token": tokenizer.token_text(token), "logprob": logprob, "greedy": best}
            for token, logprob, best in zip(
                scored.token_ids, scored.logprobs, scored.greedy, strict=True
            )
        ]
    return record


def _pair_record(item: Item, pair: PairScore) -> dict[str, Any]:
    return {
        "place": item.place,
        **item.others,
        "good": pair.good.text,
        "bad": pair.bad.text,
        "good_logprob": pair.good.total,
        "bad_logprob": pair.bad.total,
        "margin": pair.margin,
        "right": pair.is_right,
    }


def _ranking_record(item: Item, ranking: Ranking, answer: str) -> dict[str, Any]:
    gold = item.others.get(answer)
    return {
        "place": item.place,
        **item.others,
        "context": item.values[0],
        "endings": item.values[1],
        "logprobs": [ending.total for ending in ranking.endings],
        "greedy": [ending.is_greedy for ending in ranking.endings],
        "scores": ranking.scores,
        "normalize": ranking.normalize,
        "best": ranking.best,
        "right": ranking.best == gold if isinstance(gold, int) else None,
    }


@dataclass
class Summary:
    """Sums over records of one kind, group by group.

    Attributes:
        group: a field of the records; None puts all into one.
    """

    kind: Kind
    group: str | None = None
    _sums: dict[str, dict[str, float]] = field(default_factory=dict)

    def add(self, record: dict[str, Any]) -> None:
        name = "all" if self.group is None else str(record.get(self.group))
        for place in dict.fromkeys(("all", name)):
            sums = self._sums.setdefault(place, {})
            for key, value in self._values(record).items():
                sums[key] = sums.get(key, 0.0) + value

    def _values(self, record: dict[str, Any]) -> dict[str, float]:
        if self.kind == "texts":
            weight, nll = record["average"]
            names = ("tokens", "words", "bytes", "nll")
            values = {name: float(record[name]) for name in names}
            return values | {"texts": 1.0, "weight": weight, "weighted": nll}
        if self.kind == "pairs":
            tie = record["margin"] == 0
            return {
                "pairs": 1.0, "right": float(record["right"]), "ties": float(tie),
                "margin": record["margin"],
            }  # fmt: skip
        judged = record["right"] is not None
        return {"items": 1.0, "judged": float(judged), "right": float(record["right"] or False)}

    def groups(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each group with its figures; "all" comes first, and is there even without records."""
        self._sums.setdefault("all", {})
        for name in sorted(self._sums, key=lambda name: (name != "all", name)):
            yield name, self._figures(self._sums[name])

    def _figures(self, sums: dict[str, float]) -> dict[str, Any]:
        def get(name: str) -> float:
            return sums.get(name, 0.0)

        if self.kind == "texts":
            return {
                "texts": int(get("texts")),
                "tokens": int(get("tokens")),
                "words": int(get("words")),
                "bytes": int(get("bytes")),
                "nll": get("nll"),
                "perplexity": _ratio(get("weighted"), get("weight"), exp=True),
                "word_perplexity": _ratio(get("nll"), get("words"), exp=True),
                "bits_per_byte": _ratio(get("nll") / math.log(2), get("bytes")),
            }
        tried = get("pairs") if self.kind == "pairs" else get("judged")
        low, high = wilson(get("right"), tried)
        figures: dict[str, Any] = {
            self.kind if self.kind == "pairs" else "items": int(get("pairs") + get("items")),
            "accuracy": _ratio(get("right"), tried),
            "accuracy_low": low,
            "accuracy_high": high,
        }
        if self.kind == "pairs":
            figures |= {"ties": int(get("ties")), "mean_margin": _ratio(get("margin"), tried)}
        return figures


def wilson(successes: float, trials: float) -> tuple[float | None, float | None]:
    """The 95 per cent interval of a share (Wilson 1927); None without trials."""
    if not trials:
        return None, None
    z = 1.959964
    share = successes / trials
    middle = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return (middle - spread) / scale, (middle + spread) / scale


def _ratio(value: float, by: float, *, exp: bool = False) -> float | None:
    if not by:
        return None
    ratio = exp_or_inf(value / by) if exp else value / by
    return ratio if math.isfinite(ratio) else None
