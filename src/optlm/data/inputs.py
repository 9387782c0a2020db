"""Which files are meant: names, folders and patterns, with the format of each."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from optlm.data.report import CorpusError
from optlm.errors import ConfigError, did_you_mean

__all__ = ["FORMATS", "InputFile", "find_inputs"]

# Ending (without .gz and .zst) -> format. BabyLM's corpora end in .train, .dev and .test.
_ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".train": "text",
    ".dev": "text",
    ".test": "text",
    ".parquet": "parquet",
}
FORMATS = ("jsonl", "text", "parquet")
_COMPRESSIONS = {".gz": "gz", ".zst": "zst"}


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file to read."""

    path: Path
    format: str  # of FORMATS
    compression: str = ""  # "", "gz" or "zst"
    size: int = 0  # bytes as stored
    modified: int = 0  # nanoseconds

    def check_unchanged(self) -> None:
        """Raise CorpusError if the file was written to since it was found."""
        now = _describe(self.path, self.format)
        if (now.size, now.modified) != (self.size, self.modified):
            raise CorpusError(f"{self.path} changed while it was read; run the command again")


def find_inputs(names: Iterable[str], *, format: str | None = None) -> list[InputFile]:
    """The files that `names` mean, in their order; those of a folder or pattern by name.

    A folder stands for every file below it whose ending is known (`_ENDINGS`), hidden ones left
    out. A file named twice is read once.

    Args:
        format: read every file as this, whatever its ending.

    Raises:
        ConfigError: `format` is unknown, or an ending is and no format was given.
        CorpusError: there is no such file, or nothing to read in a folder.
    """
    if format is not None and format not in FORMATS:
        known = ", ".join(FORMATS)
        raise ConfigError(
            f"the format {format!r} is unknown; use one of {known}{did_you_mean(format, FORMATS)}"
        )
    found: dict[Path, InputFile] = {}
    for name in names:
        for path in _paths(name):
            found.setdefault(path.resolve(), _describe(path, format))
    return list(found.values())


def _paths(name: str) -> Sequence[Path]:
    path = Path(name)
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and _known(p)]
        visible = [p for p in files if not any(s[0] == "." for s in p.relative_to(path).parts)]
        if not visible:
            raise CorpusError(f"the folder {name} holds no file ending in {', '.join(_ENDINGS)}")
        return visible
    if path.is_file():
        return [path]
    if path.exists():
        raise CorpusError(f"{name} is no regular file; text is read more than once")
    matches = [Path(p) for p in sorted(glob.glob(name, recursive=True)) if Path(p).is_file()]
    if not matches:
        raise CorpusError(f"cannot read {name}: there is no such file")
    return matches


def _known(path: Path) -> bool:
    return _split(path)[0] in _ENDINGS


def _split(path: Path) -> tuple[str, str]:
    """Ending without compression, and the compression."""
    compression = _COMPRESSIONS.get(path.suffix.lower(), "")
    inner = Path(path.stem) if compression else path
    return inner.suffix.lower(), compression


def _describe(path: Path, format: str | None) -> InputFile:
    ending, compression = _split(path)
    if format is None and ending not in _ENDINGS:
        raise ConfigError(
            f"{path}: the ending {ending!r} tells no format (known: {', '.join(_ENDINGS)}, each "
            "also with .gz or .zst); rename the file or name its format"
        )
    stat = path.stat()
    return InputFile(
        path=path,
        format=format or _ENDINGS[ending],
        compression=compression,
        size=stat.st_size,
        modified=stat.st_mtime_ns,
    )
