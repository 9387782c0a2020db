"""Kill a training run again and again, anywhere; it must end as if nobody had touched it.

    python benchmarks/kills.py --technique finetune --kills 100

A tiny model is trained once without a pause. Then the same run is started, ended with SIGKILL, and
started again in the same folder, until it is done; and anew in the next folder, until there were as
many kills as asked. Half of the kills come at a random moment, half as soon as a half-written file
is seen in the folder. Every resume must succeed and lose no step that was saved; the files of the
result and the last checkpoint must equal those of the untouched run bit for bit. Each start is a
fork of one process that has imported everything and computed nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import common
import report
from optlm.train.distil import teacher_cache
from optlm.train.distil.distil import DistilConfig, distil
from optlm.train.distil.fill_cache import EngineOptions, cache_teacher
from optlm.train.finetune.adapters import AdapterConfig
from optlm.train.finetune.finetune import FinetuneConfig, finetune
from optlm.train.pretrain.pretrain import pretrain
from optlm.train.pretrain.recipe import PretrainConfig
from optlm.train.run.folder import RunFolder

METHOD = (
    "A model of two layers and 32 units, {steps} steps, a checkpoint every {every}. In each row "
    "{kills} times the process was ended with SIGKILL: half at a random moment up to {longest:g} s "
    "after its start, half at the first sight of a half-written file. After each kill the same "
    "command was started again; a run that came to its end was compared with one that was never "
    "stopped, and the next was begun. Compared: every file of the result (model, adapter, teacher "
    "cache), weights, average and optimizer state of the last checkpoint, and the log "
    "without its times."
)
EVERY = 3  # steps
_WORDS = ["the", "cat", "dog", "sat", "ran", "on", "under", "a", "mat", "house", "red"]
_RESULTS = ("*.safetensors", "last/*.safetensors", "model/*.safetensors", "*.topk", "shards.json")
_STATE = ("model", "average", "optimizer", "random", "watch", "best", "kept", "tokens", "words")

Work = Callable[[Path], object]  # trains in the folder, or goes on


# ---- what is killed ------------------------------------------------------------------------------


def settings(folder: Path, steps: int) -> dict[str, Any]:
    """A recipe whose text it writes first."""
    draw = random.Random(0)
    text = folder / "text.jsonl"
    lines = (json.dumps({"text": " ".join(draw.choices(_WORDS, k=60))}) for _ in range(300))
    text.write_text("\n".join(lines) + "\n")
    return {
        "model": {
            "vocab_size": 270, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64,
            "num_attention_heads": 2, "max_position_embeddings": 64, "dropout": 0.1,
        },
        "data": {
            "parts": [{"name": "text", "file": str(text)}], "validation": {"text": str(text)},
        },
        "loop": {
            "steps": steps, "log_every": 5, "evaluate_every": 40, "checkpoint_every": EVERY,
            "optim": {"learning_rate": 0.003, "warmup_steps": 5},
        },
        "batch_tokens": 256, "micro_batch_tokens": 128, "sequence_lengths": {"32": 1},
        "validation_bytes": 500, "precision": "f32",
    }  # fmt: skip


def pretraining(folder: Path, steps: int) -> dict[str, Work]:
    config = PretrainConfig.from_dict(settings(folder, steps))
    return {"pretrain": lambda run: pretrain(config, run, data_folder=folder / "data")}


def base_model(folder: Path) -> Path:
    """A model to adapt or to learn from, trained in a process of its own."""
    (work,) = pretraining(folder, 20).values()
    finish(work, folder / "base")
    return folder / "base" / "model"


def finetuning(folder: Path, steps: int) -> dict[str, Work]:
    base = base_model(folder)

    def work(method: str) -> Work:
        adapter = AdapterConfig(method=method, dropout=0.1) if method == "lora" else None
        config = FinetuneConfig(
            method=method, adapter=adapter, max_steps=steps, learning_rate=1e-3, batch_tokens=128,
            micro_batch_tokens=64, seq_len=32, evaluate_every=EVERY, patience=None,
        )  # fmt: skip
        return lambda run: finetune(base, folder / "text.jsonl", run, config)

    return {f"finetune, {method}": work(method) for method in ("full", "lora", "prefix")}


def distillation(folder: Path, steps: int) -> dict[str, Work]:
    teacher = str(base_model(folder))
    values = settings(folder, steps) | {
        "teacher": teacher,
        "model": {"num_hidden_layers": 1, "dropout": 0.1},
        "losses": {"forward_kl": 1.0, "labels": 0.5},
    }
    teacher_cache._SHARD_BYTES = 1  # a step a shard, so that there are many to be killed between
    data = folder / "data-of-the-teacher"

    def cache(run: Path) -> None:
        engine = EngineOptions(dtype="f32", threads=1)
        config = DistilConfig.from_dict(values)
        cache_teacher(config, run, data_folder=data, top_k=8, engine=engine)

    def student(cached: Path | None) -> Work:
        config = DistilConfig.from_dict(values)
        return lambda run: distil(config, run, data_folder=data, cache_folder=cached)

    finish(cache, folder / "cache")
    return {
        "teacher-cache": cache,
        "distil, beside the teacher": student(None),
        "distil, from the cache": student(folder / "cache"),
    }


TECHNIQUES = {"pretrain": pretraining, "finetune": finetuning, "distil": distillation}


# ---- killing -------------------------------------------------------------------------------------


def start(work: Work, run: Path) -> int:
    """Train in a fork of this process; its exit code is 0 if it finished."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        work(run)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(work: Work, run: Path) -> None:
    """Train without a pause."""
    if os.waitpid(start(work, run), 0)[1]:
        raise RuntimeError(f"the run in {run.name} failed")


