"""The BabyLM protocol: pairs and surprisal against the models own losses, and a small track."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_corpus import story, write_corpus

from optlm import cli
from optlm.errors import ConfigError
from optlm.model import OPT
from optlm.train.pretrain.babylm import BabySettings, milestones, train
from optlm.train.pretrain.pairs import Pair, judge_pairs, log_probabilities, read_pairs, surprisal
from optlm.train.run.folder import RunFolder
from optlm.train.tokens.corpus import CorpusError
from variants import VARIANTS, make_state, write_checkpoint

BLIMP = Path(__file__).resolve().parents[4] / "shared" / "eval" / "blimp_300.jsonl.zst"


def model_of(variant: str) -> OPT:
    torch.manual_seed(0)
    return OPT(VARIANTS[variant]).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_sentences_together_score_as_alone(variant: str) -> None:
    """Against the loss of the model's full forward pass, one sentence at a time."""
    model = model_of(variant)
    random = torch.Generator().manual_seed(1)
    sentences = [
        [2, *torch.randint(4, 300, (length,), generator=random).tolist()]
        for length in (1, 9, 3, 64, 20, 3)
    ]
    told: list[int] = []
    scores = log_probabilities(model, sentences, progress=told.append)
    assert sum(told) == len(sentences)
    for ids, score in zip(sentences, scores, strict=True):
        tokens = torch.tensor([ids[:64]])
        with torch.no_grad():
            logits = model(tokens).logits[0, : len(ids) - 1].double().log_softmax(1)
        rows = torch.arange(len(ids) - 1)
        assert score == pytest.approx(float(logits[rows, ids[1:]].sum()), rel=1e-4)


def test_too_long_sentence_is_refused() -> None:
    with pytest.raises(CorpusError, match="66 tokens; the model's context is 64"):
        log_probabilities(model_of("base"), [[2] * 66])


def letters(texts: list[str]) -> list[list[int]]:
    return [[2, *text.encode()] for text in texts]


def test_shares_are_means_over_paradigms() -> None:
    """A model that knows only how likely the letter a is."""
    model = model_of("base")
    with torch.no_grad():
        model.head_weight.zero_()
        model.decoder.finish = lambda x: torch.ones_like(x)  # type: ignore[method-assign]
        model.head_weight[ord("a")] = 1.0

    def pair(good: str, bad: str, paradigm: str) -> Pair:
        return Pair(good, bad, (("field", "x"), ("paradigm", paradigm)))

    pairs = [pair("aab", "abb", "p"), pair("bab", "bbb", "p"), pair("bb", "ab", "q")]
    told = judge_pairs(model, letters, [*pairs, pair("ba", "ab", "p")])  # a tie is no success
    assert told["accuracy"] == pytest.approx((2 / 3 + 0) / 2, abs=1e-4)
    assert told["field"] == {"x": 0.5}
    assert (told["pairs"], told["identical"]) == (4, 0)
    assert judge_pairs(model, letters, [pair("a", "a", "p")])["identical"] == 1
    assert told["paradigm"] == {"p": 0.6667, "q": 0.0}


