import subprocess
import sys
from collections.abc import Callable
from itertools import product

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from sparsity import InputError
from sparsity.data import Images
from sparsity.data import images as module
from sparsity.data.images import Batch, Split, augmented, crop, mirror

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

SOURCE = torch.randint(256, (120, 2, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Numbered(Images):
    """100 training and 20 test images whose label is their place in `SOURCE`."""

    mean = (0.5, 0.25)
    std = (0.25, 0.125)

    def __init__(self, batch_size: int = 16, validation: float = 0.1, augment: bool = False) -> None:
        super().__init__(batch_size, validation, augment)
        self.reads: list[str] = []

    def read(self, split: str) -> Batch:
        self.reads.append(split)
        chosen = {"train": torch.arange(100), "test": torch.arange(100, 120)}[split]
        return SOURCE[chosen], chosen


class Recorder(pl.LightningModule):
    """Keeps what every step was given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen: dict[str, list[Batch]] = {}

    def record(self, step: str, batch: Batch) -> None:
        self.seen.setdefault(step, []).append(batch)

    def training_step(self, batch: Batch) -> Tensor:
        self.record("training", batch)
        return self.scale * batch[0].mean()

    def validation_step(self, batch: Batch) -> None:
        self.record("sanity check" if self.trainer.sanity_checking else "validation", batch)

    def test_step(self, batch: Batch) -> None:
        self.record("test", batch)

    def predict_step(self, batch: Batch) -> Tensor:
        self.record("predict", batch)
        return batch[1]

    def configure_optimizers(self) -> torch.optim.SGD:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def ready(**settings: float) -> Numbered:
    data = Numbered(**settings)  # type: ignore[arg-type]  # each setting has a type of its own
    data.setup()
    return data


def trainer() -> pl.Trainer:
    return pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def labels(loader: DataLoader[Batch]) -> list[int]:
    return [int(label) for _, batch in loader for label in batch]


def expected(pixels: Tensor) -> Tensor:
    """Normalisation written out one channel at a time, in float64."""
    first = (pixels[:, 0].double() / 255 - 0.5) / 0.25
    second = (pixels[:, 1].double() / 255 - 0.25) / 0.125
    return torch.stack([first, second], dim=1)


def window(image: Tensor, top: int, left: int, mirrored: bool) -> Tensor:
    """One crop of `[C, H, W]`, pixel by pixel."""
    channels, height, width = image.shape
    out = torch.zeros_like(image)
    for channel, row, column in product(range(channels), range(height), range(width)):
        source_row = row + top - 4
        source_column = (width - 1 - column if mirrored else column) + left - 4
        if 0 <= source_row < height and 0 <= source_column < width:
            out[channel, row, column] = image[channel, source_row, source_column]
    return out


def test_splits_are_disjoint_and_exhaustive() -> None:
    splits = ready().splits
    places = {name: split.labels.tolist() for name, split in splits.items()}

    assert {name: len(place) for name, place in places.items()} == {"train": 90, "validation": 10, "test": 20}
    assert sorted(places["train"] + places["validation"]) == list(range(100))
    assert places["test"] == list(range(100, 120))
    for split in splits.values():
        assert torch.equal(split.images, SOURCE[split.labels])


def test_the_validation_images_do_not_depend_on_the_seed() -> None:
    held_out = []
    for seed in range(3):
        torch.manual_seed(seed)
        held_out.append(ready().splits["validation"].labels.tolist())

    assert held_out[0] == held_out[1] == held_out[2]
    assert held_out[0] != sorted(held_out[0])


def test_setup_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    ready()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("validation", "count"), [(0.0, 0), (0.07, 7), (0.5, 50)])
def test_validation_is_a_share_of_the_training_images(validation: float, count: int) -> None:
    splits = ready(validation=validation).splits
    assert (len(splits["train"]), len(splits["validation"])) == (100 - count, count)


@pytest.mark.parametrize("validation", [-0.1, 1.0, 5.0])
def test_an_impossible_validation_share_is_refused(validation: float) -> None:
    with pytest.raises(InputError, match=rf"share .* in \[0, 1\), got {validation}"):
        Numbered(validation=validation)


def test_setup_reads_once() -> None:
    data = Numbered()
    for stage in ("fit", "validate", "test", "predict"):
        data.prepare_data()
        data.setup(stage)
    assert data.reads == ["train", "test"]


def test_a_loader_before_setup_is_refused() -> None:
    with pytest.raises(InputError, match=r"Numbered holds no images yet; call setup\(\)"):
        Numbered().train_dataloader()


def test_images_of_other_channels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Numbered, "mean", (0.5,))
    with pytest.raises(InputError, match=r"Numbered expects images of 1 channel\(s\), got 2 in the train"):
        ready()


def test_a_subclass_must_read() -> None:
    with pytest.raises(NotImplementedError, match="Images reads no images"):
        Images().setup()


def test_a_batch_is_uint8_until_it_is_on_the_device() -> None:
    images, places = next(iter(ready(batch_size=7).train_dataloader()))
    assert (images.dtype, images.shape) == (torch.uint8, (7, 2, 6, 5))
    assert (places.dtype, places.shape) == (torch.int64, (7,))
    assert torch.equal(images, SOURCE[places])


def test_a_batch_is_one_index_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    whole: Callable[[Split, list[int]], Batch] = Split.__getitems__

    def counted(split: Split, indices: list[int]) -> Batch:
        sizes.append(len(indices))
        return whole(split, indices)

    monkeypatch.setattr(Split, "__getitems__", counted)
    monkeypatch.delattr(Split, "__getitem__")
    labels(ready(batch_size=40).train_dataloader())
    assert sizes == [40, 40, 10]


def test_one_image_can_be_indexed() -> None:
    image, label = ready().splits["test"][3]
    assert torch.equal(image, SOURCE[103])
    assert label == 103


def test_training_shuffles_all_images_anew_every_epoch() -> None:
    data = ready()
    loader = data.train_dataloader()
    first, second = labels(loader), labels(loader)
    assert first != second
    assert sorted(first) == sorted(second) == sorted(data.splits["train"].labels.tolist())


def test_the_other_loaders_keep_their_order() -> None:
    data = ready()
    assert labels(data.val_dataloader()) == data.splits["validation"].labels.tolist()
    assert labels(data.test_dataloader()) == labels(data.predict_dataloader()) == list(range(100, 120))


def test_samplers_are_of_the_kind_that_lightning_replaces() -> None:
    data = ready()
    assert type(data.train_dataloader().sampler) is RandomSampler
    assert type(data.val_dataloader().sampler) is SequentialSampler
    assert type(data.test_dataloader().sampler) is SequentialSampler


def test_normalise_by_hand() -> None:
    images = Numbered().normalise(SOURCE)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    torch.testing.assert_close(images.double(), expected(SOURCE), rtol=1e-6, atol=1e-6)


def test_crop_and_mirror_agree_with_a_loop_over_pixels() -> None:
    draw = torch.Generator().manual_seed(1)
    tops, lefts = torch.randint(9, (2, len(SOURCE)), generator=draw)
    mirrored = torch.rand(len(SOURCE), generator=draw) < 0.5

    got = mirror(crop(SOURCE, tops, lefts), mirrored)

    slow = [
        window(image, int(top), int(left), bool(flip))
        for image, top, left, flip in zip(SOURCE, tops, lefts, mirrored, strict=True)
    ]
    assert torch.equal(got, torch.stack(slow))
    assert got.dtype == torch.uint8


def test_the_middle_crop_is_the_image() -> None:
    middle = torch.full((len(SOURCE),), 4)
    assert torch.equal(crop(SOURCE, middle, middle), SOURCE)


def test_augmentation_draws_every_window_and_no_other() -> None:
    image = torch.arange(1, 101, dtype=torch.uint8).view(1, 10, 10)
    torch.manual_seed(0)
    drawn = {bytes(each.flatten().tolist()) for each in augmented(image.expand(5000, 1, 10, 10))}
    windows = {
        bytes(window(image, top, left, mirrored).flatten().tolist())
        for top, left, mirrored in product(range(9), range(9), (False, True))
    }
    assert drawn == windows
    assert len(windows) == 9 * 9 * 2


def test_the_same_seed_augments_alike() -> None:
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augmented(SOURCE))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_only_training_steps_augment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "augmented", lambda images: 255 - images)
    model, data = Recorder(), Numbered(augment=True)
    run = trainer()
    run.fit(model, datamodule=data)
    run.test(model, datamodule=data, verbose=False)
    run.predict(model, datamodule=data)

    steps = {step: len(batches) for step, batches in model.seen.items()}
    assert steps == {"sanity check": 1, "training": 12, "validation": 2, "test": 2, "predict": 2}
    for step, batches in model.seen.items():
        for images, places in batches:
            pixels = 255 - SOURCE[places] if step == "training" else SOURCE[places]
            assert torch.equal(images, data.normalise(pixels)), step
    assert data.reads == ["train", "test"]


def test_without_augmentation_training_sees_the_images_themselves() -> None:
    model, data = Recorder(), Numbered()
    trainer().fit(model, datamodule=data)
    for images, places in model.seen["training"]:
        assert torch.equal(images, data.normalise(SOURCE[places]))


def test_the_same_seed_gives_the_same_training_batches() -> None:
    runs = []
    for seed in (1, 1, 2):
        pl.seed_everything(seed, verbose=False)
        model = Recorder()
        trainer().fit(model, datamodule=Numbered(augment=True))
        runs.append(torch.cat([images for images, _ in model.seen["training"]]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_batch_outside_a_trainer_is_not_augmented() -> None:
    images, _ = Numbered(augment=True).on_after_batch_transfer((SOURCE, torch.arange(120)), 0)
    assert torch.equal(images, Numbered().normalise(SOURCE))


def test_importing_the_package_imports_no_reader() -> None:
    script = """
import sys
import pytorch_lightning
before = set(sys.modules)
import sparsity.data
print(sorted({"PIL", "datasets", "pyarrow", "sklearn"} & (set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
