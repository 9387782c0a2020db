"""Tasks by our own table, through the harness: prompts, measures, shots, errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_up import SETS

from optlm import LLM
from optlm.errors import ContextLengthError, RequestError
from optlm.evaluate import prompts
from optlm.evaluate.data import read_items
from optlm.evaluate.protocol import ProtocolTask
from optlm.evaluate.published import Published, published_numbers, size_of
from optlm.evaluate.run import Evaluation, evaluate
from optlm.evaluate.table import table
from optlm.evaluate.tasks import TASKS
from variants import VARIANTS

QUICK = [name for name, spec in TASKS.items() if spec.kind != "code"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_task_on_every_variant(variant: str, folders: dict[str, Path], sets: Path) -> None:
    llm = LLM(str(folders[variant]), dtype="f32")
    found = evaluate(llm, QUICK, data=sets, limit=2)
    assert [result.task for result in found.results] == QUICK
    for result in found.results:
        low, value, high = result.main.low, result.main.value, result.main.high
        assert low is None or high is None or low <= value <= high
        assert result.chance is not None or result.metric == "bits_per_byte"


def test_the_table_shows_metric_interval_chance_and_parts(base: LLM, sets: Path) -> None:
    found = evaluate(base, ["crows_pairs", "arc_easy"], data=sets)
    lines = table(found.results).splitlines()
    assert lines[1].split()[:4] == ["crows_pairs", "6", "0", "stereotype"]
    assert "0.5000" in lines[1]
    assert lines[2].split()[0] == "age"
    assert any(line.split()[:4] == ["arc_easy", "6", "0", "acc_uncond"] for line in lines)


def test_answers_are_kept_and_a_run_goes_on(base: LLM, sets: Path, tmp_path: Path) -> None:
    cache = tmp_path / "answers"
    seen: list[tuple[str, int, int]] = []

    def follow(*progress: Any) -> None:
        seen.append(progress)

    first = evaluate(base, ["copa"], data=sets, limit=3, cache=cache, progress=follow)
    assert seen[-1] == ("copa", 6, 6)
    more = evaluate(base, ["copa"], data=sets, cache=cache, progress=follow)
    assert seen[-1] == ("copa", 6, 6)  # 12 requests, 6 of them known
    again = evaluate(base, ["copa"], data=sets, cache=cache)
    assert again.forward_tokens == 0 < first.forward_tokens
    assert again.results == more.results


def test_answers_of_another_model_are_not_taken(
    base: LLM, folders: dict[str, Path], sets: Path, tmp_path: Path
) -> None:
    evaluate(base, ["copa"], data=sets, limit=1, cache=tmp_path)
    other = LLM(str(folders["no_final_norm"]), dtype="f32")
    assert evaluate(other, ["copa"], data=sets, limit=1, cache=tmp_path).forward_tokens > 0
    assert len(list(tmp_path.glob("*.db"))) == 2


def task_of(name: str, sets: Path, shots: int, *, context: int = 2048, **options: Any) -> Any:
    task = ProtocolTask(
        TASKS[name], sets, num_fewshot=shots, encode=lambda t: list(t.encode()), context=context,
        **options,
    )  # fmt: skip
    task.set_fewshot_seed(0)
    return task


def test_shots_stand_before_the_question_and_never_show_its_item(sets: Path) -> None:
    task = task_of("piqa", sets, 5)
    for item in task.test_docs():
        (prompt,) = task.fewshot_context(item, 5)
        *shots, question = prompt.split("\n\n")
        assert question == item["question"]
        others = [other for other in task.test_docs() if other is not item]
        assert sorted(shots) == sorted(TASKS["piqa"].shot(other) for other in others)


def test_shots_that_do_not_fit_are_left_out_whole(sets: Path) -> None:
    task = task_of("boolq", sets, 3, context=130)
    (prompt,) = task.fewshot_context(task.test_docs()[0], 3)
    *shots, question = prompt.split("\n\n")
    assert question == prompts.boolq(task.test_docs()[0])
    assert 0 < len(shots) < 3
    assert task.num_shots == [len(shots)]
    assert len(prompt.encode()) + len(" yes") + 1 <= 130


def test_a_question_beyond_the_context(sets: Path) -> None:
    with pytest.raises(ContextLengthError, match=r"boolq: item 'boolq-0' takes .* holds 20"):
        task_of("boolq", sets, 0, context=20).fewshot_context(
            {**SETS["boolq"][0], "id": "boolq-0"}, 0
        )
    task = task_of("boolq", sets, 0, context=20, cut=True)
    task.fewshot_context(SETS["boolq"][0], 0)
    assert task.num_cut == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ["helaswag"]}, r"no task 'helaswag'; did you mean 'hellaswag'\?"),
        ({"tasks": []}, "no task given"),
        ({"num_fewshot": -1}, "num_fewshot is -1"),
        ({"limit": 0}, "limit is 0"),
        ({"num_fewshot": 4, "tasks": ["boolq"]}, "4 shots for boolq; there are 3"),
        ({"num_fewshot": 6, "tasks": ["piqa"]}, "6 shots for piqa; there are 5"),
        ({"num_fewshot": 1, "tasks": ["blimp"]}, "blimp takes no shots"),
        ({"tasks": ["humaneval"]}, "allow it with --run-code"),
        ({"data": "/nowhere"}, "no data folder /nowhere"),
        ({"data": None}, "name it with --data"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_told(
    arguments: dict[str, Any], message: str, base: LLM, sets: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        evaluate(base, **({"tasks": ["copa"], "data": sets} | arguments))


class FakeManager:
    """The harness's own takes ten seconds to find its tasks, and they download their data."""

    all_tasks = ("hellaswag", "offline")
    task: Any = None

    def load(self, names: list[str]) -> dict[str, Any]:
        if names == ["offline"]:
            raise ConnectionError("no route")
        return {"tasks": {"piqa": self.task}}


