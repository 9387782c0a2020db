"""`evaluate`: tasks in, a report of measures with intervals, chance and published numbers out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from optlm.engine.llm import LLM
from optlm.errors import RequestError, did_you_mean
from optlm.evaluate.harness import EngineLM
from optlm.evaluate.measures import bootstrap, wilson
from optlm.evaluate.protocol import ProtocolTask
from optlm.evaluate.published import Published, published_numbers
from optlm.evaluate.tasks import HARNESS_PREFIX, TASKS, TaskSpec, find_task

__all__ = ["Evaluation", "Measure", "TaskResult", "evaluate"]

Progress = Callable[[str, int, int], None]  # task, requests done, requests in all

_PLAIN = (int, float)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One figure: its value and 95 % interval (None where there is none)."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What came out of one task.

    Attributes:
        metric: the name of the measure that the OPT paper reports, among `measures`.
        shots_fewest, shots_mean: shots that fitted into a prompt.
        cut: items whose question lost its beginning.
        chance: what guessing gives by `metric`; None where it is not defined.
        groups: the same metric for parts of the set.
    """

    task: str
    title: str
    items: int
    num_fewshot: int
    metric: str
    measures: dict[str, Measure]
    chance: float | None = None
    shots_fewest: int = 0
    shots_mean: float = 0.0
    cut: int = 0
    groups: dict[str, Measure] = field(default_factory=dict)
    note: str = ""
    published: tuple[Published, ...] = ()

    @property
    def main(self) -> Measure:
        return self.measures[self.metric]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All results of one run, and what they cost."""

    results: tuple[TaskResult, ...]
    seed: int
    limit: int | None
    forward_tokens: int
    seconds: float

    def told(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def evaluate(
    llm: LLM,
    tasks: Sequence[str],
    *,
    data: Path | str | None = None,
    num_fewshot: int = 0,
    limit: int | None = None,
    seed: int = 1234,
    cache: Path | str | None = None,
    cut: bool = False,
    run_code: bool = False,
    size: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Run tasks through lm-evaluation-harness on this engine.

    Args:
        tasks: names of `TASKS`, or "lm-eval:NAME" for tasks of the harness's own.
        data: folder of the evaluation sets.
        num_fewshot: shots in each prompt, drawn anew for each item.
        limit: only the first so many items of each task.
        seed: of the draws.
        cache: a folder in which answers are kept, each model's in a file of its own, so that a run
            that ended goes on where it was.
        cut: questions beyond the context lose their beginning; else they are an error.
        run_code: allow tasks that run what the model wrote.
        size: the published size whose numbers stand beside ours.

    Raises:
        RequestError: an unknown task, missing data, a number out of range, code not allowed.
        ContextLengthError: a question alone does not fit.
    """
    _check(num_fewshot=num_fewshot, limit=limit)
    if not tasks:
        raise RequestError(f"no task given; tasks: {', '.join(TASKS)}")
    names = list(dict.fromkeys(tasks))
    specs = {name: find_task(name) for name in names if not name.startswith(HARNESS_PREFIX)}
    code = [spec.name for spec in specs.values() if spec.kind == "code"]
    if code and not run_code:
        raise RequestError(
            f"{code[0]} runs programs that the model wrote, confined but on this machine; "
            "allow it with --run-code"
        )
    start = time.monotonic()
    lm = EngineLM(llm=llm)
    results = []
    for name in names:
        if name in specs:
            task = ProtocolTask(
                specs[name],
                data,
                num_fewshot=num_fewshot,
                encode=lambda text: lm.scorer.tokenizer.encode(text, add_bos=False),
                context=lm.max_length,
                cut=cut,
            )
        else:
            task = _harness_task(name.removeprefix(HARNESS_PREFIX), num_fewshot)
        raw = _run(lm, task, limit=limit, seed=seed, cache=cache, name=name, progress=progress)
        if name in specs:
            results.append(_own_result(specs[name], task, raw, num_fewshot, size))
        else:
            results.append(_harness_result(name, raw, num_fewshot))
    return Evaluation(
        results=tuple(results),
        seed=seed,
        limit=limit,
        forward_tokens=lm.scorer.num_forward_tokens,
        seconds=time.monotonic() - start,
    )


def _check(**numbers: int | None) -> None:
    for name, least in (("num_fewshot", 0), ("limit", 1)):
        value = numbers[name]
        if value is not None and (isinstance(value, bool) or value < least):
            raise RequestError(f"{name} is {value}; it must be at least {least}")


