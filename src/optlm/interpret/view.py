"""One text studied in all the ways that fit a terminal, as text and as JSON.

The page of `optlm.interpret.page` shows the same in a browser, with the attention maps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from optlm.errors import RequestError
from optlm.interpret.lens import LogitLens, TokenProbabilities, logit_lens, token_probabilities
from optlm.interpret.roles import HeadReport, head_report
from optlm.interpret.sparsity import SparsityProfile, sparsity_profile
from optlm.interpret.subject import Subject

__all__ = ["Study", "as_json", "as_text", "study"]

# Background colours of the 256-colour terminal, from likely to unlikely, by nats of surprisal.
_TINTS = ((1.0, 194), (2.5, 229), (4.5, 223), (7.0, 217), (math.inf, 210))


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """What a model does on one text; `position` is the token whose lens is shown."""

    model: str
    text: str
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]  # each token by itself
    vocabulary: dict[int, str]  # every token that the lens and the probabilities name
    position: int
    probabilities: TokenProbabilities
    lens: LogitLens
    sparsity: SparsityProfile | None
    no_sparsity: str | None  # why there is none
    heads: HeadReport


def study(subject: Subject, text: str, *, position: int = -1, top: int = 5) -> Study:
    """Read `text` and study it.

    Raises:
        RequestError: an empty text, no such position, or `top` out of range.
        ContextLengthError: the text does not fit the context.
        CheckpointError: weights hold NaN.
    """
    tokens = subject.tokens(text)
    if not -len(tokens) <= position < len(tokens):
        raise RequestError(
            f"no position {position}; the text has {len(tokens)} tokens, 0 is the start token"
        )
    model = subject.model
    lens = logit_lens(model, tokens, top=top)
    probabilities = token_probabilities(model, tokens, top=top)
    named = {*lens.top_ids.ravel().tolist(), *lens.targets.tolist()}
    sparsity: SparsityProfile | None = None
    reason: str | None = None
    try:
        sparsity = sparsity_profile(model, [tokens])
    except RequestError as error:
        reason = str(error)
    return Study(
        model=subject.name,
        text=text,
        tokens=tuple(tokens),
        pieces=tuple(subject.texts(tokens)),
        vocabulary=dict(zip(named, subject.texts(list(named)), strict=True)),
        position=position % len(tokens),
        probabilities=probabilities,
        lens=lens,
        sparsity=sparsity,
        no_sparsity=reason,
        heads=head_report(model, [tokens], name=subject.name),
    )


# ---- JSON ---------------------------------------------------------------------------------------


def as_json(found: Study) -> dict[str, Any]:
    """The study as JSON values; scores that are undefined are null."""
    return {
        "model": found.model,
        "text": found.text,
        "tokens": _json_tokens(found),
        "lens": {
            "position": found.position,
            "target": _named(found, int(found.lens.targets[found.position])),
            "rows": [_json_lens_row(found, row) for row in range(len(found.lens.entropy))],
        },
        "sparsity": _json_sparsity(found),
        "heads": [
            {"layer": head.layer, "head": head.head, "role": head.role, "score": head.score}
            | {
                name: _number(float(score[head.layer, head.head]))
                for name, score in found.heads.scores.items()
            }
            for head in found.heads.roles
        ],
    }


def _json_tokens(found: Study) -> list[dict[str, Any]]:
    seen = found.probabilities
    rows: list[dict[str, Any]] = [
        {"id": token, "text": piece}
        for token, piece in zip(found.tokens, found.pieces, strict=True)
    ]
    for i, row in enumerate(rows[1:]):
        row["logprob"] = float(seen.logprobs[i])
        row["rank"] = int(seen.ranks[i])
        row["entropy"] = float(seen.entropy[i])
    return rows


def _json_lens_row(found: Study, row: int) -> dict[str, Any]:
    lens, at = found.lens, found.position
    return {
        "layer": row - 1 if row else None,  # null: the embedding
        "top": [
            _named(found, int(token)) | {"logprob": float(logprob)}
            for token, logprob in zip(
                lens.top_ids[row, at], lens.top_logprobs[row, at], strict=True
            )
        ],
        "target_logprob": float(lens.target_logprobs[row, at]),
        "target_rank": int(lens.target_ranks[row, at]),
        "entropy": float(lens.entropy[row, at]),
        "kl_to_final": float(lens.kl_to_final[row, at]),
    }


def _json_sparsity(found: Study) -> dict[str, Any]:
    profile = found.sparsity
    if profile is None:
        return {"reason": found.no_sparsity}
    return {
        "mean_share": profile.mean_share,
        "layers": [
            {
                "layer": i,
                "active_share": float(profile.active_share[i]),
                "least": float(profile.least_share[i]),
                "most": float(profile.most_share[i]),
                "never": int(profile.never[i]),
                "always": int(profile.always[i]),
            }
            for i in range(len(profile.active_share))
        ],
    }


def _named(found: Study, token: int) -> dict[str, Any]:
    return {"id": token, "text": found.vocabulary[token]}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


# ---- text ---------------------------------------------------------------------------------------


def as_text(found: Study, *, colour: bool = False, width: int = 100) -> str:
    """The study as lines for a terminal of `width` columns."""
    sections = [
        _tokens(found, colour),
        _lens(found, width),
        _sparsity(found),
        _heads(found),
    ]
    return "\n\n".join(sections)


def _tokens(found: Study, colour: bool) -> str:
    seen = found.probabilities
    mean = -float(seen.logprobs.mean())
    title = f"{len(seen.logprobs)} tokens after the start token, {mean:.3f} nats each on average"
    if colour:
        legend = " ".join(
            _tinted(f" {word} ", bound - 0.1)
            for word, (bound, _) in zip(
                ("< 1 nat", "< 2.5", "< 4.5", "< 7", "more"), _TINTS, strict=True
            )
        )
        pieces = zip(found.pieces[1:], seen.logprobs, strict=True)
        body = "".join(_tinted(_safe(piece), -float(logprob)) for piece, logprob in pieces)
        return f"{title}\n{legend}\n{body}"
    rows = [
        f"{i:>5}  {-seen.logprobs[i - 1]:7.3f}  {seen.ranks[i - 1]:>6}  {_quoted(piece)}"
        for i, piece in enumerate(found.pieces)
        if i
    ]
    return "\n".join([title, "token     nats    rank", *rows])


def _tinted(piece: str, nats: float) -> str:
    tint = next(tint for bound, tint in _TINTS if nats < bound or bound == math.inf)
    lines = (f"\x1b[48;5;{tint}m\x1b[30m{line}\x1b[0m" for line in piece.split("\n"))
    return "\n".join(lines)


def _lens(found: Study, width: int) -> str:
    lens, at = found.lens, found.position
    target = _quoted(found.vocabulary[int(lens.targets[at])])
    last = at == len(found.tokens) - 1
    what = f"the likeliest, {target}" if last else f"the true next token, {target}"
    lines = [
        f"logit lens after token {at}, {_quoted(found.pieces[at])}; rank (0 is first) of {what}"
    ]
    for row in range(len(lens.entropy)):
        name = f"layer {row - 1}" if row else "embedding"
        words = "  ".join(
            f"{_quoted(found.vocabulary[int(token)])} {math.exp(float(logprob)):.2f}"
            for token, logprob in zip(
                lens.top_ids[row, at], lens.top_logprobs[row, at], strict=True
            )
        )
        line = f"{name:<10} rank {int(lens.target_ranks[row, at]):>5}  {words}"
        lines.append(line if len(line) <= width else line[: width - 1] + "…")
    return "\n".join(lines)


def _sparsity(found: Study) -> str:
    profile = found.sparsity
    if profile is None:
        return f"active units: {found.no_sparsity}"
    lines = [f"active units: {profile.mean_share:.1%} of the inputs of fc2 on average"]
    for i, share in enumerate(profile.active_share):
        bar = "█" * round(40 * float(share))
        spread = f"{profile.least_share[i]:.1%} to {profile.most_share[i]:.1%}"
        lines.append(f"layer {i:<3} {float(share):6.1%}  {bar or '·'}  ({spread} by token)")
    return "\n".join(lines)


def _heads(found: Study) -> str:
    lines = ["heads, with the share of attention that gives them their role"]
    layers = max(head.layer for head in found.heads.roles) + 1
    for layer in range(layers):
        words = [
            f"{head.role} {head.score:.2f}" for head in found.heads.roles if head.layer == layer
        ]
        lines.append(f"layer {layer:<3} " + "  ".join(f"{word:<15}" for word in words).rstrip())
    return "\n".join(lines)


def _quoted(piece: str) -> str:
    return "'" + _safe(piece).replace("\n", "\\n") + "'"


def _safe(piece: str) -> str:
    """Without control characters: a token can hold any byte."""
    shown = (c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in piece)
    return "".join(shown)
