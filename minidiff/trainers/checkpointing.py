"""Gradient checkpointing (Chen et al. 2016, "Training deep nets with sublinear memory cost").

On the way forward a block keeps its input alone; on the way back it is run again to have what its gradient needs. Same numbers, much less
memory, about a third more time.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from minidiff.blocks import ResBlock, SpatialTransformer
from minidiff.text_encoder import TextBlock
from minidiff.vae import AttentionBlock

BLOCKS = (ResBlock, SpatialTransformer, TextBlock, AttentionBlock)


@contextmanager
def checkpointed(networks: Iterable[nn.Module], on: bool = True) -> Iterator[None]:
    """Within the block, the networks' blocks are checkpointed; forward hooks on layers inside them run again as well."""
    blocks = {part: None for network in networks for part in network.modules() if on and isinstance(part, BLOCKS)}  # each once
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