def test_tasks_of_the_harness(base: LLM, sets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", FakeManager)
    monkeypatch.setattr(FakeManager, "task", task_of("piqa", sets, 0))
    (found,) = evaluate(base, ["lm-eval:hellaswag"], limit=2).results
    assert (found.items, found.metric) == (2, "acc")
    assert 0 <= found.main.value <= 1
    with pytest.raises(RequestError, match=r"no task 'helaswag'; did you mean 'hellaswag'\?"):
        evaluate(base, ["lm-eval:helaswag"])
    with pytest.raises(RequestError, match="may be no network: no route"):
        evaluate(base, ["lm-eval:offline"])


def test_broken_files_are_told_by_line(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"has no piqa\.jsonl"):
        read_items(tmp_path, "piqa")
    for text, message in (
        ("\n", "has no items"),
        ('{"question": "", "choices": [], "gold": 0}\nnonsense\n', "line 2 is no JSON"),
        ("[1]\n", "line 1 is a list"),
        ('{"question": "x"}\n', "line 1 lacks the fields choices, gold"),
    ):
        (tmp_path / "piqa.jsonl").write_text(text, encoding="utf-8")
        with pytest.raises(RequestError, match=message):
            read_items(tmp_path, "piqa", TASKS["piqa"].fields)
    (tmp_path / "piqa.jsonl").write_bytes(b'{"question": "caf\xe9"}\n')
    with pytest.raises(RequestError, match=r"line 1 is not UTF-8 \(byte 17 of the line\)"):
        read_items(tmp_path, "piqa")


def test_prompts_of_the_paper() -> None:
    assert prompts.hellaswag({"context": "A: A man sits. he"}) == "A: A man sits. He"
    assert prompts.hellaswag({"context": "A: A man sits."}) == "A: A man sits."
    copa = {"premise": "The man fell.", "relation": "cause", "choices": ["It rained.", "He ran."]}
    assert prompts.copa(copa) == "The man fell because"
    assert prompts.copa_choices(copa) == [" it rained.", " he ran."]
    assert prompts.boolq({"passage": "P.", "question": "is it"}) == "P.\nquestion: is it?\nanswer:"
    cb = {"premise": "P.", "hypothesis": "it is."}
    assert prompts.cb(cb) == "P.\nquestion: it is. true, false, or neither?\nanswer:"
    assert prompts.mark("Bob said that his friend Al left", 4, "friend Al") == (
        "Bob said that his *friend Al* left"
    )
    record = {"passage": "P\n@highlight\nH", "query": "@placeholder won", "entities": ["A", "B"]}
    assert prompts.record(record) == "P\n- H"
    assert prompts.record_choices(record) == ["\n- A won", "\n- B won"]


def test_no_prompt_of_ours_ends_in_a_space(sets: Path) -> None:
    for spec in TASKS.values():
        for item in read_items(sets, spec.file, spec.fields):
            asked = spec.contexts(item) if spec.contexts else [spec.prompt(item)]
            assert all(text == text.rstrip(" ") for text in asked), spec.name
            if spec.kind in ("choice", "contexts"):
                assert all(choice[0].isspace() for choice in spec.choices(item)), spec.name


def test_true_sets_have_the_fields(shared_dir: Path) -> None:
    for spec in TASKS.values():
        items = read_items(shared_dir / "eval", spec.file, spec.fields)
        assert any(spec.target(item) for item in items[-9:])  # WikiText has empty rows
        if spec.shots is not None:
            assert len(read_items(shared_dir / "eval", spec.shots, spec.fields)) == 32


def test_published_numbers_are_for_trained_models_of_that_size(base: LLM, sets: Path) -> None:
    assert size_of(base) is None
    (acc, norm) = published_numbers("arc_easy", "125m")
    assert (acc.metric, acc.value, norm.value) == ("acc", 0.4352, 0.3998)
    assert "commit 8a7077017" in acc.source
    found = evaluate(base, ["arc_easy"], data=sets, size="125m")
    lines = table(found.results).splitlines()
    assert any(line.split()[0] == "acc" and line.endswith("0.4352") for line in lines)
    assert any(line.startswith("arc_easy: published: EleutherAI") for line in lines)
    shown = replace(found.results[0], num_fewshot=1)  # zero-shot numbers say nothing about it
    assert "0.4352" not in table([shown])
    assert isinstance(acc, Published)
    assert isinstance(found, Evaluation)
