"""The table of our tasks: which set, which prompt, which measure, and what chance would give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from optlm.errors import RequestError, did_you_mean
from optlm.evaluate import prompts
from optlm.evaluate.data import Item

__all__ = ["HARNESS_PREFIX", "TASKS", "Kind", "TaskSpec", "find_task"]

Kind = Literal["choice", "contexts", "pair", "answer", "code", "text"]

HARNESS_PREFIX = "lm-eval:"  # a task of the harness's own, with the data that it downloads


def _whole(item: Item) -> list[str]:
    return [str(item["text"])]


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task.

    Attributes:
        name: for `--tasks`.
        title: of the set.
        file: of the data folder, without its ending.
        shots: the set that the shots are drawn from; the task's own, less the item under test, when
            None.
        kind: "choice" compares answers after one prompt, "contexts" one answer after several,
            "pair" whole sentences; "answer" and "code" generate; "text" is perplexity.
        fields: what an item needs.
        prompt: the question of an item.
        choices: its answers, each with the space it begins with; sentences of a "pair"; the texts.
        contexts: of kind "contexts", one a choice.
        metric: the one that the OPT paper, or GPT-3, reports.
        reference: the context after which "acc_uncond" measures answers by themselves.
        chance: expected of guessing; None to compute it from the numbers of choices.
        group: the field by which results are also given.
        note: what a reader of the figures must know.
    """

    name: str
    title: str
    file: str
    shots: str | None = None
    kind: Kind = "choice"
    fields: tuple[str, ...]
    prompt: Callable[[Item], str] = str
    choices: Callable[[Item], Sequence[str]] = prompts.choices_of
    contexts: Callable[[Item], Sequence[str]] | None = None
    metric: str = "acc"
    reference: str | None = None
    chance: float | None = None
    group: str | None = None
    note: str = ""

    def answers(self, item: Item) -> list[int]:
        """The right choices by index."""
        if "answers" in item:
            return [i for i, entity in enumerate(item["entities"]) if entity in item["answers"]]
        return [0 if self.kind == "pair" else int(item["gold"])]

    def target(self, item: Item) -> str:
        """The right answer, as a shot shows it."""
        if self.kind == "answer":
            return f" {item['answers'][0]}"
        if self.kind == "code":
            return str(item["canonical_solution"])
        if self.kind == "text":
            return str(item["text"])
        return self.choices(item)[self.answers(item)[0]]

    def shot(self, item: Item) -> str:
        """Question and answer."""
        asked = self.contexts(item)[self.answers(item)[0]] if self.contexts else self.prompt(item)
        return asked + self.target(item)

    @property
    def takes_shots(self) -> bool:
        return self.kind in ("choice", "contexts", "answer")


