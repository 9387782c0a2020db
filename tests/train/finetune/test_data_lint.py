"""`optlm data lint`: what the model will see, on every variant, and every fault of the text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optlm.cli import run
from optlm.data.inputs import find_inputs
from optlm.data.report import CorpusError
from optlm.errors import ConfigError
from optlm.tokenizer import Tokenizer
from optlm.train.finetune.examples import read_examples
from optlm.train.finetune.lint import PROBLEMS, lint
from variants import VARIANTS, make_state, tiny_tokenizer, write_checkpoint


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def tokenizer() -> Tokenizer:
    return Tokenizer(tiny_tokenizer(300))


def linted(path: Path, records: list[Any], **options: Any) -> dict[str, Any]:
    file = write(path / "x.jsonl", records)
    return lint(find_inputs([str(file)]), tokenizer(), **({"length": 30} | options))


def problems(report: dict[str, Any]) -> dict[str, int]:
    return {name: p["count"] for name, p in report["problems"].items() if p["count"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_tokens_and_labels_on_every_variant(
    variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = VARIANTS[variant]
    model = write_checkpoint(tmp_path / "model", config, make_state(config))
    pair = {"prompt": "the cat", "response": " sat"}
    file = write(tmp_path / "x.jsonl", [{"text": "the mat"}, pair])
    assert run(["data", "lint", str(file), "-m", str(model), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    text, answered = (example["tokens"] for example in report["examples"])
    ids = tiny_tokenizer(config.vocab_size)
    assert [token["id"] for token in text] == [*ids.encode("the mat").ids, 2]
    assert [token["label"] for token in text] == [False, *[True] * (len(text) - 1)]
    prompt, response = ids.encode("the cat").ids, ids.encode(" sat", add_special_tokens=False).ids
    assert [token["id"] for token in answered] == [*prompt, *response, 2]
    assert [token["label"] for token in answered] == [
        *[False] * len(prompt),
        *[True] * (len(response) + 1),
    ]
    assert (report["texts"], report["pairs"]) == (1, 1)
    assert report["length"] == config.max_position_embeddings
    assert report["predicted"] == len(text) - 1 + len(response) + 1


def test_faultless_text(tmp_path: Path) -> None:
    report = linted(tmp_path, [{"text": "the cat"}, {"text": "the mat in the rain"}])
    assert problems(report) == {}
    assert sum(report["histogram"].values()) == 2
    assert report["over_length"] == 0


LONG = "xyzabc" * 10  # 60 tokens
FAULTS = {
    "split": {"text": LONG},
    "truncated": {"prompt": LONG[:25], "response": "zzzzzzzz"},
    "too_long": {"prompt": "the", "response": LONG},
    "both": {"text": "the cat", "prompt": "the"},
    "masked": {"prompt": "the cat", "response": ""},
    "prompt_fills": {"prompt": LONG, "response": "q"},
    "written": {"text": "the cat</s>"},
    "exact_duplicates": {"text": "a text that is there twice"},
    "near_duplicates": {"text": "A text that is THERE twice!"},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_counted_with_its_place(tmp_path: Path, fault: str) -> None:
    good = {"text": "a text that is there twice"}
    report = linted(tmp_path, [good, FAULTS[fault]])
    wanted = {fault: 1} | ({"truncated": 1} if fault == "prompt_fills" else {})
    assert problems(report) == wanted
    (place,) = report["problems"][fault]["places"]
    assert place == ("record 2 like 1" if "duplicates" in fault else "x.jsonl:2")


@pytest.mark.parametrize("characters", range(26, 33))
def test_the_length_is_exact(tmp_path: Path, characters: int) -> None:
    """Of `length` + 1 tokens the model reads all but the last."""
    records = [{"text": "x" * characters}, {"prompt": "", "response": "y" * characters}]
    report = linted(tmp_path, records)
    tokens = characters + 2  # no two of these letters are one token
    assert report["longest"] == tokens
    fits = tokens - 1 <= 30
    assert problems(report) == ({} if fits else {"split": 1, "too_long": 1})


def test_tokenizers_that_add_another_start_token_or_none(tmp_path: Path) -> None:
    file = find_inputs([str(write(tmp_path / "x.jsonl", [{"text": "the cat"}]))])
    without = Tokenizer(tiny_tokenizer(300), settings={"add_bos_token": False})
    assert problems(lint(file, without, length=30)) == {"start_missing": 1}
    doubling = tokenizer()
    plain = doubling.encode
    doubling.encode = lambda *args, **options: [2, *plain(*args, **options)]  # type: ignore[method-assign]
    assert problems(lint(file, doubling, length=30)) == {"doubled": 1}


def test_held_out_overlap_and_broken_lines_end_with_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "one two three four five six seven eight nine ten eleven twelve thirteen"
    file = write(tmp_path / "x.jsonl", [{"text": f"So: {text.title()}."}])
    held = write(tmp_path / "h.jsonl", [{"question": text}])
    (tmp_path / "t.json").write_text(tiny_tokenizer(300).to_str())
    command = ["data", "lint", str(file), "--tokenizer", str(tmp_path / "t.json")]
    assert run(command) == 0
    assert "nothing wrong was found" in capsys.readouterr().out
    assert run([*command, "--held-out", str(held)]) == 1
    assert f"1 of 1 records of {held} found" in capsys.readouterr().out
    with file.open("a") as out:
        out.write("oops\n")
    assert run(command) == 1
    assert "x.jsonl:2: no JSON" in capsys.readouterr().out


def test_the_table_shows_both_ends_and_where_labels_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = {"prompt": "q" * 20, "response": "z" * 20}
    file = write(tmp_path / "x.jsonl", [pair])
    (tmp_path / "t.json").write_text(tiny_tokenizer(300).to_str())
    run(["data", "lint", str(file), "--tokenizer", str(tmp_path / "t.json")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "x.jsonl:1: 42 tokens"
    assert lines[1].split() == ["0", "2", "-", '"</s>"']
    assert lines[9].split() == ["...", "10", "more"]
    assert [line.split()[2] for line in lines[10:16]] == ["-"] * 3 + ["label"] * 3
    assert lines[20].split() == ["41", "2", "label", '"</s>"']


def test_training_sees_the_same(tmp_path: Path) -> None:
    """Against what fine-tuning reads, cut to a length or not."""
    records = [{"text": "the cat</s> in the rain"}, {"prompt": "the", "response": " mat"}]
    records += [{"prompt": "", "response": "x"}, {"prompt": "q" * 40, "response": "zz"}]
    report = linted(tmp_path, records, shown=9)
    whole, _ = read_examples(tmp_path / "x.jsonl", tokenizer(), length=1000)
    assert [[t["id"] for t in e["tokens"]] for e in report["examples"]] == [e.tokens for e in whole]
    assert [[t["label"] for t in e["tokens"]].index(True) for e in report["examples"]] == [
        example.first for example in whole
    ]
    cut, told = read_examples(
        tmp_path / "x.jsonl", tokenizer(), length=30, on_long="truncate_prompt"
    )
    assert report["problems"]["truncated"]["count"] == told.truncated == 1
    assert len(cut) == len(whole)


def test_nothing_to_look_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CorpusError, match=r"no usable record \(1 broken: x\.jsonl:1"):
        linted(tmp_path, [3])
    with pytest.raises(ConfigError, match="length is 0"):
        linted(tmp_path, [{"text": "a"}], length=0)
    assert run(["data", "lint", str(tmp_path / "x.jsonl"), "-m", str(tmp_path / "no")]) == 2


def test_every_problem_has_a_test() -> None:
    assert PROBLEMS.keys() == FAULTS.keys() | {"start_missing", "doubled"}
