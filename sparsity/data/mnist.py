"""MNIST."""

from sparsity.data.parquet import ParquetImages


class MNIST(ParquetImages):
    """70,000 handwritten digits, 28 x 28, grey: 60,000 for training and validation, 10,000 for test.

    ``mean`` and ``std`` are those of the 60,000.

    Source: LeCun et al., "Gradient-based learning applied to document recognition" (Proceedings of the IEEE,
    1998).

    Args:
        data_dir: folder with ``train-*.parquet`` and ``test-*.parquet``; None downloads ``ylecun/mnist``.
        batch_size: images per batch.
        validation: share of the training images held out for validation, in [0, 1).
    """

    repository = "ylecun/mnist"
    mean = (0.1307,)
    std = (0.3081,)

    def __init__(self, data_dir: str | None = None, batch_size: int = 128, validation: float = 0.1) -> None:
        super().__init__(data_dir, batch_size, validation)
