"""Adapters that are damaged or made for another model are left out, with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import load_file, save_file

from live_server import running
from lora_files import write_lora
from optlm.engine.llm import LLM
from variants import VARIANTS, make_state, write_checkpoint


def damage(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **values}))


def test_damaged_adapters_are_left_out_with_the_reason(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    base = write_checkpoint(tmp_path / "base", config, make_state(config))
    folder = tmp_path / "adapters"
    bad: dict[str, dict[str, Any]] = {
        "no-rank": {"r": 0},
        "huge-rank": {"r": 10**6},
        "text-rank": {"r": "4"},
        "nan-alpha": {"lora_alpha": float("nan")},
        "infinite-alpha": {"lora_alpha": float("inf")},
        "unknown": {"made_up": 1},
    }
    for name, values in bad.items():
        damage(write_lora(folder / name, config, 1), **values)
    write_lora(folder / "nan-weights", config, 1)
    write_lora(folder / "doubled", config, 1)
    for name in ("nan-weights", "doubled"):
        file = folder / name / "adapter_model.safetensors"
        tensors = load_file(file)
        key = next(iter(tensors))
        if name == "doubled":  # the same weights under two spellings
            tensors[key.removeprefix("base_model.model.")] = tensors[key]
        else:
            tensors[key] = np.full_like(tensors[key], np.nan)
        save_file(tensors, file)
    write_lora(folder / "sound", config, 1)
    llm = LLM(base, threads=1)
    with running(llm, adapters=folder) as server:
        told = httpx.post(f"{server.url}/v1/adapters/reload").json()
        assert set(told["refused"]) == {*bad, "nan-weights", "doubled"}
        assert all(told["refused"].values())
        for name, status in (("sound", 200), ("doubled", 404), ("nan-alpha", 404)):
            body = {"model": name, "prompt": [2, 5], "max_tokens": 2}
            answer = httpx.post(f"{server.url}/v1/completions", json=body)
            assert answer.status_code == status, answer.text
