"""The evaluation sets on disk: one JSON object a line, plain or compressed, in one folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optlm.data.lines import read_lines
from optlm.errors import RequestError

__all__ = ["Item", "read_items"]

Item = dict[str, Any]

_ENDINGS = {".jsonl": "", ".jsonl.zst": "zst", ".jsonl.gz": "gz"}


def read_items(folder: Path | str | None, name: str, fields: tuple[str, ...] = ()) -> list[Item]:
    """Read the set `name`: ``name.jsonl``, ``.jsonl.zst`` or ``.jsonl.gz`` of `folder`.

    Args:
        fields: what every item must have.

    Raises:
        RequestError: no folder, no such file, nothing in it, or a line that is no item.
        CorpusError: the file's compressed data are damaged.
    """
    if folder is None:
        raise RequestError(f"the set {name!r} is read from a folder; name it with --data DIR")
    folder = Path(folder)
    if not folder.is_dir():
        raise RequestError(
            f"there is no data folder {folder}; --data DIR names the folder of the evaluation sets"
        )
    for ending, compression in _ENDINGS.items():
        path = folder / f"{name}{ending}"
        if path.is_file():
            items = list(_items(path, compression, fields))
            if not items:
                raise RequestError(f"{path} has no items")
            return items
    raise RequestError(
        f"the data folder {folder} has no {name}.jsonl (nor .jsonl.zst or .jsonl.gz); "
        "docs/evaluation.md tells the form of each set"
    )


def _items(path: Path, compression: str, fields: tuple[str, ...]) -> Iterator[Item]:
    for number, line in enumerate(read_lines(path, compression), start=1):
        where = f"{path}, line {number}"
        if isinstance(line, int):
            raise RequestError(f"{where}: {line} bytes are too many for an item")
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except UnicodeDecodeError as error:
            raise RequestError(f"{where} is not UTF-8 (byte {error.start} of the line)") from None
        except ValueError as error:
            raise RequestError(f"{where} is no JSON: {error}") from None
        if not isinstance(item, dict):
            raise RequestError(f"{where} is a {type(item).__name__}; an item is a JSON object")
        missing = [field for field in fields if field not in item]
        if missing:
            raise RequestError(f"{where} lacks the fields {', '.join(missing)}")
        yield item
