"""Packed tokens on disk and the order in which training sees them.

`prepare` turns the corpus files of a `DataConfig` into one folder, laid out as `optlm.data.packed`
describes.

`Mixture.batch(step)` is a pure function of the seed and the step, so a resumed run sees exactly
what the first would have seen, and nothing about the order needs saving.
"""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from optlm.checkpoint.save import atomic_file
from optlm.data.card import data_card
from optlm.data.inputs import find_inputs
from optlm.data.lines import Progress
from optlm.data.packed import CARD, MANIFEST, TOKENIZER, read_manifest, sha256_of
from optlm.errors import ConfigError
from optlm.train.run.settings import build, json_list, json_object
from optlm.train.tokens.corpus import END, CorpusError, ReadReport, read_documents, train_tokenizer

__all__ = ["TOKENIZER", "DataConfig", "Mixture", "Part", "TokenSet", "encode_documents", "prepare"]

_LARGEST_VOCABULARY = 2**16  # tokens are stored as uint16
_ENCODE_TOGETHER = 256  # documents a call into the tokenizer


@dataclass(frozen=True, kw_only=True)
class Part:
    """One ingredient of the training mixture."""

    name: str
    file: str
    weight: float = 1.0  # share of the training rows, relative to the other parts
    decay_weight: float | None = None  # the same while the learning rate falls; None: `weight`
    sources: tuple[str, ...] = ()  # beginnings of the wanted ``source`` values; empty: all
    max_bytes: int | None = None  # use only the first so many bytes of text

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        if not self.name.replace("-", "").replace("_", "").isalnum():
            raise ConfigError(f"part name {self.name!r}: use letters, digits, '-' and '_'")
        for name in ("weight", "decay_weight"):
            share = getattr(self, name)
            if share is not None and not 0 < share < float("inf"):
                raise ConfigError(f"part {self.name!r}: {name} is {share}; it must be above 0")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ConfigError(
                f"part {self.name!r}: max_bytes is {self.max_bytes}; it must be above 0"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What the model reads, and the tokenizer made from it."""

    parts: tuple[Part, ...]
    validation: dict[str, str] = field(default_factory=dict)  # domain -> file; the judges
    vocab_size: int = 8192
    tokenizer_bytes: int = 20_000_000  # read to train the tokenizer, shared out by weight

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        names = [part.name for part in self.parts]
        if not names:
            raise ConfigError("the data has no parts; name at least one file to train on")
        if len(set(names)) != len(names):
            raise ConfigError(f"part names must differ: {', '.join(names)}")
        if self.vocab_size > _LARGEST_VOCABULARY:
            raise ConfigError(f"vocab_size is {self.vocab_size}; packed tokens hold at most 65536")

    @classmethod
    def from_dict(cls, values: Any) -> DataConfig:
        """Build from parsed JSON; an unknown key is refused and the nearest valid one named.

        Raises:
            ConfigError: unknown or missing keys, or values out of range.
        """
        data = json_object(values, "data")
        data["parts"] = tuple(
            build(Part, part, f"data.parts[{index}]")
            for index, part in enumerate(json_list(data.get("parts", []), "data.parts"))
        )
        return build(cls, data, "data")


# ---- preparing ---------------------------------------------------------------------------------


def prepare(
    config: DataConfig,
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    anew: bool = False,
    log: Callable[[str], None] = lambda message: None,
    max_broken: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the tokenizer, pack every part, write card and manifest; finished data are used again.

    Args:
        tokenizer: pack with this one, and train none.
        anew: replace data of another configuration or tokenizer, which nothing stands on.
        max_broken: broken lines of one part that are left out; more are an error. None: any number.
        progress: told how many bytes of the source files were packed.

    Returns:
        The manifest: ``config``, ``tokenizer_sha256`` and ``parts``, for each ``tokens``,
        ``documents``, ``text_bytes``, ``broken_lines``, ``broken_examples``, ``licenses``,
        ``sha256``, ``starts_sha256``, ``files``.

    Raises:
        ConfigError: the folder was prepared from another configuration or tokenizer (not `anew`).
        CorpusError: a file is missing or damaged, too much is broken, or a part holds no document.
    """
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    try:
        if (folder / MANIFEST).exists():
            try:
                return _used_again(folder, wanted, tokenizer)
            except ConfigError:
                if not anew:
                    raise
                (folder / MANIFEST).unlink()
        folder.mkdir(parents=True, exist_ok=True)
        if tokenizer is None:
            tokenizer = train_tokenizer(_tokenizer_texts(config), config.vocab_size)
            log(f"trained a tokenizer of {config.vocab_size:,} entries")
        with atomic_file(folder / TOKENIZER) as file:
            file.write(tokenizer.to_str(pretty=True).encode())
        parts = {}
        for part in config.parts:
            report = ReadReport(max_broken=max_broken)
            parts[part.name] = _pack(part, tokenizer, folder, report, progress)
            log(_summary(part, parts[part.name]))
        sha256 = sha256_of(folder / TOKENIZER)
        manifest = {"config": wanted, "tokenizer_sha256": sha256, "parts": parts}
        with atomic_file(folder / CARD) as file:
            file.write(data_card(manifest).encode())
        with atomic_file(folder / MANIFEST) as file:  # last of all: it means that all is there
            file.write(json.dumps(manifest, indent=1).encode())
    except OSError as error:
        raise CorpusError(f"cannot prepare data in {folder}: {error}") from error
    return manifest


def _used_again(
    folder: Path, wanted: dict[str, Any], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    manifest = read_manifest(folder)
    if manifest["config"] != wanted:
        raise ConfigError(f"{folder} holds data of another configuration; choose another folder")
    if manifest["tokenizer_sha256"] != sha256_of(folder / TOKENIZER):
        raise CorpusError(f"{folder / TOKENIZER} is not the one the data was packed with")
    if tokenizer and tokenizer.to_str() != Tokenizer.from_file(str(folder / TOKENIZER)).to_str():
        raise ConfigError(f"{folder} holds data of another tokenizer; choose another folder")
    return manifest


def _summary(part: Part, packed: dict[str, Any]) -> str:
    text = f"packed {part.name}: {packed['documents']:,} documents, {packed['tokens']:,} tokens"
    if packed["broken_lines"]:
        examples = "; ".join(packed["broken_examples"])
        text += f"; left out {packed['broken_lines']:,} broken lines ({examples})"
    return text


def _tokenizer_texts(config: DataConfig) -> Iterator[str]:
    total = sum(part.weight for part in config.parts)
    for part in config.parts:
        share = max(1, int(config.tokenizer_bytes * part.weight / total))
        limit = min(share, part.max_bytes or share)
        yield from read_documents(
            Path(part.file), ReadReport(), sources=part.sources, max_bytes=limit
        )


def _pack(
    part: Part,
    tokenizer: Tokenizer,
    folder: Path,
    report: ReadReport,
    progress: Progress | None,
) -> dict[str, Any]:
    documents = read_documents(
        Path(part.file),
        report,
        sources=part.sources,
        max_bytes=part.max_bytes,
        progress=progress,
    )
    starts = array("Q")
    position = 0
    with atomic_file(folder / f"{part.name}.tokens") as out:
        for ids in encode_documents(tokenizer, documents):
            starts.append(position)
            position += len(ids)
            out.write(np.asarray(ids, dtype="<u2").tobytes())
    if not starts:
        raise CorpusError(
            f"part {part.name!r}: {part.file} holds no usable document "
            f"({report.not_wanted} of other sources, {report.broken} broken {report.examples})"
        )
    with atomic_file(folder / f"{part.name}.starts") as out:
        out.write(np.asarray(starts, dtype="<u8").tobytes())
    return {
        "tokens": position,
        "documents": report.documents,
        "text_bytes": report.text_bytes,
        "broken_lines": report.broken,
        "broken_examples": report.examples,
        "licenses": dict(report.licenses.most_common()),
        "sha256": sha256_of(folder / f"{part.name}.tokens"),
        "starts_sha256": sha256_of(folder / f"{part.name}.starts"),
        "files": [
            {"file": str(file.path), "bytes": file.size, "sha256": sha256_of(file.path)}
            for file in find_inputs([part.file])
        ],
    }


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[list[int]]:
    """Yield every document as ``</s>`` and its tokens; special-looking text inside stays text."""
    tokenizer.encode_special_tokens = True
    documents = iter(documents)
    while group := list(islice(documents, _ENCODE_TOGETHER)):
        for encoding in tokenizer.encode_batch_fast(group, add_special_tokens=False):
            yield [END, *encoding.ids]


# ---- reading -----------------------------------------------------------------------------------


class TokenSet:
    """The packed tokens of one part, memory-mapped.

    Raises:
        CorpusError: the files are missing or their size contradicts the manifest.
    """

    def __init__(self, folder: Path, name: str, tokens: int) -> None:
        try:
            self.tokens = np.memmap(folder / f"{name}.tokens", dtype="<u2", mode="r")
            self.starts = np.fromfile(folder / f"{name}.starts", dtype="<u8").astype(np.int64)
        except (OSError, ValueError) as error:
            raise CorpusError(f"cannot read part {name!r} in {folder}: {error}") from error
        if len(self.tokens) != tokens:
            raise CorpusError(
                f"part {name!r} in {folder} has {len(self.tokens)} tokens, its manifest says "
                f"{tokens}; prepare it again"
            )

    def row(self, at: int, length: int) -> NDArray[np.int64]:
        """`length` + 1 tokens around index `at`, wrapping at the end of the part.

        The row begins at the document start before `at` if that keeps `at` inside the row, else at
        `at`: short documents are always read from their beginning, long ones from everywhere.
        """
        start = int(self.starts[np.searchsorted(self.starts, at, side="right") - 1])
        begin = start if at - start < length else at
        end = begin + length + 1
        row = self.tokens[begin:end].astype(np.int64)
        while len(row) < length + 1:
            row = np.concatenate([row, self.tokens[: length + 1 - len(row)].astype(np.int64)])
        return row


class Mixture:
    """Endless batches drawn from packed parts.

    Args:
        sets: packed parts, with a weight for each in `weights`, and in `late_weights` from step
            `late_from` on.
        batch_tokens: predicted tokens of one step; a multiple of every sequence length.
        sequence_lengths: length -> share of the steps that use it.
    """

    def __init__(
        self,
        sets: list[TokenSet],
        weights: list[float],
        *,
        late_weights: list[float],
        late_from: int,
        batch_tokens: int,
        sequence_lengths: dict[int, float],
        seed: int,
    ) -> None:
        self._sets = sets
        self._shares = _normalised(weights)
        self._late_shares = _normalised(late_weights)
        self._late_from = late_from
        self._lengths = list(sequence_lengths)
        self._length_shares = _normalised(list(sequence_lengths.values()))
        self._batch_tokens = batch_tokens
        self._seed = seed

    def batch(self, step: int) -> NDArray[np.int64]:
        """The rows of `step`, (B, S + 1): inputs and targets overlap by S.

        The same for the same seed, whatever was asked before.
        """
        length, places = self.places(step)
        return np.stack([self._sets[index].row(at, length) for index, at in places])

    def places(self, step: int) -> tuple[int, list[tuple[int, int]]]:
        """Sequence length of `step`, and for each row its part and the drawn token in that part."""
        shares = self._shares if step < self._late_from else self._late_shares
        random = np.random.Generator(
            np.random.Philox(key=np.array([self._seed, step], dtype=np.uint64))
        )
        length = self._lengths[random.choice(len(self._lengths), p=self._length_shares)]
        which = random.choice(len(self._sets), size=self._batch_tokens // length, p=shares)
        sizes = [len(part.tokens) for part in self._sets]
        return length, [(int(index), int(random.integers(sizes[index]))) for index in which]


def _normalised(shares: list[float]) -> NDArray[np.float64]:
    total = sum(shares)
    return np.asarray([share / total for share in shares], dtype=np.float64)
