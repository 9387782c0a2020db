"""Items, the report that compares estimators, calibration in halves, and the commands for them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from optlm import LLM, SamplingParams
from optlm.errors import RequestError
from optlm.uncertainty.calibrating import calibrate_choices
from optlm.uncertainty.evaluation import (
    Judged,
    choice_probabilities,
    judge_answers,
    judge_choices,
    report,
)
from optlm.uncertainty.items import Item, read_items, read_texts
from variants import VARIANTS

Command = Callable[..., tuple[int, str, str]]
RANDOM = np.random.default_rng(4)
WORDS = ["the", "cat", "sat", "on", "mat", "and", "then", "other", "cats", "went", "home", "rain"]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def items(base: LLM, tmp_path: Path) -> Path:
    """Items that a model is right about less often than it thinks: labels at a temperature of 4."""
    random = np.random.default_rng(6)
    asked = [
        Item(
            prompt=" ".join(random.choice(WORDS, 3)),
            choices=tuple(f" {word}" for word in random.choice(WORDS, 3, replace=False)),
        )
        for _ in range(80)
    ]
    scores = judge_choices(base, asked).scores
    assert scores is not None
    rows = [
        {
            "prompt": item.prompt,
            "choices": list(item.choices),
            "gold": int(random.choice(3, p=choice_probabilities(each, 4.0))),
        }
        for item, each in zip(asked, scores, strict=True)
    ]
    return write(tmp_path / "items.jsonl", rows)


# ---- items ---------------------------------------------------------------------------------------


def test_items_of_all_kinds(tmp_path: Path) -> None:
    rows = [
        {"good": "a", "bad": "b", "paradigm": "x"},
        {"prompt": "p", "choices": ["x", " y"], "gold": 1},
        {"question": "q?", "choices": ["x", "y"], "gold": 0},
        {"context": "c ", "choices": ["x", "y"], "gold": 0},
    ]
    pair, plain, question, context = read_items(write(tmp_path / "a.jsonl", rows))
    assert (pair.prompt, pair.choices, pair.gold) == ("", ("a", "b"), 0)
    assert (plain.choices, plain.gold) == ((" x", " y"), 1)
    assert question.prompt == "Question: q?\nAnswer:"
    assert context.choices == ("x", "y")
    assert len(read_items(tmp_path / "a.jsonl", limit=2)) == 2
    (answer,) = read_items(write(tmp_path / "b.jsonl", [{"question": "q", "answers": ["A"]}]))
    assert answer.answers == ("A",)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{", "x.jsonl:1 is no item"),
        ([1], "holds an object, not a list"),
        ({"prompt": "p", "choices": ["a", "b"]}, "label is missing: gold is None"),
        ({"prompt": "p", "choices": ["a", "b"], "gold": True}, "label is missing"),
        ({"prompt": "p", "choices": ["a", "b"], "gold": 2}, "gold is 2; there are 2 choices"),
        ({"prompt": "p", "choices": ["a"], "gold": 0}, "at least 2 choices"),
        ({"prompt": "p", "choices": ["a", ""], "gold": 0}, "texts that are not empty"),
        ({"prompt": "p"}, "labels are missing: give choices and gold, or answers"),
        ({"prompt": "", "answers": ["a"]}, "prompt is ''; it must be a text"),
        ({"answers": ["a"]}, "it needs prompt, context or question"),
        ({"good": "a"}, "bad is None"),
        ("", "holds no item, so there are no labels"),
    ],
)
def test_lines_that_are_no_items(tmp_path: Path, row: Any, told: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(row if isinstance(row, str) else json.dumps(row), encoding="utf-8")
    with pytest.raises(RequestError, match=told):
        read_items(path)


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    rows = [{"good": "a", "bad": "b"}, {"prompt": "p", "answers": ["a"]}]
    with pytest.raises(RequestError, match="mixes items"):
        read_items(write(tmp_path / "x.jsonl", rows))


def test_texts(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("one\n\n two\n", encoding="utf-8")
    assert read_texts(path) == ["one", " two"]
    assert read_texts(write(tmp_path / "t.jsonl", [{"text": "a"}]), limit=3) == ["a"]
    with pytest.raises(RequestError, match=r"t\.jsonl:1 holds no text"):
        read_texts(write(tmp_path / "t.jsonl", [{"txt": "a"}]))
    with pytest.raises(RequestError, match="its text is a int"):
        read_texts(write(tmp_path / "t.jsonl", [{"text": 1}]))
    path.write_text("\n\n")
    with pytest.raises(RequestError, match="holds no text"):
        read_texts(path)
    path.write_bytes(b"one\ncaf\xe9\n")
    with pytest.raises(RequestError, match=r"t\.txt:2 is not UTF-8 \(byte 3 of the line\)"):
        read_texts(path)
    lines = tmp_path / "t.jsonl"
    lines.write_bytes(b'{"text": "caf\xe9"}\n')
    for read in (read_texts, read_items):
        with pytest.raises(RequestError, match=r"t\.jsonl:1 is not UTF-8 \(byte 13 of the line\)"):
            read(lines)


# ---- judging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_choices_are_judged_by_their_likelihood(engine: Callable[[str], LLM], name: str) -> None:
    llm = engine(name)
    items = [Item(prompt="the cat", choices=(" sat", " home again", " rain"), gold=1)] * 2
    items.append(Item(prompt="", choices=("the mat sat", "the cat sat"), gold=0))
    for scoring in ("total", "token", "byte"):
        judged = judge_choices(llm, items, scoring=scoring, ask_true=True)  # type: ignore[arg-type]
        assert judged.scores is not None
        assert judged.scores[0] == pytest.approx(judged.scores[1])
        assert judged.wrong.tolist() == [
            int(scores.argmax()) != item.gold
            for scores, item in zip(judged.scores, items, strict=True)
        ]
        assert set(map(len, judged.figures.values())) == {3}
    total = judge_choices(llm, items)
    best = int(total.scores[0].argmax())  # type: ignore[index]
    assert total.texts[0] == items[0].choices[best]
    assert -total.figures["likelihood"][0] == pytest.approx(total.scores[0][best], abs=1e-4)  # type: ignore[index]
    probs = np.exp(total.scores[0] / 2) / np.exp(total.scores[0] / 2).sum()  # type: ignore[index]
    warm = judge_choices(llm, items, temperature=2.0).figures
    assert warm["choice-probability"][0] == pytest.approx(1 - probs.max())
    assert warm["choice-entropy"][0] == pytest.approx(-(probs * np.log(probs)).sum())


def test_written_answers_are_right_when_they_match(base: LLM) -> None:
    from optlm.uncertainty.asking import ask

    (answered,) = ask(base, ["the cat"], samples=2, max_tokens=3)
    items = [
        Item(prompt="the cat", answers=("no", answered.text.upper() + ".")),
        Item(prompt="the cat", answers=("no",)),
    ]
    judged = judge_answers(base, items, samples=2, max_tokens=3)
    assert judged.wrong.tolist() == [False, True]
    assert {"semantic-entropy", "disagreement", "p-true"} < set(judged.figures)
    with pytest.raises(RequestError, match="items with answers are needed"):
        judge_answers(base, [Item(prompt="", choices=("a", "b"))])
    with pytest.raises(RequestError, match="items with choices are needed"):
        judge_choices(base, [])


# ---- the report ----------------------------------------------------------------------------------


def planted(count: int = 600) -> Judged:
    """Entropy knows a little; one estimator knows more, one nothing, one the contrary."""
    wrong = RANDOM.random(count) < 0.4
    signal = wrong.astype(float)
    figures = {
        "entropy": signal + RANDOM.normal(0, 2, count),
        "better": signal + RANDOM.normal(0, 0.5, count),
        "noise": RANDOM.normal(size=count),
        "same": np.zeros(count),
    }
    figures["same"] = figures["entropy"] * 3
    figures["contrary"] = -figures["better"]
    return Judged(wrong=wrong, figures=figures, asked=[], texts=[])


def test_an_estimator_that_does_not_beat_entropy_is_reported_so() -> None:
    rows = {row.estimator: row for row in report(planted())}
    assert rows["entropy"].verdict == "baseline"
    assert rows["better"].verdict == "beats entropy"
    assert rows["same"].verdict == "does not beat entropy"
    assert rows["contrary"].verdict == "worse than entropy"
    assert rows["noise"].verdict in {"does not beat entropy", "worse than entropy"}
    assert rows["same"].difference == rows["same"].low == rows["same"].high == 0
    assert rows["better"].low < rows["better"].difference < rows["better"].high


def test_labels_of_one_class_have_no_report() -> None:
    judged = planted(10)
    judged.wrong[:] = True
    with pytest.raises(RequestError, match="all 10 answers are wrong"):
        report(judged)


def test_calibration_of_choices_in_halves(base: LLM, items: Path) -> None:
    found = calibrate_choices(base, read_items(items))
    assert (found.fitted_on, found.held_out) == (40, 40)
    assert found.temperature > 1  # the model was too sure
    assert found.nll_after < found.nll_before
    assert found.after.ece < found.before.ece
    with pytest.raises(RequestError, match="3 items are too few"):
        calibrate_choices(base, read_items(items)[:3])


# ---- commands ------------------------------------------------------------------------------------


def test_calibrate_stores_what_evaluate_uses(
    command: Command, folders: dict[str, Path], items: Path, tmp_path: Path
) -> None:
    base = ("-m", folders["base"], "--dtype", "f32")
    out, picture = tmp_path / "t.json", tmp_path / "r.svg"
    code, told, err = command(
        "uncertainty",
        "calibrate",
        items,
        "--of",
        "choices",
        "--out",
        out,
        "--picture",
        picture,
        *base,
    )
    assert (code, told.count("ECE")) == (0, 2), err
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    evaluate = ("uncertainty", "evaluate", items, "--temperature", out)
    code, told, err = command(*evaluate, *base, "--json")
    assert code == 0, err
    record = json.loads(told)
    assert record["items"] == 80
    assert {row["estimator"] for row in record["estimators"]} > {"entropy", "choice-margin"}
    code, _, err = command(*evaluate, "--scoring", "byte", *base)
    assert code == 2
    assert "is for --scoring total, not byte" in err
    code, _, err = command(*evaluate, "-m", folders["mini"])
    assert code == 1 or code == 2
    assert "was made for another model" in err


@pytest.mark.parametrize("name", VARIANTS)
def test_calibrate_saves_beside_the_model(
    command: Command,
    engine: Callable[[str], LLM],
    folders: dict[str, Path],
    tmp_path: Path,
    name: str,
) -> None:
    llm = engine(name)
    assert llm.tokenizer is not None
    size = llm.config.vocab_size
    letters = [i for i in range(size) if llm.tokenizer.decode([i]).strip().isalpha()]
    barred = dict.fromkeys(set(range(size)) - set(letters), -1e4)
    params = SamplingParams(max_tokens=30, ignore_eos=True, n=12, seed=3, logit_bias=barred)
    (written,) = llm.generate([[2]], params)  # only letters: other than the model would write
    path = write(tmp_path / "texts.jsonl", [{"text": each.text} for each in written.outputs])
    code, out, err = command(
        "uncertainty", "calibrate", path, "--save", "--json", "-m", folders[name]
    )
    assert code == 0, err
    record = json.loads(out)
    assert record["after"]["nll"] < record["before"]["nll"]
    stored = json.loads((folders[name] / "optlm_temperature_tokens.json").read_text())
    assert stored["temperature"] == record["temperature"]
    assert stored["data"]["sha256"] == record["data_sha256"]
    measured = ("uncertainty", "tokens", "-t", "the cat sat", "--json", "-m", folders[name])
    _, plain, _ = command(*measured)
    code, warm, err = command(*measured, "--temperature", "auto")
    assert code == 0, err
    assert json.loads(warm)["mean_entropy"] != json.loads(plain)["mean_entropy"]
    (folders[name] / "optlm_temperature_tokens.json").unlink()
    code, _, err = command(*measured, "--temperature", "auto")
    assert code == 2
    assert "optlm_temperature_tokens.json" in err


def test_evaluate_learns_a_rule_that_answer_uses(
    command: Command, folders: dict[str, Path], tmp_path: Path
) -> None:
    base = ("-m", folders["base"], "--dtype", "f32")
    _, told, _ = command(
        "uncertainty", "answer", "the cat", "-n", 2, "--max-tokens", 3, "--json", *base
    )
    right = json.loads(told)["answer"]
    rows = [{"prompt": "the cat", "answers": [right]}] * 60 + [{"prompt": "rain", "answers": ["x"]}]
    path = write(tmp_path / "qa.jsonl", rows)
    rule, picture = tmp_path / "rule.json", tmp_path / "curves.svg"
    code, told, err = command(
        "uncertainty", "evaluate", path, "-n", 2, "--max-tokens", 3, "--risk", 0.2,
        "--save-rule", rule, "--picture", picture, *base,
    )  # fmt: skip
    assert code == 0, err
    assert "semantic-entropy" in told
    assert "61 items of qa.jsonl" in told
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")
    answer = ("uncertainty", "answer", "the cat", "-n", 2, "--max-tokens", 3)
    code, told, err = command(*answer, "--rule", rule, "--flag", "entropy>99", *base)
    assert code == 0, err
    assert "ok    entropy against a threshold of" in told
    assert "not calibrated" in told
    code, _, err = command(*answer, "--rule", rule, "-m", folders["mini"])
    assert "was made for another model" in err
    _, told, _ = command(*answer, *base)
    assert "no flags" in told


def test_further_estimators(command: Command, folders: dict[str, Path], items: Path) -> None:
    base = ("-m", folders["base"], "--dtype", "f32")
    evaluate = ("uncertainty", "evaluate", items, "--limit", 12)
    code, told, err = command(
        *evaluate, *base, "--ensemble", folders["no_final_norm"], "--dropout", 0.1, "--p-true"
    )
    assert code == 0, err
    assert {"ensemble", "mc-dropout", "p-true"} < set(told.split())
    code, _, err = command(*evaluate, *base, "--ensemble", folders["mini"])
    assert code == 2
    assert "vocabulary of 512 tokens" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("evaluate", "none.jsonl"), "none.jsonl: No such file"),
        (("evaluate", "ITEMS", "--save-rule", "r.json"), "--save-rule goes with --risk"),
        (("evaluate", "ITEMS", "--risk", "0.3", "--by", "entropie"), "did you mean 'entropy'"),
        (("evaluate", "ITEMS", "--risk", "0.01"), "cannot bound a risk of 0.01"),
        (("calibrate", "ITEMS", "--limit", "2", "--of", "choices"), "2 items are too few"),
        (("answer", "the", "-n", "1"), "1 samples cannot disagree"),
        (("answer", "the", "--flag", "entropy"), "NAME>NUMBER"),
        (("answer", ""), "empty"),
        (("nothing",), "invalid choice"),
    ],
)
def test_bad_input_ends_with_a_message(
    command: Command, folders: dict[str, Path], items: Path, words: tuple[str, ...], told: str
) -> None:
    given = [items if word == "ITEMS" else word for word in words]
    code, _, err = command("uncertainty", *given, "-m", folders["base"])
    assert code == 2, err
    assert told in err


def test_a_missing_library_is_named(
    command: Command, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.jsonl.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    code, _, err = command("uncertainty", "evaluate", tmp_path / "x.jsonl.zst")
    assert code == 1
    assert "needs zstandard; install it with: pip install 'optlm[train]'" in err