def half_written(run: Path) -> bool:
    with contextlib.suppress(OSError):
        return any(name.startswith(".") for name in os.listdir(run))
    return False


def kill_once(work: Work, run: Path, draw: random.Random, longest: float) -> str:
    """Start, kill; "saving" or "training" by what the process was doing, "finished" if too late.

    Raises:
        RuntimeError: the process ended by itself with an error: a resume that failed.
    """
    aimed = draw.random() < 0.5
    deadline = time.monotonic() + (10.0 if aimed else draw.uniform(0.0, longest))
    patience = draw.randrange(1, 12)  # half-written files to let pass
    child, seen = start(work, run), False
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if status:
                raise RuntimeError(f"a start failed with status {status}")
            return "finished"
        if aimed:
            now = half_written(run)
            patience -= now and not seen
            seen = now
            if now and patience <= 0:
                break
        else:
            time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "saving" if half_written(run) else "training"


def reached(run: Path) -> int:
    """Steps, or shards of a cache, that are safe."""
    shards = len(list(run.glob("*.topk")))
    return shards or max(RunFolder(run).steps(), default=0)


# ---- comparing -----------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, whatever the nesting."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def results(run: Path) -> dict[str, bytes]:
    files = (file for pattern in _RESULTS for file in run.glob(pattern))
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def same_end(one: Path, other: Path) -> bool:
    """Whether two finished runs left the same bits."""
    runs = [RunFolder(one), RunFolder(other)]
    if not results(one) or results(one) != results(other) or runs[0].steps() != runs[1].steps():
        return False
    if not runs[0].steps():
        return True
    states = [run.load(run.steps()[-1]) for run in runs]
    return all(same(states[0][part], states[1][part]) for part in _STATE)


def told(run: Path) -> list[dict[str, Any]]:
    """The log without starts and times."""
    timed = ("seconds", "tokens_per_second")
    events = (event for event in RunFolder(run).events() if event["kind"] != "start")
    return [{k: v for k, v in event.items() if k not in timed} for event in events]


def trial(
    name: str, work: Work, folder: Path, kills: int, draw: random.Random, longest: float
) -> dict[str, Any]:
    """Kill so often; one row of the table.

    Raises:
        RuntimeError: a start failed, or steps that had been saved were lost.
    """
    folder.mkdir()
    whole = folder / "whole"
    finish(work, whole)
    counts, ended, saved = {"training": 0, "saving": 0}, [], 0
    while sum(counts.values()) < kills:
        run = folder / f"killed-{len(ended)}"
        doing = kill_once(work, run, draw, longest)
        if doing == "finished":
            ended.append(run)
            saved = 0
            continue
        counts[doing] += 1
        if reached(run) < saved:
            raise RuntimeError(f"a kill lost step {saved}, which was saved; now at {reached(run)}")
        saved = reached(run)
        common.say(f"{name}, kill {sum(counts.values())}: {doing}, step {saved}")
    last = folder / f"killed-{len(ended)}"
    finish(work, last)
    ended.append(last)
    return {
        "run": name,
        "kills": kills,
        "while training": counts["training"],
        "with a half-written file": counts["saving"],
        "runs that came to their end": len(ended),
        "same bits": all(same_end(whole, run) for run in ended),
        "same log": all(told(whole) == told(run) for run in ended),
    }


def main() -> int:
    parser = common.options(__doc__)
    parser.add_argument("--technique", choices=TECHNIQUES, default="pretrain")
    parser.add_argument("--kills", type=int, default=100, help="in each row")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=2.0, help="seconds to a random kill")
    wanted = parser.parse_args()
    draw = random.Random(wanted.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        works = TECHNIQUES[wanted.technique](folder, wanted.steps)
        rows = [
            trial(name, work, folder / f"trial-{i}", wanted.kills, draw, wanted.longest)
            for i, (name, work) in enumerate(works.items())
        ]
    numbers = {"kills": wanted.kills, "steps": wanted.steps, "every": EVERY}
    good = all(row["same bits"] and row["same log"] for row in rows)
    suffix = "" if wanted.technique == "pretrain" else f"-{wanted.technique}"
    report.Report(
        name=f"kills{suffix}",
        title=f"Killed again and again: {wanted.technique}",
        method=METHOD.format(**numbers, longest=wanted.longest),
        rows=rows,
        columns={name: name for name in rows[0]},
        headline={"every resume succeeded": True, "everything equal bit for bit": good},
        packages={"torch": torch.__version__},
    ).publish(wanted)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
