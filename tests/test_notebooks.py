"""Every notebook's code runs from top to bottom, and what is committed shows what it printed and drew."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(code: str, names: dict[str, Any]) -> Any:
    """The value of a cell's last expression, without IPython's magics."""
    tree = ast.parse(re.sub(r"^%.*$", "", code, flags=re.MULTILINE))
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "notebook", "exec"), names)
    return eval(compile(ast.Expression(last.value), "notebook", "eval"), names) if isinstance(last, ast.Expr) else None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_its_figures(
    path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    pyplot.switch_backend("agg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        value = run("".join(cell["source"]), names)
        printed = capsys.readouterr().out.splitlines()
        kinds = {kind for output in cell["outputs"] for kind in output.get("data", {"text": None})}
        assert ("image/png" in kinds) == (isinstance(value, Figure) or bool(pyplot.get_fignums()))
        assert bool(kinds) == (bool(printed) or "image/png" in kinds)
        shown = "".join("".join(output.get("text", "")) for output in cell["outputs"]).splitlines()
        assert {line for line in shown if line.startswith("density")} <= set(printed)  # exact on every machine
        pyplot.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_says_nothing_of_a_machine(path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    texts = [
        text
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        for text in ("".join(output.get("text", "")), "".join(output.get("data", {}).get("text/plain", "")))
    ]
    assert not any(re.search(r"(?:^|[\s'\"(])/\w+/\w+", text) for text in [*texts, json.dumps(notebook["metadata"])])
    assert not any("error" in output["output_type"] for cell in notebook["cells"] for output in cell.get("outputs", []))