def _run(
    lm: EngineLM,
    task: Any,
    *,
    limit: int | None,
    seed: int,
    cache: Path | str | None,
    name: str,
    progress: Progress | None,
) -> dict[str, Any]:
    """One task through the harness's `evaluate`."""
    from lm_eval.api.model import CachingLM
    from lm_eval.evaluator import evaluate as run_harness

    task.set_fewshot_seed(seed=seed)
    lm.follow(None if progress is None else lambda done, total: progress(name, done, total))
    if cache is not None:
        Path(cache).mkdir(parents=True, exist_ok=True)
    model = lm if cache is None else CachingLM(lm, str(Path(cache) / f"{_fingerprint(lm.llm)}.db"))
    found = run_harness(
        lm=model,
        task_dict={"tasks": {task.task_name: task}, "groups": {}},
        limit=limit,
        bootstrap_iters=0,
        confirm_run_unsafe_code=False,
    )
    assert found is not None
    return dict(found)


def _fingerprint(llm: LLM) -> str:
    """A name for this model as it computes: weights, adapter and number format all show in it."""
    vocab_size = llm.config.vocab_size
    length = min(64, llm.config.max_position_embeddings)
    ids = [llm.config.bos_token_id, *(place * 9973 % vocab_size for place in range(1, length))]
    scored = f"{llm.config.to_dict()} {llm.score([ids])[0].total:.4f}"
    return hashlib.sha256(scored.encode()).hexdigest()[:16]


def _harness_task(name: str, num_fewshot: int) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if name not in manager.all_tasks:
        near = did_you_mean(name, manager.all_tasks)
        raise RequestError(f"lm-evaluation-harness has no task {name!r}{near}")
    try:
        loaded = manager.load([name])["tasks"]
    except (OSError, ValueError) as error:
        raise RequestError(
            f"the data of {name!r} could not be loaded, and there may be no network: {error}"
        ) from None
    if len(loaded) != 1:
        raise RequestError(f"{name!r} is a group; name one of {', '.join(sorted(loaded)[:8])}")
    (task,) = loaded.values()
    task.set_config(key="num_fewshot", value=num_fewshot)
    return task


def _own_result(
    spec: TaskSpec, task: ProtocolTask, raw: dict[str, Any], num_fewshot: int, size: str | None
) -> TaskResult:
    samples = raw["samples"][spec.name]
    aggregation = task.aggregation()
    names = samples[0]["metrics"]
    measures = {
        name: _measure([sample[name] for sample in samples], aggregation[name]) for name in names
    }
    groups: dict[str, list[Any]] = {}
    for sample in samples:
        if spec.group is not None:
            groups.setdefault(str(sample["doc"][spec.group]), []).append(sample[spec.metric])
    shots = task.num_shots or [0]
    return TaskResult(
        task=spec.name,
        title=spec.title,
        items=len(samples),
        num_fewshot=num_fewshot,
        metric=spec.metric,
        measures=measures,
        chance=_chance(spec, [sample["doc"] for sample in samples]),
        shots_fewest=min(shots),
        shots_mean=sum(shots) / len(shots),
        cut=task.num_cut,
        groups={name: _measure(v, aggregation[spec.metric]) for name, v in sorted(groups.items())},
        note=spec.note,
        published=published_numbers(spec.name, size),
    )


def _measure(values: list[Any], aggregate: Callable[[Sequence[Any]], float]) -> Measure:
    value = float(aggregate(values))
    if isinstance(values[0], _PLAIN):  # zeros and ones
        low, high = wilson(sum(values), len(values))
        return Measure(value=value, low=low, high=high)
    if len(values) < 2:
        return Measure(value=value)
    low, high = bootstrap(values, aggregate)
    return Measure(value=value, low=low, high=high)


def _chance(spec: TaskSpec, items: list[Any]) -> float | None:
    """Expected accuracy of guessing; of F1, with both answers equally often."""
    if spec.chance is not None or spec.kind == "text":
        return spec.chance
    if spec.metric == "f1":
        share = sum(item["gold"] for item in items) / len(items)
        return share / (share + 0.5) if share else 0.0
    guesses = [len(spec.answers(item)) / len(spec.choices(item)) for item in items]
    return sum(guesses) / len(guesses)


def _harness_result(name: str, raw: dict[str, Any], num_fewshot: int) -> TaskResult:
    (found,) = raw["results"].values()
    (count,) = raw["n-samples"].values()
    values = {
        key.removesuffix(",none"): Measure(value=float(value))
        for key, value in found.items()
        if key.endswith(",none") and "stderr" not in key and isinstance(value, _PLAIN)
    }
    return TaskResult(
        task=name,
        title=f"{name}, as the harness has it",
        items=count["effective"],
        num_fewshot=num_fewshot,
        metric=next(iter(values)),
        measures=values,
    )
