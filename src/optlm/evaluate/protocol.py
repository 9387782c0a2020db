"""Our tasks as the harness's `Task` objects: prompts with shots, requests, and measures."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig

from optlm.errors import ContextLengthError, RequestError
from optlm.evaluate.data import Item, read_items
from optlm.evaluate.measures import binary_f1, exact_match, macro_f1
from optlm.evaluate.sandbox import first_block, passes
from optlm.evaluate.tasks import TaskSpec

__all__ = ["ProtocolTask"]

_BETWEEN = "\n\n"  # between shots
# Of what is generated: most tokens, and the strings that end it.
_NEW_TOKENS = {"answer": 32, "code": 384}
_STOPS = {"answer": ["\n"], "code": ["\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@"]}
_REQUESTS = {"answer": "generate_until", "code": "generate_until", "text": "loglikelihood_rolling"}


class ProtocolTask(Task):  # type: ignore[misc]
    """A `TaskSpec` over its data, for one model's tokenizer and context.

    Shots that do not fit beside the question are left out, whole and the first ones first; a
    question is never cut.

    Args:
        encode: tokens of a text, without the start token.
        context: most tokens that the model reads.
        cut: let a question that does not fit by itself lose its beginning, as the harness does.

    Attributes:
        num_shots: shots of each item, in order.
        num_cut: items whose question lost its beginning.

    Raises:
        RequestError: the set or its shots are missing or broken, or there are too few shots.
        ContextLengthError: a question does not fit by itself, once requests are built.
    """

    VERSION = 1

    def __init__(
        self,
        spec: TaskSpec,
        data: Any,
        *,
        num_fewshot: int,
        encode: Callable[[str], list[int]],
        context: int,
        cut: bool = False,
    ) -> None:
        self.spec = spec
        self._encode = encode
        self._context = context
        self._cut = cut
        self.OUTPUT_TYPE = _REQUESTS.get(spec.kind, "multiple_choice")
        self.items = [i for i in read_items(data, spec.file, spec.fields) if _is_usable(spec, i)]
        self._pool = self.items if spec.shots is None else []
        if num_fewshot and spec.shots is not None:
            self._pool = read_items(data, spec.shots, spec.fields)
        self.num_shots: list[int] = []
        self.num_cut = 0
        available = len(self._pool) - (1 if spec.shots is None else 0)
        if num_fewshot and not spec.takes_shots:
            raise RequestError(f"{spec.name} takes no shots; run it with --num-fewshot 0")
        if num_fewshot > available:
            raise RequestError(
                f"{num_fewshot} shots for {spec.name}; there are {available} items to draw from"
            )
        _hush()
        super().__init__()
        self._config = TaskConfig(
            task=spec.name, num_fewshot=num_fewshot, output_type=self.OUTPUT_TYPE
        )

    # ---- what the harness asks a task ----------------------------------------------------------

    def download(self, *_: object, **__: object) -> None:
        """Nothing: the items are read from the data folder."""

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[Item]:
        return self.items

    def doc_to_text(self, doc: Item) -> str:
        return "" if self.spec.kind in ("pair", "text") else self.spec.prompt(doc)

    def doc_to_target(self, doc: Item) -> str:
        return self.spec.target(doc)

    def doc_to_prefix(self, doc: Item) -> None:
        return None

    def higher_is_better(self) -> dict[str, bool]:
        return {"stereotype": False, "bits_per_byte": False}

    def aggregation(self) -> dict[str, Callable[[Sequence[Any]], float]]:
        own = {"f1": binary_f1, "macro_f1": macro_f1, "bits_per_byte": _bits_per_byte}
        names = ("acc", "acc_norm", "acc_token", "acc_uncond", "stereotype", "exact_match")
        return {**dict.fromkeys((*names, "pass@1"), mean), **own}

    def fewshot_context(self, doc: Item, num_fewshot: int, **_: object) -> list[str]:
        """The contexts of an item's requests: shots, and the question (or each of several)."""
        spec = self.spec
        if spec.kind in ("pair", "text"):
            return [""]
        questions = list(spec.contexts(doc)) if spec.contexts else [spec.prompt(doc)]
        others = [item for item in self._pool if item is not doc] if num_fewshot else []
        shots = [spec.shot(item) for item in self.fewshot_rnd.sample(others, num_fewshot)]
        kept = self._pack(doc, questions, shots)
        self.num_shots.append(len(kept))
        return [_BETWEEN.join([*kept, question]) for question in questions]

    def construct_requests(self, doc: Item, ctx: list[str], **kwargs: Any) -> list[Instance]:
        spec = self.spec
        arguments: list[tuple[Any, ...]]
        if spec.kind in _NEW_TOKENS:
            options = {"until": _STOPS[spec.kind], "max_gen_toks": _NEW_TOKENS[spec.kind]}
            arguments = [(ctx[0], {**options, "do_sample": False})]
        elif spec.kind == "text":
            arguments = [(text,) for text in spec.choices(doc)]
        else:
            choices = spec.choices(doc)
            contexts = ctx if spec.kind == "contexts" else ctx * len(choices)
            arguments = list(zip(contexts, choices, strict=True))
            if spec.reference is not None:
                arguments += [(spec.reference, choice) for choice in choices]
        kwargs = {"metadata": kwargs["metadata"]}
        kind = "loglikelihood" if self.OUTPUT_TYPE == "multiple_choice" else self.OUTPUT_TYPE
        return [
            Instance(request_type=kind, doc=doc, arguments=arg, idx=i, **kwargs)
            for i, arg in enumerate(arguments)
        ]

    def process_results(self, doc: Item, results: Sequence[Any]) -> dict[str, Any]:
        spec = self.spec
        if spec.kind == "text":
            return {"bits_per_byte": (results[0], len(doc["text"].encode()))}
        if spec.kind == "answer":
            return {"exact_match": exact_match(results[0], doc["answers"])}
        if spec.kind == "code":
            program = f"{self.spec.prompt(doc)}{first_block(results[0])}"
            return {"pass@1": float(passes(program, doc["test"], doc["entry_point"]))}
        return self._choice_measures(doc, [total for total, _ in results])

    # ---- inside --------------------------------------------------------------------------------

    def _choice_measures(self, doc: Item, totals: list[float]) -> dict[str, Any]:
        spec = self.spec
        choices = spec.choices(doc)
        right = spec.answers(doc)
        conditional = totals[: len(choices)]
        best = _argmax(conditional)
        if spec.kind == "pair":
            return {spec.metric: float(best in right)}
        found: dict[str, Any] = {"acc": float(best in right)}
        if "choices" in spec.fields:  # lengths tell nothing where all items have the same answers
            lengths = [len(choice.strip().encode()) for choice in choices]
            found["acc_norm"] = float(_argmax(_divided(conditional, lengths)) in right)
            tokens = [len(self._encode(choice)) for choice in choices]
            found["acc_token"] = float(_argmax(_divided(conditional, tokens)) in right)
        if spec.reference is not None:
            gains = [a - b for a, b in zip(conditional, totals[len(choices) :], strict=True)]
            found["acc_uncond"] = float(_argmax(gains) in right)
        if spec.metric == "f1":
            found["f1"] = (right[0], best)
        if spec.name == "cb":
            found["macro_f1"] = (right[0], best)
        return found

    def _pack(self, doc: Item, questions: list[str], shots: list[str]) -> list[str]:
        """The last of the shots, as many as fit."""
        needed = self._needed(doc, questions)
        room = self._context - needed
        if room < 0:
            if not self._cut:
                raise ContextLengthError(
                    f"{self.spec.name}: item {doc.get('id', '?')!r} takes {needed} tokens by "
                    f"itself; the model's context holds {self._context}. Take a model with a "
                    "longer context, or let such questions lose their beginning (--cut)"
                )
            self.num_cut += 1
            return []
        kept: list[str] = []
        for shot in reversed(shots):
            room -= len(self._encode(shot + _BETWEEN)) + 1  # 1: tokens may meet otherwise
            if room < 0:
                break
            kept.insert(0, shot)
        return kept

    def _needed(self, doc: Item, questions: list[str]) -> int:
        """Tokens of the longest question with its longest answer, and of the start token."""
        if self.spec.kind in _NEW_TOKENS:
            return 1 + len(self._encode(questions[0])) + _NEW_TOKENS[self.spec.kind]
        choices = self.spec.choices(doc)
        asked = questions if self.spec.kind == "contexts" else questions * len(choices)
        pairs = zip(asked, choices, strict=True)
        return 1 + max(len(self._encode(question + choice)) for question, choice in pairs)


def _hush() -> None:
    """The harness narrates each step, and warns of defaults that have no meaning here."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _is_usable(spec: TaskSpec, item: Item) -> bool:
    return spec.kind != "text" or bool(item["text"].strip())  # WikiText has empty rows


def _argmax(values: Sequence[float]) -> int:
    """The index of the largest, the lowest of equals."""
    return max(range(len(values)), key=lambda place: values[place])


def _divided(totals: Sequence[float], lengths: Sequence[int]) -> list[float]:
    return [total / max(length, 1) for total, length in zip(totals, lengths, strict=True)]


def _bits_per_byte(pairs: Sequence[tuple[float, int]]) -> float:
    nats = math.fsum(total for total, _ in pairs)
    return -nats / math.log(2) / sum(length for _, length in pairs)
