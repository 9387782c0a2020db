"""A student with its teacher beside the same student without: bits per byte and closeness.

    python benchmarks/distil.py --corpus CORPUS --work FOLDER [--steps 400] [--teacher MODEL]

CORPUS holds DOMAIN.jsonl.zst and DOMAIN.valid.jsonl.zst. The student has 4 layers of width 128 and
about 2 million parameters. It is trained twice by `optlm distil --control`: by the teacher's
distributions (forward KL, from a cache of the likeliest tokens that `optlm teacher-cache` writes)
together with the labels, and by the labels alone. Both begin with the same weights, read the same
batches and end after the same steps. --starts says whether these weights are random, cut from the
teacher, or both in turn. FOLDER keeps the runs; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from optlm.train.distil.distil import distil
from optlm.train.distil.fill_cache import cache_teacher
from optlm.train.distil.recipe import DistilConfig
from optlm.train.distil.report import write_report
from report import Report

DOMAINS = {  # weights of the parts of the text
    "stories": 50,
    "books": 13,
    "encyclopedic": 13,
    "dialogue": 10,
    "code": 7,
    "multilingual": 7,
}
COLUMNS = {
    "start": "first weights",
    "model": "model",
    "parameters": "parameters",
    "kl": "KL to teacher",
    "agreement": "top-1 agreement",
    "bits_per_byte": "bits/byte",
    **{domain: domain for domain in DOMAINS},
}


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    headline: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    cache = options.work / "cache"
    for start in options.starts:
        config = settings(options, start)
        begun = time.monotonic()
        if not rows:
            cache_teacher(
                config, cache, data_folder=options.work / "data", top_k=options.top_k, log=print
            )
            seconds["cache"] = time.monotonic() - begun
        found = pair(config, options, start, cache, seconds)
        rows += [{"start": start, **flat(row)} for row in found if row["model"] != "teacher"]
        with_teacher, alone = found[0], found[1]
        headline |= {
            f"{start}: KL to the teacher, with and without it": f"{with_teacher['kl']:.4f} and "
            f"{alone['kl']:.4f}",
            f"{start}: bits per byte, with and without": f"{with_teacher['bits_per_byte']:.4f} and "
            f"{alone['bits_per_byte']:.4f}",
        }
    rows.append({"start": None, **flat(found[2])})
    headline |= {f"seconds: {name}": round(value) for name, value in seconds.items()}
    Report(
        name="distil",
        title="Distillation: a student with and without its teacher",
        method=(
            f"{options.steps} steps of 4096 tokens, forward KL 1 and labels "
            f"{options.labels}, {options.top_k} likeliest tokens of each prediction cached; "
            f"{options.threads} thread. Means over domains, held-out text of "
            f"{config.training.validation_bytes:,} bytes each."
        ),
        rows=rows,
        columns=COLUMNS,
        headline=headline,
        packages={"torch": torch.__version__},
    ).publish(options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--teacher", default="bundled")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--labels", type=float, default=0.5, help="weight of the labels (0.5)")
    parser.add_argument("--starts", nargs="+", default=["random", "teacher"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", help="name of the result files (distil)")
    parser.add_argument("--json", help="write the JSON line here too")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results", help="folder"
    )
    return parser.parse_args()


def settings(options: argparse.Namespace, start: str) -> DistilConfig:
    corpus = options.corpus
    return DistilConfig.from_dict(
        {
            "teacher": options.teacher,
            "student": {"init": start},
            "losses": {"forward_kl": 1.0, "labels": options.labels},
            "model": {
                "num_hidden_layers": 4,
                "hidden_size": 128,
                "ffn_dim": 512,
                "num_attention_heads": 4,
            },
            "data": {
                "parts": [
                    {
                        "name": name,
                        "file": str(corpus / f"{name}.jsonl.zst"),
                        "weight": weight,
                        "max_bytes": 10_000_000,
                    }
                    for name, weight in DOMAINS.items()
                ],
                "validation": {name: str(corpus / f"{name}.valid.jsonl.zst") for name in DOMAINS},
            },
            "loop": {
                "steps": options.steps,
                "evaluate_every": 200,
                "checkpoint_every": 100,
                "average_decay": 0.98,
                "optim": {"learning_rate": 0.003, "warmup_steps": 40, "decay_share": 0.5},
            },
            "batch_tokens": 4096,
            "micro_batch_tokens": 4096,
            "sequence_lengths": {"256": 1.0},
            "validation_bytes": 30_000,
            "seed": 1,
        }
    )


def pair(
    config: DistilConfig,
    options: argparse.Namespace,
    start: str,
    cache: Path,
    seconds: dict[str, float],
) -> list[dict[str, Any]]:
    """Report rows of the student, its twin and the teacher."""
    run, models = options.work / start, {}
    for name, wanted, where in (
        ("student", config, cache),
        ("student without teacher", config.control, None),
    ):
        begun = time.monotonic()
        models[name] = distil(
            wanted,
            run if where else run / "control",
            data_folder=options.work / "data",
            cache_folder=where,
            log=print,
        )
        seconds[f"{start}, {name}"] = time.monotonic() - begun
    write_report(config, run, models, speed=False, log=print)
    found: list[dict[str, Any]] = json.loads((run / "report.json").read_text())["rows"]
    return found


def flat(row: dict[str, Any]) -> dict[str, Any]:
    domains = {name: figures["bits_per_byte"] for name, figures in row["domains"].items()}
    return {name: value for name, value in row.items() if name != "domains"} | domains


if __name__ == "__main__":
    main()
