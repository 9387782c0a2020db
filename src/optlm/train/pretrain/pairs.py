"""What a model knows of grammar and how much text surprises it: BabyLM's two yardsticks.

A minimal pair is two sentences that differ in one point; the model is right when it gives the good
one the higher probability, as in BLiMP (Warstadt et al. 2020). Sentences are scored whole, after
``</s>``. Surprisal is -log2 p of a word in its context.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optlm.data.inputs import find_inputs
from optlm.data.lines import read_lines
from optlm.model import OPT
from optlm.train.pretrain.validate import bits_per_byte
from optlm.train.tokens.corpus import CorpusError, ReadReport, read_documents

__all__ = ["Pair", "Progress", "judge_pairs", "log_probabilities", "read_pairs", "surprisal"]

Progress = Callable[[int], None]  # told how many more sentences are done
Encode = Callable[[list[str]], Iterable[list[int]]]  # texts to token ids, each after ``</s>``

_PADDED_TOKENS = 4096  # of one forward pass
_LOGIT_ROWS = 1024


@dataclass(frozen=True)
class Pair:
    good: str
    bad: str
    groups: tuple[tuple[str, str], ...]  # such as ("field", "syntax")


_GROUPS = ("field", "phenomenon", "paradigm")


def read_pairs(path: Path, *, per_paradigm: int | None = None) -> list[Pair]:
    """Pairs of a JSON Lines file (.gz, .zst): ``good``, ``bad``, and any of BLiMP's groups.

    Args:
        per_paradigm: use only the first so many of every paradigm.

    Raises:
        CorpusError: the file is missing or damaged, a line is no pair, or there is none.
    """
    pairs, taken = [], defaultdict[str, int](int)
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            good, bad = values.get("good"), values.get("bad")
        except (ValueError, AttributeError, RecursionError) as error:
            raise CorpusError(f"{path.name}:{number} is no minimal pair: {error}") from error
        if not (isinstance(good, str) and isinstance(bad, str) and good and bad):
            raise CorpusError(f"{path.name}:{number} is no minimal pair: give 'good' and 'bad'")
        paradigm = str(values.get("paradigm", ""))
        taken[paradigm] += 1
        if per_paradigm is None or taken[paradigm] <= per_paradigm:
            groups = tuple((name, str(values[name])) for name in _GROUPS if name in values)
            pairs.append(Pair(good, bad, groups))
    if not pairs:
        raise CorpusError(f"{path} holds no minimal pair")
    return pairs


def _lines(path: Path) -> Iterator[bytes]:
    for source in find_inputs([str(path)]):
        for line in read_lines(source.path, source.compression):
            if isinstance(line, int):
                raise CorpusError(f"{path.name} has a line of {line} bytes")
            yield line


def judge_pairs(
    model: OPT, encode: Encode, pairs: list[Pair], *, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """Share of pairs whose good sentence is likelier: ``accuracy``, and by each kind of group.

    ``accuracy`` is the mean over paradigms where pairs have one, as BLiMP's overall figure is. A
    tie is no success; ``identical`` counts the pairs of equal sentences (BLiMP has some), always
    ties.

    Raises:
        CorpusError: a sentence is longer than the model's context.
    """
    sentences = [sentence for pair in pairs for sentence in (pair.good, pair.bad)]
    scores = log_probabilities(model, list(encode(sentences)), progress=progress)
    right = [good > bad for good, bad in zip(scores[::2], scores[1::2], strict=True)]
    by_group: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for pair, is_right in zip(pairs, right, strict=True):
        for kind, name in pair.groups:
            by_group[kind][name].append(is_right)
    shares = {
        kind: {name: round(float(np.mean(hits)), 4) for name, hits in groups.items()}
        for kind, groups in by_group.items()
    }
    paradigms = by_group.get("paradigm")
    means = [float(np.mean(hits)) for hits in paradigms.values()] if paradigms else right
    overall = {
        "accuracy": round(float(np.mean(means)), 4),
        "pairs": len(pairs),
        "identical": sum(pair.good == pair.bad for pair in pairs),
    }
    return overall | shares


@torch.no_grad()
def log_probabilities(
    model: OPT, sentences: list[list[int]], *, progress: Progress = lambda _: None
) -> list[float]:
    """Natural logarithm of the probability of each sentence after its first token.

    Sentences of like length are read together. They are padded on the right, where causal attention
    lets nobody look.

    Raises:
        CorpusError: a sentence is longer than the model's context.
    """
    context = model.config.max_position_embeddings
    longest = max(map(len, sentences), default=0)
    if longest > context + 1:
        raise CorpusError(f"a sentence has {longest} tokens; the model's context is {context}")
    results = [0.0] * len(sentences)
    for group in _groups(sentences):
        ids = [sentences[index] for index in group]
        for index, value in zip(group, _log_probabilities(model, ids), strict=True):
            results[index] = value
        progress(len(group))
    return results


def _groups(sentences: list[list[int]]) -> Iterator[list[int]]:
    """Indices by length, as many at once as fit one forward pass."""
    order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
    group: list[int] = []
    for index in order:
        if group and (len(group) + 1) * len(sentences[index]) > _PADDED_TOKENS:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _log_probabilities(model: OPT, sentences: list[list[int]]) -> list[float]:
    width = max(map(len, sentences))
    padded = torch.full((len(sentences), width), model.config.pad_token_id)
    for row, ids in enumerate(sentences):
        padded[row, : len(ids)] = torch.tensor(ids)
    if width < 2:
        return [0.0] * len(sentences)
    hidden = model.hidden(padded[:, :-1])
    lengths = torch.tensor([len(ids) - 1 for ids in sentences])
    real = torch.arange(width - 1)[None] < lengths[:, None]  # (B, T)
    states, targets = hidden[real], padded[:, 1:][real]
    scores = torch.cat([
        _target_scores(model, states[at : at + _LOGIT_ROWS], targets[at : at + _LOGIT_ROWS])
        for at in range(0, len(targets), _LOGIT_ROWS)
    ])  # fmt: skip
    return [float(part.sum()) for part in torch.split(scores, lengths.tolist())]


def _target_scores(model: OPT, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = torch.nn.functional.linear(states, model.head_weight).double()
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)


def surprisal(model: OPT, encode: Encode, texts: list[str]) -> dict[str, float]:
    """``bits_per_word`` and ``bits_per_byte`` of texts, each read from ``</s>``.

    A word is what stands between blanks; its bits are those of all its tokens.
    """
    size = sum(len(text.encode()) for text in texts)
    words = sum(len(text.split()) for text in texts)
    bits = bits_per_byte(model, list(encode(texts)), size)
    per_word = bits * size / max(1, words)
    return {"bits_per_word": round(per_word, 4), "bits_per_byte": round(bits, 4), "words": words}


def read_texts(path: Path, max_bytes: int | None) -> list[str]:
    """Documents of a file for `surprisal`.

    Raises:
        CorpusError: the file is missing or damaged, or holds none.
    """
    report = ReadReport()
    texts = list(read_documents(path, report, max_bytes=max_bytes))
    if not texts:
        raise CorpusError(f"{path} holds no document within {max_bytes} bytes")
    return texts
