"""Source: the samples of all clients, by index, and what a model is measured on."""

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from sparsity.errors import InputError

TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric"}


class Source:
    """A Lightning data module's training samples by index, and its validation and test batches.

    Batches are made as its own loader makes them, of its size and by its collate function, a short last one only where
    it keeps those; they go through its hooks for the transfer to a device, or, as in Lightning, through those that only
    the model defines. Its `trainer` is a stand-in, which says whether it is `training`.
    """

    def __init__(self, data: Any, device: torch.device, model: Any = None) -> None:
        if not all(callable(getattr(data, name, None)) for name in ("prepare_data", "setup", "train_dataloader")):
            raise InputError(f"clients share a LightningDataModule, got {type(data).__name__}: put loaders into one")
        data.prepare_data()
        data.setup("fit")
        self.data, self.device, self._tests = data, device, False
        self._stage = SimpleNamespace(training=False, validating=False, testing=False)
        if data.trainer is None:
            data.trainer = self._stage
        loader = data.train_dataloader()
        dataset, size = getattr(loader, "dataset", None), getattr(loader, "batch_size", None)
        if size is None or not hasattr(dataset, "__getitem__") or isinstance(dataset, IterableDataset):
            raise InputError(
                f"clients hold samples by index: {type(data).__name__} has to have a train_dataloader of a map-style "
                f"dataset and a batch_size, got {type(dataset).__name__} in batches of {size}"
            )
        self.dataset = samples_of(loader)
        self.batch_size: int = size
        self._collate, self._whole = loader.collate_fn, loader.drop_last
        owners = [model if defines(model, name) and not defines(data, name) else data for name in TRANSFERS]
        self._before, self._move, self._after = map(getattr, owners, TRANSFERS)

    def __len__(self) -> int:
        return len(self.dataset)

    def close(self) -> None:
        """The data module has no trainer again."""
        if self.data.trainer is self._stage:
            self.data.trainer = None

    def has(self, stage: str) -> bool:
        """Whether there is a "validation" or a "test" split."""
        return defines(self.data, "test_dataloader" if stage == "test" else "val_dataloader")

    def batches(self, indices: Tensor, generator: torch.Generator | None = None) -> Iterator[Any]:
        """The samples of these indices once, in an order that the generator draws: for training.

        Without one they are in their own order, and for a measurement.
        """
        training = generator is not None
        order = (indices[torch.randperm(len(indices), generator=generator)] if training else indices).tolist()
        for begin in range(0, len(order), self.batch_size):
            part = order[begin : begin + self.batch_size]
            if training and self._whole and len(part) < self.batch_size <= len(order):
                return
            yield self._moved(self._collate(self._samples(part)), "training" if training else "validating")

    def evaluation(self, stage: str) -> list[Iterator[Any]]:
        """The batches of each loader of the "validation" or the "test" split."""
        if stage == "test" and not self._tests:
            self.data.setup("test")
            self._tests = True
        found = self.data.test_dataloader() if stage == "test" else self.data.val_dataloader()
        loaders = list(found.values()) if isinstance(found, Mapping) else found
        several = loaders if isinstance(loaders, list | tuple) else [] if loaders is None else [loaders]
        name = "testing" if stage == "test" else "validating"
        return [self._read(loader, name, place) for place, loader in enumerate(several)]

    def _read(self, loader: Any, stage: str, place: int) -> Iterator[Any]:
        # A generator: a loader that begins draws a random number, which is to come after the seed is set.
        for batch in loader:
            yield self._moved(batch, stage, place)

    def _samples(self, places: list[int]) -> Any:
        at_once = getattr(self.dataset, "__getitems__", None)
        return at_once(places) if at_once else [self.dataset[place] for place in places]

    def _moved(self, batch: Any, stage: str, place: int = 0) -> Any:
        if not getattr(self._stage, stage):
            vars(self._stage).update({each: each == stage for each in vars(self._stage)})
        batch = self._before(batch, place)
        if self.device.type != "cpu":
            batch = self._move(batch, self.device, place)
        return self._after(batch, place)


def samples_of(loader: Any) -> Any:
    """What a loader draws from: its dataset, or those of its samples that a `SubsetRandomSampler` is limited to.

    Raises `InputError` for a sampler that draws some samples more often than others.
    """
    sampler = loader.sampler
    if isinstance(sampler, SubsetRandomSampler):
        return Subset(loader.dataset, [int(place) for place in sampler.indices])
    whole = isinstance(sampler, SequentialSampler | DistributedSampler)
    shuffled = isinstance(sampler, RandomSampler) and not sampler.replacement and len(sampler) == len(loader.dataset)
    if not whole and not shuffled:
        raise InputError(
            f"clients draw each of their samples once in an epoch, so the {type(sampler).__name__} of train_dataloader "
            "would be ignored: take shuffle=True, or a SubsetRandomSampler"
        )
    return loader.dataset


def defines(thing: Any, name: str) -> bool:
    """Whether a class of the user's own, or the object itself, has a hook, which in Lightning's bases does nothing."""
    own = (each for each in type(thing).__mro__ if each.__module__.partition(".")[0] not in LIGHTNING)
    return name in getattr(thing, "__dict__", ()) or any(name in vars(each) for each in own)
