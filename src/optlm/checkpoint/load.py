"""`open_checkpoint`: from a folder or hub name to a strict mapping of tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from optlm.checkpoint.configfile import read_config
from optlm.checkpoint.faults import error_of, fault_error
from optlm.checkpoint.files import present, read_small
from optlm.checkpoint.names import CANONICAL, Named, fit, to_hugging_face
from optlm.checkpoint.packed import PACKED_NAME, PackedWeights, read_packed
from optlm.checkpoint.settings import config_from_settings
from optlm.checkpoint.tensor import Tensor, is_finite
from optlm.checkpoint.weights import read_weights
from optlm.config import OPTConfig
from optlm.errors import ConfigError, Fault


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An OPT model on disk.

    `tensors` has exactly the names and shapes of `config.parameter_shapes()`, in that order.
    """

    config: OPTConfig
    tensors: Mapping[str, Tensor]
    folder: Path
    layout: str  # how the weights were found, such as "sharded torch, decoder.*"
    packed: PackedWeights | None = None  # instead of tensors, in a folder made by save_packed

    def check_finite(self) -> None:
        """Read every weight once (at the speed of the file).

        Raises:
            CheckpointError: weights hold NaN or infinite values; all of them are named.
        """
        faults = non_finite(self.tensors)
        if faults:
            raise error_of(faults)


def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    offline: bool | None = None,
    progress: bool | None = None,
) -> Checkpoint:
    """Open a folder, or a model on the Hugging Face hub such as ``facebook/opt-125m``.

    Headers are read and checked, numbers are not: call `Checkpoint.check_finite`, or `is_finite` on
    each array as you use it.

    Args:
        source: a folder with ``config.json`` and weights, or ``owner/name`` on the hub.
        revision: branch, tag or commit of a hub model.
        offline: use only what is already in the local cache; None follows ``HF_HUB_OFFLINE``.
        progress: show download bars; None shows them on a terminal.

    Raises:
        ConfigError: ``config.json`` is missing or makes no sense.
        CheckpointError: weights are missing, broken, or do not fit the configuration; all are
            named.
    """
    folder = resolve(source, revision=revision, offline=offline, progress=progress)
    path = folder / "config.json"
    config = read_config(path) if present(path) else None  # before any weight is touched
    if present(folder / PACKED_NAME):
        return _packed_checkpoint(folder, config)
    weights = read_weights(folder)
    if config is None and weights.settings is None:
        raise ConfigError(
            f"{path} does not exist; the weights alone do not say which model they are"
        )
    if config is None:
        config = config_from_settings(weights.settings, weights.tensors, str(folder))
    named = to_hugging_face(weights.tensors)
    tensors, faults = fit(named, config)
    if faults:
        raise error_of(faults)
    return Checkpoint(
        config=config, tensors=tensors, folder=folder, layout=_layout(weights.layout, named)
    )


class _NoTensors(Mapping[str, Tensor]):
    """The tensors of a packed folder: any use is an error that says so."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _refuse(self) -> NoReturn:
        raise fault_error(
            "packed",
            self._folder,
            "holds packed weights, which only the native engine reads; "
            "use the checkpoint they were made from",
        )

    def __getitem__(self, name: str) -> Tensor:
        self._refuse()

    def __iter__(self) -> Iterator[str]:
        self._refuse()

    def __len__(self) -> int:
        self._refuse()


def _packed_checkpoint(folder: Path, config: OPTConfig | None) -> Checkpoint:
    if config is None:
        raise ConfigError(f"{folder / 'config.json'} does not exist")
    packed = read_packed(folder / PACKED_NAME, config)
    return Checkpoint(
        config=config,
        tensors=_NoTensors(folder),
        folder=folder,
        layout=f"packed {packed.dtype}",
        packed=packed,
    )


def resolve(
    source: str | Path,
    *,
    revision: str | None = None,
    offline: bool | None = None,
    progress: bool | None = None,
) -> Path:
    """The local folder of `source`, downloaded if it names a hub model.

    For the folder of a finished training run it is the folder of the model therein.
    """
    path = Path(source)
    if os.path.isdir(source):  # unlike Path("").is_dir(), false for an empty or too long name
        if revision is not None:
            raise fault_error(
                "revision", path, "is a local folder; a revision applies to hub models only"
            )
        return _model_in(path)
    from optlm.checkpoint.hub import download, is_hub_name  # its client takes time to import

    if os.path.lexists(path) or not is_hub_name(str(source)):
        raise fault_error(
            "no-folder",
            source or "an empty name",
            "is neither a folder nor a hub name such as facebook/opt-125m",
        )
    return download(str(source), revision=revision, offline=offline, progress=progress)


_RUN_LIMIT = 2**24  # bytes of a run.json


def _model_in(folder: Path) -> Path:
    """`folder`, or what a training run has left in it."""
    if present(folder / "config.json"):
        return folder
    if present(folder / "adapter_config.json"):
        raise fault_error(
            "adapter",
            folder,
            "holds an adapter, no model; give the model it was made for as the model and this "
            "folder as the adapter (--model MODEL --adapter DIR)",
        )
    technique = _technique(folder / "run.json") if present(folder / "run.json") else None
    if technique is None:
        return folder
    if technique == "teacher-cache":
        raise fault_error(
            "teacher-cache",
            folder,
            "holds a teacher's predictions and no model",
        )
    model = folder / "model"
    if not present(model / "config.json"):
        raise fault_error(
            "unfinished-run",
            folder,
            f"is the folder of a training run ({technique}) that has not left its model yet; give "
            "the same command again, and it goes on to the end",
        )
    return model


def _technique(file: Path) -> str | None:
    """What trained in the folder of `file`, a ``run.json``; None if it is another program's."""
    try:
        values = json.loads(read_small(file, _RUN_LIMIT))
    except (ValueError, RecursionError):
        return None
    technique = values.get("technique") if isinstance(values, dict) else None
    return technique if isinstance(technique, str) else None


def non_finite(tensors: Mapping[str, Tensor]) -> list[Fault]:
    """A fault for every tensor that holds NaN or infinity."""
    return [
        Fault(code="non-finite", where=name, message="holds NaN or infinite values")
        for name, tensor in tensors.items()
        if not is_finite(tensor.raw(), tensor.dtype)
    ]


def _layout(files: str, named: Named) -> str:
    prefix = "".join(named.prefixes)
    return files if prefix == CANONICAL else f"{files}, {prefix or 'bare '}names"
