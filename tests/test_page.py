"""The page of a report: well-formed, alone, true to the report, and safe from what users call their layers."""

import base64
import io
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sparsity import page, report
from sparsity.history import History
from sparsity.traces import Traces, histogram
from tests.webpage import Page

HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(2)>&amp;{{ 7 * 7 }}"""


def mask(*rows: str) -> Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def written(masks: dict[str, Tensor], **more: Any) -> report.Report:
    """A report of these masks, whose other numbers are made up."""
    layers = report.layers(masks, "unstructured")
    for row in layers.values():
        row |= {"bytes": {"dense": 1200, "stored": 300}, "flops": {"dense": 3000, "sparse": 750}, "kernel": "rows"}
    achieved = 1 - sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    found = {
        "recipe": "mine", "seed": 3, "metrics": {"train/acc": 0.99, "val/acc": 0.8765, "val/loss": None},
        "sparsity": {"target": 0.75, "achieved": achieved, "layers": layers},
        "flops": {"dense": 81_100_000, "sparse": 8_112_000}, "bytes": {"dense": 202_440, "stored": 27_995},
        "versions": {"torch": "1.2.3"}, "warnings": report.warnings(layers),
    }  # fmt: skip
    return found | more


def moved() -> tuple[dict[str, Tensor], History]:
    """Two layers of 4 and 12 weights, whose masks are renewed at steps 0, 10 and 20."""
    stages = [
        {"one": mask("xx", "xx"), "two": mask("xxxx", "xxxx", "xxxx")},
        {"one": mask("x.", ".."), "two": mask("xxxx", "xx..", "....")},
        {"one": mask(".x", ".."), "two": mask("xx..", "....", "....")},
    ]
    history = History()
    for step, before, after in zip((0, 10, 20), [stages[0], *stages], stages, strict=False):
        history.record(step, after, before, 1.0)
    return stages[-1], history


def whole(name: str = "one", recipe: str = "mine", **more: Any) -> tuple[report.Report, Page]:
    """A page with everything a run in one process can have."""
    masks, history = moved()
    masks = {name: masks["one"], "two": masks["two"]}
    history.names = list(masks)
    traces = Traces()
    for step in (5, 10, 20):
        traces.note(step, {"val/acc": step / 40, "train/acc": step / 30, f"val/{name}": 1.0})
    traces.before = {each: histogram(torch.randn(20)) for each in masks}
    traces.after = {each: histogram(torch.randn(20)) for each in masks}
    found = written(masks, recipe=recipe, **more)
    return found, Page(page.render(found, traces, masks, history, [0.0, 0.5, 0.75]))


def test_all_sections_are_there_and_nothing_comes_from_outside() -> None:
    _, found = whole()
    assert found.sections == ["warnings", "training", "metrics", "layers", "density", "weights", "masks"]
    assert found.headings == [
        "Sparsity report: mine", "Warnings", "Over training", "Metrics at the end", "Layers", "Density over training",
        "Weights before and after", "Masks of the first layers",
    ]  # fmt: skip
    assert found.outside() == []
    assert "default-src 'none'" in found.text
    assert all(value for tag, name, value in found.attributes if (tag, name) == ("img", "src"))
    assert sum(tag == "img" for tag in found.tags) == sum(name == "alt" for _, name, _ in found.attributes)


def test_numbers_are_those_of_the_report() -> None:
    result, found = whole()
    table = found.tables["Layers"]
    assert [row[0] for row in table[1:]] == ["one", "two", "whole model"]
    assert table[1] == ["one", "2 x 2", "4", "1", "0.2500", "unstructured", "1.2 kB", "300 B", "3000", "0.01 %", "rows"]
    assert table[2][2:5] == ["12", "2", "0.1667"]
    assert table[3][6:9] == ["202.4 kB", "28.0 kB", "81.1M"]
    assert found.tables["Metrics"][1:] == [["train/acc", "0.99"], ["val/acc", "0.8765"], ["val/loss", "-"]]
    text = " ".join(found.words)
    for shown in ("81.2 %", "75.0 % asked for", "0.8765", "28.0 kB", "13.8 % of 202.4 kB dense", "8.112M",
                  "10.0 % of 81.1M dense", "Theory is not time", "torch 1.2.3"):  # fmt: skip
        assert shown in text, shown
    assert all(each in found.words for each in result["warnings"])


def test_sparsity_and_churn_over_training_by_hand() -> None:
    _, found = whole()
    # Of 16 weights 16, 7 and 3 are kept. Of 16 the first renewal drops 9; of 7 the second drops 1 and 4.
    assert "sparsity over optimizer step. achieved: 0 at 0, 0.8125 at 20; asked for: 0 at 0, 0.75 at 20." in (
        found.summaries
    )
    assert any(each.startswith("mask churn over optimizer step. churn: 0.5625 at 10, 0.7143 at 20;")
               for each in found.summaries)  # fmt: skip
    # A row of `one` is empty from step 10 on, one of `two` then, and two at last.
    assert "neurons without a weight over optimizer step. dead: 0 at 0, 3 at 20." in found.summaries


def test_heat_map_by_hand() -> None:
    _, found = whole()
    images = [value for tag, name, value in found.attributes if (tag, name) == ("img", "src")]
    table = found.tables["Density of each layer over training"]
    assert table[1] == ["one", "1.0000", "", "0.2500"]
    assert table[2] == ["two", "1.0000", "", "0.1667"]
    row = Image.open(io.BytesIO(base64.b64decode(str(images[1]).partition(",")[2])))
    assert row.size == (240, 1)
    # Half of the time 1, then 6 of 12, and 2 of 12 at the last moment; roots of them are drawn.
    assert list(row.getchannel("A").tobytes()) == [255] * 120 + [180] * 119 + [104]


def test_names_are_text_whatever_is_in_them() -> None:
    result, found = whole(name=HOSTILE, recipe=HOSTILE)
    assert found.outside() == []
    assert "script" not in found.tags
    assert found.headings[0] == f"Sparsity report: {HOSTILE}"
    for table in ("Layers", "Density of each layer over training"):
        assert found.tables[table][1][0] == HOSTILE
    assert any(HOSTILE in word for word in found.words if word in result["warnings"])
    assert any(each.startswith(f"Histogram of the weights of {HOSTILE}") for each in found.summaries)
    assert any(each.startswith(f"{HOSTILE} over optimizer step") for each in found.summaries)
    assert any(name == "alt" and str(value).startswith(f"Mask of {HOSTILE}") for _, name, value in found.attributes)


def test_what_a_run_does_not_have_is_left_out() -> None:
    masks = {"one": mask("xx", "xx")}
    nothing = {"dense": None, "sparse": None}
    result = written(masks, metrics={}, seed=None, recipe=None, flops=nothing)
    result["sparsity"]["layers"]["one"]["flops"] = nothing
    found = Page(page.render(result, Traces(), masks, History()))
    assert found.sections == ["layers"]
    assert found.headings == ["Sparsity report", "Layers"]
    assert found.tables["Layers"][1][8:10] == ["-", "-"]
    assert "FLOPs, theoretical" not in found.words


def test_the_history_of_another_model_is_left_out() -> None:
    _, history = moved()
    found = Page(page.render(written({"one": mask("x.")}), Traces(), {"one": mask("x.")}, history))
    assert "density" not in found.sections


def test_a_federation_has_accuracy_against_rounds_and_bytes() -> None:
    rounds = [
        {"round": number, "bytes_up": 1_000_000, "bytes_down": 3_000_000, "accuracy": accuracy}
        for number, accuracy in enumerate((None, 0.25, None, 0.5))
    ]
    spread = {"val/acc": {"least": 0.1, "median": 0.5, "mean": 0.4, "largest": 0.75}}
    about = {"clients": 8, "bytes_up": 4_000_000, "bytes_down": 12_000_000, "bytes_dense": 64_000_000,
             "failures": {"timeout": 2}, "per_client": spread}  # fmt: skip
    _, found = whole(rounds=rounds, federated=about)
    assert "federated" in found.sections
    assert "rounds" not in found.sections
    title = "accuracy on the validation split over"
    assert f"{title} round. by round: 0.25 at 2, 0.5 at 4." in found.summaries
    assert f"{title} MB sent, both ways. by MB: 0.25 at 8, 0.5 at 16." in found.summaries
    assert found.tables["The final model on what each client held out"][1] == ["val/acc", "0.1", "0.5", "0.4", "0.75"]
    assert "25.0 % of 64.0 MB dense" in found.words
    assert "Failures: timeout 2." in found.words


def test_rounds_and_phases_are_tables() -> None:
    rounds = [{"round": 0, "sparsity": 0.5, "metrics": {"val/acc": 0.9}}, {"round": 1, "sparsity": 0.75, "metrics": {}}]
    _, found = whole(rounds=rounds, phases={"phase": 3, "because": "done"})
    assert found.tables["Rounds"] == [
        ["round", "sparsity", "metrics"], ["0", "0.5", "val/acc 0.9"], ["1", "0.75", ""],
    ]  # fmt: skip
    assert found.tables["Phases"] == [["phase", "because"], ["3", "done"]]


def test_filters_inputs_and_matrices_have_pictures_and_dense_layers_none() -> None:
    masks = {
        "pixels": torch.arange(3 * 64).view(3, 64) % 3 == 0, "dense": torch.ones(2, 2, dtype=torch.bool),
        "conv": torch.arange(4 * 2 * 9).view(4, 2, 3, 3) % 2 == 0,
    }  # fmt: skip
    found = Page(page.render(written(masks), Traces(), masks, History()))
    shown = [str(value) for _, name, value in found.attributes if name == "alt"]
    assert [text.partition(":")[0] for text in shown] == ["Mask of pixels", "Mask of conv", "Mask of pixels"]
    assert "4 filters of 3 x 3" in shown[1]
    assert "the 64 inputs as a square; the most is 0.333" in shown[2]


def test_a_name_that_is_no_unicode_can_be_written(tmp_path: Path) -> None:
    _, found = whole(recipe="a\udcff")
    page.save(found.text, tmp_path / "report.html")
    assert "Sparsity report: a\\udcff" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]


def test_the_headline_is_what_was_not_trained_on() -> None:
    assert page.headline({"train/acc": 1.0, "val/loss": 0.2, "val/acc": 0.9, "test/acc": 0.8}) == [
        "test/acc",
        "val/acc",
    ]
    assert page.headline({"train/acc": 1.0, "val/loss": 0.2, "val/acc": None}) == ["val/loss", "train/acc"]
    assert page.headline({}) == []


def test_percents_keep_what_is_small() -> None:
    assert [page.percent(each) for each in (0.9, 0.995, 0.0004, 0.0, 1.0)] == [
        "90.0 %", "99.50 %", "0.04 %", "0.0 %", "100.0 %",
    ]  # fmt: skip
    assert page.percent(0, 0) == "0.0 %"


def test_a_vector_among_the_first_targets_has_a_picture() -> None:
    masks = {"bias": torch.tensor([True, False, True])}
    found = Page(page.render(written(masks), Traces(), masks, History()))
    assert "Mask of bias: 3 rows (axis 0) by 1 columns" in [
        value for _, name, value in found.attributes if name == "alt"
    ]
