"""The README's code runs, and what it says of files is true."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import federated, kernels, methods, rates, readme
from tests import pages

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = [code for code, _ in pages.blocks(README)]


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(
    block: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # what blocks write goes there
    names = pages.names()
    exec(compile(block, "README.md", "exec"), names)
    if "trainer.fit" in block:
        model = names["model"]
        assert isinstance(model, nn.Module)
        weights = [m.weight for m in set(model.modules()) if isinstance(m, nn.Linear | nn.Conv2d)]
        distinct = {id(weight): weight for weight in weights}.values()
        total = sum(weight.numel() for weight in distinct)
        assert sum(int(weight.count_nonzero()) for weight in distinct) == round(0.1 * total)
    if "print(sparsifier.density" in block:
        assert float(capsys.readouterr().out) == round(0.1 * 22_200) / 22_200


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "benchmarks/README.md",
        "recipes/README.md",
        "recipes/federated/README.md",
        "recipes/federated/FLOWER.md",
    ],
)
def test_links_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link


def test_commands_name_files_that_exist() -> None:
    for path in re.findall(r"recipes/[\w/]+\.yaml", README):
        assert (ROOT / path).is_file(), path
    assert torch.__version__.split("+")[0] in (ROOT / "constraints.txt").read_text()


def test_tables_are_those_of_the_results() -> None:
    results = ROOT / "benchmarks" / "results"
    trained = json.loads((results / "methods.json").read_text())
    assert readme.between("methods")[1] == methods.table(trained["summary"])
    assert trained["summary"] == methods.summary(trained["runs"])
    timed = json.loads((results / "kernels_cpu.json").read_text())
    assert readme.between("speed")[1] == kernels.short(timed)
    assert readme.between("kernels", "benchmarks/README.md")[1] == kernels.text(timed).strip()
    by_rate = rates.table(json.loads((results / "rates.json").read_text())["runs"])
    assert readme.between("rates", "benchmarks/README.md")[1] == by_rate
    page = (ROOT / "docs/explanation/dynamic.md").read_text().splitlines()
    quoted = [line for line in page if line.startswith(("| dense", "| StaticMask", "| RigL"))]
    assert len(quoted) == 7
    assert set(quoted) <= set(by_rate.splitlines())
    for path in results.glob("federated_*.json"):
        rows, name = json.loads(path.read_text())["summary"], path.stem.replace("_", " ")
        assert readme.between(name, "benchmarks/README.md")[1] == federated.table(rows)
