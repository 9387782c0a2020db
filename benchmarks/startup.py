"""From process start to the first token: `optlm generate` beside minimal scripts of the peers.

python benchmarks/startup.py                 the bundled model
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import checkpoints
import common
import peers
import report
from common import Spread

PROMPT = "Once upon a time"
TOKENS = 32
OURS = "optlm generate"
METHOD = (
    f"Wall time from starting the process to the first byte of the continuation of {PROMPT!r}, and "
    f"to the end of the process after {TOKENS} greedy tokens; default settings, files in the page "
    "cache. Programs take turns; medians of {rounds} rounds after one that does not count."
)
_TIMEOUT = 300  # seconds

# Each prints the first token's text as soon as it has it.
_TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

folder, prompt, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)

class Printer(BaseStreamer):
    seen_prompt = False
    def put(self, value):
        if self.seen_prompt:
            print(tokenizer.decode(value), end="", flush=True)
        self.seen_prompt = True
    def end(self):
        print()

inputs = tokenizer(prompt, return_tensors="pt")
model.generate(**inputs, max_new_tokens=tokens, do_sample=False, streamer=Printer())
"""
_OPENVINO = """
import sys
import openvino_genai

folder, prompt, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
pipeline = openvino_genai.LLMPipeline(folder, "CPU")
def write(text):
    print(text, end="", flush=True)
    return openvino_genai.StreamingStatus.RUNNING
pipeline.generate(prompt, max_new_tokens=tokens, do_sample=False, streamer=write)
"""
Command = list[str | Path]


def main() -> None:
    parser = common.options(__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="bundled", help="a shape, 'bundled', or a folder")
    wanted = common.parse(parser)
    failures: dict[str, str] = {}
    found = measure(commands(wanted.model, failures), wanted.rounds, failures)
    rows = [as_row(name, times) for name, times in found.items()]
    report.Report(
        name="startup",
        title="From process start to the first token",
        method=METHOD.format(rounds=wanted.rounds),
        rows=rows,
        columns={
            "engine": "program",
            "first_s": "first token, s",
            "first_s_least": "least",
            "first_s_most": "most",
            "whole_s": "whole process, s",
        },
        headline=headline(rows),
        packages=versions(),
        failures=failures,
    ).publish(wanted, plot=lambda path: plot(path, rows))


def commands(model: str, failures: dict[str, str]) -> dict[str, Command]:
    """Command lines by title; a peer that cannot run is noted in `failures`."""
    folder = checkpoints.checkpoint(model)
    found = {OURS: optlm_command(folder)}
    for title, environment, script, form in (
        ("transformers", "transformers", _TRANSFORMERS, "f32"),
        ("OpenVINO int8", "openvino", _OPENVINO, "int8"),
    ):
        python = peers.binary(environment)
        try:
            if not python.exists():
                raise RuntimeError("not installed; run: python benchmarks/peers.py install")
            ready = checkpoints.converted(folder, environment, form)
        except RuntimeError as error:
            common.note(failures, model, title, error)
            continue
        found[title] = [python, "-c", script, ready, PROMPT, str(TOKENS)]
    return found


def optlm_command(folder: Path) -> Command:
    """`optlm` as installed beside this Python, else as a module."""
    program = shutil.which("optlm", path=str(Path(sys.executable).parent))
    start: Command = [program] if program else [sys.executable, "-m", "optlm"]
    options = ["--max-tokens", str(TOKENS), "--temperature", "0", "--stream"]
    return [*start, "generate", PROMPT, "--model", folder, *options]


def measure(
    programs: Mapping[str, Command], rounds: int, failures: dict[str, str]
) -> dict[str, list[tuple[float, float]]]:
    """Seconds to the first byte and to the end, by program and round."""
    times: dict[str, list[tuple[float, float]]] = {title: [] for title in programs}
    for turn in range(rounds + 1):
        for title in list(times):
            try:
                taken = run_once(programs[title], None if title == OURS else checkpoints.offline())
            except RuntimeError as error:
                common.note(failures, "startup", title, error)
                del times[title]
                continue
            if turn:
                times[title].append(taken)
    return times


def run_once(command: Command, environment: dict[str, str] | None) -> tuple[float, float]:
    """Run one program; seconds to its first byte of output, and to its end.

    Raises:
        RuntimeError: it failed or printed nothing.
    """
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, bufsize=0
    ) as process:
        assert process.stdout is not None
        begun = process.stdout.read(1)
        first = time.perf_counter() - start
        _, errors = process.communicate(timeout=_TIMEOUT)
        whole = time.perf_counter() - start
    if process.returncode or not begun:
        raise RuntimeError(f"exit code {process.returncode}: {errors.decode()[-400:]}")
    return first, whole


def as_row(title: str, times: Sequence[tuple[float, float]]) -> dict[str, Any]:
    first, whole = (Spread.of([pair[k] for pair in times]) for k in (0, 1))
    return {
        "engine": title,
        "first_s": first.median,
        "first_s_least": first.least,
        "first_s_most": first.most,
        "whole_s": whole.median,
        "rounds": first.count,
    }


def headline(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    by_title = {row["engine"]: row["first_s"] for row in rows}
    ours = by_title.get(OURS)
    if ours is None:
        return {}
    found: dict[str, Any] = {f"{OURS}, process start to first token, s": ours}
    for title, seconds in by_title.items():
        if title != OURS:
            found[f"{title} over optlm"] = seconds / ours
    return found


def versions() -> dict[str, str]:
    """The pinned versions of the peers that are installed."""
    pins = peers.read_pins(peers.PINS.read_text(encoding="utf-8"))
    installed = [pins[name] for name in pins if peers.binary(name).exists()]
    pairs = (line.split("==") for lines in installed[::-1] for line in lines)
    return {name: version for name, version in pairs if name in ("transformers", "openvino-genai")}


def plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    bars = {row["engine"]: row["first_s"] for row in rows}
    report.plot_bars(path, "From process start to the first token", {"bundled model": bars}, "s")


if __name__ == "__main__":
    main()
