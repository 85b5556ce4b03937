"""ControlNet: a picture of edges, depth or scribbles steers the model.

    hint pixels -> HintBlock -.
                              v
    x_t -> conv_in ---------> + -> [level 0] -> [level 1] -> ... -> middle       a trainable copy of the U-Net's way down
                              |        |            |                 |
                              0        0            0                 0          zero convolutions: 1x1, and 0 at the start
                              v        v            v                 v
    x_t -> conv_in ---------> s0  ->  s1   ->      s2   -> ... -> middle -.      the U-Net, locked: residuals are added
                              |        |            |                     v      to the skips s and to the middle's output
              prediction <---------------------------------------- way up

Each skip of the U-Net has its zero convolution, and so has the middle's output. Since all of them are 0 at the start, a new ControlNet
changes nothing, and training moves the model from where it is.

Paper: Zhang et al. 2023, "Adding conditional control to text-to-image diffusion models", figures 2 and 3 and section 3.2; its guess mode is
in the authors' code. Left out: the variants of other authors (unions, LLLite, XS), and T2I-Adapters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf, isfinite, log2
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from minidiff.blocks import add_rows
from minidiff.conditioning import Conditioning
from minidiff.config import ModelConfig, UNetConfig
from minidiff.unet import UNet, UNetEncoder

HINT_WIDTHS = (16, 32, 96, 256)  # of the authors' hint block, which halves the resolution three times; others take the first ones
Model = Callable[[Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True)
class ControlNetConfig:
    """The numbers of a ControlNet.

    unet: those of the U-Net whose way down is copied; in_channels are the latent's, also beside an inpainting U-Net.
    hint_widths: of the hint block, one per resolution; each but the first halves it, down to the latent's.
    channel_order: of the hint's colours, which a few old files want reversed.
    pooled: average each residual over space, as the "shuffle" ControlNet wants; it then acts on the text's half of guidance alone.
    """

    unet: UNetConfig
    hint_widths: tuple[int, ...] = HINT_WIDTHS
    channel_order: Literal["rgb", "bgr"] = "rgb"
    pooled: bool = False

    @property
    def factor(self) -> int:
        """Return how many pixels of the hint a latent cell is wide."""
        return 2 ** (len(self.hint_widths) - 1)


def zero_conv(c_in: int, c_out: int, kernel: int) -> nn.Conv2d:
    """Return a convolution whose weight and bias are 0, and which keeps the size."""
    conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
    for p in conv.parameters():
        nn.init.zeros_(p)
    return conv


class HintBlock(nn.Module):
    """Hint pixels in [0, 1] -> a feature map of the latent's size, added after the first convolution; its last layer starts at 0."""

    def __init__(self, widths: tuple[int, ...], c_out: int):
        super().__init__()
        layers = [nn.Conv2d(3, widths[0], 3, padding=1)]
        for c_in, c in pairwise(widths):
            layers += [nn.Conv2d(c_in, c_in, 3, padding=1), nn.Conv2d(c_in, c, 3, stride=2, padding=1)]
        self.convs = nn.ModuleList(layers)
        self.conv_out = zero_conv(widths[-1], c_out, 3)

    def forward(self, hint: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        for conv in self.convs:
            hint = F.silu(conv(hint))
        return self.conv_out(hint)


class ControlNet(UNetEncoder):
    """The copy of the way down and the middle, the hint block, and a zero convolution for each skip and, last, for the middle's output."""

    def __init__(self, config: ControlNetConfig):
        super().__init__(config.unet)
        self.config = config
        self.hint_block = HintBlock(config.hint_widths, config.unet.widths[0])
        widths = (*config.unet.skip_widths, config.unet.widths[-1])
        self.zero_convs = nn.ModuleList(zero_conv(width, width, 1) for width in widths)

    def forward(
        self,
        x_t: Float[Tensor, "B C H W"],
        t: Shaped[Tensor, " B"],
        context: Float[Tensor, "R L D_context"] | Conditioning,
        hint: Float[Tensor, "B_hint C_hint H_hint W_hint"],
    ) -> tuple[Tensor, ...]:
        """Return the residuals, one per skip of the U-Net, then one for the middle: Conditioning.residuals.

        Args:
            x_t, t, context: what the U-Net is given.
            hint: what `hint_block` makes of the hints, which is the same at every step: one for each row of x_t, or one for all.

        Raises ValueError for hints of another size than x_t's pictures.
        """
        if hint.shape[-2:] != x_t.shape[-2:]:
            (h, w), (H, W), factor = hint.shape[-2:], x_t.shape[-2:], self.config.factor
            raise ValueError(
                f"a hint of {w * factor} x {h * factor} pixels for a picture of {W * factor} x {H * factor}; give one of that size"
            )
        skips, middle, _ = self.encode(x_t, t, context, hint)
        return tuple(conv(x) for conv, x in zip(self.zero_convs, [*skips, middle]))


def controlnet_config(config: ModelConfig) -> ControlNetConfig:
    """Return the config of a ControlNet for a model: its hint block ends at the resolution of the model's latents."""
    halvings = int(log2(config.vae.factor))
    widths = (*HINT_WIDTHS, *(HINT_WIDTHS[-1],) * halvings)[: halvings + 1]
    return ControlNetConfig(replace(config.unet, in_channels=config.vae.latent_channels), widths)


def create_controlnet(config: ModelConfig, unet: UNet, generator: torch.Generator) -> ControlNet:
    """Return an untrained ControlNet, which adds nothing yet: a copy of the U-Net's way down, and a random hint block whose end is 0.

    Args:
        config: of the model.
        unet: its U-Net; of an inpainting model's first convolution the latent's channels are copied.
        generator: on the CPU.
    """
    net = ControlNet(controlnet_config(config))
    net.load_state_dict(encoder_weights(unet, net.config), strict=False)
    for conv in net.hint_block.convs:
        assert isinstance(conv, nn.Conv2d) and conv.bias is not None
        nn.init.kaiming_uniform_(conv.weight, a=5**0.5, generator=generator)  # PyTorch's own, from a generator that is known
        nn.init.zeros_(conv.bias)
    return net.to(unet.conv_in.weight)


def encoder_weights(unet: UNet, config: ControlNetConfig) -> dict[str, Tensor]:
    """Return those weights of a U-Net that a ControlNet starts from, by name."""
    up = ("up.", "norm_out.", "conv_out.")
    weights = {name: weight for name, weight in unet.state_dict().items() if not name.startswith(up)}
    return weights | {"conv_in.weight": unet.conv_in.weight.detach()[:, : config.unet.in_channels]}


# --- in use -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Control:
    """A ControlNet in use. Raises ValueError for numbers out of range.

    net: the ControlNet.
    hint: pixels in [0, 1], white lines on black for edges; -1 in the holes for inpainting. One for each picture, or one for all.
    scale: all its residuals are multiplied by this number; at 0 it is not run.
    start, end: the share of the steps during which it acts, 0..1: step i of n if start <= i / n and (i + 1) / n <= end.
    """

    net: ControlNet
    hint: Float[Tensor, "B 3 H W"]
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        if not isfinite(self.scale):
            raise ValueError(f"control scale {self.scale} is not a finite number; 1 is usual")
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(
                f"control from {self.start:g} to {self.end:g}: an empty interval; give shares of the steps, 0 <= start < end <= 1"
            )

    def interval(self, timesteps: Sequence[float] | None) -> tuple[float, float]:
        """Return the highest and the lowest timestep at which it acts, of those at which the steps begin.

        Raises ValueError where no step falls within start and end, and where they matter and the timesteps are not given.
        """
        if (self.start, self.end) == (0, 1):
            return inf, -inf
        if timesteps is None:
            raise ValueError(f"control from {self.start:g} to {self.end:g} needs the timesteps of the loop")
        n = len(timesteps)
        acts = [i for i in range(n) if self.start <= i / n and (i + 1) / n <= self.end]
        if not acts:
            raise ValueError(f"control from {self.start:g} to {self.end:g} contains none of the {n} steps; widen it, or take more steps")
        # Samplers with two calls a step make the second one at the next step's timestep; the ends are open, for there is no such step.
        return inf if acts[0] == 0 else timesteps[acts[0]], -inf if acts[-1] == n - 1 else timesteps[acts[-1]]


def controlled(model: Model, controls: Sequence[Control], timesteps: Sequence[float] | None = None, guess_mode: bool = False) -> Model:
    """Return the model with ControlNets: `model=` of StableDiffusion.denoise. Residuals of several are summed.

    sd.denoise("a cat", model=controlled(sd.predict, [Control(net, hint)]))

    Args:
        model: model(x_t, t, conditioning), as StableDiffusion.predict. Of an inpainting model, the one that adds mask and picture to x_t.
        controls: each with its own hint, scale and interval.
        timesteps: at which the steps of the loop begin; needed if a control has an interval.
        guess_mode: let the hint speak alone: residuals grow from 0.1 at the first skip to 1 at the middle, and act on the text's half of
            guidance only (the authors' code, in diffusers' numbers). Guidance of 3 to 5 is advised.
    """
    acting = [(control, control.interval(timesteps)) for control in controls if control.scale != 0]
    with torch.no_grad():
        hints = [control.net.hint_block(prepare_hint(control.hint, control.net)) for control, _ in acting]

    def controlled_model(x_t: Float[Tensor, "B C H W"], t: Shaped[Tensor, " B"], conditioning: Conditioning) -> Tensor:
        total: list[Tensor] = []
        for (control, (first, last)), hint in zip(acting, hints):
            # Without an interval t is not looked at: on a GPU that would wait for all that was launched before.
            if (first, last) == (inf, -inf) or first >= t[0] >= last:
                residuals = scaled_residuals(control, x_t, t, conditioning, hint, guess_mode)
                total = [add_rows(a, b) for a, b in zip(total, residuals)] if total else residuals
        return model(x_t, t, replace(conditioning, residuals=tuple(total)) if total else conditioning)

    return controlled_model


def prepare_hint(hint: Float[Tensor, "B 3 H W"], net: ControlNet) -> Float[Tensor, "B 3 H W"]:
    """Move hints to the ControlNet's device and dtype, with the colours in the order that it wants.

    Raises ValueError for sides that are not a multiple of its factor.
    """
    height, width = hint.shape[-2:]
    if height % net.config.factor or width % net.config.factor:
        raise ValueError(f"a hint of {width} x {height} pixels: both must be multiples of {net.config.factor}")
    return (hint if net.config.channel_order == "rgb" else hint.flip(1)).to(net.conv_in.weight)


def scaled_residuals(
    control: Control,
    x_t: Float[Tensor, "B C H W"],
    t: Shaped[Tensor, " B"],
    conditioning: Conditioning,
    hint: Float[Tensor, "B_hint C_hint H_hint W_hint"],
    guess_mode: bool,
) -> list[Tensor]:
    """Run a ControlNet for all rows of the conditioning, or in guess mode for the last B alone, the text's half of guidance.

    Args:
        control: the ControlNet with its scale.
        x_t, t, conditioning: what the U-Net is given.
        hint: what the hint block gave, B rows or one.
        guess_mode: as in `controlled`.
    """
    net, B = control.net, len(x_t)
    if len(hint) not in (1, B):
        raise ValueError(f"{len(hint)} hints for {B} pictures; give one for each, or one for all")
    told = conditioning[-B:] if guess_mode or net.config.pooled else conditioning
    x_t = x_t[:, : net.config.unet.in_channels].to(net.conv_in.weight.dtype)
    residuals = [control.scale * r for r in net(x_t, t, told, hint.expand(B, *hint.shape[1:]))]
    if net.config.pooled:
        residuals = [r.mean(dim=(2, 3), keepdim=True) for r in residuals]
    elif guess_mode:
        residuals = [weight * r for weight, r in zip(torch.logspace(-1, 0, len(residuals)).tolist(), residuals)]
    others = len(conditioning) - len(told)  # rows of the other half, to which nothing is added
    return [torch.cat([r.new_zeros(others, *r.shape[1:]), r]) for r in residuals] if others else residuals
