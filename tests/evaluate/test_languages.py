"""Languages side by side: what is counted, and which language a text is in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from optlm import LLM
from optlm.cli import run
from optlm.engine.outputs import Completion, RequestOutput
from optlm.errors import RequestError
from optlm.evaluate.identify import Identifier, pieces_of
from optlm.evaluate.languages import language_report, languages_table
from variants import VARIANTS

ENGLISH = "The cat sat on the mat. Then it went home in the rain, because nobody was there."
LINE = "Then it went home in the rain, because nobody was there."
GERMAN = "Die Katze saß auf der Matte. Dann ging sie im Regen nach Hause, weil niemand da war."
TEXTS = {"en": [ENGLISH, "once upon a time"], "de": [GERMAN], "ru": ["кошка сидела на ковре"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_figures_are_those_of_the_texts(variant: str, folders: dict[str, Path]) -> None:
    llm = LLM(str(folders[variant]), dtype="f32")
    rows = {row.language: row for row in language_report(llm, TEXTS).rows}
    for language, texts in TEXTS.items():
        row = rows[language]
        scored = llm.score(texts)
        assert row.tokens == sum(each.num_scored for each in scored)
        assert row.characters == sum(map(len, texts))
        nats = -math.fsum(each.total for each in scored)
        assert row.bits_per_byte * row.bytes == pytest.approx(nats / math.log(2))
        assert row.bits_per_character * row.characters == pytest.approx(nats / math.log(2))
        assert row.context_characters == pytest.approx(512 / row.tokens_per_character)
    assert rows["en"].tax == 1
    wanted = rows["ru"].tokens_per_character / rows["en"].tokens_per_character
    assert rows["ru"].tax == pytest.approx(wanted)
    assert wanted > 1.5  # two bytes a letter, none of them merged


class Speaks:
    """An engine whose continuations are given."""

    def __init__(self, llm: LLM, text: str) -> None:
        self._llm, self._text = llm, text

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def generate(self, prompts: list[str], _: Any) -> list[Any]:
        said = Completion(index=0, text=self._text, token_ids=[2], finish_reason="stop")
        return [RequestOutput(prompt=p, prompt_token_ids=[2], outputs=[said]) for p in prompts]


@pytest.mark.parametrize(
    ("said", "switched"),
    [(ENGLISH, 0.0), (GERMAN, 1.0), (f"{LINE}\n{GERMAN}", len(GERMAN) / len(LINE + GERMAN))],
)
def test_planted_switches_are_counted(said: str, switched: float, base: LLM) -> None:
    (row,) = language_report(Speaks(base, said), {"en": [ENGLISH]}, generate=1).rows  # type: ignore[arg-type]
    assert row.mistaken == 0
    assert row.switched == pytest.approx(switched, abs=0.02)  # but for spaces between sentences
    assert row.pieces == len(pieces_of(said))


def test_a_language_that_nobody_identifies_has_no_rate(base: LLM) -> None:
    report = language_report(base, {"haw": ["he aha keia"], "en": [ENGLISH]}, generate=1)
    rows = {row.language: row for row in report.rows}
    assert rows["haw"].switched is None
    assert rows["en"].pieces >= 0
    assert languages_table(report).splitlines()[0].split()[:3] == ["language", "texts", "bits/byte"]


def test_identifier() -> None:
    identifier = Identifier()
    assert identifier.language(ENGLISH) == "en"
    assert identifier.language(GERMAN) == "de"
    assert identifier.knows("pt-BR")
    assert identifier.knows("nb")
    assert not identifier.knows("haw")
    assert identifier.share_of_others("pt-BR", ["Todos os seres humanos nascem livres"]) == 0
    assert identifier.share_of_others("en", []) is None
    assert pieces_of("Too short.\nThis one is long enough to tell.") == [
        "This one is long enough to tell."
    ]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ({}, {}, "there are no texts"),
        ({"en": ["x", " "]}, {}, "language 'en' has no text, or an empty one"),
        ({"en": ["x"]}, {"generate": -1}, "generate is -1"),
    ],
)
def test_what_cannot_be_measured(
    texts: dict[str, list[str]], options: dict[str, int], message: str, base: LLM
) -> None:
    with pytest.raises(RequestError, match=message):
        language_report(base, texts, **options)  # type: ignore[arg-type]


def test_command(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "corpus.jsonl"
    records: list[dict[str, str]] = [{"text": t, "lang": k} for k, v in TEXTS.items() for t in v]
    lines = map(json.dumps, [*records, {"text": "no language"}])
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["languages", str(file), "-m", str(folders["base"])]
    assert run([*words, "--limit", "1", "--generate", "1"]) == 0
    shown = capsys.readouterr()
    assert {line.split()[0] for line in shown.out.splitlines()[1:4]} == set(TEXTS)
    assert "1 records have no text or no language" in shown.err
    assert run([*words, "--lang", "en", "--json"]) == 0
    rows = {row["language"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["en"]["texts"] == 3
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text('{"a": 1}\n')
    assert run(["languages", str(nothing)]) == 2
    assert "name the language with --lang" in capsys.readouterr().err
    assert run([*words, "--limit", "0"]) == 2
