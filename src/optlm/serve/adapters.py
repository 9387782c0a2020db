"""`AdapterFolder`: the adapters in one folder, under the names of its subfolders.

A name in a request is a key of this registry and never becomes a path. What the engine calls an
adapter is a number of its own, so a folder that was replaced can be loaded while requests still
use what it was before; that is forgotten when the last of them has ended.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from optlm.engine.adapters import check_adapter_name
from optlm.engine.aio import AsyncLLM
from optlm.errors import OptlmError, RequestError

__all__ = ["AdapterFolder", "Reload", "find_adapters"]

Identity = tuple[tuple[str, int, int, int], ...]  # file, inode, size, time of change
_RETRY = 0.5  # seconds until an adapter in use is tried again


@dataclass(kw_only=True)
class Reload:
    """What a look at the folder changed: names, and why others were left out."""

    loaded: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


class AdapterFolder:
    """Use `reload` to bring the engine up to what the folder holds."""

    def __init__(self, folder: Path, engine: AsyncLLM) -> None:
        self._folder = folder
        self._engine = engine
        self._names: dict[str, str] = {}
        self._identities: dict[str, Identity] = {}
        self._retired: list[str] = []
        self._serial = 0
        self._busy = asyncio.Lock()
        self._sweep: asyncio.Task[None] | None = None

    def names(self) -> Mapping[str, str]:
        """What requests may name, and what the engine calls it."""
        return self._names

    async def reload(self) -> Reload:
        """Load what is new or changed in the folder and forget what is gone.

        Raises:
            OSError: the folder cannot be read.
        """
        async with self._busy:
            found = await asyncio.to_thread(find_adapters, self._folder)
            told = Reload()
            for name in [name for name in self._names if name not in found]:
                self._retire(name)
                told.removed.append(name)
            for name, identity in sorted(found.items()):
                if self._identities.get(name) != identity:
                    await self._load(name, identity, told)
        if self._retired and (self._sweep is None or self._sweep.done()):
            self._sweep = asyncio.ensure_future(self._forget_retired())
        return told

    async def close(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
            await asyncio.gather(self._sweep, return_exceptions=True)

    async def _load(self, name: str, identity: Identity, told: Reload) -> None:
        self._serial += 1
        inner = f"adapter-{self._serial}"
        try:
            check_adapter_name(name)
            await self._engine.load_adapter(inner, self._folder / name)
        except (OptlmError, OSError) as error:
            told.refused[name] = str(error)  # what was loaded before under this name stays
            return
        if name in self._names:
            self._retire(name)
        self._names[name], self._identities[name] = inner, identity
        told.loaded.append(name)

    def _retire(self, name: str) -> None:
        self._retired.append(self._names.pop(name))
        del self._identities[name]

    async def _forget_retired(self) -> None:
        while self._retired:
            for inner in list(self._retired):
                try:
                    await self._engine.unload_adapter(inner)
                except RequestError:  # in use
                    continue
                self._retired.remove(inner)
            if self._retired:
                await asyncio.sleep(_RETRY)


def find_adapters(folder: Path) -> dict[str, Identity]:
    """Subfolders that hold an adapter, by name. Links and hidden folders are none."""
    found = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or not entry.is_dir(follow_symlinks=False):
                continue
            try:
                identity = _identity(Path(entry.path))
            except FileNotFoundError:  # it went away just now
                continue
            if any(file == "adapter_config.json" for file, *_ in identity):
                found[entry.name] = identity
    return found


def _identity(folder: Path) -> Identity:
    with os.scandir(folder) as entries:
        stats = [(entry.name, entry.stat(follow_symlinks=False)) for entry in entries]
    return tuple(sorted((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats))
