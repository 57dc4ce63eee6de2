"""Every recipe runs for a few steps, and reaches its sparsity exactly even then."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

import train

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml") if not path.stem.startswith("smoke"))
STAGED = ("HyperSparse", "IterativeMagnitude", "SWAMP")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny data sets of random images in the layout of the real ones."""
    found = {}
    for name, column, mode, size in (("MNIST", "image", "L", 28), ("CIFAR10", "img", "RGB", 32)):
        found[name] = tmp_path_factory.mktemp(name)
        for split, count in (("train", 900), ("test", 40)):
            pixels = torch.randint(0, 256, (count, size, size, len(mode)), dtype=torch.uint8).squeeze(-1).numpy()
            images = []
            for each in pixels:
                Image.fromarray(each, mode).save(buffer := io.BytesIO(), "PNG")
                images.append({"bytes": buffer.getvalue(), "path": None})
            labels = [index % 10 for index in range(count)]
            pq.write_table(pa.table({column: images, "label": labels}), found[name] / f"{split}-00000-of-00001.parquet")
    found["TinyShakespeare"] = tmp_path_factory.mktemp("text")
    (found["TinyShakespeare"] / "input.txt").write_text("All's well that ends well. " * 400)
    return found


def wanted(method: dict[str, Any] | None) -> float:
    """The sparsity that a recipe asks for."""
    if method is None:
        return 0.0
    if "sparsity" in method["init_args"]:
        sparsity: float = method["init_args"]["sparsity"]
        return sparsity
    kept, group = map(int, method["init_args"]["pattern"].split(":"))
    return 1 - kept / group


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs_and_reaches_its_sparsity(
    recipe: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = yaml.safe_load((ROOT / f"recipes/{recipe}.yaml").read_text())
    data = settings["data"]["class_path"]
    arguments = [f"--data.data_dir={folders[data]}"] if data in folders else []
    staged = (settings["sparsity"] or {}).get("class_path") in STAGED
    files = [str(ROOT / f"recipes/{name}.yaml") for name in (recipe, "smoke_stages" if staged else "smoke")]
    if staged:
        rounds = settings["sparsity"]["class_path"] != "HyperSparse"
        arguments += ["--data.batch_size=8", f"--trainer.max_epochs={25 if rounds else 10}"]
    overrides = [f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false", *arguments]
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", files[0], "--config", files[1], *overrides])
    train.main()
    [path] = tmp_path.rglob("report.json")
    report = json.loads(path.read_text())
    assert report["recipe"] == recipe
    total = sum(torch.Size(row["shape"]).numel() for row in report["sparsity"]["layers"].values())
    expected = 1 - round((1 - wanted(settings["sparsity"])) * total) / total
    assert report["sparsity"]["achieved"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_listed_and_explained(recipe: str) -> None:
    assert f"`{recipe}`" in (ROOT / "recipes/README.md").read_text()
    text = (ROOT / f"recipes/{recipe}.yaml").read_text()
    assert text.startswith("# ")
    assert f"python train.py fit --config recipes/{recipe}.yaml" in text
