"""A student and its teacher: the whole way, stopped, resumed, compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distil_settings import settings

from optlm import LLM
from optlm.cli import run as command_line
from optlm.errors import CheckpointError, ConfigError
from optlm.model import OPT
from optlm.train.distil import distil as module
from optlm.train.distil.data import open_data
from optlm.train.distil.distil import distil, first_student
from optlm.train.distil.on_policy import write_rows
from optlm.train.distil.recipe import DistilConfig
from optlm.train.distil.report import closeness, write_report
from optlm.train.distil.teacher import open_teacher, teacher_digest
from optlm.train.run.export import export_run
from optlm.train.run.folder import RunFolder, TrainingError
from optlm.train.tokens.corpus import CorpusError
from variants import VARIANTS, make_state, write_checkpoint

HIDDEN = {"weight": 1.0, "pairs": [[0, 1]], "projection": "learned"}
ON_POLICY = {"share": 0.5, "prompt_tokens": 4}


@pytest.fixture
def values(recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return settings(recipe, tmp_path / "teacher")


def train(values: dict[str, Any], tmp_path: Path, name: str = "run") -> Path:
    config = DistilConfig.from_dict(values)
    return distil(config, tmp_path / name, data_folder=tmp_path / "data")


def bits(folder: Path) -> dict[str, bytes]:
    state = OPT.from_checkpoint(folder).state_dict()
    return {name: value.numpy().tobytes() for name, value in state.items()}


def losses(run: Path) -> list[float]:
    return [event["loss"] for event in RunFolder(run).events() if event["kind"] == "train"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns_from_its_teacher(
    recipe: dict[str, Any], tmp_path: Path, variant: str
) -> None:
    values = settings(recipe, tmp_path / "teacher", variant)
    values["losses"] = {"forward_kl": 1.0, "reverse_kl": 0.5, "jsd": 0.5, "hidden": HIDDEN}
    values |= {"on_policy": ON_POLICY}
    values["loop"] |= {"steps": 12, "evaluate_every": 12, "checkpoint_every": 12}
    folder = train(values, tmp_path)
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]
    student = OPT.from_checkpoint(folder)
    assert student.config.num_hidden_layers == 1
    assert student.config.vocab_size == VARIANTS[variant].vocab_size
    LLM(folder, threads=1).generate("the cat")
    export_run(tmp_path / "run", tmp_path / "exported", dtype="f32")  # without the projections
    assert bits(tmp_path / "exported") == bits(folder)


@pytest.mark.parametrize("technique", ["plain", "hidden", "on_policy", "frozen"])
def test_killed_run_resumes_to_the_same_bits(
    values: dict[str, Any], tmp_path: Path, technique: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["model"] |= {"dropout": 0.1}
    if technique == "hidden":
        values["losses"] |= {"hidden": HIDDEN}
    elif technique == "on_policy":
        values |= {"on_policy": ON_POLICY}
    elif technique == "frozen":
        values |= {"student": {"embedding": "frozen"}}
    whole = bits(train(values, tmp_path, "whole"))
    plain = module._batch_loss

    def killed(*arguments: Any) -> Any:
        if RunFolder(tmp_path / "cut").checkpoint(2).exists():
            raise MemoryError
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_batch_loss", killed)
        with pytest.raises(MemoryError):
            train(values, tmp_path, "cut")
    assert bits(train(values, tmp_path, "cut")) == whole
    with pytest.raises(ConfigError, match=r"another configuration.*losses\.jsd"):
        train(values | {"losses": values["losses"] | {"jsd": 1.0}}, tmp_path, "cut")


@pytest.mark.parametrize("variant", ["base", "350m"])
def test_narrow_student_shares_the_embedding(
    recipe: dict[str, Any], tmp_path: Path, variant: str
) -> None:
    values = settings(recipe, tmp_path / "teacher", variant)
    values |= {"student": {"embedding": "frozen"}}
    values["model"] = {"hidden_size": 24, "num_attention_heads": 3}
    student = OPT.from_checkpoint(train(values, tmp_path))
    teacher = OPT.from_checkpoint(tmp_path / "teacher")
    assert student.config.has_projections
    assert torch.equal(student.decoder.embed_tokens.weight, teacher.decoder.embed_tokens.weight)
    state = RunFolder(tmp_path / "run").load_latest()
    assert state is not None
    assert "model.decoder.embed_tokens.weight" not in state["model"]


def test_hidden_states_by_the_basis_of_the_cut(values: dict[str, Any], tmp_path: Path) -> None:
    values["model"] = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2}
    values["losses"] |= {"hidden": HIDDEN | {"projection": "basis"}}
    train(values, tmp_path)
    assert losses(tmp_path / "run")[-1] > 0


def first(values: dict[str, Any], tmp_path: Path) -> OPT:
    config = DistilConfig.from_dict(values)
    checkpoint = open_teacher(config.teacher)
    return first_student(config, checkpoint, open_data(config, checkpoint, tmp_path / "data"))[0]


def test_student_of_the_teachers_shape_loses_nothing(
    values: dict[str, Any], tmp_path: Path
) -> None:
    hidden = {"weight": 1.0, "pairs": [[0, 0], [1, 1]], "projection": "none"}
    values |= {
        "model": {},
        "losses": {"forward_kl": 1.0, "hidden": hidden},
    }
    values["loop"]["steps"] = 1
    train(values, tmp_path)
    assert losses(tmp_path / "run")[0] == pytest.approx(0.0, abs=1e-5)


def test_first_weights_are_the_same_with_and_without_the_teacher(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values |= {"student": {"init": "random"}}
    config = DistilConfig.from_dict(values)
    assert config.control.terms.divergences == {}
    assert config.control.training == config.training
    checkpoint = open_teacher(config.teacher)
    data = open_data(config, checkpoint, tmp_path / "data")
    a, _ = first_student(config, checkpoint, data)
    b, _ = first_student(config.control, checkpoint, data)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_larger_student_is_allowed_and_said(values: dict[str, Any], tmp_path: Path) -> None:
    values |= {
        "model": {"hidden_size": 96, "num_attention_heads": 4},
        "student": {"init": "random"},
    }
    told: list[str] = []
    distil(
        DistilConfig.from_dict(values),
        tmp_path / "run",
        data_folder=tmp_path / "data",
        log=told.append,
    )
    assert any("the student is the larger one" in line for line in told)


def test_on_policy_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = OPT(VARIANTS["base"]).train()
    prompts = torch.tensor([[2, 7, 9], [2, 30, 31]])
    before = torch.get_rng_state()
    rows = write_rows(model, prompts, 20, temperature=1.0, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert rows.shape == (2, 20)
    assert torch.equal(rows[:, :3], prompts)
    assert torch.equal(rows, write_rows(model, prompts, 20, temperature=1.0, seed=5))
    assert not torch.equal(rows, write_rows(model, prompts, 20, temperature=1.0, seed=6))
    cold = write_rows(model, prompts, 12, temperature=0.01, seed=1)
    with torch.no_grad():
        likeliest = model.eval()(cold).logits.argmax(-1)
    assert torch.equal(cold[:, 3:], likeliest[:, 2:-1])


# ---- report --------------------------------------------------------------------------------------


def test_closeness_is_what_it_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = VARIANTS["base"]
    teacher, model = OPT(config).eval(), OPT(config).eval()
    document = [2, *range(10, 110)]  # two windows
    found = closeness(model, teacher, [document])
    nats = kl = agreed = 0.0
    with torch.no_grad():
        for begin in (0, 64):
            window = torch.tensor([document[begin : begin + 65]])
            log_q, log_p = (m(window[:, :-1]).logits[0].log_softmax(-1) for m in (model, teacher))
            nats -= float(log_q.gather(1, window[0, 1:, None]).sum())
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            agreed += float((log_p.argmax(1) == log_q.argmax(1)).sum())
    assert found.predictions == 100
    assert found.nats == pytest.approx(nats, rel=1e-4)
    assert found.kl == pytest.approx(kl, rel=1e-3)
    assert found.agreed == agreed
    same = closeness(teacher, teacher, [document])
    assert (same.agreed, same.kl) == (100, pytest.approx(0.0, abs=1e-4))


def test_command_line(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cache, student, control and report, by the commands a user types."""
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(values))
    data = ["--data", str(tmp_path / "data")]
    cache, out = str(tmp_path / "cache"), tmp_path / "run"
    assert command_line(["teacher-cache", str(file), "--out", cache, *data, "--top-k", "8"]) == 0
    arguments = ["distil", str(file), "--out", str(out), *data, "--cache", cache]
    assert command_line([*arguments, "--control"]) == 0
    output = capsys.readouterr()
    assert "MB are free" in output.err
    assert [line.split("|")[1].strip() for line in output.out.splitlines()[2:]] == [
        "student",
        "student without teacher",
        "teacher",
    ]
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert [row["kl"] > 0 for row in rows] == [True, True, False]
    assert rows[2]["agreement"] == 1.0
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert rows[0]["parameters"] < rows[2]["parameters"]
    assert "KL(teacher, model)" in (out / "report.md").read_text()
    assert command_line([*arguments, "--no-report"]) == 0  # finished: nothing to do
    assert capsys.readouterr().out == ""
    file.write_text(json.dumps(values | {"losses": {"forward_k": 1}}))
    assert command_line(arguments) == 2
    assert "unknown key 'forward_k' in losses; did you mean 'forward_kl'" in capsys.readouterr().err


