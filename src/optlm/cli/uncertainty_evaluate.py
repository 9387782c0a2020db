"""Compare estimators of uncertainty on items whose answers are known.

Items are JSON Lines: good and bad; or prompt, choices and gold; or prompt and answers. For each
estimator: AUROC, area under the risk-coverage curve, rejection ratio, and whether it beats the
plain entropy of the answer's tokens (95 % interval of the AUROC's difference, paired bootstrap).
--risk learns a threshold below which at most that share of the answers is wrong, with probability
1 - delta.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optlm.cli.common import (
    add_adapter_options,
    add_engine_options,
    add_json_option,
    engine_options,
    load_model,
    say,
    text_argument,
    usage_error,
)
from optlm.cli.progress import count_bar

if TYPE_CHECKING:
    from optlm.engine.llm import LLM
    from optlm.uncertainty.ensemble import Member
    from optlm.uncertainty.evaluation import Judged, Row
    from optlm.uncertainty.items import Item
    from optlm.uncertainty.stored import StoredRule

USAGE = "FILE [options]"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="items, also .gz and .zst")
    parser.add_argument("--limit", type=int, metavar="N", help="use the first N items")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn (0)")
    parser.add_argument("--picture", type=Path, metavar="OUT", help="risk-coverage curves, SVG")
    add_json_option(parser)
    group = parser.add_argument_group("estimators")
    group.add_argument(
        "--scoring", choices=("total", "token", "byte"), default="total",
        help="log-likelihood of a choice: as it is, a token, or a byte (total)",
    )  # fmt: skip
    group.add_argument(
        "--temperature", type=Path, metavar="FILE", help="from calibrate --of choices"
    )
    group.add_argument(
        "--p-true", action="store_true", help="also ask the model whether it is true"
    )
    group.add_argument("-n", "--samples", type=int, default=10, metavar="N", help="of answers (10)")
    group.add_argument(
        "--stop", type=text_argument, action="append", help="where an answer ends (a line's end)"
    )
    group.add_argument("--max-tokens", type=int, default=32, metavar="N", help="of an answer (32)")
    group.add_argument(
        "--ensemble", action="append", default=[], metavar="MODEL", help="another member"
    )
    group.add_argument(
        "--ensemble-adapter", action="append", default=[], metavar="DIR",
        help="another member: the model with this adapter",
    )  # fmt: skip
    group.add_argument(
        "--dropout", type=float, metavar="RATE", help="10 passes with dropout (torch)"
    )
    group.add_argument("--known", type=Path, metavar="FILE", help="texts to measure distance from")
    group = parser.add_argument_group("selective answering")
    group.add_argument("--risk", type=float, metavar="SHARE", help="most answers that may be wrong")
    group.add_argument(
        "--delta", type=float, default=0.05, help="chance that it is not kept (0.05)"
    )
    group.add_argument("--by", default="entropy", metavar="NAME", help="estimator to use (entropy)")
    group.add_argument("--save-rule", type=Path, metavar="OUT", help="store the threshold")
    add_engine_options(parser)
    add_adapter_options(parser)


def run(options: Namespace) -> None:
    from optlm.uncertainty.evaluation import report
    from optlm.uncertainty.items import read_items

    if options.save_rule is not None and options.risk is None:
        raise usage_error("--save-rule goes with --risk")
    items = read_items(options.file, limit=options.limit)
    temperature = _temperature(options)
    llm = load_model(options)
    judged = _judge(options, llm, items, temperature)
    _add_extras(options, llm, judged)
    rows = report(judged, seed=options.seed)
    rule = None if options.risk is None else _rule(options, judged, temperature, len(items))
    _show(options, judged, rows, rule)
    if options.picture is not None:
        _draw(options, judged, rows)
    if options.save_rule is not None and rule is not None:
        from optlm.uncertainty.stored import save

        save(rule, options.save_rule)
        say(f"wrote {options.save_rule}")


def _temperature(options: Namespace) -> float:
    if options.temperature is None:
        return 1.0
    from optlm.uncertainty.stored import load_temperature, model_mark

    mark = model_mark(options.model, options.adapter)
    stored = load_temperature(options.temperature, kind="choices", model=mark)
    if stored.scoring != options.scoring:
        raise usage_error(
            f"{options.temperature} is for --scoring {stored.scoring}, not {options.scoring}"
        )
    return stored.temperature


def _judge(options: Namespace, llm: LLM, items: list[Item], temperature: float) -> Judged:
    from optlm.uncertainty.evaluation import judge_answers, judge_choices

    if items[0].choices:
        with count_bar("choices", sum(len(item.choices) for item in items)) as progress:
            return judge_choices(
                llm, items, scoring=options.scoring, temperature=temperature,
                ask_true=options.p_true, progress=progress,
            )  # fmt: skip
    with count_bar("items", len(items)) as progress:
        return judge_answers(
            llm, items, samples=options.samples, max_tokens=options.max_tokens,
            stop=options.stop or "\n", seed=options.seed,
            progress=progress,
        )  # fmt: skip


def _add_extras(options: Namespace, llm: LLM, judged: Judged) -> None:
    """Figures of the estimators that were asked for by name."""
    from optlm.uncertainty import extras

    if options.ensemble or options.ensemble_adapter:
        judged.figures["ensemble"] = extras.by_ensemble(_members(options, llm), judged.asked)
    if options.dropout is not None:
        if options.adapter is not None:
            raise usage_error("--dropout reads the model without adapters; merge the adapter first")
        judged.figures["mc-dropout"] = extras.by_dropout(
            options.model, judged.asked, rate=options.dropout, seed=options.seed
        )
    if options.known is not None:
        from optlm.uncertainty.hidden import by_distance, reference_distance
        from optlm.uncertainty.items import read_texts

        known = reference_distance(llm, read_texts(options.known))
        say(f"distance: {known.texts} texts, covariance shrunk by {known.shrinkage:.3f}")
        judged.figures["distance"] = by_distance(llm, known, judged.asked)


def _members(options: Namespace, llm: LLM) -> list[Member]:
    from optlm.engine.llm import LLM
    from optlm.uncertainty.ensemble import Member

    members = [Member(llm=llm)]
    members += [Member(llm=LLM(model, **engine_options(options))) for model in options.ensemble]
    for number, folder in enumerate(options.ensemble_adapter, start=1):
        name = f"member-{number}"
        llm.load_adapter(name, folder, force=options.force)
        members.append(Member(llm=llm, adapter=name))
    return members


def _rule(options: Namespace, judged: Judged, temperature: float, items: int) -> StoredRule:
    from optlm.errors import did_you_mean
    from optlm.uncertainty.selective import learn_rule
    from optlm.uncertainty.stored import DataMark, StoredRule, model_mark

    if options.by not in judged.figures:
        raise usage_error(
            f"there is no estimator {options.by!r} here{did_you_mean(options.by, judged.figures)}; "
            f"there are {', '.join(judged.figures)}"
        )
    if judged.scores is None:
        settings = f"{options.samples} samples of {options.max_tokens} tokens at most"
    else:
        settings = f"scoring {options.scoring} and temperature {temperature:.4g}"
    return StoredRule(
        estimator=options.by,
        task="answers" if judged.scores is None else "choices",
        settings=settings,
        rule=learn_rule(
            judged.figures[options.by], judged.wrong, risk=options.risk, delta=options.delta,
            seed=options.seed,
        ),
        model=model_mark(options.model, options.adapter),
        data=DataMark.of_file(options.file, items=items, of="items"),
    )  # fmt: skip


def _show(options: Namespace, judged: Judged, rows: list[Row], rule: StoredRule | None) -> None:
    wrong = int(judged.wrong.sum())
    if options.json:
        record: dict[str, Any] = {
            "items": len(judged.wrong),
            "wrong": wrong,
            "estimators": [row.to_dict() for row in rows],
        }
        if rule is not None:
            record["rule"] = {"estimator": rule.estimator, **rule.rule.to_dict()}
        print(json.dumps(record))
        return
    print(f"{len(judged.wrong)} items, {wrong} answered wrong ({wrong / len(judged.wrong):.1%})")
    print(f"{'estimator':26}{'AUROC':>7}{'AURC':>8}{'PRR':>8}   AUROC over entropy's (95 %)")
    for row in rows:
        each = row.ranking
        print(
            f"{row.estimator:26}{each.auroc:7.3f}{each.aurc:8.3f}{each.prr:8.3f}   "
            f"{row.difference:+.3f} ({row.low:+.3f} to {row.high:+.3f})  {row.verdict}"
        )
    if rule is not None:
        found = rule.rule
        print(rule.basis)
        print(
            f"answers {found.coverage:.1%} of the {found.tested} items that tested it, "
            f"{found.errors} of {found.accepted} wrong, bound {found.bound:.3f}"
        )


def _draw(options: Namespace, judged: Judged, rows: list[Row]) -> None:
    from optlm.uncertainty.pictures import risk_coverage_svg
    from optlm.uncertainty.ranking import risk_coverage

    curves = {
        f"{row.estimator} ({row.ranking.aurc:.3f})": risk_coverage(
            judged.figures[row.estimator], judged.wrong
        )
        for row in rows
    }
    curves["the best possible"] = risk_coverage(judged.wrong, judged.wrong)
    title = f"Error rate of the answers given, {options.file.name} (area)"
    options.picture.write_text(risk_coverage_svg(curves, title), encoding="utf-8")
    say(f"wrote {options.picture}")