_SPECS = (
    TaskSpec(
        name="hellaswag", title="HellaSwag", file="hellaswag",
        fields=("context", "choices", "gold"), prompt=prompts.hellaswag, metric="acc_token",
    ),
    TaskSpec(
        name="piqa", title="PIQA", file="piqa", fields=("question", "choices", "gold"),
        prompt=prompts.bare_question, metric="acc_token",
    ),
    TaskSpec(
        name="piqa_harness", title="PIQA, harness's prompt", file="piqa",
        fields=("question", "choices", "gold"), prompt=prompts.question_answer,
    ),
    TaskSpec(
        name="arc_easy", title="ARC Easy", file="arc_easy", fields=("question", "choices", "gold"),
        prompt=prompts.question_answer, metric="acc_uncond", reference="Answer:",
    ),
    TaskSpec(
        name="openbookqa", title="OpenBookQA", file="openbookqa",
        fields=("question", "choices", "gold"), prompt=prompts.bare_question,
        metric="acc_uncond", reference="Answer:",
    ),
    TaskSpec(
        name="copa", title="COPA", file="copa", shots="copa.fewshot32",
        fields=("premise", "relation", "choices", "gold"), prompt=prompts.copa,
        choices=prompts.copa_choices, metric="acc_token",
    ),
    TaskSpec(
        name="boolq", title="BoolQ", file="boolq", shots="boolq.fewshot32",
        fields=("passage", "question", "gold"), prompt=prompts.boolq, choices=prompts.yes_no,
    ),
    TaskSpec(
        name="cb", title="CommitmentBank", file="cb", shots="cb.fewshot32",
        fields=("premise", "hypothesis", "gold"), prompt=prompts.cb, choices=prompts.cb_choices,
    ),
    TaskSpec(
        name="wic", title="WiC", file="wic", shots="wic.fewshot32",
        fields=("word", "sentence1", "sentence2", "gold"), prompt=prompts.wic,
        choices=prompts.yes_no,
    ),
    TaskSpec(
        name="wsc", title="WSC", file="wsc", shots="wsc.fewshot32",
        fields=("text", "span1", "span2", "span2_index", "gold"), prompt=prompts.wsc,
        choices=prompts.yes_no,
    ),
    TaskSpec(
        name="winograd", title="Winograd (WSC273)", file="winograd_wsc273", kind="contexts",
        fields=("context_options", "continuation", "gold"), contexts=prompts.winograd_contexts,
        choices=prompts.winograd_choices,
    ),
    TaskSpec(
        name="record", title="ReCoRD, 64 training items", file="record_mini",
        fields=("passage", "query", "entities", "answers"), prompt=prompts.record,
        choices=prompts.record_choices, note="training items: it tests code, it is no score",
    ),
    TaskSpec(
        name="ethos", title="ETHOS, binary", file="ethos_binary", fields=("text", "gold"),
        prompt=prompts.ethos, choices=prompts.yes_no, metric="f1",
        note="wording of the question ours; the set holds hateful text",
    ),
    TaskSpec(
        name="crows_pairs", title="CrowS-Pairs", file="crows_pairs", kind="pair",
        fields=("sent_more", "sent_less", "bias_type"), choices=prompts.crows_pair,
        metric="stereotype", chance=0.5, group="bias_type",
        note="share of pairs whose more stereotyping sentence is likelier; 0.5 is unbiased",
    ),
    TaskSpec(
        name="blimp", title="BLiMP, 300 pairs a paradigm", file="blimp_300", kind="pair",
        fields=("good", "bad", "phenomenon"), choices=prompts.blimp_pair, chance=0.5,
        group="phenomenon",
    ),
    TaskSpec(
        name="nq_open", title="NaturalQuestions-Open", file="nq_open_dev", kind="answer",
        fields=("question", "answers"), prompt=prompts.question_answer, metric="exact_match",
        chance=0.0,
    ),
    TaskSpec(
        name="humaneval", title="HumanEval", file="humaneval", kind="code",
        fields=("prompt", "test", "entry_point", "canonical_solution"), prompt=prompts.code,
        metric="pass@1", chance=0.0, note="greedy; runs generated programs",
    ),
    TaskSpec(
        name="wikitext2", title="WikiText-2, row by row", file="wikitext2_raw_test", kind="text",
        fields=("text",), choices=_whole, metric="bits_per_byte",
        note="each row by itself; for perplexity over windows see optlm score --convention gptq",
    ),
    TaskSpec(
        name="udhr", title="Universal Declaration of Human Rights", file="udhr", kind="text",
        fields=("text", "lang"), choices=_whole, metric="bits_per_byte", group="lang",
    ),
)  # fmt: skip

TASKS = {spec.name: spec for spec in _SPECS}


def find_task(name: str) -> TaskSpec:
    """The task of this name.

    Raises:
        RequestError: there is none; the nearest is named.
    """
    if name not in TASKS:
        raise RequestError(
            f"there is no task {name!r}{did_you_mean(name, TASKS)} (tasks: {', '.join(TASKS)}; "
            f"{HARNESS_PREFIX}NAME is one of the harness's own, which downloads its data)"
        )
    return TASKS[name]
