"""The picture of a run shows what its evaluations found, whichever technique made them."""

from __future__ import annotations

from optlm.train.run.curve import draw_curve, held_out_lines

TRAIN = {"kind": "train", "tokens": 10, "loss": 2.0}


def test_domains_have_a_line_each() -> None:
    events = [
        TRAIN,
        {"kind": "valid", "tokens": 10, "score": 9.0, "bits_per_byte": {"a": 1.0, "b": 2.0}},
        {"kind": "valid", "tokens": 20, "score": 8.0, "bits_per_byte": {"a": 0.5, "b": 1.5}},
    ]
    expected = {"a": ([10, 20], [1.0, 0.5]), "b": ([10, 20], [2.0, 1.5])}
    assert held_out_lines(events) == ("bits per byte", expected)


def test_fine_tuning_shows_its_loss_and_how_far_it_went() -> None:
    events = [
        TRAIN,
        {"kind": "valid", "tokens": 10, "score": 4.0, "base_score": 5.0, "kl_to_base": 0.1},
        {"kind": "valid", "tokens": 20, "score": 3.0, "base_score": 5.0, "kl_to_base": 0.2},
    ]
    unit, lines = held_out_lines(events)
    assert unit == "nats per token"
    assert list(lines.values()) == [([10, 20], [4.0, 3.0]), ([10, 20], [0.1, 0.2])]


def test_a_run_without_evaluations_has_a_picture() -> None:
    assert held_out_lines([TRAIN]) == ("bits per byte", {})
    assert draw_curve([TRAIN]).startswith(b"\x89PNG")
