"""CIFAR-10."""

from sparsity.data.parquet import ParquetImages


class CIFAR10(ParquetImages):
    """60,000 photographs, 32 x 32, RGB, of ten kinds: 50,000 for training and validation, 10,000 for test.

    ``mean`` and ``std`` are those of the 50,000.

    Source: Krizhevsky, "Learning multiple layers of features from tiny images" (2009).

    Args:
        data_dir: folder with ``train-*.parquet`` and ``test-*.parquet``; None downloads ``uoft-cs/cifar10``.
        batch_size: images per batch.
        validation: share of the training images held out for validation, in [0, 1).
        augment: whether training images are cropped and mirrored at random.
    """

    repository = "uoft-cs/cifar10"
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.247, 0.243, 0.261)

    def __init__(
        self,
        data_dir: str | None = None,
        batch_size: int = 128,
        validation: float = 0.1,
        augment: bool = True,
    ) -> None:
        super().__init__(data_dir, batch_size, validation, augment)
