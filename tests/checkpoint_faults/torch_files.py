"""Broken, hostile and foreign files of torch.save, and metaseq parts."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from checkpoint_faults.base import BREAKS, CONFIG, breaks
from checkpoint_layouts import as_torch, metaseq_flat_shards, metaseq_names, split_parts, torch_file
from variants import make_state


class _Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.what = (function, arguments)

    def __reduce__(self) -> Any:
        return self.what


def _torch(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    torch_file(folder, CONFIG, as_torch(make_state(CONFIG), "f32"))
    return folder / "pytorch_model.bin"


def edit_zip(path: Path, changes: dict[str, bytes | None], method: int = 0) -> None:
    """Replace, add or (None) leave out entries, named without their folder unless they have one."""
    with zipfile.ZipFile(path) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    root = next(iter(entries)).split("/")[0]
    for name, data in changes.items():
        full = name if name.startswith("!") else f"{root}/{name}"
        entries.pop(full, None)
        if data is not None:
            entries[full.removeprefix("!")] = data
    with zipfile.ZipFile(path, "w", method) as new:
        for name, data in entries.items():
            new.writestr(zipfile.ZipInfo(name), data, compress_type=method)


@breaks("unsafe-pickle", "os.system")
def os_system(folder: Path) -> None:
    torch.save({"a": _Call(os.system, f"touch {folder}/executed")}, _torch(folder))


@breaks("unsafe-pickle", "getattr")
def builtins_getattr(folder: Path) -> None:
    torch.save({"a": _Call(getattr, "x", "upper")}, _torch(folder))


@breaks("unsafe-pickle", "opcode")
def old_opcode(folder: Path) -> None:
    edit_zip(_torch(folder), {"data.pkl": b"(S'x'\nios\nsystem\n."})


@breaks("pickle")
def short_pickle(folder: Path) -> None:
    edit_zip(_torch(folder), {"data.pkl": pickle.dumps({}, protocol=2)[:-1]})


@breaks("legacy-torch")
def legacy(folder: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer, _use_new_zipfile_serialization=False)
    _torch(folder).write_bytes(buffer.getvalue())


@breaks("zip", "text")
def not_zip(folder: Path) -> None:
    _torch(folder).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


@breaks("zip", "compressed")
def compressed(folder: Path) -> None:
    edit_zip(_torch(folder), {}, method=zipfile.ZIP_DEFLATED)


@breaks("zip", "no-pickle")
def without_pickle(folder: Path) -> None:
    edit_zip(_torch(folder), {"data.pkl": None})


@breaks("zip-path", "slip")
def zip_slip(folder: Path) -> None:
    edit_zip(_torch(folder), {"!../../x": b"y"})


@breaks("byte-order")
def big_endian(folder: Path) -> None:
    edit_zip(_torch(folder), {"byteorder": b"big"})


@breaks("tensor-bounds", "no-storage")
def storage_missing(folder: Path) -> None:
    edit_zip(_torch(folder), {"data/0": None})


@breaks("tensor-bounds", "short-storage")
def storage_short(folder: Path) -> None:
    edit_zip(_torch(folder), {"data/0": bytes(8)})


@breaks("tensor-bounds", "expanded")
def expanded(folder: Path) -> None:
    torch.save({"a": torch.ones(1).expand(10**12)}, _torch(folder))


@breaks("not-tensors")
def not_tensors(folder: Path) -> None:
    torch.save({"epoch": 3, "a": torch.ones(3)}, _torch(folder))


@breaks("truncated", "torch")
def torch_truncated(folder: Path) -> None:
    path = _torch(folder)
    path.write_bytes(path.read_bytes()[:5000])


# ---- metaseq ----


def _parts(folder: Path) -> list[Path]:
    (folder / "model.safetensors").unlink()
    named = metaseq_names(CONFIG, as_torch(make_state(CONFIG), "f32"), fused=True)
    paths = []
    for part, model in enumerate(split_parts(named, 2)):
        paths.append(folder / f"reshard-model_part-{part}.pt")
        torch.save({"model": model}, paths[-1])
    return paths


@breaks("missing-part")
def part_missing(folder: Path) -> None:
    _parts(folder)[0].unlink()


@breaks("several-models")
def two_models(folder: Path) -> None:
    path = _parts(folder)[0]
    (folder / "best-model_part-0.pt").write_bytes(path.read_bytes())


@breaks("missing-part", "shard")
def shard_gap(folder: Path) -> None:
    path = _parts(folder)[0]
    path.rename(folder / "reshard-model_part-0-shard1.pt")


def _flat(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    metaseq_flat_shards(folder, CONFIG, as_torch(make_state(CONFIG), "f32"))
    return folder / "checkpoint_last-model_part-1-shard2.pt"


def _edit_flat(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


@breaks("flat-parameters", "one-shard")
def flat_undescribed(folder: Path) -> None:
    _edit_flat(_flat(folder), lambda state: state.pop("shard_metadata"))


def _flat_breaks() -> None:
    def one(name: str, change: Callable[[list[Any]], object], shard: int = 0) -> None:
        def function(folder: Path) -> None:
            path = _flat(folder)
            path = path.with_name(path.name.replace("shard2", f"shard{shard}"))
            _edit_flat(path, lambda state: change(state["shard_metadata"]["param_metadata"]))

        BREAKS.append(("flat-metadata", name, function))

    def first(modules: list[Any]) -> dict[str, Any]:
        content: dict[str, Any] = modules[0]["params"]["flat_param_0"]
        return content

    one("padding", lambda m: first(m).update(padding=first(m)["padding"] + 1), shard=2)
    one("negative-padding", lambda m: first(m).update(padding=-1))
    one("no-padding", lambda m: first(m).pop("padding"))
    one("shapes", lambda m: first(m).update(shapes=[(2**40, 2**40)] * len(first(m)["names"])))
    one("names", lambda m: first(m).update(names=None))
    one("fewer-names", lambda m: first(m).update(names=first(m)["names"][1:]))
    one("wild-shape", lambda m: first(m).update(shapes=["x"] * len(first(m)["names"])))
    one("no-path", lambda m: m[0].pop("fsdp_path"))
    one("number", lambda m: m[0]["params"].update(flat_param_0=1))
    one("fewer-modules", lambda m: m.pop(), shard=1)
    one("undescribed", lambda m: m.pop())


_flat_breaks()


@breaks("part-drift")
def part_drift(folder: Path) -> None:
    path = _parts(folder)[1]
    model = torch.load(path)["model"]
    model["decoder.layer_norm.weight"] += 1e-6
    torch.save({"model": model}, path)


@breaks("flat-parameters")
def flat(folder: Path) -> None:
    for path in _parts(folder):
        torch.save({"model": {"decoder.flat_param_0": torch.ones(3)}}, path)
