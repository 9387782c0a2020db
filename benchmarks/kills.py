"""Kill a training run again and again, anywhere; it must end as if nobody had touched it.

    python benchmarks/kills.py --kills 100

A tiny model is trained once without a pause. Then the same run is started, ended with SIGKILL, and
started again in the same folder, until it has been killed as often as asked; then it may finish.
Half of the kills come at a random moment, half as soon as a half-written file is seen in the
folder. Every resume must succeed and lose no step that was saved; the last weights, their average
and the optimizer must equal those of the untouched run bit for bit. Each start is a fork of one
process that has imported everything and computed nothing.
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
from pathlib import Path
from typing import Any

import torch

import common
import report
from optlm.train.pretrain.pretrain import pretrain
from optlm.train.pretrain.recipe import PretrainConfig
from optlm.train.run.folder import RunFolder

METHOD = (
    "A model of two layers and 32 units, {steps} steps, a checkpoint every {every}, two kept. "
    "{kills} times the process was ended with SIGKILL: half at a random moment up to {longest:g} s "
    "after its start, half at the first sight of a half-written file. After each kill the same "
    "command was started again. Compared with one run that was never stopped: weights, average and "
    "optimizer state of the last checkpoint, and the log without its times."
)
EVERY = 3  # steps
_WORDS = ["the", "cat", "dog", "sat", "ran", "on", "under", "a", "mat", "house", "red"]


def settings(folder: Path, steps: int) -> PretrainConfig:
    """A recipe whose text it writes first."""
    draw = random.Random(0)
    text = folder / "text.jsonl"
    lines = (json.dumps({"text": " ".join(draw.choices(_WORDS, k=60))}) for _ in range(300))
    text.write_text("\n".join(lines) + "\n")
    return PretrainConfig.from_dict({
        "model": {
            "vocab_size": 270, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64,
            "num_attention_heads": 2, "max_position_embeddings": 64, "dropout": 0.1,
        },
        "data": {
            "parts": [{"name": "text", "file": str(text), "weight": 1}],
            "validation": {"text": str(text)}, "vocab_size": 270,
        },
        "loop": {
            "steps": steps, "log_every": 5, "evaluate_every": 40, "checkpoint_every": EVERY,
            "optim": {"learning_rate": 0.003, "warmup_steps": 5},
        },
        "batch_tokens": 256, "micro_batch_tokens": 128, "sequence_lengths": {"32": 1},
        "validation_bytes": 500, "precision": "f32",
    })  # fmt: skip


def start(config: PretrainConfig, run: Path) -> int:
    """Train in a fork of this process; its exit code is 0 if it finished."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        pretrain(config, run, data_folder=run.parent / "data")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def half_written(run: Path) -> bool:
    with contextlib.suppress(OSError):
        return any(name.startswith(".") for name in os.listdir(run))
    return False


def kill_once(config: PretrainConfig, run: Path, draw: random.Random, longest: float) -> str:
    """Start, kill; "saving" or "training" by what the process was doing, "finished" if too late.

    Raises:
        RuntimeError: the process ended by itself with an error: a resume that failed.
    """
    aimed = draw.random() < 0.5
    deadline = time.monotonic() + (10.0 if aimed else draw.uniform(0.0, longest))
    patience = draw.randrange(1, 12)  # half-written files to let pass
    child, seen = start(config, run), False
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


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, whatever the nesting."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def told(run: Path) -> list[dict[str, Any]]:
    """The log without starts and times."""
    timed = ("seconds", "tokens_per_second")
    events = (event for event in RunFolder(run).events() if event["kind"] != "start")
    return [{k: v for k, v in event.items() if k not in timed} for event in events]


def trial(folder: Path, kills: int, steps: int, seed: int, longest: float) -> dict[str, Any]:
    """Run both; one row of the table.

    Raises:
        RuntimeError: a start failed, or steps that had been saved were lost.
    """
    config, draw = settings(folder, steps), random.Random(seed)
    whole, killed = folder / "whole", folder / "killed"
    assert os.waitpid(start(config, whole), 0)[1] == 0, "the untouched run failed"
    counts = {"training": 0, "saving": 0}
    saved = 0
    while sum(counts.values()) < kills:
        doing = kill_once(config, killed, draw, longest)
        if doing == "finished":
            raise RuntimeError(f"the run finished after {sum(counts.values())} kills: more steps")
        counts[doing] += 1
        reached = max(RunFolder(killed).steps(), default=0)
        if reached < saved:
            raise RuntimeError(f"a kill lost step {saved}, which was saved; now at {reached}")
        saved = reached
        common.say(f"kill {sum(counts.values())}: {doing}, step {saved}")
    assert os.waitpid(start(config, killed), 0)[1] == 0, "the last start failed"
    states = [RunFolder(run).load(steps) for run in (whole, killed)]
    parts = ("model", "average", "optimizer", "random", "watch", "best", "kept", "tokens", "words")
    return {
        "kills": kills,
        "while training": counts["training"],
        "with a half-written file": counts["saving"],
        "step at the last kill": saved,
        "same bits": all(same(states[0][part], states[1][part]) for part in parts),
        "same log": told(whole) == told(killed),
    }


def main() -> int:
    parser = common.options(__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=2.0, help="seconds to a random kill")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = trial(Path(folder), wanted.kills, wanted.steps, wanted.seed, wanted.longest)
    numbers = {
        "kills": wanted.kills,
        "steps": wanted.steps,
        "every": EVERY,
        "longest": wanted.longest,
    }
    report.Report(
        name="kills",
        title="A training run, killed again and again",
        method=METHOD.format(**numbers),
        rows=[row],
        columns={name: name for name in row},
        headline={"every resume succeeded": True, "weights equal bit for bit": row["same bits"]},
        packages={"torch": torch.__version__},
    ).publish(wanted)
    return 0 if row["same bits"] and row["same log"] else 1


if __name__ == "__main__":
    sys.exit(main())
