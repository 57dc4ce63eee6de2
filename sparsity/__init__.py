"""Sparse training and pruning. Nothing here imports Lightning; the callbacks are in `callbacks`.

`import sparsity.callbacks` reaches the same classes where a project has a `callbacks` folder of its own.
"""

from sparsity.errors import InputError
from sparsity.schedules import Horizon
from sparsity.sparsifier import Sparsifier
from sparsity.targets import Targets
from sparsity.version import __version__

__all__ = ["Horizon", "InputError", "Sparsifier", "Targets", "__version__"]
