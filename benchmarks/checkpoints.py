"""What is measured: random weights in the published shapes, and their forms for the peers.

All of it is kept in $OPTLM_BENCH_DIR (default ~/.cache/optlm-bench) and made once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np

import peers
from optlm.checkpoint.save import save_checkpoint
from optlm.config import PUBLISHED, OPTConfig

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "src" / "optlm" / "assets" / "mini-8m"
TOKENIZER = ROOT.parent / "shared" / "opt-tokenizer"
NUM_TOKENS = 50265  # of the real vocabulary; the embedding's other rows are padding

_TOKENIZER_CONFIG = {
    "tokenizer_class": "GPT2Tokenizer",
    "bos_token": "</s>",
    "eos_token": "</s>",
    "unk_token": "</s>",
    "pad_token": "<pad>",
    "add_bos_token": True,
    "add_prefix_space": False,
}


def cache() -> Path:
    given = os.environ.get("OPTLM_BENCH_DIR")
    return Path(given) if given else Path.home() / ".cache" / "optlm-bench"


def checkpoint(name: str) -> Path:
    """Folder of "125m" and so on (made if need be), or of the checkpoint folder `name`."""
    if name not in PUBLISHED:
        folder = BUNDLED if name == "bundled" else Path(name)
        if not (folder / "config.json").is_file():
            raise SystemExit(
                f"{name}: no checkpoint there; give one of {', '.join(PUBLISHED)}, or a folder"
            )
        return folder
    folder = cache() / name
    if not (folder / "config.json").is_file():
        write_random(folder, PUBLISHED[name].config)
    return folder


def write_random(folder: Path, config: OPTConfig, seed: int = 0) -> None:
    """Write float16 weights as at the start of a training: N(0, init_std), norms 1, biases 0."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, shape in config.parameter_shapes().items():
        if "layer_norm.weight" in name:
            weights[name] = np.ones(shape, np.float16)
        elif name.endswith("bias"):
            weights[name] = np.zeros(shape, np.float16)
        else:
            values = random.standard_normal(shape, np.float32) * np.float32(config.init_std)
            weights[name] = values.astype(np.float16)
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder)
    save_checkpoint(folder, config, weights)


def _write_tokenizer(folder: Path) -> None:
    """The real tokenizer where it is at hand, else one of its size that joins pairs of bytes."""
    (folder / "tokenizer_config.json").write_text(json.dumps(_TOKENIZER_CONFIG))
    if TOKENIZER.is_dir():
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(TOKENIZER / name, folder / name)
        return
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "<pad>", "</s>", "<unk>", *letters]
    pairs = list(itertools.islice(itertools.product(letters, letters), NUM_TOKENS - len(words)))
    words += [left + right for left, right in pairs]
    vocabulary = {word: index for index, word in enumerate(words)}
    merges = "".join(f"{left} {right}\n" for left, right in pairs)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")


# ---- forms for the peers -------------------------------------------------------------------------


def converted(source: Path, engine: str, form: str) -> Path:
    """Folder that `engine` loads in format `form`; converted on first use."""
    if engine not in _COMMANDS:
        return source
    target = cache() / f"{_identity(source)}-{engine}-{form}"
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        command = _COMMANDS[engine](source, partial, form)
        if not Path(command[0]).exists():
            raise RuntimeError("not installed; run: python benchmarks/peers.py install")
        done = subprocess.run(command, capture_output=True, text=True, env=offline())
        if done.returncode:
            raise RuntimeError(f"{engine}'s converter failed: {done.stderr.strip()[-800:]}")
        partial.rename(target)
    return target


def offline() -> dict[str, str]:
    """Environment variables for the peers: no network, and none of this Python's own paths."""
    values = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**values, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def _identity(source: Path) -> str:
    """A name that changes with the weights."""
    digest = hashlib.sha256()
    for path in [*sorted(source.glob("*.safetensors")), source / "config.json"]:
        stat = path.stat()
        digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
    return f"{source.name}-{digest.hexdigest()[:12]}"


def _ctranslate2(source: Path, target: Path, form: str) -> list[str | Path]:
    quantization = {"int8": "int8_float32", "f32": "float32"}[form]
    program = peers.binary("transformers", "ct2-transformers-converter")
    return [program, "--model", source, "--output_dir", target, "--quantization", quantization]


def _openvino(source: Path, target: Path, form: str) -> list[str | Path]:
    program = peers.binary("openvino", "optimum-cli")
    task = ["--task", "text-generation-with-past", "--weight-format", form]
    return [program, "export", "openvino", "--model", source, *task, target]


_COMMANDS = {"ctranslate2": _ctranslate2, "openvino": _openvino}
