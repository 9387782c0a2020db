"""The teacher's likeliest tokens for the exact batches of a training, on disk.

    run.json            what the cache was made for: teacher, tokenizer, data order, k, temperature
    shards.json         sha256 of every finished shard; the cache is whole when all are listed
    shard-00000.topk    the predictions of some steps

A shard is four arrays back to back, little-endian: ``crc`` uint32 (steps,) of each step's tokens;
``rest`` float32 (N,), the mass of all tokens that are not listed; ``logs`` float32 or float16
(N, k), log-probabilities, greatest first; ``ids`` uint16 (N, k). N counts predictions, row after
row, as the batches have them. Shards are written whole or not at all, so a writer that was killed
goes on with the next one. Shards are memory-mapped by the reader.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from optlm.checkpoint.save import atomic_file
from optlm.errors import ConfigError, OptlmError
from optlm.train.distil.divergence import CachedRows
from optlm.train.run.folder import RunFolder, TrainingError

__all__ = ["CacheError", "CacheFormat", "TeacherCache", "write_cache"]

_SHARD_BYTES = 64 * 2**20
_LARGEST_VOCABULARY = 2**16  # ids are stored as uint16, as packed tokens are
PRECISIONS: dict[str, np.dtype[Any]] = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2")}
_CLAIM, _SHARDS = "run.json", "shards.json"
_Array = NDArray[Any]


class CacheError(OptlmError):
    """A teacher cache that is missing, unfinished, damaged, or made for something else."""


class LogProbs(Protocol):
    """A teacher that reads rows: log-probabilities (n, V) after tokens (B, S), in pieces."""

    def __call__(self, tokens: NDArray[np.int64]) -> Iterable[torch.Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class CacheFormat:
    """Sizes of a cache.

    Raises:
        ConfigError: values out of range.
    """

    top_k: int
    precision: str  # of the log-probabilities: "f32" or "f16"
    vocab_size: int
    steps: int
    batch_tokens: int

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision is {self.precision!r}; use f32 or f16")
        if not 1 <= self.top_k <= self.vocab_size:
            raise ConfigError(
                f"top_k is {self.top_k}; it must lie between 1 and the vocabulary's "
                f"{self.vocab_size}"
            )
        if self.vocab_size > _LARGEST_VOCABULARY:
            raise ConfigError(
                f"the teacher has {self.vocab_size} tokens; a cache holds at most "
                f"{_LARGEST_VOCABULARY}"
            )

    @property
    def step_bytes(self) -> int:
        item = int(PRECISIONS[self.precision].itemsize) + 2
        return 4 + self.batch_tokens * (4 + self.top_k * item)

    @property
    def total_bytes(self) -> int:
        return self.steps * self.step_bytes

    @property
    def shard_steps(self) -> int:
        return max(1, _SHARD_BYTES // self.step_bytes)

    @property
    def shards(self) -> int:
        return -(-self.steps // self.shard_steps)

    def steps_of(self, shard: int) -> range:
        first = shard * self.shard_steps
        return range(first, min(first + self.shard_steps, self.steps))

    def split(self, data: _Array, steps: int) -> tuple[_Array, _Array, _Array, _Array]:
        """crc, rest, logs and ids of a shard of so many steps, as views of its bytes (uint8)."""
        n, k = steps * self.batch_tokens, self.top_k
        logs = PRECISIONS[self.precision]
        ends = np.cumsum([steps * 4, n * 4, n * k * logs.itemsize, n * k * 2])
        crc, rest, listed, ids = np.split(data, ends[:-1])
        return (
            crc.view("<u4"),
            rest.view("<f4"),
            listed.view(logs).reshape(n, k),
            ids.view("<u2").reshape(n, k),
        )


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.topk"


# ---- writing ------------------------------------------------------------------------------------


def write_cache(
    folder: Path,
    made_for: dict[str, Any],
    form: CacheFormat,
    *,
    batch: Callable[[int], NDArray[np.int64]],
    teacher: LogProbs,
    progress: Callable[[int], None] = lambda steps: None,
    log: Callable[[str], None] = lambda message: None,
) -> None:
    """Write what is missing of the cache in `folder`.

    Args:
        made_for: all that decides the numbers, as JSON values; another cache there is refused.
        batch: rows (B, S + 1) of a step.
        progress: told the number of steps that are done.

    Raises:
        ConfigError: the folder holds a cache for something else.
        TrainingError: another process is at work there, the disk is full, or the teacher's numbers
            are NaN or infinite. Finished shards stay; the same call goes on.
    """
    run = RunFolder(folder)
    with run.locked(made_for):
        done = _finished(folder)
        kept = [shard for shard in range(form.shards) if _is_whole(folder, shard, done)]
        if kept:
            log(f"going on after {len(kept)} of {form.shards} finished shards")
        done = {str(shard): done[str(shard)] for shard in kept}
        for shard in range(form.shards):
            steps = form.steps_of(shard)
            if shard not in kept:
                data = _fill(form, steps, batch, teacher, progress)
                try:
                    with atomic_file(shard_file(folder, shard)) as file:
                        file.write(data.data)
                except OSError as error:
                    raise TrainingError(
                        f"cannot write {shard_file(folder, shard)}: {error}; finished shards are "
                        "unharmed, free some space and give the same command again"
                    ) from error
                done[str(shard)] = hashlib.sha256(data.data).hexdigest()
                run.write(_SHARDS, json.dumps(done, indent=1).encode())
            progress(steps.stop)


def _fill(
    form: CacheFormat,
    steps: range,
    batch: Callable[[int], NDArray[np.int64]],
    teacher: LogProbs,
    progress: Callable[[int], None],
) -> _Array:
    data = np.zeros(len(steps) * form.step_bytes, dtype=np.uint8)
    crc, rest, logs, ids = form.split(data, len(steps))
    at = 0
    for index, step in enumerate(steps):
        rows = batch(step)
        crc[index] = checksum(rows)
        for piece in teacher(rows[:, :-1]):
            begin, at = at, at + len(piece)
            try:
                ids[begin:at], logs[begin:at], rest[begin:at] = top_k(piece, form.top_k)
            except FloatingPointError as error:
                raise TrainingError(f"step {step}: {error}") from error
        progress(step + 1)
    assert at == len(rest)
    return data


def top_k(log_probs: torch.Tensor, k: int) -> tuple[_Array, _Array, _Array]:
    """Of (N, V): ids and log-probabilities of the k likeliest tokens, and the mass of the others.

    Raises:
        FloatingPointError: NaN or infinity among them.
    """
    if not bool(torch.isfinite(log_probs.sum())):
        raise FloatingPointError(
            "the teacher's logits are no numbers (NaN or infinite); `optlm doctor` lists the "
            "faults of a checkpoint"
        )
    logs, ids = log_probs.topk(k, dim=1)
    rest = log_probs.scatter(1, ids, -torch.inf).exp().sum(dim=1)
    return ids.numpy(), logs.numpy(), rest.numpy()


def checksum(rows: NDArray[np.int64]) -> int:
    """Of the tokens of one batch and its shape."""
    return zlib.crc32(np.ascontiguousarray(rows).tobytes(), rows.shape[1])


def _finished(folder: Path) -> dict[str, str]:
    file = folder / _SHARDS
    if not file.exists():
        return {}
    try:
        done: dict[str, str] = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CacheError(f"{file} is damaged: {error}; make the cache again") from error
    return done


def _is_whole(folder: Path, shard: int, done: dict[str, str]) -> bool:
    file = shard_file(folder, shard)
    return str(shard) in done and file.exists() and _sha256(file) == done[str(shard)]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- reading ------------------------------------------------------------------------------------


class TeacherCache:
    """A finished cache, memory-mapped; every shard is checked against its sha256 first.

    Args:
        wanted: what it must have been made for; keys that only the cache has are free.

    Raises:
        CacheError: it is missing, unfinished, damaged, or made for something else.
    """

    def __init__(self, folder: Path, wanted: dict[str, Any]) -> None:
        self._folder = folder
        made_for = _claim_of(folder)
        for name, value in json.loads(json.dumps(wanted)).items():
            if made_for.get(name) != value:
                raise CacheError(
                    f"the cache in {folder} was made for another {name.replace('_', ' ')}; "
                    f"make one for this configuration "
                    f"({_first_difference(made_for.get(name), value)})"
                )
        try:
            self.form = CacheFormat(**made_for["format"])
        except (TypeError, KeyError, ConfigError) as error:
            raise CacheError(f"{folder / _CLAIM} is damaged: {error}") from error
        done = _finished(folder)
        missing = [shard for shard in range(self.form.shards) if str(shard) not in done]
        if missing:
            raise CacheError(
                f"the cache in {folder} is not finished ({len(missing)} of {self.form.shards} "
                "shards are missing); `optlm teacher-cache` with the same options goes on"
            )
        self._shards = [self._map(shard, done) for shard in range(self.form.shards)]
        listing = json.dumps([done[str(shard)] for shard in range(self.form.shards)])
        self.digest = hashlib.sha256(listing.encode()).hexdigest()

    def _map(self, shard: int, done: dict[str, str]) -> tuple[_Array, _Array, _Array, _Array]:
        file = shard_file(self._folder, shard)
        steps = len(self.form.steps_of(shard))
        try:
            size = file.stat().st_size
            if size != steps * self.form.step_bytes or _sha256(file) != done[str(shard)]:
                raise CacheError(
                    f"{file} is damaged ({size} bytes, {steps * self.form.step_bytes} expected); "
                    "delete it, and `optlm teacher-cache` with the same options makes it again"
                )
            return self.form.split(np.memmap(file, dtype=np.uint8, mode="r"), steps)
        except OSError as error:
            raise CacheError(f"cannot read {file}: {error}") from error

    def step(self, step: int, rows: NDArray[np.int64]) -> CachedRows:
        """The teacher's predictions for all of `rows` (B, S + 1), the batch of `step`.

        Raises:
            CacheError: the cache was made for other rows.
        """
        shard, index = divmod(step, self.form.shard_steps)
        crc, rest, logs, ids = self._shards[shard]
        if int(crc[index]) != checksum(rows):
            raise CacheError(
                f"the batch of step {step} is not the one that the cache in {self._folder} was "
                "made for; make the cache again"
            )
        part = slice(index * self.form.batch_tokens, (index + 1) * self.form.batch_tokens)
        return CachedRows(
            ids=torch.from_numpy(ids[part].astype(np.int64)),
            logs=torch.from_numpy(logs[part].astype(np.float32)),
            rest=torch.from_numpy(rest[part].astype(np.float32)),
        )


def _claim_of(folder: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = dict(json.loads((folder / _CLAIM).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CacheError(f"{folder} is no teacher cache: {error}") from error
    if values.get("technique") != "teacher-cache":
        raise CacheError(f"{folder} is no teacher cache, but the folder of another run")
    return values


def _first_difference(held: Any, wanted: Any) -> str:
    if isinstance(held, dict) and isinstance(wanted, dict):
        for key in sorted(held.keys() | wanted.keys()):
            if held.get(key) != wanted.get(key):
                return f"{key}: {_first_difference(held.get(key), wanted.get(key))}"
    return f"the cache has {str(held)[:60]}, wanted is {str(wanted)[:60]}"
