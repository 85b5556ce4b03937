"""The change of one layer's weight, W0 -> W0 + delta, of whatever form: what a LoRA holds for each of its layers.

A new form is one file with a subclass: `shape` and `delta` are enough. `forward` is worth writing where delta x is cheaper without delta,
as in low_rank.py.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class LayerChange(nn.Module):
    """A learned change of a linear layer or a convolution. `take` gives it the layer's stride and padding."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] | str = (0, 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight that it changes: (out, in), or (out, in, kh, kw) of a convolution."""
        raise NotImplementedError

    def delta(self) -> Float[Tensor, "out ..."]:
        """Return the change as one float32 tensor of that shape."""
        raise NotImplementedError

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return what is added to the layer's output for the input x, in the dtype of the parameters (float32; lower under autocast)."""
        delta = self.delta()
        if delta.dim() == 2:
            return F.linear(x.to(delta.dtype), delta)
        return F.conv2d(x.to(delta.dtype), delta, stride=self.stride, padding=self.padding)

    def take(self, layer: nn.Module) -> None:
        """Work on inputs as this layer does."""
        if isinstance(layer, nn.Conv2d):
            self.stride, self.padding = layer.stride, layer.padding
