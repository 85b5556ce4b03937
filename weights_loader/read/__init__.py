"""Read named tensors from the files that Stable Diffusion weights come in, running nothing that a file holds.

checkpoint.py    the entrance: read(path) looks at the bytes and gives a Checkpoint; safetensors and sharded checkpoints are read here
torch_files.py   the three forms in which torch.save has written weights: .ckpt, .pt, .bin
pickles.py       a pickle as data
verify.py        the numbers of a file against its checksums
"""

from weights_loader.read.checkpoint import Checkpoint, find_weights, read
from weights_loader.read.verify import verify

__all__ = ["Checkpoint", "find_weights", "read", "verify"]
