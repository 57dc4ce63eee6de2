"""One-shot pruning by data of a GPT with 25 million weights, on all cores: how long each method takes.

    python -m benchmarks.calibrate

The weights are random, as time does not depend on them; the calibration data is 64 windows of 256 bytes.
"""

import json
import time
from pathlib import Path

import torch

from sparsity.calibration import Calibration
from sparsity.data import Text
from sparsity.distributions import OWL, Distribution, Uniform
from sparsity.models import GPT
from sparsity.oneshot import OneShotSparsifier, SparseGPT, Wanda
from sparsity.scores import Magnitude, Score

RESULTS = Path(__file__).parent / "results"
CONTEXT, BATCH, BATCHES = 256, 8, 8
CASES: dict[str, tuple[Score, str | None, Distribution, bool]] = {
    "magnitude 2:4": (Magnitude(), "2:4", Uniform(), False),
    "magnitude 2:4, permuted": (Magnitude(), "2:4", Uniform(), True),
    "Wanda 2:4": (Wanda(), "2:4", Uniform(), False),
    "Wanda 50 %": (Wanda(), None, Uniform(), False),
    "Wanda 50 %, OWL": (Wanda(), None, OWL(), False),
    "SparseGPT 2:4": (SparseGPT(), "2:4", Uniform(), False),
    "SparseGPT 50 %": (SparseGPT(), None, Uniform(), False),
}


def main() -> None:
    data = Text(context=CONTEXT, batch_size=BATCH)
    data.setup()
    rows = []
    print("| method | seconds | target weights |\n|---|---|---|")
    for name, (score, pattern, distribution, permute) in CASES.items():
        torch.manual_seed(0)
        model = GPT(CONTEXT, width=512, depth=8, heads=8)
        sparsifier = OneShotSparsifier(0.5, score, distribution, pattern, Calibration(BATCHES, permute))
        sparsifier.batches = data.val_dataloader
        start = time.perf_counter()
        sparsifier.attach(model)
        seconds = time.perf_counter() - start
        weights = sum(mask.numel() for mask in sparsifier.masks.values())
        rows.append({"method": name, "seconds": seconds, "weights": weights, "density": sparsifier.density()})
        print(f"| {name} | {seconds:.1f} | {weights:,} |", flush=True)
    about = {"tokens": CONTEXT * BATCH * BATCHES, "threads": torch.get_num_threads(), "torch": torch.__version__}
    (RESULTS / "calibrate.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
