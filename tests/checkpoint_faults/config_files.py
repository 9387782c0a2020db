"""Broken config.json files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from checkpoint_faults.base import BREAKS, breaks, edit_json


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
    one("config-lacks-key", hidden_size=None)
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
