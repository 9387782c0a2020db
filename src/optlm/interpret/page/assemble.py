"""From studies of one text to one HTML file."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optlm.checkpoint.save import atomic_file
from optlm.interpret.lens import LogitLens, TokenProbabilities, logit_lens, token_probabilities
from optlm.interpret.page.attention import BUDGET, PackedAttention, pack_attention
from optlm.interpret.sparsity import SparsityProfile, sparsity_profile
from optlm.interpret.subject import Subject

__all__ = ["InspectPage", "inspect_page"]

LENS_TOP, TOKEN_TOP = 5, 8


@dataclass(frozen=True, kw_only=True, eq=False)
class InspectPage:
    """The page as text; a notebook shows it inline."""

    html: str

    def write(self, path: str | Path) -> Path:
        """Write the file, whole or not at all.

        Raises:
            TrainingError: the disk is full or the folder cannot be written.
        """
        target = Path(path)
        with atomic_file(target) as file:
            file.write(self.html.encode("utf-8"))
        return target

    def _repr_html_(self) -> str:
        """What Jupyter shows: the page in a frame of its own."""
        return (
            f'<iframe srcdoc="{html.escape(self.html)}" sandbox="allow-scripts" '
            'style="width:100%;height:720px;border:0" title="Inside the model"></iframe>'
        )


def inspect_page(subject: Subject, text: str, *, budget: int = BUDGET) -> InspectPage:
    """Study `text` and put what was found into one page.

    Args:
        budget: bytes of the attention maps before compression; of long texts the page keeps the
            strongest keys of each token.

    Raises:
        RequestError: there is no text.
        ContextLengthError: it does not fit the context.
        CheckpointError: weights hold NaN.
    """
    ids = subject.tokens(text)
    model = subject.model
    parts = _Parts()
    described: dict[str, Any] = {
        "model": subject.name,
        "ids": ids,
        "tokens": subject.texts(ids),
        "attention": _attention(parts, pack_attention(model, ids, budget=budget)),
        "lens": _lens(parts, logit_lens(model, ids, top=_top(subject, LENS_TOP))),
        "probabilities": _probabilities(
            parts, token_probabilities(model, ids, top=_top(subject, TOKEN_TOP))
        ),
        "sparsity": _sparsity(parts, model.config.activation_function, subject, ids),
    }
    named = sorted(parts.named_tokens)
    described["vocabulary"] = dict(zip(named, subject.texts(named), strict=True))
    return InspectPage(html=_document(described | {"arrays": parts.arrays}, parts.joined()))


def _top(subject: Subject, wanted: int) -> int:
    return min(wanted, subject.model.config.vocab_size)


class _Parts:
    """Arrays end to end, with where each begins; every array begins at a multiple of 4 bytes."""

    def __init__(self) -> None:
        self.arrays: dict[str, dict[str, Any]] = {}
        self.named_tokens: set[int] = set()
        self._pieces: list[bytes] = []
        self._size = 0

    def add(self, name: str, values: NDArray[Any]) -> str:
        raw = np.ascontiguousarray(values).tobytes()
        kind = str(values.dtype)
        self.arrays[name] = {"at": self._size, "type": kind, "shape": list(values.shape)}
        raw += b"\0" * (-len(raw) % 4)
        self._pieces.append(raw)
        self._size += len(raw)
        return name

    def add_tokens(self, name: str, ids: NDArray[np.int64]) -> str:
        self.named_tokens |= set(np.unique(ids).tolist())
        return self.add(name, ids.astype(np.uint32))

    def joined(self) -> bytes:
        return b"".join(self._pieces)


def _attention(parts: _Parts, packed: PackedAttention) -> dict[str, Any]:
    return {
        "keys": parts.add("attention.keys", packed.keys),
        "weights": parts.add("attention.weights", packed.weights),
        "pictures": parts.add("attention.pictures", packed.pictures),
        "whole": packed.whole,
    }


def _lens(parts: _Parts, lens: LogitLens) -> dict[str, Any]:
    return {
        "ids": parts.add_tokens("lens.ids", lens.top_ids),
        "logprobs": parts.add("lens.logprobs", lens.top_logprobs.astype(np.float32)),
        "ranks": parts.add("lens.ranks", lens.target_ranks.astype(np.uint32)),
        "target": parts.add("lens.target", lens.target_logprobs.astype(np.float32)),
        "kl": parts.add("lens.kl", lens.kl_to_final.astype(np.float32)),
    }


def _probabilities(parts: _Parts, found: TokenProbabilities) -> dict[str, Any]:
    return {
        "logprobs": parts.add("token.logprobs", found.logprobs.astype(np.float32)),
        "ranks": parts.add("token.ranks", found.ranks.astype(np.uint32)),
        "entropy": parts.add("token.entropy", found.entropy.astype(np.float32)),
        "ids": parts.add_tokens("token.ids", found.top_ids),
        "top": parts.add("token.top", found.top_logprobs.astype(np.float32)),
    }


def _sparsity(
    parts: _Parts, activation: str, subject: Subject, ids: list[int]
) -> dict[str, Any] | None:
    """Which feed-forward units are on; a model without ReLU has no zeros to show."""
    if activation != "relu":
        return None
    profile: SparsityProfile = sparsity_profile(subject.model, [ids])
    return {
        "shares": parts.add("sparsity.shares", profile.active_share.astype(np.float32)),
        "tokens": parts.add("sparsity.tokens", profile.by_token.astype(np.float32)),
        "never": profile.never.tolist(),
        "units": subject.model.config.ffn_dim,
    }


# ---- the file ----------------------------------------------------------------------------------


def _document(described: dict[str, Any], data: bytes) -> str:
    style, script = _asset("page.css"), _asset("page.js")
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return (
        _asset("page.html")
        .replace("{{policy}}", html.escape(policy))
        .replace("{{title}}", html.escape(f"Inside {described['model']}"))
        .replace("{{style}}", style)
        .replace("{{described}}", _json_in_html(described))
        .replace("{{data}}", base64.b64encode(gzip.compress(data, 6, mtime=0)).decode())
        .replace("{{script}}", script)
    )


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()


def _json_in_html(values: dict[str, Any]) -> str:
    """JSON that cannot end the element it stands in, nor hold a placeholder of the page.

    Both strings can stand only inside JSON's own strings, where an escape means the same.
    """
    written = json.dumps(values, ensure_ascii=True, separators=(",", ":"))
    return written.replace("<", "\\u003c").replace("{{", "\\u007b\\u007b")
