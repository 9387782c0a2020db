"""`optlm eval` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optlm.cli import run


def test_a_sweep_over_shots(
    folders: dict[str, Path], sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    words = f"eval --tasks copa,cb --data {sets} -m {folders['base']} --num-fewshot 0-2 --limit 2"
    assert run([*words.split(), "--json", str(out)]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].split()[:5] == ["task", "items", "shots", "metric", "value"]
    assert [line.split()[2] for line in lines if line.startswith("copa ")] == ["0", "1", "2"]
    saved = json.loads(out.read_text(encoding="utf-8"))
    assert [each["results"][0]["num_fewshot"] for each in saved] == [0, 1, 2]
    assert saved[0]["results"][0]["measures"]["acc"]["value"] in (0.0, 0.5, 1.0)
    assert "results are in" in shown.err


def test_json_on_stdout_and_a_list_of_tasks(
    folders: dict[str, Path], sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"eval --tasks udhr --data {sets} -m {folders['350m']} --json -"
    assert run(words.split()) == 0
    (only,) = json.loads(capsys.readouterr().out)
    assert set(only["results"][0]["groups"]) == {"de", "en"}
    assert run(["eval", "--tasks", "list"]) == 0
    assert capsys.readouterr().out.startswith("hellaswag")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tasks copa --num-fewshot many", "--num-fewshot is 'many'; give numbers"),
        ("--tasks copa --num-fewshot 3-1", "--num-fewshot is '3-1'"),
        ("--tasks copper --data .", "did you mean 'copa'?"),
        ("--tasks copa", "name it with --data DIR"),
    ],
)
def test_bad_words(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_weights_that_are_not_numbers(
    tmp_path: Path, sets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from variants import VARIANTS, make_state, write_checkpoint

    state = make_state(VARIANTS["base"])
    state["model.decoder.layers.0.fc1.weight"][0, 0] = float("nan")
    folder = write_checkpoint(tmp_path / "model", VARIANTS["base"], state)
    assert run(["eval", "--tasks", "copa", "--data", str(sets), "-m", str(folder)]) == 2
    assert "fc1.weight" in capsys.readouterr().err
