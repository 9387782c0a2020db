"""Rows, and rows to files and back."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from optlm.batch.job import BatchReport

RunJob = Callable[..., BatchReport]


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def request(url: str, custom_id: str = "a", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": f"/v1/{url}", "body": body}


def mixed(count: int) -> list[Any]:
    """Requests of every kind, of different lengths, some of which are refused."""
    rng = random.Random(4)
    rows: list[Any] = []
    for number in range(count):
        words = "the cat " * rng.randint(1, 9)
        rows.append(
            rng.choice(
                [
                    request("completions", prompt=words, max_tokens=rng.randint(1, 20)),
                    request(
                        "chat/completions",
                        messages=[{"role": "user", "content": words}],
                        max_tokens=rng.randint(1, 20),
                    ),
                    request("embeddings", input=words),
                    request("score", context=words, continuations=[" the", " mat"]),
                    request("score", context=words),
                ]
            )
            | {"custom_id": f"r{number}"}
        )
    return rows
