"""Each rule of Gopher and C4 on a text that passes and one that does not."""

from __future__ import annotations

from collections import Counter

import pytest

from optlm.data.c4_lines import keep_c4_lines
from optlm.data.rules import GROUPS, RULES, Document, blocklist_rule, choose_rules
from optlm.errors import ConfigError

GOOD = (
    "The old baker woke before the sun and walked down to the harbour. There, with a lantern in "
    "his hand, stood a young sailor who had lost his way. Nobody else was awake. They sat on the "
    "wall, shared a warm loaf, and talked about storms, bread and far cities until the first boats "
    "came home. When the bells rang, the sailor thanked him and went to look for his ship."
)
WORDS = GOOD.split()
OFFENDERS = {
    "gopher-words-min": "The cat sat and the dog ran.",
    "gopher-words-max": "the and " * 50_001,
    "gopher-word-length-min": "a b " * 40,
    "gopher-word-length-max": "incomprehensibilities " * 60,
    "gopher-symbols": GOOD + " #" * 10,
    "gopher-bullets": "\n".join(f"- {word}" for word in WORDS),
    "gopher-ellipses": "\n".join(f"{word}..." if i % 2 else word for i, word in enumerate(WORDS)),
    "gopher-alphabetic": GOOD + " 12" * 30,
    "gopher-stop-words": "der Hund lief schnell " * 20,
    "gopher-duplicate-lines": "\n".join([GOOD, *["x"] * 9]),
    "gopher-duplicate-paragraphs": "\n\n".join([GOOD, *["x"] * 9]),
    "gopher-duplicate-line-chars": f"{GOOD}\n{GOOD}",
    "gopher-duplicate-paragraph-chars": f"{GOOD}\n\n{GOOD}",
    "gopher-top-2-gram": GOOD + " strawberry icecream" * 20,
    "gopher-top-3-gram": GOOD + " strawberry icecream sundae" * 10,
    "gopher-top-4-gram": GOOD + " strawberry icecream sundae today" * 10,
    **{f"gopher-duplicate-{n}-grams": f"{GOOD} {GOOD}" for n in range(5, 11)},
    "c4-sentences": "Only one sentence is here. And then",
    "c4-curly-brackets": GOOD + " {",
    "c4-lorem-ipsum": GOOD + " Lorem ipsum dolor.",
}


def test_every_rule_is_tested_here() -> None:
    assert OFFENDERS.keys() == RULES.keys()


@pytest.mark.parametrize("name", RULES)
def test_a_rule_drops_its_offender_and_keeps_prose(name: str) -> None:
    rule = RULES[name]
    assert rule.value_if_broken(Document(GOOD)) is None
    value = rule.value_if_broken(Document(OFFENDERS[name]))
    assert value is not None
    assert value < rule.limit if rule.at_least else value > rule.limit


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("text", ["", "\n", "...", "猫" * 100, "\0"])
def test_no_rule_stumbles_over_odd_texts(name: str, text: str) -> None:
    assert RULES[name].measure(Document(text)) >= 0


def test_limits_are_those_of_the_papers() -> None:
    limits = {name: rule.limit for name, rule in RULES.items()}
    assert [limits[f"gopher-top-{n}-gram"] for n in (2, 3, 4)] == [0.20, 0.18, 0.16]
    assert [limits[f"gopher-duplicate-{n}-grams"] for n in range(5, 11)] == [
        0.15,
        0.14,
        0.13,
        0.12,
        0.11,
        0.10,
    ]
    assert (limits["gopher-words-min"], limits["gopher-words-max"]) == (50, 100_000)
    assert limits["c4-sentences"] == 3


def test_choosing_rules() -> None:
    assert [rule.name for rule in choose_rules(["c4"])] == list(GROUPS["c4"])
    assert choose_rules(["none"]) == ()
    chosen = choose_rules(["gopher"], without=["gopher-symbols"], limits={"gopher-words-min": 5})
    assert len(chosen) == len(GROUPS["gopher"]) - 1
    assert chosen[0].limit == 5
    assert chosen[0].value_if_broken(Document("the cat sat on it")) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"wanted": ["gofer"]}, "did you mean 'gopher'"),
        ({"wanted": ["c4"], "without": ["c4-curly"]}, "did you mean 'c4-curly-brackets'"),
        ({"wanted": ["c4"], "limits": {"gopher-symbols": 1}}, "not among the chosen"),
        ({"wanted": ["c4"], "limits": {"c4-sentences": float("nan")}}, "must be a number"),
    ],
)
def test_bad_choices(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_rules(**arguments)  # type: ignore[arg-type]


def test_blocklist() -> None:
    rule = blocklist_rule(["Darn\n", "", "go away"])
    assert rule.value_if_broken(Document("Well, darn!")) == 1
    assert rule.value_if_broken(Document("go\naway, darn")) == 2
    assert rule.value_if_broken(Document("darning; ego away")) is None
    with pytest.raises(ConfigError, match="no entry"):
        blocklist_rule(["", " "])


def test_c4_lines() -> None:
    page = [
        "Menu | Home | About | Contact us",
        "This line ends a sentence and stays.[12]",
        "Too short.",
        "Please enable Javascript to read this page.",
        "This site uses cookies to serve you better.",
        "It goes on and on and on...",
        'He said it, and "it was so."',
        "",
    ]
    dropped: Counter[str] = Counter()
    assert keep_c4_lines("\n".join(page), dropped).split("\n") == [
        "This line ends a sentence and stays.",
        'He said it, and "it was so."',
    ]
    assert dropped == {
        "no terminal punctuation": 2,
        "fewer than 5 words": 1,
        "javascript": 1,
        "policy notice": 1,
    }
