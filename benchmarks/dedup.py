"""Near duplicates: optlm's index beside datasketch's, on the same documents with planted copies.

    python benchmarks/dedup.py FILE... [--documents 20000] [--write-to NAME]

Every tenth document gets a copy in which every 20th, 60th or 120th word is another one; of those
whose word 5-grams overlap by 80 % or more (counted exactly), the tools should find all. Each tool
runs in its own process, one after the other, and gets the texts; reading them is not measured.
Times are processor seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from optlm.data.dedup import DuplicateIndex
from optlm.data.inputs import find_inputs
from optlm.data.records import read_records
from optlm.data.report import ReadReport
from optlm.data.words import words_of

THRESHOLD = 0.8
STEPS = (20, 60, 120)  # words between two changed ones; overlaps of about 0.6, 0.85, 0.92
RESULTS = Path(__file__).with_name("results")
Pairs = set[int]  # the documents found to be copies


def documents(files: list[str], count: int) -> tuple[list[str], dict[int, float]]:
    """Texts, and the exact similarity of each planted copy to its original, by its number."""
    records = read_records(find_inputs(files), ReadReport())
    texts = [record.text for record in islice(records, count)]
    chance = random.Random(0)
    planted = {}
    for number in range(0, len(texts), 10):
        words = texts[number].split(" ")
        step = STEPS[number // 10 % len(STEPS)]
        for place in range(chance.randrange(step), len(words), step):
            words[place] = f"changed{place}"
        copy = " ".join(words)
        planted[len(texts)] = jaccard(texts[number], copy)
        texts.append(copy)
    return texts, planted


def grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[^\W_]+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def jaccard(a: str, b: str) -> float:
    left, right = grams(a), grams(b)
    return len(left & right) / len(left | right)


def with_optlm(texts: list[str]) -> Pairs:
    with (
        tempfile.TemporaryDirectory() as folder,
        DuplicateIndex(Path(folder), threshold=THRESHOLD) as index,
    ):
        for text in texts:
            index.add(text, words_of(text))
        return {found.document for found in index.find()}


def with_datasketch(texts: list[str]) -> Pairs:
    """As its documentation shows: update_batch, MinHashLSH in memory, then comparing signatures."""
    from datasketch import MinHash, MinHashLSH

    lsh = MinHashLSH(threshold=THRESHOLD, num_perm=128)
    model = MinHash(num_perm=128)
    signatures: list[Any] = []
    found = set()
    for number, text in enumerate(texts):
        words = re.findall(r"[^\W_]+", text.lower())
        shingles = {" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))}
        signature = MinHash(num_perm=128, permutations=model.permutations, scheme=model.scheme)
        signature.update_batch(list(shingles))
        near = (signatures[other].jaccard(signature) for other in lsh.query(signature))
        if any(similarity >= THRESHOLD for similarity in near):
            found.add(number)
        signatures.append(signature)
        lsh.insert(number, signature, check_duplication=False)
    return found


TOOLS: dict[str, Callable[[list[str]], Pairs]] = {
    "optlm": with_optlm,
    "datasketch": with_datasketch,
}


def measure(tool: str, files: list[str], count: int) -> dict[str, Any]:
    """Run in a process of its own; what the texts take in memory is subtracted."""
    texts, planted = documents(files, count)
    words_of("the tables")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    found = TOOLS[tool](texts)
    seconds = time.process_time() - start
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    wanted = {number for number, similarity in planted.items() if similarity >= THRESHOLD}
    size = sum(len(text.encode()) for text in texts)
    return {
        "tool": tool,
        "documents": len(texts),
        "megabytes": round(size / 1e6, 1),
        "cpu_seconds": round(seconds, 2),
        "documents_per_second": round(len(texts) / seconds),
        "megabytes_per_second": round(size / 1e6 / seconds, 1),
        "planted_at_0.8": len(wanted),
        "recall": round(len(wanted & found) / max(1, len(wanted)), 4),
        "planted_below_0.7": sum(similarity < 0.7 for similarity in planted.values()),
        "found_below_0.7": sum(planted.get(number, 1) < 0.7 for number in found),
        "found_not_planted": len(found - planted.keys()),
        "added_peak_mib": round(memory),
    }


def environment() -> str:
    names = ("optlm", "datasketch", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return (
        f"{model[1] if model else platform.machine()}; {versions}, Python {sys.version.split()[0]}"
    )


def table(results: list[dict[str, Any]]) -> str:
    keys = list(results[0])
    rows = [[str(result[key]) for key in keys] for result in results]
    lines = [keys, ["---"] * len(keys), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write(results: list[dict[str, Any]], name: str) -> None:
    where = environment()
    whole = {"environment": where, "results": results}
    (RESULTS / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(f"{where}\n\n{table(results)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Near duplicates: optlm beside datasketch.")
    parser.add_argument("files", nargs="+", help="documents")
    parser.add_argument("--documents", type=int, default=20_000, help="how many of them")
    parser.add_argument("--write-to", help="name of the result files in benchmarks/results")
    parser.add_argument("--worker", choices=TOOLS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.worker, options.files, options.documents)))
        return
    results = []
    for tool in TOOLS:
        command = [sys.executable, __file__, *options.files, "--worker", tool]
        command += ["--documents", str(options.documents)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout))
    print(table(results) + json.dumps(results))
    if options.write_to:
        write(results, options.write_to)


if __name__ == "__main__":
    main()
