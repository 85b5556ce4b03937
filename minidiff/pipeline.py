"""Stable Diffusion: the parts together, from a prompt to a picture.

    prompt -> tokenizer -> text encoder -> context ----.
    seed   -> noise x_T -> sampler x guidance x U-Net --+--> latent -> VAE decoder -> picture

Paper: Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models". Left out: the safety checker and the
watermark of the original's script.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from minidiff.attention_maps import record_cross_attention
from minidiff.config import ModelConfig
from minidiff.cuda_graph import Savings, channels_last, saving
from minidiff.guidance import guided
from minidiff.samplers import Step, levels, sample
from minidiff.schedule import NoiseSchedule
from minidiff.text_encoder import TextEncoder
from minidiff.tiled_decode import decode_tiled, should_tile
from minidiff.tokenizer import Tokenizer
from minidiff.unet import UNet
from minidiff.vae import VAE


class StableDiffusion:
    """The modules of one checkpoint, and what it takes to make pictures with them.

    carried: tensors of the file that nothing is computed with, kept so that saving loses nothing.
    notes: what was decided when the file was loaded and is worth saying.
    adapters: the small files that are attached to the modules, no part of what is saved (see weights_loader).
    """

    def __init__(
        self,
        config: ModelConfig,
        text_encoder: TextEncoder,
        unet: UNet,
        vae: VAE,
        tokenizer: Tokenizer,
        carried: dict[str, Tensor] | None = None,
        notes: tuple[str, ...] = (),
    ):
        self.config = config
        self.text_encoder, self.unet, self.vae, self.tokenizer = text_encoder, unet, vae, tokenizer
        self.schedule = NoiseSchedule(config.schedule)
        self.carried = carried or {}
        self.notes = notes
        self.adapters = []
        self.attached: list = []  # of adapters/base.py, in the order in which they were attached

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Float[Tensor, "B L D"]:
        """The context that the U-Net looks at, one row a token."""
        return self.text_encoder(self.tokenizer(list(prompts)).to(self.device))

    def denoise(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int = 30,
        sampler: str = "ddim",
        guidance_scale: float | None = None,
        negative_prompt: str = "",
        seeds: Sequence[int] = (0,),
        size: int | tuple[int, int] | None = None,
        spacing: str | None = None,
        eta: float = 0.0,
        attention_maps: bool = False,
        savings: Savings = Savings(),
    ) -> Iterator[Step]:
        """From noise to latents; yields one Step a step, the last one's x_t is to be decoded.

        prompts and seeds: one picture each; a single one of either is used for all of the other. size: pixels, one number for a square
        or (width, height); None is the model's own. guidance_scale: None is the model's own; 1 follows the prompt alone. attention_maps:
        each Step carries the cross-attention of its first model call, for the prompt, by layer (see attention_maps.py). savings: what is
        not worked out twice (see cuda_graph.py); all of it by default.
        Everything is checked before the first step: raises ValueError for what the model cannot do.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = list(seeds)
        if not prompts or not seeds:
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds make no picture; give at least one of each")
        if len(prompts) != len(seeds) and 1 not in (len(prompts), len(seeds)):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds do not pair up; give one of either, or as many of each")
        count = max(len(prompts), len(seeds))
        if len(prompts) < count:
            prompts = prompts * count
        if len(seeds) < count:
            seeds = seeds * count

        shape = self._latent_shape(size)
        draw = noise_source(seeds, shape, self.device)
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        cond = self.encode_prompts(prompts)
        uncond = self.encode_prompts([negative_prompt]).expand(count, -1, -1) if guidance_scale != 1 else None
        if savings.channels_last:
            channels_last(self.unet)
            channels_last(self.vae)
        spacing = self.config.schedule.spacing if spacing is None else spacing
        model = guided(self.unet, cond, uncond, guidance_scale, savings.shared_prefix)
        model = saving(model, self.unet, lambda: [level.t for level in levels(self.schedule, sampler, steps, spacing)], savings)
        x = draw()
        walk = sample(
            lambda x_t, t: model(x_t.to(self.dtype), t).to(x_t.dtype),
            x,
            self.schedule,
            sampler=sampler,
            steps=steps,
            spacing=spacing,
            eta=eta,
            noise=draw,
        )
        return self._steps(walk, count, attention_maps)

    def _steps(self, walk: Iterator[Step], count: int, attention_maps: bool) -> Iterator[Step]:
        while True:
            # Around one step, not the loop: between two steps the caller's grad mode holds, and what the caller runs is not recorded.
            with torch.no_grad(), record_cross_attention(self.unet) if attention_maps else nullcontext() as maps:
                step = next(walk, None)
            if step is None:
                return
            if maps is not None:
                # Guidance runs the unconditional half first; the prompt's rows are the last.
                step = replace(step, attention_maps={name: m[-count:] for name, m in maps.items()})
            yield step

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C h w"], tiled: bool = True) -> Float[Tensor, "B 3 H W"]:
        """Scaled latents to pixels, clamped to [-1, 1], in float32. strips: large pictures a few rows at a time, the same but for rounding.

        In half precision the decoder can overflow (the cause of black pictures); then it is run again in float32, with a warning.
        """
        pictures = max(1, 2**18 // (latents[0, 0].numel() * self.config.vae.factor**2))  # at a time: the decoder is the peak of memory
        return torch.cat([self._decode(z, tiled) for z in (latents / self.config.vae.scaling_factor).split(pictures)])

    def _decode(self, z: Float[Tensor, "B C h w"], tiled: bool) -> Float[Tensor, "B 3 H W"]:
        dtype = self.vae.post_quant_conv.weight.dtype
        decode = partial(decode_tiled, self.vae) if tiled and should_tile(self.config.vae, z) else self.vae.decode
        pixels = decode(z.to(dtype))
        if not pixels.isfinite().all() and dtype.itemsize < 4:
            warnings.warn(
                f"the decoder overflowed in {dtype}: decoded again in float32", stacklevel=4
            )  # past no_grad's wrapper, to who called decode
            try:
                self.vae.float()
                pixels = decode(z.float())
            finally:
                self.vae.to(dtype)
        if not pixels.isfinite().all():
            raise ValueError("the picture is not finite even in float32: the latents or the weights are broken")
        return pixels.float().clamp(-1, 1)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int = 30,
        sampler: str = "ddim",
        guidance_scale: float | None = None,
        negative_prompt: str = "",
        seed: int = 0,
        batch: int = 1,
        size: int | tuple[int, int] | None = None,
        spacing: str | None = None,
        eta: float = 0.0,
        savings: Savings = Savings(),
    ) -> list[Image.Image]:
        """Prompts to pictures: `batch` pictures of each prompt, on the seeds seed, seed + 1, ...; the rest as in `denoise`."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        walk = self.denoise(
            [prompt for prompt in prompts for _ in range(batch)],
            steps=steps,
            sampler=sampler,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            seeds=[seed + i for _ in prompts for i in range(batch)],
            size=size,
            spacing=spacing,
            eta=eta,
            savings=savings,
        )
        *_, last = walk
        return to_images(self.decode(last.x_t))

    def _latent_shape(self, size: int | tuple[int, int] | None) -> tuple[int, int, int]:
        latent_channels = self.config.vae.latent_channels
        if self.config.unet.in_channels != latent_channels:
            raise ValueError(
                f"this U-Net has {self.config.unet.in_channels} input channels, not {latent_channels}: an inpainting model, "
                "which needs a picture and a mask beside the prompt; for text alone load a text-to-image checkpoint"
            )
        size = self.config.image_size if size is None else size
        width, height = (size, size) if isinstance(size, int) else size
        factor = self.config.vae.factor
        if width < factor or height < factor or width % factor or height % factor:
            raise ValueError(f"size {width} x {height}: width and height must be multiples of {factor} pixels, at least {factor}")
        return latent_channels, height // factor, width // factor


def noise_source(seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device) -> Callable[[], Float[Tensor, "B C h w"]]:
    """A function that draws a unit normal for each seed, picture by picture on the CPU.

    So a seed gives the same noise alone, in any batch and for any device. Raises ValueError for a seed outside 0..2^64-1.
    """
    for seed in seeds:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed {seed} is outside 0..2^64-1")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)


def to_images(pixels: Float[Tensor, "B 3 H W"]) -> list[Image.Image]:
    """Pixels in [-1, 1] to 8-bit pictures, rounded to the nearest value."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    return [Image.fromarray(picture) for picture in rearrange(values, "B C H W -> B H W C").numpy()]
