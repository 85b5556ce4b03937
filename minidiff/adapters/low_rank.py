"""The low-rank change of LoRA: (alpha / r) up down in place of a whole matrix.

    x -- dropout -- down [r, in] -- up [out, r] -- (alpha / r)

Paper: Hu et al. 2021, "LoRA: low-rank adaptation of large language models" (section 4.1).
"""

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.adapters.dropout import SampleDropout
from minidiff.adapters.layer_change import LayerChange


class LowRank(LayerChange):
    """The change (alpha / r) up down of one layer.

    Args:
        down: [r, in], or [r, in, kh, kw] of a convolution; copied
        up: [out, r], or [out, r, 1, 1]; copied
        alpha: the change is scaled by alpha / r
        dropout: probability, on the input, in training mode; drawn for each sample (dropout.py)
    """

    def __init__(self, down: Float[Tensor, "r ..."], up: Float[Tensor, "out r ..."], alpha: float, dropout: float = 0.0):
        super().__init__()
        self.down, self.up = _bare_layer(down), _bare_layer(up)
        self.rank, self.alpha = down.shape[0], alpha
        self.dropout = SampleDropout(dropout)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the weight that it changes."""
        return (self.up.weight.shape[0], *self.down.weight.shape[1:])

    def take(self, layer: nn.Module) -> None:
        """Give a convolution's stride and padding to `down`, which sees the layer's input."""
        if isinstance(layer, nn.Conv2d) and isinstance(self.down, nn.Conv2d):
            self.down.stride, self.down.padding = layer.stride, layer.padding

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return what is added to the layer's output for its input, in the dtype of the factors (float32; lower under autocast)."""
        return self.alpha / self.rank * self.up(self.down(self.dropout(x.to(self.down.weight.dtype))))

    def delta(self) -> Float[Tensor, "out ..."]:
        """Return the change as one float32 tensor of the weight's shape."""
        down, up = self.down.weight.float(), self.up.weight.float()
        return self.alpha / self.rank * einsum(up.flatten(1), down, "out r, r ... -> out ...")


def _bare_layer(weight: Tensor) -> nn.Linear | nn.Conv2d:
    """Return a linear layer or a convolution around the weight, without bias; nothing is drawn at random."""
    c_out, c_in, *kernel = weight.shape
    if kernel:
        layer = nn.Conv2d(c_in, c_out, (kernel[0], kernel[1]), bias=False, device="meta")
    else:
        layer = nn.Linear(c_in, c_out, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    return layer
