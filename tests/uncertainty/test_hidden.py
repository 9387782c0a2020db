"""Hidden states of texts, their distance from known ones, and the choice of texts to label."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from optlm import LLM
from optlm.model import OPT
from optlm.uncertainty.answers import continuation
from optlm.uncertainty.hidden import by_distance, hidden_states, reference_distance
from variants import VARIANTS

Command = Callable[..., tuple[int, str, str]]
KNOWN = ["the cat sat on the mat", "the other cats went home", "in the rain again", "then the mat"]


@pytest.mark.parametrize("name", VARIANTS)
def test_distances_over_every_variant(
    engine: Callable[[str], LLM], folders: dict[str, Path], name: str
) -> None:
    llm = engine(name)
    known = reference_distance(llm, KNOWN)
    assert 0 < known.shrinkage <= 1
    assert llm.tokenizer is not None
    ids = [llm.tokenizer.encode(text) for text in KNOWN]
    reference = OPT.from_checkpoint(folders[name])
    with torch.no_grad():
        states = [reference.hidden(torch.tensor([each]))[0].mean(0).numpy() for each in ids]
    assert hidden_states(llm, ids) == pytest.approx(np.array(states), abs=1e-3)
    near, far = by_distance(
        llm, known, [continuation(llm, "the cat sat", " on the mat"), continuation(llm, "@", "%$#")]
    )
    assert far > near > 0


def test_evaluate_reports_the_distance(
    command: Command, folders: dict[str, Path], tmp_path: Path
) -> None:
    items = tmp_path / "items.jsonl"
    pair = ("the cat", "cat the")  # both ways round: one is right
    rows = [{"good": a, "bad": b} for a, b in (pair, pair[::-1])] * 3
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = tmp_path / "known.txt"
    known.write_text("\n".join(KNOWN))
    code, out, err = command(
        "uncertainty", "evaluate", items, "--known", known, "-m", folders["base"]
    )
    assert code == 0, err
    assert "distance" in out
    assert "distance: 4 texts, covariance shrunk by" in err


@pytest.mark.parametrize("name", VARIANTS)
def test_select_writes_the_texts(
    command: Command, folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(KNOWN))
    code, out, err = command(
        "uncertainty", "select", path, "-k", 2, "--breadth", 1, "-m", folders[name]
    )
    assert code == 0, err
    first, second = (json.loads(line) for line in out.splitlines())
    assert {first["text"], second["text"]} < set(KNOWN)
    _, every, _ = command("uncertainty", "select", path, "-k", 4, "-m", folders[name])
    rows = [json.loads(line) for line in every.splitlines()]
    assert sorted(row["text"] for row in rows) == sorted(KNOWN)
    assert rows[0]["entropy"] == max(row["entropy"] for row in rows)
    code, _, err = command("uncertainty", "select", path, "-k", 5, "-m", folders[name])
    assert code == 2
    assert "5 of 4 texts" in err
