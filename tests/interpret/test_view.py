"""`optlm inspect`: what a terminal and a machine see, on every variant, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from subjects import TEXT, subject

from optlm.cli import run
from optlm.errors import RequestError
from optlm.interpret.view import as_json, as_text, study
from variants import VARIANTS, make_state, write_checkpoint

every_variant = pytest.mark.parametrize("name", VARIANTS)


@every_variant
def test_text_and_json_tell_the_same(name: str) -> None:
    found = study(subject(name), TEXT, position=3)
    card = json.loads(json.dumps(as_json(found), allow_nan=False))
    config = VARIANTS[name]
    assert "".join(row["text"] for row in card["tokens"][1:]) == TEXT
    assert "logprob" not in card["tokens"][0]
    assert card["lens"]["position"] == 3
    assert card["lens"]["target"]["id"] == card["tokens"][4]["id"]
    assert [row["layer"] for row in card["lens"]["rows"]] == [
        None,
        *range(config.num_hidden_layers),
    ]
    last = card["lens"]["rows"][-1]
    assert last["target_logprob"] == pytest.approx(card["tokens"][4]["logprob"], abs=1e-5)
    assert len(card["heads"]) == config.num_hidden_layers * config.num_attention_heads
    text = as_text(found)
    assert f"layer {config.num_hidden_layers - 1}" in text
    assert repr(card["tokens"][4]["text"]) in text
    if config.activation_function == "relu":
        assert f"{card['sparsity']['mean_share']:.1%} of the inputs of fc2" in text
    else:
        assert "gelu has no exact zeros" in card["sparsity"]["reason"]
        assert "active units: gelu has no exact zeros" in text
    assert max(map(len, as_text(found, width=60).split("\n\n")[1].split("\n")[1:])) <= 60


def test_colours_are_those_of_the_surprisal() -> None:
    found = study(subject("base"), TEXT)
    text = as_text(found, colour=True)
    body = text.split("\n\n")[0].split("\n", 2)[2]
    assert body.count("\x1b[48;5;") == len(found.tokens) - 1
    assert as_text(found).count("\x1b") == 0


def test_control_characters_do_not_reach_the_terminal() -> None:
    text = as_text(study(subject("base"), "the\x1b[2J cat\tsat\n"))
    assert "\x1b" not in text
    assert "\\x1b" in text


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = VARIANTS["350m"]
    folder = str(write_checkpoint(tmp_path / "model", config, make_state(config)))
    assert run(["inspect", TEXT, "--model", folder, "--top", "2"]) == 0
    shown = capsys.readouterr().out
    assert "logit lens after token" in shown
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    assert run(["inspect", "--file", str(file), "-m", folder, "--json", "--top", "2"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["text"] == TEXT
    assert len(card["lens"]["rows"][0]["top"]) == 2
    page = tmp_path / "page.html"
    assert run(["inspect", TEXT, "-m", folder, "--html", str(page)]) == 0
    assert page.read_text(encoding="utf-8").startswith("<!")
    assert not capsys.readouterr().out


def test_nan_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = make_state(VARIANTS["base"])
    state["model.decoder.layers.0.fc1.weight"][0, 0] = np.nan
    folder = write_checkpoint(tmp_path, VARIANTS["base"], state)
    assert run(["inspect", TEXT, "-m", str(folder)]) == 2
    assert "model.decoder.layers.0.fc1.weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a TEXT"),
        (["a", "--file", "b"], "give a TEXT"),
        ([""], "the text is empty"),
        (["a", "--html", "x", "--json"], "do not go together"),
        (["a", "--position", "9"], "no position 9; the text has 2 tokens"),
        (["a", "--top", "0"], "top is 0"),
        (["word " * 1100], "the context is 1024"),
        (["--file", "nowhere.txt"], "nowhere.txt"),
        (["a", "--model", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9")
    assert run(["inspect", "--file", str(file)]) == 2
    assert "latin.txt is not UTF-8 (byte 3)" in capsys.readouterr().err


def test_position_out_of_range() -> None:
    with pytest.raises(RequestError, match="0 is the start token"):
        study(subject("base"), TEXT, position=-100)
