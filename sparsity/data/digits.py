"""The digits of scikit-learn."""

import torch

from sparsity.data.images import Batch, Images, fixed_permutation
from sparsity.errors import InputError

LEVELS = 16
TEST_SHARE = 0.2


class Digits(Images):
    """1,797 handwritten digits of 8 x 8 pixels and 17 grey levels, which come with scikit-learn: no download.

    359 images, the same in every run, are the test split. The levels 0 .. 16 become round(level * 255 / 16),
    so that pixels lie in 0 .. 255 as in the other data sets; no two levels coincide. ``mean`` and ``std`` are
    those of all images.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998), the test set there.

    Args:
        batch_size: images per batch.
        validation: share of the training images held out for validation, in [0, 1).
    """

    mean = (0.3053,)
    std = (0.3760,)

    def __init__(self, batch_size: int = 64, validation: float = 0.1) -> None:
        super().__init__(batch_size, validation)

    def read(self, split: str) -> Batch:
        """Images of ``"train"`` or ``"test"``, uint8 ``[N, 1, 8, 8]``, and their labels, int64 ``[N]``."""
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise InputError('sklearn is missing: pip install "lightning-sparsity[data]"') from error
        digits = load_digits()
        levels, labels = torch.from_numpy(digits.images), torch.from_numpy(digits.target)
        order = fixed_permutation(len(labels))
        test, train = order.tensor_split([round(TEST_SHARE * len(labels))])
        chosen = {"train": train, "test": test}[split]
        images = (levels * 255 / LEVELS).round().to(torch.uint8).unsqueeze(1)
        return images[chosen], labels[chosen]
