"""Ways to break a sound checkpoint folder, each with the code by which the doctor must name it."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from checkpoint_layouts import (
    as_torch,
    metaseq_names,
    sharded_safetensors,
    split_parts,
    torch_file,
)
from variants import VARIANTS, make_state

CONFIG = VARIANTS["base"]
Break = Callable[[Path], object]
BREAKS: list[tuple[str, str, Break]] = []  # code, short name, function

FC1 = "model.decoder.layers.0.fc1.weight"
NORM = "model.decoder.layers.0.final_layer_norm.weight"
EMBEDDING = "model.decoder.embed_tokens.weight"


def breaks(code: str, name: str = "") -> Callable[[Break], Break]:
    def register(function: Break) -> Break:
        BREAKS.append((code, name or function.__name__, function))
        return function

    return register


# ---- config.json ---------------------------------------------------------------------------------


def edit_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            del values[key]
        else:
            values[key] = value
    path.write_text(json.dumps(values))


def _config_breaks() -> None:
    def one(code: str, **changes: Any) -> None:
        def function(folder: Path) -> None:
            edit_json(folder / "config.json", **changes)

        BREAKS.append((code, "-".join(f"{k}={v!r:.20}" for k, v in changes.items()), function))

    one("config-unknown-key", hiden_size=48)
    one("config-architecture", model_type="llama")
    one("config-architecture", quantization_config={"bits": 4})
    one("config-architecture", layer_norm_eps=1e-6)
    one("config-architecture", scale_embeddings=True)
    one("config-lacks-key", ffn_dim=...)
    one("config-type", hidden_size="48")
    one("config-type", num_hidden_layers=2.0)
    one("config-type", enable_bias="false")
    one("config-type", dropout="0.1")
    for key in ("hidden_size", "num_hidden_layers", "ffn_dim", "vocab_size"):
        for value in (0, -1, 10**12):
            one("config-range", **{key: value})
    one("config-range", num_attention_heads=0)
    one("config-range", max_position_embeddings=0)
    one("config-range", dropout=float("nan"))
    one("config-range", init_std=-1.0)
    one("config-activation", activation_function="__import__")
    one("config-heads", num_attention_heads=5)
    one("config-special-token", bos_token_id=-1)
    one("config-special-token", eos_token_id=10**6)
    one("config-special-token", pad_token_id="1")


_config_breaks()


@breaks("config-missing")
def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@breaks("config-json", "garbage")
def config_garbage(folder: Path) -> None:
    (folder / "config.json").write_bytes(b'{"vocab_size": 3')


@breaks("config-json", "list")
def config_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


@breaks("config-json", "nested")
def config_nested(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 200_000)


@breaks("config-duplicate-key")
def config_twice(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("{", '{"vocab_size": 7, ', 1))


@breaks("not-a-file", "config-fifo")
def config_fifo(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


@breaks("symlink-loop", "config-loop")
def config_loop(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")


@breaks("file-size")
def config_huge(folder: Path) -> None:
    (folder / "config.json").write_text(" " * (2**20 + 1))


# ---- safetensors ---------------------------------------------------------------------------------


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


# ---- names and numbers ---------------------------------------------------------------------------


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


# ---- shards --------------------------------------------------------------------------------------

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


# ---- torch files ---------------------------------------------------------------------------------


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


# ---- metaseq -------------------------------------------------------------------------------------


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


@breaks("fsdp-shards")
def fsdp(folder: Path) -> None:
    path = _parts(folder)[0]
    path.rename(folder / "reshard-model_part-0-shard1.pt")


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


# ---- tokenizer -----------------------------------------------------------------------------------


def edit_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    change(values)
    (folder / "tokenizer.json").write_text(json.dumps(values))


def _tokenizer_breaks() -> None:
    def one(code: str, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        BREAKS.append((code, name, lambda folder: edit_tokenizer(folder, change)))

    one("tokenizer-merges", "json", lambda v: v["model"].pop("merges"))
    one("tokenizer-vocab", "json", lambda v: v["model"].pop("vocab"))
    one("tokenizer-type", "unigram", lambda v: v["model"].update(type="Unigram"))
    one("tokenizer-id", "negative", lambda v: v["model"]["vocab"].update(a=-1))
    one("tokenizer-id", "text", lambda v: v["model"]["vocab"].update(a="5"))
    one("tokenizer-duplicate-id", "two", lambda v: v["model"]["vocab"].update(a=40, b=40))
    one("tokenizer-id-range", "beyond", lambda v: v["model"]["vocab"].update(zzz=300))
    one("tokenizer-merge-unknown", "merge", lambda v: v["model"]["merges"].append("q zzz"))
    one("tokenizer-added", "kind", lambda v: v.update(added_tokens=["x"]))
    one(
        "tokenizer-added",
        "million",
        lambda v: v.update(added_tokens=[{"content": f"x{i}", "id": i} for i in range(100_001)]),
    )
    one(
        "tokenizer-regex",
        "backtracking",
        lambda v: v.update(
            normalizer={"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
        ),
    )
    one("special-token-missing", "bos", _without_end)


def _without_end(values: dict[str, Any]) -> None:
    values["model"]["vocab"].pop("</s>")
    values["added_tokens"] = [t for t in values["added_tokens"] if t["content"] != "</s>"]


_tokenizer_breaks()


@breaks("tokenizer-missing")
def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@breaks("tokenizer-json")
def tokenizer_garbage(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"\xff\xfe")


@breaks("tokenizer-size")
def tokenizer_small(folder: Path) -> None:
    def shrink(values: dict[str, Any]) -> None:
        model = values["model"]
        model["vocab"] = {token: number for token, number in model["vocab"].items() if number < 99}
        model["merges"] = []
        model["merges"] = [["!", '"']]
        model["vocab"]['!"'] = 99

    edit_tokenizer(folder, shrink)


def _slow_tokenizer(folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


@breaks("tokenizer-merges", "txt")
def merges_missing(folder: Path) -> None:
    _slow_tokenizer(folder)
    (folder / "merges.txt").unlink()


@breaks("tokenizer-vocab", "vocab.json")
def vocab_missing(folder: Path) -> None:
    _slow_tokenizer(folder)
    (folder / "vocab.json").unlink()


@breaks("tokenizer-duplicate-token")
def token_twice(folder: Path) -> None:
    _slow_tokenizer(folder)
    text = (folder / "vocab.json").read_text()
    (folder / "vocab.json").write_text(text.replace("{", '{"<pad>": 7, ', 1))


@breaks("tokenizer-merge-unknown", "txt")
def merge_unknown(folder: Path) -> None:
    _slow_tokenizer(folder)
    with (folder / "merges.txt").open("a") as file:
        file.write("q zzz\n")


def _special_breaks() -> None:
    def one(code: str, **settings: Any) -> None:
        def function(folder: Path) -> None:
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))

        BREAKS.append((code, "-".join(settings), function))

    one("bos-disagrees", bos_token="<s>")
    one("eos-disagrees", eos_token={"content": "<unk>"})
    one("pad-disagrees", pad_token="</s>")
    one("special-token-unknown", bos_token="<|endoftext|>")


_special_breaks()


@breaks("generation-config")
def generation(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 50118}')
