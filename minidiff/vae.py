"""The autoencoder: pictures to small latents, where diffusion happens, and back.

    pixels (3, H, W) -> Encoder -> mean, logvar (4, H/8, W/8) -> sample -> Decoder -> pixels

Paper: Rombach et al. 2022, section 3.1 and appendix G (Kingma and Welling 2014 for the variational part); the model is VQGAN's
encoder and decoder (Esser et al. 2021). Left out: the vector-quantised variant, and the discriminator it was trained against.
Every GroupNorm here has eps 1e-6.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.attention import Attention
from minidiff.blocks import ResBlock, norm_silu
from minidiff.config import VAEConfig
from minidiff.kernels.dispatch import active_backend, attention_backend

EPS = 1e-6


@dataclass(frozen=True)
class DiagonalGaussian:
    """q(z | x) = N(mean, exp(logvar)), every latent value for itself. logvar lies in -30..20, as in the original."""

    mean: Float[Tensor, "B C H W"]
    logvar: Float[Tensor, "B C H W"]

    def sample(self, generator: torch.Generator | None = None) -> Float[Tensor, "B C H W"]:
        """Draw mean + std * noise (Kingma and Welling 2014, section 2.4), the noise drawn on the generator's device, or the CPU."""
        device = generator.device if generator is not None else "cpu"
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=device)
        return self.mean + (0.5 * self.logvar).exp() * noise.to(self.mean.device)

    def kl(self) -> Float[Tensor, " B"]:
        """Return the KL divergence to N(0, 1), summed over a picture: 1/2 sum(mean^2 + var - 1 - logvar), in nats."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))


class AttentionBlock(nn.Module):
    """Single-head self-attention over the cells of a feature map, and a skip around it."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=EPS)
        self.attention = Attention(width, heads=1, bias=True)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        H = x.shape[2]
        # "triton" does not insist here: Stable Diffusion's one head, 512 wide, is wider than our kernels take.
        with attention_backend("auto" if active_backend() == "triton" else active_backend()):
            # Contiguous, for queries, keys and values to share: of rows that lie apart each projection makes and keeps a copy of its own.
            h = self.attention(rearrange(self.norm(x), "B C H W -> B (H W) C").contiguous())
        return x + rearrange(h, "B (H W) C -> B C H W", H=H)


class Middle(nn.Module):
    """ResBlock, attention, ResBlock at the latents' resolution."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.block_1 = ResBlock(width, width, groups, EPS)
        self.attention = AttentionBlock(width, groups)
        self.block_2 = ResBlock(width, width, groups, EPS)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return self.block_2(self.attention(self.block_1(x)))


class DownLevel(nn.Module):
    """The ResBlocks of one resolution, then half the resolution, except at the last level."""

    def __init__(self, c_in: int, c_out: int, last: bool, config: VAEConfig):
        super().__init__()
        n = config.blocks_per_level
        self.blocks = nn.ModuleList(ResBlock(c_in if j == 0 else c_out, c_out, config.groups, EPS) for j in range(n))
        self.downsample = None if last else nn.Conv2d(c_out, c_out, 3, stride=2)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C_out H_out W_out"]:
        for block in self.blocks:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, unlike the U-Net's
        return x


class UpLevel(nn.Module):
    """The ResBlocks of one resolution (one more than on the way down), then twice the resolution, except at the last level."""

    def __init__(self, c_in: int, c_out: int, last: bool, config: VAEConfig):
        super().__init__()
        n = config.blocks_per_level + 1
        self.blocks = nn.ModuleList(ResBlock(c_in if j == 0 else c_out, c_out, config.groups, EPS) for j in range(n))
        self.upsample = None if last else nn.Conv2d(c_out, c_out, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C_out H_out W_out"]:
        for block in self.blocks:
            x = block(x)
        if self.upsample is not None:
            x = self.upsample(F.interpolate(x, scale_factor=2, mode="nearest"))
        return x


class Encoder(nn.Module):
    """Pixels to the mean and logvar of each latent, side by side as channels."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(DownLevel(widths[max(i - 1, 0)], width, i == last, config) for i, width in enumerate(widths))
        self.middle = Middle(widths[-1], config.groups)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        x = self.conv_in(pixels)
        for level in self.down:
            x = level(x)
        return self.conv_out(norm_silu(self.norm_out, self.middle(x)))


class Decoder(nn.Module):
    """Latents to pixels: the encoder's mirror image. up.0 is the lowest resolution."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, last = config.widths[::-1], len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.middle = Middle(widths[0], config.groups)
        self.up = nn.ModuleList(UpLevel(widths[max(i - 1, 0)], width, i == last, config) for i, width in enumerate(widths))
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        x = self.middle(self.conv_in(z))
        for level in self.up:
            x = level(x)
        return self.conv_out(norm_silu(self.norm_out, x))


class VAE(nn.Module):
    """Encoder and decoder, each with a 1x1 convolution between it and the latents.

    Latents go in and come out unscaled: whoever diffuses them multiplies by config.scaling_factor, and divides before decoding.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def encode(self, pixels: Float[Tensor, "B 3 H W"]) -> DiagonalGaussian:
        """Encode pixels in [-1, 1], H and W multiples of config.factor. Raises ValueError for other sizes."""
        H, W = pixels.shape[-2:]
        if H % self.config.factor or W % self.config.factor:
            raise ValueError(f"picture of {W} x {H} pixels: the VAE needs multiples of {self.config.factor}; crop or resize it")
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: Float[Tensor, "B C h w"]) -> Float[Tensor, "B 3 H W"]:
        """Decode unscaled latents to pixels, about [-1, 1]; not clamped."""
        return self.decoder(self.post_quant_conv(z))
