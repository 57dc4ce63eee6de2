"""Labelled images in memory, as a Lightning data module."""

from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from sparsity.errors import InputError

Batch = tuple[Tensor, Tensor]

PADDING = 4
SPLIT_SEED = 0


class Split(Dataset[Batch]):
    """Images, uint8 ``[N, C, H, W]``, and labels, int64 ``[N]``, that are indexed a whole batch at a time."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        """One image ``[C, H, W]`` and its label ``[]``."""
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        """The batch that ``DataLoader`` asks for: images ``[B, C, H, W]``, labels ``[B]``."""
        return self.images[indices], self.labels[indices]


class Images(pl.LightningDataModule):
    """Training, validation and test images; a subclass gives ``mean``, ``std`` and ``read``.

    A batch, at every stage, is ``(images, labels)``: float32 ``[B, C, H, W]``, normalised, and int64 ``[B]``.
    The images stay uint8 until they are on the device; there they are augmented, for training steps only, and
    normalised. After ``setup`` the images themselves are in ``splits["train"]``, ``splits["validation"]`` and
    ``splits["test"]``.

    The validation images are the same in every run: a permutation with a seed of its own takes them out of
    the training images.

    Args:
        batch_size: images per batch; the last batch of an epoch may be smaller.
        validation: share of the training images held out for validation, in [0, 1); 0 trains on all of them.
        augment: whether training images are cropped and mirrored at random (``augmented``).
    """

    mean: ClassVar[tuple[float, ...]]  # per channel, of pixels scaled to [0, 1]
    std: ClassVar[tuple[float, ...]]

    def __init__(self, batch_size: int = 128, validation: float = 0.1, augment: bool = False) -> None:
        super().__init__()
        if not 0 <= validation < 1:
            raise InputError(f"validation must be a share of the training images in [0, 1), got {validation}")
        self.batch_size = batch_size
        self.validation = validation
        self.augment = augment
        self.splits: dict[str, Split] = {}

    def read(self, split: str) -> Batch:
        """Images of ``"train"`` or ``"test"``, uint8 ``[N, C, H, W]``, and their labels, int64 ``[N]``."""
        raise NotImplementedError(f"{type(self).__name__} reads no images")

    def setup(self, stage: str | None = None) -> None:
        """Reads all three splits into memory; a second call does nothing."""
        if self.splits:
            return
        images, labels = self._checked("train")
        order = fixed_permutation(len(labels))
        held_out, kept = order.tensor_split([round(self.validation * len(labels))])
        self.splits = {
            "train": Split(images[kept], labels[kept]),
            "validation": Split(images[held_out], labels[held_out]),
            "test": Split(*self._checked("test")),
        }

    def train_dataloader(self) -> DataLoader[Batch]:
        """The training images in a new random order every epoch."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        """The validation images, always in the same order."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test images in the order of their source."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The test images again, with their labels."""
        return self._loader("test")

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Normalises a batch that has reached the device; augments it first if it is for a training step."""
        images, labels = batch
        if self.augment and self.trainer is not None and self.trainer.training:
            images = augmented(images)
        return self.normalise(images), labels

    def normalise(self, images: Tensor) -> Tensor:
        """(images / 255 - mean) / std, channel by channel: uint8 to float32, both ``[B, C, H, W]``."""
        # Constants in a tensor would be copied to the device, and the host would wait for each copy.
        channels = zip((images.float() / 255).unbind(1), self.mean, self.std, strict=True)
        return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)

    def _checked(self, split: str) -> Batch:
        images, labels = self.read(split)
        if images.shape[1] != len(self.mean):
            raise InputError(
                f"{type(self).__name__} expects images of {len(self.mean)} channel(s), "
                f"got {images.shape[1]} in the {split} images; check that they are of this data set"
            )
        return images, labels

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Batch]:
        if not self.splits:
            raise InputError(f"{type(self).__name__} holds no images yet; call setup() first")
        return DataLoader(self.splits[split], batch_size=self.batch_size, shuffle=shuffle, collate_fn=_as_is)


def fixed_permutation(count: int) -> Tensor:
    """A permutation of 0 .. count - 1, int64 ``[count]``; every call returns the same."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))


def augmented(images: Tensor) -> Tensor:
    """Each image cropped at a random place and, half the time, mirrored; any dtype, ``[B, C, H, W]``.

    The augmentation of He et al., "Deep Residual Learning for Image Recognition", section 4.2 (arXiv
    1512.03385). Draws from torch's global generator of the images' device.
    """
    count, device = len(images), images.device
    tops, lefts = torch.randint(2 * PADDING + 1, (2, count), device=device)
    mirrored = torch.rand(count, device=device) < 0.5
    return mirror(crop(images, tops, lefts), mirrored)


def crop(images: Tensor, tops: Tensor, lefts: Tensor) -> Tensor:
    """A window of each image's own size, ``[B, C, H, W]``, out of the image with 4 zeros on every side.

    ``tops`` and ``lefts``, int64 ``[B]`` in 0 .. 8, are where in the padded image the window begins; 4 and 4
    give the image back.
    """
    count, channels, height, width = images.shape
    padded = F.pad(images, [PADDING] * 4)
    image, channel, row, column = (torch.arange(size, device=images.device) for size in images.shape)
    rows = (tops[:, None] + row).view(count, 1, height, 1)
    columns = (lefts[:, None] + column).view(count, 1, 1, width)
    return padded[image.view(count, 1, 1, 1), channel.view(channels, 1, 1), rows, columns]


def mirror(images: Tensor, mirrored: Tensor) -> Tensor:
    """The images ``[B, C, H, W]``, left and right exchanged where ``mirrored``, bool ``[B]``, is true."""
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def _as_is(batch: Any) -> Any:
    return batch
