"""Calibration of the bundled model before and after, and which uncertainty knows its errors.

    python benchmarks/uncertainty.py --corpus FOLDER --eval FOLDER [--model M]

Tokens: texts of the validation files of each domain. Choices: minimal pairs of BLiMP. Answers: the
last word of sentences of stories, written by the model. Temperatures are found on one half of the
data and judged on the other.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optlm import LLM
from optlm.uncertainty import extras
from optlm.uncertainty.calibrating import Calibrated, calibrate_choices, calibrate_tokens
from optlm.uncertainty.evaluation import Judged, judge_answers, judge_choices, report
from optlm.uncertainty.items import Item, read_items, read_texts
from optlm.uncertainty.pictures import reliability_svg
from optlm.uncertainty.selective import learn_rule

sys.path.insert(0, str(Path(__file__).parent))

from report import Report, today

DOMAINS = ("stories", "dialogue", "encyclopedic", "books")
CHARACTERS = 1500  # of a text
TEXTS = 60  # of a domain
PAIRS = 30  # of a paradigm


def sentences(texts: Iterable[str], per_text: int = 3) -> list[Item]:
    """The story up to the last word of some of its sentences, and that word."""
    items = []
    for text in texts:
        found = list(re.finditer(r"[a-z,] ([a-z]{3,})\.(?=\s)", text))
        places = [each for each in found if 150 < each.start() < 500][:per_text]
        for place in places:
            items.append(Item(prompt=text[: place.start(1) - 1], answers=(place.group(1),)))
    return items


def pairs(path: Path) -> list[Item]:
    """The first pairs of each paradigm: the file has 300 of each, one paradigm after another."""
    return [item for number, item in enumerate(read_items(path)) if number % 300 < PAIRS]


def calibration_row(of: str, found: Calibrated) -> dict[str, Any]:
    before, after = found.figures()
    return {
        "of": of,
        "answers": found.before.items,
        "temperature": round(found.temperature, 4),
        **{f"{name}_before": round(value, 4) for name, value in before.items()},
        **{f"{name}_after": round(value, 4) for name, value in after.items()},
    }


def estimator_rows(of: str, judged: Judged) -> list[dict[str, Any]]:
    wrong = float(judged.wrong.mean())
    rows = []
    for row in report(judged):
        values = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.to_dict().items()}
        rows.append({"of": of, "error_rate": round(wrong, 4), **values})
    return rows


def rule_row(of: str, judged: Judged, by: str, risk: float) -> dict[str, Any]:
    rule = learn_rule(judged.figures[by], judged.wrong, risk=risk)
    return {"of": of, "rule_by": by, **rule.to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--eval", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--model")
    parser.add_argument("--results", default=Path(__file__).with_name("results"))
    parser.add_argument("--name")
    parser.add_argument("--json")
    wanted = parser.parse_args()
    llm = LLM(wanted.model, dtype="f32")
    rows, panels = [], {}
    seconds: Counter[str] = Counter()
    for domain in DOMAINS:
        begun = time.process_time()
        texts = read_texts(wanted.corpus / f"{domain}.valid.jsonl.zst", limit=TEXTS)
        found = calibrate_tokens(llm, [text[:CHARACTERS] for text in texts])
        rows.append(calibration_row(f"tokens of {domain}", found))
        panels[f"{domain}, before"] = found.before
        panels[f"{domain}, T = {found.temperature:.3f}"] = found.after
        seconds["tokens"] += time.process_time() - begun
    begun = time.process_time()
    items = pairs(wanted.eval / "blimp_300.jsonl.zst")
    found = calibrate_choices(llm, items)
    rows.append(calibration_row("BLiMP pairs", found))
    panels["BLiMP pairs, before"] = found.before
    panels[f"BLiMP pairs, T = {found.temperature:.2f}"] = found.after
    judged = judge_choices(llm, items, ask_true=True)
    judged.figures["mc-dropout"] = extras.by_dropout(wanted.model, judged.asked, rate=0.1)
    rows += estimator_rows("BLiMP pairs", judged)
    rows.append(rule_row("BLiMP pairs", judged, "normalised-likelihood", 0.3))
    seconds["pairs"] += time.process_time() - begun
    begun = time.process_time()
    items = sentences(read_texts(wanted.corpus / "stories.valid.jsonl.zst"))
    judged = judge_answers(llm, items, samples=8, max_tokens=6, stop=[".", ",", "\n", "!", "?"])
    judged.figures["mc-dropout"] = extras.by_dropout(wanted.model, judged.asked, rate=0.1)
    rows += estimator_rows("last words", judged)
    rows.append(rule_row("last words", judged, "likelihood", 0.4))
    seconds["last words"] += time.process_time() - begun
    folder = Path(wanted.results)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{today()}-{wanted.name or 'uncertainty'}"
    (folder / f"{stem}.svg").write_text(reliability_svg(panels), encoding="utf-8")
    Report(
        name="uncertainty",
        title="Calibration before and after, and estimators beside entropy",
        method=f"{TEXTS} texts of {CHARACTERS} characters a domain; {PAIRS} pairs a paradigm; "
        "8 samples an answer; 95 % bootstrap intervals, texts resampled whole",
        rows=rows,
        columns={
            "of": "what",
            "temperature": "T",
            "ece_before": "ECE before",
            "ece_after": "ECE after",
            "estimator": "estimator",
            "auroc": "AUROC",
            "prr": "PRR",
            "verdict": "verdict",
        },
        headline={f"processor seconds, {name}": round(value) for name, value in seconds.items()},
        packages={},
    ).publish(wanted)


if __name__ == "__main__":
    main()
