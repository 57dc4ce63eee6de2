"""The history of the masks: what it counts, how it stays small, and its figure."""

import io

import pytest
import torch

from sparsity import Sparsifier
from sparsity.history import ROWS, History, dead_neurons
from sparsity.schedules import Linear


def mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def test_numbers_by_hand() -> None:
    history = History()
    before = {"a": mask("xx..", "...."), "b": mask("x.", ".x")}
    after = {"a": mask("x..x", "...."), "b": mask("x.", "..")}
    history.record(0, before, before, 0.5)
    history.record(10, after, before, 0.6)
    assert history.steps == [0, 10]
    assert history.rows[0][:3] == [0.0, 0.5, 1.0]
    # Two of the four that were kept are gone: one in each layer.
    assert history.last() == {"churn": 0.5, "explored": 0.6, "dead": 2.0}
    assert torch.allclose(history.densities(), torch.tensor([[0.25, 0.25], [0.5, 0.25]]))


def test_dead_neurons_are_rows_or_channels_without_a_weight() -> None:
    filters = torch.zeros(4, 2, 3, 3, dtype=torch.bool)
    filters[1, 0, 2, 2] = True
    assert dead_neurons({"conv": filters, "fc": mask("..", "x.")}) == 3 + 1


def test_a_long_history_is_thinned_and_keeps_its_last_row() -> None:
    history, masks = History(), {"a": mask("x.")}
    for step in range(3 * ROWS):
        history.record(step, masks, masks, 1.0)
        assert len(history.rows) == len(history.steps) <= ROWS
        assert history.steps[-1] == step
    assert history.steps == sorted(history.steps)


def test_state_comes_back_also_when_empty() -> None:
    history, again = History(), History()
    again.load_state_dict(history.state_dict())
    assert again.rows == []
    assert again.last() == {}
    history.record(3, {"a": mask("x.")}, {"a": mask("xx")}, 0.5)
    buffer = io.BytesIO()
    torch.save(history.state_dict(), buffer)
    buffer.seek(0)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert (again.names, again.steps, again.rows) == (history.names, history.steps, history.rows)


def test_pruning_explores_what_it_starts_with() -> None:
    for sparsity, schedule, expected in ((0.5, Linear(0, 4, 1), 1.0), (0.5, None, 0.5)):
        model = torch.nn.Linear(8, 8)
        sparsifier = Sparsifier(sparsity, schedule=schedule)
        sparsifier.attach(model)
        for step in range(5):
            sparsifier.update(step)
        assert sparsifier.explored() == expected
        assert sparsifier.history.last()["explored"] == expected


def test_figure_shows_every_layer_over_steps() -> None:
    pytest.importorskip("matplotlib")
    history = History()
    for step in (0, 10, 20):
        history.record(step, {"one": mask("x."), "two": mask("xx")}, {"one": mask("x."), "two": mask("xx")}, 1.0)
    above, below, _ = history.figure().axes
    assert [label.get_text() for label in above.get_yticklabels()] == ["one", "two"]
    assert below.get_xlabel() == "optimizer step"
    assert above.get_xlim() == (0, 30)