def test_surprisal_of_a_uniform_model() -> None:
    model = model_of("base")
    with torch.no_grad():
        model.head_weight.zero_()
    told = surprisal(model, letters, ["abc de", "f"])
    bits = math.log2(300)
    assert told == {
        "bits_per_word": pytest.approx(7 * bits / 3, abs=1e-3),
        "bits_per_byte": pytest.approx(bits, abs=1e-3),
        "words": 3,
    }


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "no minimal pair"),
        ("{", "x.jsonl:1 is no minimal pair"),
        ('{"good": "a"}', "x.jsonl:1 is no minimal pair: give 'good' and 'bad'"),
        ("[1]", "x.jsonl:1 is no minimal pair"),
    ],
)
def test_files_that_hold_no_pairs(tmp_path: Path, lines: str, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(lines + "\n")
    with pytest.raises(CorpusError, match=message):
        read_pairs(tmp_path / "x.jsonl")


@pytest.mark.skipif(not BLIMP.exists(), reason="BLiMP is not here")
def test_blimp_is_read() -> None:
    pairs = read_pairs(BLIMP, per_paradigm=2)
    assert len(pairs) == 2 * 67
    assert len({dict(pair.groups)["paradigm"] for pair in pairs}) == 67


def test_milestones_are_the_challenges() -> None:
    millions = [mark / 10**6 for mark in milestones(10_000_000, 100_000_000)]
    assert millions == [*range(1, 11), *range(20, 101, 10)]
    assert len(milestones(100_000_000, 10**9)) == 28
    assert milestones(1000, 2500) == (*range(100, 1001, 100), 2000)


# ---- the whole way
# ----------------------------------------------------------------------------------


@pytest.fixture
def settings(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    pairs = [
        {"good": "the cat sat", "bad": "cat the sat", "paradigm": "order", "phenomenon": "order"},
        {"good": "a dog ran", "bad": "dog ran a", "paradigm": "order", "phenomenon": "order"},
    ]
    text = write_corpus(tmp_path / "text.jsonl", [{"text": story(i)} for i in range(5)])
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    del recipe["loop"]["steps"]
    recipe["loop"] |= {"evaluate_every": 1000, "checkpoint_every": 1000}
    recipe["babylm"] = {
        "words": 4000, "epochs": 2, "pairs": str(tmp_path / "pairs.jsonl"),
        "surprisal": {"stories": str(text)},
    }  # fmt: skip
    return recipe


def test_a_small_track(settings: dict[str, Any], tmp_path: Path) -> None:
    told: list[str] = []
    train(BabySettings.from_dict(settings), tmp_path / "run", log=told.append)
    events = RunFolder(tmp_path / "run").events()
    counts = next(line for line in told if " times is " in line)
    words, tokens = (int(part.replace(",", "")) for part in counts.split()[:3:2])
    assert words == sum(len(story(i).split()) for i in range(60)) + sum(
        len(story(i * 3).split()) + 2 for i in range(40)
    )
    steps = math.ceil(2 * tokens / settings["batch_tokens"])
    assert events[-1]["step"] == steps
    judged = [event for event in events if event["kind"] == "valid"]
    reached = [event["reached"]["words"] for event in judged if "reached" in event]
    assert reached == [mark for mark in (*range(400, 4001, 400), 8000) if mark <= 2 * words]
    assert judged[-1]["pairs"]["pairs"] == 2
    first, last = (judged[i]["surprisal"]["stories"]["bits_per_word"] for i in (0, -1))
    assert last < first
    kept = [event["step"] for event in judged if "reached" in event]
    assert set(kept) <= set(RunFolder(tmp_path / "run").steps())


def test_text_beyond_the_track_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["babylm"]["words"] = 100
    with pytest.raises(ConfigError, match=r"words; babylm\.words allows 100"):
        train(BabySettings.from_dict(settings), tmp_path / "run")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("loop", {"steps": 5}, "loop.steps follows from"),
        ("babylm", {"word": 5}, "unknown key 'word'.*did you mean 'words'"),
        ("babylm", {"epochs": 0}, "babylm.epochs"),
        ("babylm", {"pairs_per_paradigm": 0}, "pairs_per_paradigm"),
        ("precision", "f8", "f8"),
    ],
)
def test_bad_settings_are_refused_at_once(
    settings: dict[str, Any], key: str, value: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        BabySettings.from_dict(settings | {key: value})


def test_command(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "baby.json"
    settings["babylm"]["epochs"] = 1
    file.write_text(json.dumps(settings))
    assert cli.run(["babylm", "train", str(file), "--out", str(tmp_path / "run")]) == 0
    config = VARIANTS["mini"]
    model = write_checkpoint(tmp_path / "model", config, make_state(config))
    capsys.readouterr()
    pairs, text = settings["babylm"]["pairs"], settings["babylm"]["surprisal"]["stories"]
    command = ["babylm", "test", "-m", str(model), "--pairs", pairs, "--text", text]
    assert cli.run([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pairs"]["pairs"] == 2
    assert cli.run(command) == 0
    output = capsys.readouterr().out
    assert "of 2 minimal pairs" in output
    assert f"{told['surprisal']['bits_per_word']:.2f} bits a word" in output
    assert cli.run(["babylm", "test", "-m", str(model)]) == 2
    assert "give --pairs FILE" in capsys.readouterr().err
