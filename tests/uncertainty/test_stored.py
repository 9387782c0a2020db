"""Files of temperatures and rules: whole, checked, and of one model only."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optlm.errors import CheckpointError, RequestError
from optlm.uncertainty.selective import learn_rule
from optlm.uncertainty.stored import (
    DataMark,
    StoredRule,
    StoredTemperature,
    default_path,
    load_rule,
    load_temperature,
    model_mark,
    save,
)


def temperature(mark: dict[str, Any], data: DataMark) -> StoredTemperature:
    figures = {"nll": 1.0, "ece": 0.1, "ece_low": 0.05, "ece_high": 0.2}
    return StoredTemperature(
        kind="tokens", temperature=1.25, scoring="next token", model=mark, data=data,
        before=figures, after=figures,
    )  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> DataMark:
    path = tmp_path / "texts.txt"
    path.write_text("the cat\nsat\n")
    return DataMark.of_file(path, items=2, of="documents")


def test_what_is_saved_is_loaded(folders: dict[str, Path], tmp_path: Path, data: DataMark) -> None:
    mark = model_mark(folders["base"])
    stored = temperature(mark, data)
    save(stored, tmp_path / "t.json")
    assert load_temperature(tmp_path / "t.json", kind="tokens", model=mark) == stored
    for never in (0.1, 0.4):
        random = np.random.default_rng(0)
        rule = learn_rule(random.random(100), random.random(100) < never, risk=0.2)
        whole = StoredRule(
            estimator="entropy", task="choices", settings="x", rule=rule, model=mark, data=data
        )
        save(whole, tmp_path / "r.json")
        assert load_rule(tmp_path / "r.json", task="choices", model=mark) == whole
        with pytest.raises(CheckpointError, match="learned on choices, not on answers"):
            load_rule(tmp_path / "r.json", task="answers", model=mark)
        assert "texts.txt" in whole.basis


def test_another_model_or_adapter_is_refused(
    folders: dict[str, Path], tmp_path: Path, data: DataMark
) -> None:
    mark = model_mark(folders["base"])
    save(temperature(mark, data), tmp_path / "t.json")
    with pytest.raises(CheckpointError, match="its config and weights differ"):
        load_temperature(tmp_path / "t.json", kind="tokens", model=model_mark(folders["mini"]))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="its adapter differ"):
        load_temperature(
            tmp_path / "t.json", kind="tokens", model=model_mark(folders["base"], adapter)
        )
    with pytest.raises(CheckpointError, match="for tokens, not for choices"):
        load_temperature(tmp_path / "t.json", kind="choices", model=mark)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: v.pop("format"), "is no temperature file of optlm"),
        (lambda v: v.pop("scoring"), "needs exactly the fields"),
        (lambda v: v.update(more=1), "needs exactly the fields"),
        (lambda v: v.update(temperature="2"), "temperature is '2'"),
        (lambda v: v.update(temperature=float("nan")), "temperature is nan"),
        (lambda v: v.update(temperature=0.0), "must be 0.01 to 100"),
        (lambda v: v.update(kind="words"), "kind is 'words'"),
        (lambda v: v.update(model=3), "made for another model"),
        (lambda v: v.update(data=[]), "needs exactly the fields name"),
    ],
)
def test_damaged_files_are_refused(
    folders: dict[str, Path],
    tmp_path: Path,
    data: DataMark,
    change: Callable[[dict[str, Any]], object],
    told: str,
) -> None:
    mark = model_mark(folders["base"])
    path = tmp_path / "t.json"
    save(temperature(mark, data), path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=told):
        load_temperature(path, kind="tokens", model=mark)


def test_files_that_are_no_json_or_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    mark = model_mark(folders["base"])
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not a JSON object"):
        load_rule(tmp_path / "t.json", task="choices", model=mark)
    with pytest.raises((CheckpointError, FileNotFoundError)):
        load_rule(tmp_path / "none.json", task="choices", model=mark)


def test_a_place_beside_the_model(folders: dict[str, Path]) -> None:
    assert default_path("tokens", folders["base"], None).parent == folders["base"]
    assert default_path("choices", None, folders["mini"]).parent == folders["mini"]
    for model in (None, "facebook/opt-125m"):
        with pytest.raises(RequestError, match="name a file"):
            default_path("tokens", model, None)
