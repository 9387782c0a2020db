"""Small evaluation sets of our own, in the form of the true ones."""

from __future__ import annotations

import json
from pathlib import Path

_WORDS = ("cat", "mat", "rain", "home", "sat", "then")


def _choices(number: int, count: int) -> list[str]:
    return [
        f"{_WORDS[(number + k) % 6]} the {_WORDS[(number + 2 * k + 1) % 6]}" for k in range(count)
    ]


def _multiple(count: int) -> list[dict[str, object]]:
    return [
        {"question": f"the {_WORDS[i % 6]} on", "choices": _choices(i, count), "gold": i % count}
        for i in range(6)
    ]


def _yes_no(**fields: str) -> list[dict[str, object]]:
    return [
        {**{k: v.format(_WORDS[i]) for k, v in fields.items()}, "gold": i % 2} for i in range(6)
    ]


_HELLASWAG = [
    {
        "activity": "Rain",
        "context": f"Rain: The {_WORDS[i]} sat. he",
        "choices": _choices(i, 4),
        "gold": i % 4,
    }
    for i in range(6)
]
_COPA = [
    {
        "premise": f"The {_WORDS[i]} sat.",
        "relation": ("cause", "effect")[i % 2],
        "choices": ["The rain.", "The mat."],
        "gold": i % 2,
    }
    for i in range(6)
]
_BOOLQ = _yes_no(passage="The {} sat.", question="did the {} sit")
_CB = [
    {"premise": f"The {_WORDS[i]} sat.", "hypothesis": "the rain.", "gold": i % 3} for i in range(6)
]
_WIC = _yes_no(word="{}", sentence1="The {}.", sentence2="On the {}.")
_WSC: list[dict[str, object]] = [
    {
        "text": f"The {_WORDS[i]} sat and it went",
        "span1": f"The {_WORDS[i]}",
        "span2": "it",
        "span2_index": 4,
        "gold": i % 2,
    }
    for i in range(6)
]

SETS: dict[str, list[dict[str, object]]] = {
    "hellaswag": _HELLASWAG,
    "piqa": _multiple(2),
    "arc_easy": _multiple(4),
    "openbookqa": _multiple(4),
    "copa": _COPA,
    "copa.fewshot32": _COPA[:3],
    "boolq": _BOOLQ,
    "boolq.fewshot32": _BOOLQ[:3],
    "cb": _CB,
    "cb.fewshot32": _CB[:3],
    "wic": _WIC,
    "wic.fewshot32": _WIC[:3],
    "wsc": _WSC,
    "wsc.fewshot32": _WSC[:3],
    "winograd_wsc273": [
        {
            "context_options": [f"Cat and {w} as the cat", f"Cat and {w} as the {w}"],
            "continuation": "sat.",
            "gold": i % 2,
        }
        for i, w in enumerate(_WORDS)
    ],
    "record_mini": [
        {
            "passage": f"The cat went.\n@highlight\nThe {w} sat",
            "query": "the @placeholder sat",
            "entities": ["Cat", "Rain", w],
            "answers": [w],
        }
        for w in _WORDS
    ],
    "ethos_binary": [
        {"text": f"the {w} sat", "score": 0.2, "gold": i % 2} for i, w in enumerate(_WORDS)
    ],
    "crows_pairs": [
        {
            "sent_more": f"the cat on the {w}",
            "sent_less": f"the mat on the {w}",
            "bias_type": ("age", "gender")[i % 2],
        }
        for i, w in enumerate(_WORDS)
    ],
    "blimp_300": [
        {
            "good": f"the cats sat on the {w}",
            "bad": f"the cats the sat {w}",
            "phenomenon": ("order", "word")[i % 2],
        }
        for i, w in enumerate(_WORDS)
    ],
    "nq_open_dev": [{"question": f"who sat on the {w}", "answers": ["the cat", w]} for w in _WORDS],
    "humaneval": [
        {
            "prompt": "def f(x):\n",
            "entry_point": "f",
            "canonical_solution": "    return x\n",
            "test": "def check(f):\n    assert f(1) == 1\n",
        }
    ],
    "wikitext2_raw_test": [
        {"text": ""},
        {"text": " = The cat = "},
        {"text": " the cat sat on the mat . "},
    ],
    "udhr": [
        {"text": "the cat sat on the mat", "lang": "en"},
        {"text": "die Katze saß", "lang": "de"},
    ],
}


def write_sets(folder: Path) -> Path:
    """Write every set; items get ids."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in SETS.items():
        lines = [json.dumps({"id": f"{name}-{i}", **item}) for i, item in enumerate(items)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
