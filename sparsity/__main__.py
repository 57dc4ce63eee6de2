"""`python -m sparsity`: the command line."""

import sys
from importlib import import_module

if __name__ == "__main__":
    sys.argv[0] = "python -m sparsity"  # what messages call it by
    import_module("sparsity.callbacks.commandline").main()
