"""`Adapters`: the adapters that requests may name, and what the engine must keep apart for them."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optlm.errors import RequestError, did_you_mean

if TYPE_CHECKING:
    from optlm.checkpoint import Checkpoint
    from optlm.engine.runner import Runner

__all__ = ["NO_ADAPTER", "Adapters", "LoadedAdapter", "check_adapter_name"]

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in the runner.

    Attributes:
        id: the runner's; -1 for none. Given out again after the adapter was unloaded.
        salt: begins the names of KV blocks that the adapter had a part in; never given out again.
        text_start: position of a text's first token; the context is that much shorter.
    """

    id: int
    salt: bytes
    text_start: int = 0


NO_ADAPTER = LoadedAdapter(-1, b"")


class Adapters:
    """Names to adapters of one runner. Names are keys of this registry and never paths.

    Args:
        base: the checkpoint that the runner runs, against which adapters are checked; None when it
            runs something else.
    """

    def __init__(self, runner: Runner, base: Checkpoint | None) -> None:
        self._runner = runner
        self._base = base
        self._loaded: dict[str, LoadedAdapter] = {}
        self._serial = itertools.count(1)

    @property
    def names(self) -> list[str]:
        return sorted(self._loaded)

    def find(self, name: str | None) -> LoadedAdapter:
        """Return the adapter of that name, `NO_ADAPTER` for None.

        Raises:
            RequestError: there is none.
        """
        if name is None:
            return NO_ADAPTER
        if name not in self._loaded:
            known = f"; there are {', '.join(self.names)}" if self._loaded else ""
            raise RequestError(
                f"no adapter {name!r} is loaded{did_you_mean(name, self._loaded) or known}"
            )
        return self._loaded[name]

    def load(self, name: str, folder: str | Path, *, force: bool = False) -> None:
        """Read an adapter's files and give it a name.

        Raises:
            RequestError: the name is taken or no name.
            CheckpointError: the files are broken, or made for another base.
            BackendError: an adapter that only merging or another backend can run.
        """
        check_adapter_name(name)
        if name in self._loaded:
            raise RequestError(f"an adapter {name!r} is loaded already; unload it first")
        if self._base is None:
            raise RequestError(
                "this engine does not run a checkpoint as it is stored, so nothing fits it"
            )
        from optlm.checkpoint.adapter import open_adapter

        adapter = open_adapter(folder, self._base, force=force)
        adapter_id = self._runner.load_adapter(adapter)
        salt = next(self._serial).to_bytes(8, "little")
        self._loaded[name] = LoadedAdapter(adapter_id, salt, adapter.text_start)

    def unload(self, name: str) -> None:
        """Forget an adapter that no request uses.

        Raises:
            RequestError: there is none of that name.
        """
        adapter = self.find(name)
        self._runner.unload_adapter(adapter.id)
        del self._loaded[name]


def check_adapter_name(name: object) -> str:
    """Raises: RequestError: something else than 1 to 64 letters, digits, '.', '_' and '-'."""
    if not isinstance(name, str):
        raise RequestError(f"adapter is a {type(name).__name__}; it must be a name")
    if not _NAME.fullmatch(name):
        raise RequestError(
            f"adapter is {name!r:.80}; a name has 1 to 64 letters, digits, '.', '_' and '-'"
        )
    return name
