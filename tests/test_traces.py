"""Traces: what is noted of a run, by hand, and after a checkpoint."""

import io

import torch

from sparsity.traces import BINS, ROWS, Traces, histogram, histograms


def test_measurements_of_one_step_are_one_row_and_only_finite_ones_count() -> None:
    traces = Traces()
    traces.note(10, {"val/acc": 0.5, "val/loss": float("inf")})
    traces.note(10, {"val/acc": 0.6, "train/loss": 2.0})
    traces.note(20, {"train/loss": float("nan")})
    traces.note(30, {"train/loss": 1.0})
    assert traces.rows == [
        {"step": 10, "metrics": {"val/acc": 0.6, "train/loss": 2.0}}, {"step": 30, "metrics": {"train/loss": 1.0}},
    ]  # fmt: skip
    assert traces.series() == {"val/acc": [(10, 0.6)], "train/loss": [(10, 2.0), (30, 1.0)]}


def test_long_runs_are_thinned_and_keep_the_last_row() -> None:
    traces = Traces()
    for step in range(3 * ROWS):
        traces.note(step, {"loss": 1.0})
        assert len(traces.rows) <= ROWS
        assert traces.rows[-1]["step"] == step


def test_histogram_by_hand() -> None:
    weight = torch.tensor([[-1.0, 1.0, 0.01], [0.0, float("nan"), 0.5]])
    found = histogram(weight)
    assert found["edge"] == 1.0
    counts = found["counts"].tolist()
    # Bins of 2/41: 0.01 is in the middle one, 0.5 in number floor(1.5 * 41 / 2) = 30, 1.0 in the last.
    assert {place: count for place, count in enumerate(counts) if count} == {0: 1, 20: 1, 30: 1, BINS - 1: 1}


def test_no_values_and_no_memory_are_no_trouble() -> None:
    for weight in (torch.zeros(3, 3), torch.empty(0, 3), torch.tensor([float("inf")])):
        found = histogram(weight)
        assert (found["edge"], found["counts"].tolist()) == (0.0, [0] * BINS)
    assert list(histograms({"there": torch.ones(1, 1), "not": torch.ones(1, 1, device="meta")})) == ["there"]


def test_state_comes_back_from_a_file_that_runs_no_code() -> None:
    traces, again, buffer = Traces(), Traces(), io.BytesIO()
    traces.note(1, {"loss": 0.5})
    traces.before = {"w": histogram(torch.randn(4, 4))}
    torch.save(traces.state_dict(), buffer)
    traces.note(1, {"late": 1.0})
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert again.rows == [{"step": 1, "metrics": {"loss": 0.5}}]
    assert again.before["w"]["edge"] == traces.before["w"]["edge"]
    assert torch.equal(again.before["w"]["counts"], traces.before["w"]["counts"])


def test_thinning_keeps_metrics_that_are_measured_in_turn() -> None:
    traces = Traces()
    for step in range(2 * ROWS):
        traces.note(step, {"train/loss" if step % 2 else "val/loss": float(step)})
    series = traces.series()
    assert min(map(len, series.values())) > ROWS // 4
    assert series["train/loss"][-1] == (2 * ROWS - 1, 2 * ROWS - 1)


def test_more_values_than_a_float_of_32_bits_counts() -> None:
    assert histogram(torch.ones(1, 1).expand(5000, 5000))["counts"].max() == 25_000_000
