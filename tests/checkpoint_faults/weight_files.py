"""Broken safetensors files, shards, names and numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from checkpoint_faults.base import BREAKS, CONFIG, EMBEDDING, FC1, NORM, breaks, edit_json
from checkpoint_layouts import as_torch, sharded_safetensors
from variants import make_state


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    write_header(folder, json.dumps(header).encode(), raw[8 + length :])


def write_header(folder: Path, header: bytes, body: bytes) -> None:
    raw = len(header).to_bytes(8, "little") + header + body
    (folder / "model.safetensors").write_bytes(raw)


@breaks("no-weights")
def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@breaks("truncated")
def truncated(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:-100])


@breaks("truncated", "empty")
def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


@breaks("header-length", "zero")
def header_zero(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(8) + b"{}")


@breaks("header-length", "2**63-1")
def header_vast(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**63 - 1).to_bytes(8, "little") + b"{}")


@breaks("header-json", "garbage")
def header_garbage(folder: Path) -> None:
    write_header(folder, b"{nothing}", b"")


@breaks("header-json", "list")
def header_list(folder: Path) -> None:
    write_header(folder, b"[]", b"")


@breaks("header-duplicate")
def header_twice(folder: Path) -> None:
    entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    write_header(folder, b"{" + entry + b"," + entry + b"}", bytes(4))


def _header_breaks() -> None:
    def one(code: str, **changes: Any) -> None:
        def function(folder: Path) -> None:
            edit_header(folder, lambda header: header[FC1].update(changes))

        BREAKS.append((code, "-".join(f"{k}={v!r:.30}" for k, v in changes.items()), function))

    one("header-dtype", dtype="F31")
    one("header-dtype", dtype=7)
    one("header-shape", shape=[-112, -48])
    one("header-shape", shape=[2**63, 1])
    one("header-shape", shape="48")
    one("header-size", shape=[2**32, 2**32])
    one("header-size", shape=[])
    one("header-offsets", data_offsets=[8, 0])
    one("header-offsets", data_offsets=[0, True])
    one("header-entry", extra=1)


_header_breaks()


@breaks("header-metadata")
def header_metadata(folder: Path) -> None:
    edit_header(folder, lambda header: header.update(__metadata__={"format": 1}))


@breaks("header-overlap")
def header_overlap(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        begin, end = header[NORM]["data_offsets"]
        shift = -4 if begin else 4
        header[NORM]["data_offsets"] = [begin + shift, end + shift]

    edit_header(folder, change)


@breaks("header-gap")
def header_gap(folder: Path) -> None:
    edit_header(folder, lambda header: header.pop(FC1))


@breaks("header-gap", "tail")
def header_tail(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"#!/bin/sh\n")


# ---- names and numbers ----


def _weight_breaks() -> None:
    def one(code: str, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        BREAKS.append((code, name, lambda folder: edit_weights(folder, change)))

    one("missing-tensor", "fc1", lambda t: t.pop(FC1))
    one("extra-tensor", "layer", lambda t: t.update({FC1.replace("0", "2"): t[FC1].copy()}))
    one("extra-tensor", "name", lambda t: t.update({"model.decoder.pooler": np.ones(3)}))
    one("shape", "transposed", lambda t: t.update({FC1: t[FC1].T.copy()}))
    one("dtype", "int8", lambda t: t.update({FC1: t[FC1].astype(np.int8)}))
    one("tied-head", "other", lambda t: t.update({"lm_head.weight": t[EMBEDDING] * 2}))
    one("duplicate-name", "both", lambda t: t.update({FC1[6:]: t[FC1].copy()}))
    one("mixed-names", "one", lambda t: t.update({FC1[6:]: t.pop(FC1)}))
    one("zero-norm", "norm", lambda t: t[NORM].fill(0))
    one("nan", "one", lambda t: t[FC1].__setitem__((3, 3), np.nan))
    one("infinite", "one", lambda t: t[NORM].__setitem__(5, -np.inf))
    one("zero-matrix", "fc1", lambda t: t[FC1].fill(0))
    one("constant-matrix", "fc1", lambda t: t[FC1].fill(0.5))
    one("large-values", "fc1", lambda t: t[FC1].__setitem__((0, 0), 1e6))
    one("subnormal", "fc1", lambda t: t[FC1].__imul__(1e-43))
    one("repeated-layer", "fc1", lambda t: t.update({FC1: t[FC1.replace("0", "1")].copy()}))
    one("dtype-mix", "fc1", lambda t: t.update({FC1: t[FC1].astype(np.float16)}))


_weight_breaks()


@breaks("dtype-config")
def dtype_config(folder: Path) -> None:
    edit_json(folder / "config.json", torch_dtype="float16")


@breaks("missing-tensor", "untied-head")
def untied_without_head(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=False)


# ---- shards ----

INDEX = "model.safetensors.index.json"


def _sharded(folder: Path) -> dict[str, str]:
    (folder / "model.safetensors").unlink()
    sharded_safetensors(folder, CONFIG, as_torch(make_state(CONFIG), "f32"))
    weight_map: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return weight_map


@breaks("index-json")
def index_garbage(folder: Path) -> None:
    _sharded(folder)
    (folder / INDEX).write_text("{")


@breaks("index-map")
def index_map(folder: Path) -> None:
    _sharded(folder)
    edit_json(folder / INDEX, weight_map=[])


@breaks("index-path", "parent")
def index_parent(folder: Path) -> None:
    weight_map = _sharded(folder)
    edit_json(folder / INDEX, weight_map={**weight_map, FC1: "../model.safetensors"})


@breaks("index-path", "absolute")
def index_absolute(folder: Path) -> None:
    weight_map = _sharded(folder)
    edit_json(folder / INDEX, weight_map={**weight_map, FC1: "/etc/x.safetensors"})


@breaks("index-path", "number")
def index_number(folder: Path) -> None:
    weight_map = _sharded(folder)
    edit_json(folder / INDEX, weight_map={**weight_map, FC1: 7})


@breaks("index-missing")
def index_missing(folder: Path) -> None:
    weight_map = _sharded(folder)
    other = next(shard for shard in weight_map.values() if shard != weight_map[FC1])
    edit_json(folder / INDEX, weight_map={**weight_map, FC1: other})


@breaks("index-extra")
def index_extra(folder: Path) -> None:
    weight_map = _sharded(folder)
    del weight_map[FC1]
    edit_json(folder / INDEX, weight_map=weight_map)


@breaks("missing-file")
def shard_missing(folder: Path) -> None:
    (folder / _sharded(folder)[FC1]).unlink()


@breaks("extra-shard")
def shard_extra(folder: Path) -> None:
    shard = folder / _sharded(folder)[FC1]
    (folder / "model-00009-of-00009.safetensors").write_bytes(shard.read_bytes())


@breaks("symlink-loop")
def shard_loop(folder: Path) -> None:
    shard = folder / _sharded(folder)[FC1]
    shard.unlink()
    shard.symlink_to(shard.name)


@breaks("not-a-file")
def shard_fifo(folder: Path) -> None:
    shard = folder / _sharded(folder)[FC1]
    shard.unlink()
    os.mkfifo(shard)


@breaks("not-a-file", "device")
def shard_device(folder: Path) -> None:
    shard = folder / _sharded(folder)[FC1]
    shard.unlink()
    shard.symlink_to("/dev/zero")


@breaks("several-weights")
def several_weights(folder: Path) -> None:
    raw = (folder / "model.safetensors").read_bytes()
    _sharded(folder)
    (folder / "model.safetensors").write_bytes(raw)
