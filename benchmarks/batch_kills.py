"""Kill a batch job again and again, anywhere; its output must be that of a job nobody touched.

    python benchmarks/batch_kills.py --kills 100

The bundled model continues prompts of a file, once without a pause. Then the same command is
started, ended with SIGKILL, and started again on another output, until it has been killed as often
as asked; a job that finishes meanwhile is followed by another. Half of the kills come at a random
moment, half at the sight of a journal that is being replaced or of one that just grew. No start may
fail, no row that was in the journal may be lost or done again, and all outputs must be equal byte
for byte. Each start is a fork of one process that has imported everything and loaded nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import common
import optlm.batch.starters
import optlm.checkpoint.fingerprint
import optlm.cli.batch
import optlm.engine.native_runner
import optlm.tokenizer  # noqa: F401
import report
from optlm import cli
from optlm.batch import job, ledger

METHOD = (
    "{rows:,} prompts, 1 to 8 tokens each, sampled at temperature 1; the journal is replaced at "
    "{compact} KiB in place of 16 MiB, so that kills fall into it. {kills} times the process was "
    "ended with SIGKILL: half at a random moment up to {longest:g} s after its start, half as soon "
    "as the journal was seen to grow or to be replaced. After each kill the same command was "
    "started again. A row counts as done again if the journal that a kill left holds it and the "
    "next process began it anew."
)
COMPACT = 2**17
NONE = (0, 0)  # inode and size of a file that is not there
_WORDS = ["the", "cat", "dog", "sat", "ran", "on", "under", "a", "mat", "house", "red", "Once"]


def write_rows(path: Path, rows: int, seed: int) -> None:
    """Prompts of different lengths, wanting texts of different lengths; every 50th row is bad."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for row in range(rows):
            prompt = " ".join(draw.choices(_WORDS, k=draw.randrange(1, 20)))
            wanted = {"prompt": prompt, "params": {"max_tokens": draw.randrange(1, 9)}}
            file.write(json.dumps({"bad": row} if row % 50 == 49 else wanted) + "\n")


def start(source: Path, out: Path) -> int:
    """Run the command in a fork of this process; its exit code is 0 if it finished."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        ledger._COMPACT_BYTES = COMPACT
        code = cli.run(["batch", str(source), str(out), "--threads", "1", "--sync-seconds", "0.1"])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def kill_once(source: Path, out: Path, draw: random.Random, longest: float) -> str:
    """Start, kill; "replacing" or "running" by what the journal showed, "finished" if too late.

    Raises:
        RuntimeError: the process ended by itself with an error.
    """
    aimed = draw.random() < 0.5
    deadline = time.monotonic() + (60.0 if aimed else draw.uniform(0.0, longest))
    patience = draw.randrange(1, 40)  # changes of the journal to let pass
    journal, fresh = Path(f"{out}.journal"), Path(f"{out}.journal.new")
    left, before = state(fresh), state(journal)  # a kill may have left a half-written one
    child = start(source, out)
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if status:
                raise RuntimeError(f"a start failed with status {status}")
            return "finished"
        if not aimed:
            time.sleep(0.002)
        elif (now := state(journal)) != before or state(fresh) not in (left, NONE):
            before, patience = now, patience - 1
            if patience <= 0 or (state(fresh) not in (left, NONE) and draw.random() < 0.5):
                break
    replacing = state(fresh) not in (left, NONE)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "replacing" if replacing else "running"


def state(path: Path) -> tuple[int, int]:
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_size
    return NONE


def done_rows(out: Path) -> set[int]:
    """The rows that the journal holds, written or waiting, read without the code under test."""
    path = Path(f"{out}.journal")
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    marks = [json.loads(line[11:])["tally"]["rows"] for line in lines if line[9:10] in b"ME"]
    rows = {int(found[1]) for line in lines if (found := re.match(rb"\w{8} R (\d+) ", line))}
    return rows | set(range(max(marks, default=0)))


def trial(folder: Path, kills: int, rows: int, seed: int, longest: float) -> dict[str, Any]:
    """Run both; one row of the table.

    Raises:
        RuntimeError: a start failed, or rows that were done were lost.
    """
    source, whole, killed = (folder / name for name in ("in.jsonl", "whole.jsonl", "killed.jsonl"))
    write_rows(source, rows, seed)
    assert os.waitpid(start(source, whole), 0)[1] == 0, "the untouched job failed"
    counts = {"running": 0, "replacing": 0}
    draw, kept, again = random.Random(seed), set[int](), set[int]()
    begun, jobs, same = folder / "begun", 1, True
    note_begun_rows(begun)
    while sum(counts.values()) < kills:
        doing = kill_once(source, killed, draw, longest)
        again |= kept & taken(begun)
        if doing == "finished":
            same = same and whole.read_bytes() == killed.read_bytes()
            killed, kept, jobs = folder / f"killed-{jobs}.jsonl", set(), jobs + 1
            continue
        counts[doing] += 1
        now = done_rows(killed)
        if lost := kept - now:
            raise RuntimeError(f"a kill lost {len(lost)} rows, such as {min(lost)}")
        kept = now
        common.say(f"kill {sum(counts.values())}: {doing}, {len(kept):,} rows kept")
    assert os.waitpid(start(source, killed), 0)[1] == 0, "the last start failed"
    again |= kept & taken(begun)
    return {
        "kills": kills,
        "while running": counts["running"],
        "while the journal was replaced": counts["replacing"],
        "jobs": jobs,
        "rows done again": len(again),
        "same bytes": same and whole.read_bytes() == killed.read_bytes(),
    }


def note_begun_rows(path: Path) -> None:
    """From here on every start writes the numbers of the rows that it begins."""
    real = job._not_done

    def noting(rows: Any, kept: Any) -> Any:
        with path.open("w") as file:
            for row in real(rows, kept):
                file.write(f"{row[0]}\n")
                file.flush()
                yield row

    job._not_done = noting


def taken(path: Path) -> set[int]:
    """The numbers in the file, which is removed."""
    if not path.exists():
        return set()
    numbers = {int(line) for line in path.read_text().split("\n")[:-1]}
    path.unlink()
    return numbers


def main() -> int:
    parser = common.options(__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rows", type=int, default=3_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=3.0, help="seconds to a random kill")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = trial(Path(folder), wanted.kills, wanted.rows, wanted.seed, wanted.longest)
    numbers = {"kills": wanted.kills, "rows": wanted.rows, "longest": wanted.longest}
    good = row["same bytes"] and not row["rows done again"]
    report.Report(
        name="batch-kills",
        title="A batch job, killed again and again",
        method=METHOD.format(compact=COMPACT // 1024, **numbers),
        rows=[row],
        columns={name: name for name in row},
        headline={"every start succeeded": True, "no row lost or repeated, same bytes": good},
        packages={},
    ).publish(wanted)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
