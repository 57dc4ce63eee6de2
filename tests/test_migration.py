"""ModelPruning's arguments, with our masks."""

import logging
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelPruning as Lightnings
from torch import nn
from torch.nn.utils import prune

from callbacks import ModelPruning
from sparsity import InputError, masks
from tests.nets import Batches, Task, task, trainer


def fit(callback: ModelPruning, epochs: int = 3, model: Task | None = None, **settings: Any) -> Task:
    model = model or task()
    trainer(callback, epochs=epochs, **settings).fit(model, Batches())
    return model


def zeros(model: nn.Module, callback: ModelPruning) -> float:
    weights = callback.sparsifier.targets.select(model)
    return 1 - masks.density(masks.from_zeros(weights))


@pytest.mark.parametrize("function", ["l1_unstructured", "random_unstructured", prune.L1Unstructured])
@pytest.mark.parametrize("is_global", [True, False])
def test_the_amount_is_of_all_targets_and_never_compounds(function: Any, is_global: bool) -> None:
    if isinstance(function, type) and not is_global:
        pytest.skip("Lightning takes classes for global pruning only")
    settings = {"pruning_fn": function, "amount": 0.5, "use_global_unstructured": is_global}
    callback = ModelPruning(**settings)
    model = fit(callback)
    total = sum(mask.numel() for mask in callback.sparsifier.masks.values())
    assert round(zeros(model, callback) * total) == round(0.5 * total)
    assert callback.sparsifier.density() == pytest.approx(0.5, abs=1 / total)

    theirs = task()
    peer = Lightnings(**settings, use_lottery_ticket_hypothesis=False, parameter_names=["weight"])
    trainer(peer, epochs=3).fit(theirs, Batches())
    assert float((theirs.net.fc.weight == 0).float().mean()) > 0.6, "theirs is 87.5 %"


def test_it_prunes_when_the_first_epoch_has_ended() -> None:
    seen: list[float] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            seen.append(zeros(pl_module, callback))

    callback, model = ModelPruning("l1_unstructured", amount=0.6), task()
    trainer(Watch(), callback, epochs=2).fit(model, Batches())
    assert seen[: len(Batches())] == [0.0] * len(Batches())
    assert min(seen[len(Batches()) :]) == pytest.approx(0.6, abs=1e-3)


def test_layers_keep_as_much_each_if_they_are_not_compared() -> None:
    callback = ModelPruning("l1_unstructured", (), None, False, 0.75)
    fit(callback)
    for mask in callback.sparsifier.masks.values():
        assert float(mask.float().mean()) == pytest.approx(0.25, abs=1 / mask.numel())


def test_given_parameters_are_pruned_and_no_others() -> None:
    model = task()
    callback = ModelPruning("l1_unstructured", [(model.net.fc, "weight"), (model.net.head, "bias")], amount=0.5)
    fit(callback, model=model)
    assert {name: mask.shape for name, mask in callback.sparsifier.masks.items()} == {
        "net.fc.weight": (16, 32), "net.head.bias": (3,),
    }  # fmt: skip
    found = [int((each == 0).sum()) for each in (model.net.fc.weight, model.net.head.bias)]
    assert sum(found) == 16 * 32 + 3 - round(0.5 * (16 * 32 + 3)), "half is kept, to the nearest"
    assert model.net.conv.weight.count_nonzero() == model.net.conv.weight.numel()
    with pytest.raises(InputError, match="1 parameters_to_prune were given, 0 of them are the model's"):
        fit(ModelPruning("l1_unstructured", [(nn.Linear(2, 2), "weight")]))


@pytest.mark.parametrize("function", ["ln_structured", "random_structured"])
def test_whole_outputs(function: str) -> None:
    callback = ModelPruning(function, use_global_unstructured=False, amount=0.5, pruning_dim=0, pruning_norm=1)
    model = fit(callback)
    rows = model.net.fc.weight.flatten(1).count_nonzero(dim=1)
    assert sorted(rows.tolist()) == [0] * 8 + [32] * 8


def test_a_resumed_run_has_its_masks(tmp_path: Path) -> None:
    first = ModelPruning("l1_unstructured", amount=0.8)
    run = trainer(first, epochs=2)
    run.fit(task(), Batches())
    run.save_checkpoint(tmp_path / "two.ckpt", weights_only=False)
    again, model = ModelPruning("l1_unstructured", amount=0.8), task(1)
    trainer(again, epochs=4).fit(model, Batches(), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    assert masks.fingerprint(again.sparsifier.masks) == masks.fingerprint(first.sparsifier.masks)
    assert zeros(model, again) == pytest.approx(0.8, abs=1e-3)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"pruning_fn": "identity"}, r"pruning_fn='identity' is none of l1_unstructured, .*`Score` here"),
    ({"pruning_fn": prune.CustomFromMask}, r"pruning_fn=<class .*CustomFromMask'> is none of"),
    ({"amount": lambda epoch: 0.5}, "amount as a function of the epoch is a schedule here: GMP"),
    ({"apply_pruning": lambda epoch: True}, "apply_pruning as a function of the epoch is a schedule here: GMP"),
    ({"amount": 100}, r"amount is a fraction of all targets here, a float in \(0, 1\), got 100"),
    ({"amount": 1.0}, r"a float in \(0, 1\), got 1.0"),
    ({"use_lottery_ticket_hypothesis": True}, r"IterativeMagnitude\(sparsity=0.5\) trains"),
    ({"resample_parameters": True}, "never resamples"),
    ({"apply_pruning": False}, "prunes nothing: leave the callback out"),
    ({"parameter_names": ["bias"]}, "name biases one by one in parameters_to_prune"),
    ({"pruning_fn": "ln_structured", "pruning_dim": 0, "pruning_norm": 1}, "wants use_global_unstructured=False"),
    ({"pruning_fn": "ln_structured", "use_global_unstructured": False, "pruning_dim": 1}, "got pruning_dim=1"),
    ({"pruning_fn": "ln_structured", "use_global_unstructured": False, "pruning_dim": 0, "pruning_norm": 2},
     r"\(pruning_norm=1\), got 2"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelPruning(**{"pruning_fn": "l1_unstructured", **arguments})


def test_the_arguments_are_lightnings_in_their_order() -> None:
    from inspect import signature

    assert list(signature(ModelPruning).parameters) == list(signature(Lightnings).parameters)


def test_the_note_says_what_differs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        ModelPruning("l1_unstructured")
    assert "Lightning's compounds at every epoch" in caplog.text
    assert "a resumed run has its masks" in caplog.text
    assert "no biases, norms or embeddings" in caplog.text
    assert "nothing is rewound" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        ModelPruning("l1_unstructured", [(nn.Linear(2, 2), "weight")], use_lottery_ticket_hypothesis=False)
    assert "no biases" not in caplog.text
    assert "nothing is rewound" not in caplog.text


def test_it_is_drawn_from_the_seed() -> None:
    callbacks = [ModelPruning("random_unstructured") for _ in range(2)]
    models = [fit(each, epochs=2) for each in callbacks]
    assert all(torch.equal(*pair) for pair in zip(*(each.state_dict().values() for each in models), strict=True))