def test_report_without_speed(values: dict[str, Any], tmp_path: Path) -> None:
    folder = train(values, tmp_path)
    table = write_report(DistilConfig.from_dict(values), tmp_path, {"student": folder}, speed=False)
    assert "| - |" in table


def test_settings_of_the_page_are_valid() -> None:
    page = Path(__file__).resolve().parents[3] / "docs" / "distillation.md"
    text = page.read_text(encoding="utf-8").split("```json\n")[1].split("```")[0]
    shown = json.loads(text) | {"teacher": "bundled"}
    assert DistilConfig.from_dict(shown).terms.temperature == 2.0


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": {"forward_kll": 1}}, "unknown key 'forward_kll'.*did you mean 'forward_kl'"),
        ({"losses": {}}, "nothing is learnt from the teacher"),
        ({"losses": {"labels": 1.0}}, "nothing is learnt from the teacher"),
        ({"losses": {"jsd": 1, "temperature": 0}}, "temperature is 0"),
        ({"losses": {"jsd": 1, "hidden": {"weight": 1}}}, "losses.hidden lacks pairs"),
        ({"losses": {"hidden": HIDDEN | {"weight": 0}}}, "weight is 0"),
        ({"losses": {"hidden": HIDDEN | {"pairs": [[0]]}}}, "layer of the student"),
        ({"losses": {"hidden": HIDDEN | {"projection": "learnt"}}}, "did you mean 'learned'"),
        ({"losses": {"hidden": HIDDEN}, "on_policy": ON_POLICY}, "no right answers"),
        ({"on_policy": {"share": 0}}, "share is 0"),
        ({"on_policy": {"share": 1, "prompt_tokens": 16}}, "below the shortest sequence length 16"),
        ({"on_policy": {"share": 1, "temperature": 0}}, "temperature is 0"),
        ({"model": {"vocab_size": 301}}, "vocab_size is 301, but the teacher's is 300"),
        ({"student": {"init": "zero"}}, "student.init is 'zero'"),
        ({"student": {"init": "random", "layers": [1]}}, "init is random"),
        ({"student": {"layers": ["1"]}}, "whole numbers"),
        ({"studnet": {}}, "unknown key 'studnet'.*did you mean 'student'"),
        ({"teacher": 3}, "teacher must be a folder"),
        ({"sequence_lengths": {"128": 1}}, "does not fit"),
    ],
)
def test_bad_settings_are_refused(
    values: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        DistilConfig.from_dict(values | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"hidden_size": 96, "num_attention_heads": 4}}, "cannot be cut"),
        ({"student": {"embedding": "shared"}, "model": {"word_embed_proj_dim": 24,
          "hidden_size": 24, "num_attention_heads": 2}}, "must be the teacher's 48, not 24"),
        ({"losses": {"hidden": HIDDEN | {"pairs": [[1, 0]]}}}, "layer 1 of the student"),
        ({"losses": {"hidden": HIDDEN | {"pairs": [[0, 2]]}}}, "layer 2 of the teacher"),
        ({"losses": {"hidden": HIDDEN | {"projection": "none"}},
          "model": {"hidden_size": 24, "num_attention_heads": 2}}, "widths 24 and 48 differ"),
        ({"losses": {"hidden": HIDDEN | {"projection": "basis"}}, "student": {"init": "random"}},
         "not cut from the"),
    ],
)  # fmt: skip
def test_students_that_cannot_be_made(
    values: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(values | changes, tmp_path)


def test_missing_teacher_and_empty_text(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        DistilConfig.from_dict(values | {"teacher": str(tmp_path / "nothing")})
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    values["data"] |= {"parts": [{"name": "none", "file": str(empty), "weight": 1}]}
    with pytest.raises(CorpusError, match="'none'"):
        train(values, tmp_path)


def test_teacher_with_nan_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    state = make_state(VARIANTS["base"])
    state["model.decoder.layers.1.fc1.weight"][0, 0] = float("nan")
    write_checkpoint(tmp_path / "teacher", VARIANTS["base"], state)
    with pytest.raises(CheckpointError, match=r"fc1\.weight.*NaN"):
        train(values, tmp_path)


def test_teacher_whose_logits_overflow_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    state = make_state(VARIANTS["base"])
    state["model.decoder.final_layer_norm.weight"] *= 1e38
    state["model.decoder.embed_tokens.weight"] *= 1e3
    write_checkpoint(tmp_path / "teacher", VARIANTS["base"], state)
    values |= {"student": {"init": "random"}}
    with pytest.raises(TrainingError, match="teacher's logits are no numbers"):
        train(values, tmp_path)


def test_digest_tells_teachers_apart(tmp_path: Path) -> None:
    config = VARIANTS["base"]
    state = make_state(config)
    one = teacher_digest(open_teacher(str(write_checkpoint(tmp_path / "a", config, state))))
    same = teacher_digest(open_teacher(str(write_checkpoint(tmp_path / "b", config, state))))
    state["model.decoder.layers.0.fc1.weight"][5, 7] += 1e-6
    other = teacher_digest(open_teacher(str(write_checkpoint(tmp_path / "c", config, state))))
    assert one == same != other
