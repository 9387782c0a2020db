"""JSON Lines files that appear whole or not at all."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from optlm.checkpoint.save import atomic_file
from optlm.errors import ConfigError

__all__ = ["check_ending", "jsonl_file"]

_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_ZSTD_LEVEL = 9


class Writer(Protocol):
    def __call__(self, record: dict[str, Any]) -> None: ...


def check_ending(path: Path) -> None:
    """Raise ConfigError unless `jsonl_file` can write `path`."""
    if not path.name.endswith(_ENDINGS):
        raise ConfigError(f"the output {path} must end in {', '.join(_ENDINGS)}")


@contextmanager
def jsonl_file(path: Path) -> Iterator[Writer]:
    """Yield a function that writes a record; the same records give the same bytes."""
    with atomic_file(path) as file, _compressed(file, path.suffix) as stream:

        def write(record: dict[str, Any]) -> None:
            stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

        yield write


@contextmanager
def _compressed(file: IO[bytes], suffix: str) -> Iterator[IO[bytes]]:
    if suffix == ".gz":
        with gzip.GzipFile(fileobj=file, mode="wb", filename="", mtime=0) as packed:
            yield packed  # type: ignore[misc]
    elif suffix == ".zst":
        import zstandard

        compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
        with compressor.stream_writer(file, closefd=False) as packed:
            yield packed
    else:
        yield file
