"""`optlm data pack` and `verify`: the manifest, the card, and every damage noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optlm.cli import run
from optlm.data.packed import verify
from optlm.data.report import CorpusError
from optlm.train.tokens.packed import DataConfig, prepare


def write_lines(path: Path, documents: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return path


def sentence(number: int) -> str:
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "big", "house"]
    return " ".join(words[(number * 7 + i * (number % 5 + 1)) % 12] for i in range(30))


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    tales = [{"text": sentence(i), "license": "MIT" if i % 3 else "PD"} for i in range(60)]
    notes = [{"text": f"Note {i}: {sentence(i)}", "source": "n"} for i in range(20)]
    return {
        "parts": [
            {"name": "tales", "file": str(write_lines(tmp_path / "t.jsonl", tales)), "weight": 3},
            {
                "name": "notes",
                "file": str(write_lines(tmp_path / "n.jsonl", notes)),
                "weight": 1,
                "sources": ["n"],
            },
        ],
        "validation": {},
        "vocab_size": 300,
    }


@pytest.fixture
def packed(settings: dict[str, Any], tmp_path: Path) -> Path:
    prepare(DataConfig.from_dict(settings), tmp_path / "packed")
    return tmp_path / "packed"


def test_pack_and_verify_from_the_command_line(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.json"
    config.write_text(json.dumps({"data": settings, "seed": 1}))
    out = str(tmp_path / "out")
    assert run(["data", "pack", str(config), "--out", out]) == 0
    assert run(["data", "verify", out, "--sources", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": out, "faults": []}
    config.write_text(json.dumps(settings))
    assert run(["data", "pack", str(config), "--out", out]) == 0  # the same data: used again


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ('{"parst": []}', "did you mean 'parts'"),
        ("[]", "must be a JSON object"),
    ],
)
def test_bad_settings(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.json").write_text(content)
    assert run(["data", "pack", str(tmp_path / "c.json"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_broken_lines_follow_the_policy(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "t.jsonl").open("a") as file:
        file.write("oops\n" * 3)
    (tmp_path / "c.json").write_text(json.dumps(settings))
    pack = ["data", "pack", str(tmp_path / "c.json"), "--out", str(tmp_path / "out")]
    assert run([*pack, "--on-broken", "error"]) == 1
    assert "more than 0 broken lines (t.jsonl:61: no JSON" in capsys.readouterr().err
    assert run([*pack, "--max-broken", "2"]) == 1
    assert run(pack) == 0
    assert "left out 3 broken lines" in capsys.readouterr().err


def test_the_card_tells_where_everything_is_from(packed: Path) -> None:
    card = (packed / "README.md").read_text()
    manifest = json.loads((packed / "manifest.json").read_text())
    assert "80 documents" in card
    assert "| tales | 75.0% | 60 |" in card
    assert "| MIT | 40 |\n| PD | 20 |\n| not stated | 20 |" in card
    assert "sources beginning with `n`" in card
    for part in manifest["parts"].values():
        assert part["sha256"] in card
        assert part["starts_sha256"] in card
        assert part["files"][0]["sha256"] in card


def test_the_card_quotes_the_cleaning_report(settings: dict[str, Any], tmp_path: Path) -> None:
    rules = [{"name": "gopher-words-min", "limit": 50, "dropped": 7}]
    report = {"read": 67, "kept": 60, "rules": rules}
    (tmp_path / "t.jsonl.report.json").write_text(json.dumps(report))
    prepare(DataConfig.from_dict(settings), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "60 of 67 documents kept" in card
    assert "| gopher-words-min | 50 | 7 |" in card


def test_packed_data_without_fault(packed: Path) -> None:
    assert verify(packed, sources=True) == []


@pytest.mark.parametrize("name", ["tokenizer.json", "tales.tokens", "notes.starts"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "empty"])
def test_every_damaged_file_is_named(packed: Path, name: str, damage: str) -> None:
    file = packed / name
    raw = bytearray(file.read_bytes())
    raw[5] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"flip": bytes(raw), "cut": raw[:-16], "empty": b""}[damage])
    faults = verify(packed)
    assert faults
    assert all(fault.startswith(name.split(".")[0]) for fault in faults)


def test_a_changed_source_is_named(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "n.jsonl").write_text("{}")
    assert verify(packed) == []
    (fault,) = verify(packed, sources=True)
    assert fault.startswith("n.jsonl: its sha256")


def test_numbers_that_contradict_each_other(packed: Path) -> None:
    """With hashes that agree: what a faulty packer would write."""
    manifest = json.loads((packed / "manifest.json").read_text())
    for part in manifest["parts"].values():
        part["sha256"] = part["starts_sha256"] = None
    manifest["config"]["vocab_size"] = 290
    (packed / "manifest.json").write_text(json.dumps(manifest))
    starts = np.fromfile(packed / "notes.starts", "<u8")
    starts[3] += 1
    starts.tofile(packed / "notes.starts")
    faults = verify(packed)
    assert "notes.starts: a document does not begin with </s>" in faults
    assert any("beyond the vocabulary of 290" in fault for fault in faults)
    starts[3] = 0
    starts.tofile(packed / "notes.starts")
    assert "notes.starts: the index does not ascend from 0" in verify(packed)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"parts": {}}', '{"parts": 3}'])
def test_no_manifest_or_a_broken_one(packed: Path, content: str | None) -> None:
    (packed / "manifest.json").unlink()
    if content is not None:
        (packed / "manifest.json").write_text(content)
    with pytest.raises(CorpusError, match="damaged" if content else "no finished packed data"):
        verify(packed)
