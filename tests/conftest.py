"""Settings for all tests."""

import torch

# The tests run in one process per core: more threads would only wait for one another.
torch.set_num_threads(1)
