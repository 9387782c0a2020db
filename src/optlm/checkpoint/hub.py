"""Models on the Hugging Face hub: only the needed files, through the hub's own client and cache."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from optlm.checkpoint.faults import fault_error
from optlm.checkpoint.save import TOKENIZER_FILES
from optlm.checkpoint.weights import shard_map, weight_file
from optlm.errors import CheckpointError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_hub_name(source: str) -> bool:
    """True for ``owner/name``."""
    return _NAME.fullmatch(source) is not None


def download(
    name: str,
    *,
    revision: str | None = None,
    offline: bool | None = None,
    progress: bool | None = None,
) -> Path:
    """Bring configuration, weights and tokenizer into the local cache; return their folder.

    Safetensors are preferred to pickles. Without a network the cached copy is used, if there is
    one.

    Raises:
        CheckpointError: no such model or revision, no permission, no weights, or no network and no
            cache.
    """
    if offline is None:
        offline = constants.HF_HUB_OFFLINE
    if progress is None:
        progress = sys.stderr.isatty()
    if offline:
        return _cached(name, revision)
    with _progress_bars(progress):
        try:
            return _download(name, revision)
        except CheckpointError:
            raise
        # The client's network errors belong to whichever HTTP library its version is built on.
        except Exception as error:
            if _is_answer(error):
                raise _explain(name, revision, error) from error
            with contextlib.suppress(CheckpointError):
                return _cached(name, revision)
            raise _explain(name, revision, error) from error


def _download(name: str, revision: str | None) -> Path:
    endpoint = os.environ.get("HF_ENDPOINT")
    info = HfApi(endpoint=endpoint).model_info(name, revision=revision)
    files = {sibling.rfilename for sibling in info.siblings or ()}

    def fetch(file: str) -> Path:
        return Path(hf_hub_download(name, file, revision=revision, endpoint=endpoint))

    weights = weight_file(files)
    if "config.json" not in files or weights is None:
        what = (
            "config.json"
            if "config.json" not in files
            else "model.safetensors or pytorch_model.bin"
        )
        raise fault_error("no-weights", name, f"has no {what} on the hub; it holds {_some(files)}")
    folders = {fetch("config.json").parent}
    entry = fetch(weights)
    shards = set(shard_map(entry).values()) if weights.endswith(".index.json") else set()
    absent = shards - files
    if absent:
        raise fault_error("missing-file", name, f"its index names files it lacks: {_some(absent)}")
    folders |= {entry.parent}
    for file in sorted(shards | files.intersection(TOKENIZER_FILES)):
        folders.add(fetch(file).parent)
    if len(folders) > 1:
        raise fault_error("hub-changed", name, "changed while it was downloaded; try again")
    return folders.pop()


def _cached(name: str, revision: str | None) -> Path:
    try:
        path = hf_hub_download(name, "config.json", revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, OSError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise fault_error(
            "not-cached",
            name,
            f"is not in the local cache{at}; open it once with a network connection",
        ) from error
    return Path(path).parent


def _is_answer(error: Exception) -> bool:
    """True if the hub answered and its answer is final."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", 0)
    return isinstance(error, (HfHubHTTPError, EntryNotFoundError)) and 400 <= status < 500


def _explain(name: str, revision: str | None, error: Exception) -> CheckpointError:
    if isinstance(error, GatedRepoError):
        message = "is gated: accept its terms on the hub, then log in with `hf auth login`"
        return fault_error("hub-gated", name, message)
    if isinstance(error, RevisionNotFoundError):
        return fault_error("hub-revision", name, f"has no revision {revision!r}")
    if isinstance(error, RepositoryNotFoundError):
        message = "is not on the hub, or is private (log in with `hf auth login`)"
        return fault_error("hub-not-found", name, message)
    if isinstance(error, OfflineModeIsEnabled):
        return fault_error(
            "not-cached", name, "is not in the local cache, and the hub is switched off"
        )
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return fault_error("hub-unreachable", name, f"cannot be fetched and is not cached: {reason}")


def _some(files: Iterable[str]) -> str:
    names = sorted(files)
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


@contextlib.contextmanager
def _progress_bars(show: bool) -> Iterator[None]:
    if show or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
