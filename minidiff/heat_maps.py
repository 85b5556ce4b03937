"""Heat maps: where in the picture a word was looked at, over all layers and steps, and how far two words' maps overlap.

    every cross-attention of the way down and up --> sum over steps --> enlarged to the latent's size --> mean over layers and heads
                                                                                                     --> mean over the word's tokens

Tang et al. 2022, "What the DAAM: interpreting Stable Diffusion using cross attention", eq. 4 to 6: maps are enlarged by bicubic
interpolation and cut off at 0. The middle's maps are left out, since they are coarse. One word's map can be laid over the picture.
"""

from collections.abc import Generator, Iterable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from minidiff.attention_maps import Layer, Weights, control_attention
from minidiff.samplers import Step
from minidiff.unet import UNet

DIMMED = 0.25  # brightness of a picture where a word is not looked at


class HeatMaps:
    """The attention to some tokens, summed over the model's calls while `watch` runs.

    pictures: B, the rows of the latent. positions: of the tokens in the context, the start token being at 0.
    """

    def __init__(self, pictures: int, positions: Iterable[int]):
        self.pictures, self.positions = pictures, sorted(set(positions))
        self.sums: dict[str, Float[Tensor, "B h H W T"]] = {}

    def watch(self, trajectory: Generator[Step, Tensor | None, None], unet: UNet) -> Generator[Step, Tensor | None, None]:
        """Take the same steps, and add up the attention of their model calls; the picture stays as it is, bit for bit."""
        sent = None
        while True:
            with control_attention(unet, self._add, ("cross",)):
                try:
                    step = trajectory.send(sent)
                except StopIteration:
                    return
            sent = yield step

    def _add(self, layer: Layer, weights: Weights) -> None:
        if layer.name.startswith("middle"):
            return
        # Of guidance's two halves the prompt's is the last.
        maps = weights(slice(layer.rows - self.pictures, layer.rows))[..., self.positions]
        maps = rearrange(maps.float(), "B h (H W) T -> B h H W T", H=layer.size[0])
        self.sums[layer.name] = self.sums[layer.name] + maps if layer.name in self.sums else maps

    def word(self, positions: Sequence[int]) -> Float[Tensor, "B H W"]:
        """Return one word's map at the size of the largest layer's, which is the latent's in Stable Diffusion 1 and 2.

        positions: of its tokens. Raises ValueError for none, for tokens that were not recorded, and before anything was.
        """
        if not positions or not set(positions) <= set(self.positions):
            raise ValueError(f"positions {list(positions)}: expected at least one of those recorded, {self.positions}")
        if not self.sums:
            raise ValueError("no attention was recorded; take the steps through HeatMaps.watch")
        size = max((tuple(m.shape[2:4]) for m in self.sums.values()), key=lambda size: size[0] * size[1])
        places = [self.positions.index(position) for position in positions]
        maps = [rearrange(m[..., places], "B h H W T -> B (h T) H W") for m in self.sums.values()]
        enlarged = [F.interpolate(m, size=size, mode="bicubic", align_corners=False).clamp(min=0) for m in maps]
        return torch.cat(enlarged, dim=1).mean(dim=1)


def overlap(a: Float[Tensor, "*B H W"], b: Float[Tensor, "*B H W"]) -> Float[Tensor, "*B"]:
    """Return how far two maps overlap, 0 (nowhere) to 1 (the same): the sum of the smaller values, each map scaled to a sum of 1."""
    a, b = (m / m.sum(dim=(-2, -1), keepdim=True) for m in (a, b))
    return torch.minimum(a, b).sum(dim=(-2, -1))


def lay_over(pixels: Float[Tensor, "B 3 H W"], heat: Float[Tensor, "B h w"]) -> Float[Tensor, "B 3 H W"]:
    """Return pictures, pixels in [-1, 1], bright where the map is high and dimmed where it is 0; each map on a scale of its own."""
    enlarged = F.interpolate(heat[:, None], size=pixels.shape[2:], mode="bilinear", align_corners=False).to(pixels)
    share = enlarged / enlarged.amax(dim=(2, 3), keepdim=True)
    return (pixels + 1) * (DIMMED + (1 - DIMMED) * share) - 1
