"""The command line of a checkout: `python train.py fit --config recipes/digits_lamp.yaml`.

Where the package is installed, `python -m sparsity fit ...` is the same.
"""

from callbacks.commandline import Recipe, main
from callbacks.trainer import Progress

__all__ = ["Progress", "Recipe", "main"]

if __name__ == "__main__":
    main()
