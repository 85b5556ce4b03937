"""Stable Diffusion: the parts together, from a prompt to a picture.

    prompt -> tokenizer -> text encoder -> conditioning --.
    seed   -> noise x_T -> sampler x guidance x U-Net ----+--> latent -> VAE decoder -> picture

Paper: Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models". Left out: the safety checker and the
watermark of the original's script.
"""

import warnings
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Shaped
from PIL import Image
from torch import Tensor, nn

from minidiff.conditioning import Conditioning, TextSide
from minidiff.config import ModelConfig
from minidiff.guidance import guided
from minidiff.samplers import Step, sample
from minidiff.schedule import NoiseSchedule
from minidiff.text_encoder import TextEncoder
from minidiff.tokenizer import Tokenizer
from minidiff.unet import UNet
from minidiff.vae import VAE

Model = Callable[[Tensor, Tensor, Conditioning], Tensor]  # model(x_t, t, conditioning) -> prediction
GRAPH_DEVICES = ("cuda",)  # where the U-Net runs by a captured graph; see cuda_graph.py


class StableDiffusion:
    """The modules of one checkpoint, and what it takes to make pictures with them.

    text: tokenizer and text encoder together, which turn prompts into a Conditioning.
    extra_tensors: tensors of the file that nothing is computed with, kept so that saving loses nothing.
    notes: what was decided when the file was loaded and is worth saying.
    attached: the adapters on the modules (adapters/base.py), in the order in which they came, no part of what is saved. `attach` and
        `detach` of an adapter keep it. Each is a module whose hooks are its methods, and its `version` a number that grows whenever it
        computes something else than before, but by writing into its parameters in place.
    """

    def __init__(
        self,
        config: ModelConfig,
        text: TextSide,
        unet: UNet,
        vae: VAE,
        extra_tensors: dict[str, Tensor] | None = None,
        notes: tuple[str, ...] = (),
    ):
        self.config = config
        self.text, self.unet, self.vae = text, unet, vae
        self.schedule = NoiseSchedule(config.schedule)
        self.extra_tensors = extra_tensors or {}
        self.notes = notes
        self.attached: list[Any] = []
        self._graph = None

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Return the modules by name: the text encoders, "unet" and "vae", in the order in which a picture passes them."""
        return {**self.text.encoders, "unet": self.unet, "vae": self.vae}

    @property
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the first text encoder."""
        return self.text.tokenizers["text_encoder"]

    @property
    def text_encoder(self) -> TextEncoder:
        """Return the first, and mostly the only, text encoder."""
        return self.text.encoders["text_encoder"]

    @property
    def device(self) -> torch.device:
        """Return the U-Net's device."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the U-Net's weights."""
        return self.unet.conv_in.weight.dtype

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Float[Tensor, "B L D"]:
        """Return the context that the U-Net looks at, one row per token; `text(prompts)` gives all of the conditioning."""
        return self.text(prompts, (self.config.image_size, self.config.image_size)).context

    @torch.no_grad()
    def predict(self, x_t: Float[Tensor, "B C H W"], t: Shaped[Tensor, " B"], conditioning: Conditioning) -> Float[Tensor, "R C_out H W"]:
        """Return the U-Net's prediction, in its own dtype and without gradients; on CUDA by a graph, which takes less time."""
        unet = self.unet
        if self.device.type in GRAPH_DEVICES:
            from minidiff.cuda_graph import UNetGraph

            if self._graph is None or self._graph.unet is not unet:
                self._graph = UNetGraph(unet, self.attached)
            unet = self._graph
        return unet(x_t.to(self.dtype), t, conditioning)

    def denoise(
        self,
        prompts: str | Sequence[str],
        *,
        steps: int = 30,
        sampler: str = "ddim",
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        seeds: Sequence[int] = (0,),
        size: int | tuple[int, int] | None = None,
        spacing: str | None = None,
        eta: float = 0.0,
        start: int = 0,
        x: Float[Tensor, "B C h w"] | None = None,
        model: Model | None = None,
        text: TextSide | None = None,
    ) -> Generator[Step, Tensor | None, None]:
        """Denoise from noise to latents; yield one Step per step. The last one's x_t is to be decoded.

        Between two steps `send(x_t)` replaces the latent and returns the next Step (see samplers.sample).

        Args:
            prompts: one per picture, or a single one for all seeds.
            steps: 1..T.
            sampler: a name in samplers.SAMPLERS.
            guidance_scale: None is the model's own; 1 follows the prompt alone.
            negative_prompt: what the pictures are guided away from; None is what the model was trained with, the empty prompt or, for
                SDXL, zeros.
            seeds: one per picture, 0..2^64-1, or a single one for all prompts.
            size: of the pictures, in pixels: a number for a square or (width, height); None is the model's own.
            spacing: leading, linspace or trailing; None is the model's own.
            eta: 0..1, for ddim: how much of the noise is drawn afresh.
            start: the index of the noise level to begin at, among those that samplers.levels returns; needs x.
            x: the latents at that level, one per picture, in place of the seeds' first noise.
            model: predicts in the U-Net's place, model(x_t, t, conditioning), for B rows of x_t and B or 2 B of conditioning. It usually
                calls `predict` with more channels, or with residuals in the conditioning.
            text: encodes the prompts in place of the model's own text side.

        Raises ValueError, before the first step, for what the model cannot do.
        """
        prompts, seeds = pair_prompts(prompts, seeds)
        if start and x is None:
            raise ValueError(f"start {start} needs x, the latents at that level: samplers.levels tells how much noise they have")
        if model is None:
            self.check_channels()
        model = self.predict if model is None else torch.no_grad()(model)
        shape = self._latent_shape(size)
        if x is not None and x.shape != (len(prompts), *shape):
            raise ValueError(f"x has shape {tuple(x.shape)}; expected {(len(prompts), *shape)}, for {len(prompts)} pictures of that size")
        draw = noise_source(seeds, shape, self.device)
        first_noise = draw()  # also where x takes its place: whoever adds it to a picture must not meet it again in a later step
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        pixels = shape[2] * self.config.vae.factor, shape[1] * self.config.vae.factor
        with torch.no_grad():
            text = text or self.text
            cond, uncond = (text(prompts, pixels), None) if guidance_scale == 1 else text.guided(prompts, negative_prompt, pixels)
        for part in (self.unet, self.vae):
            channels_last(part)
        return sample(
            guided(model, cond, uncond, guidance_scale, shared_prefix=True),
            first_noise if x is None else x.to(first_noise),
            self.schedule,
            sampler=sampler,
            steps=steps,
            spacing=spacing,
            eta=eta,
            noise=draw,
            start=start,
        )

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "B C h w"], tiled: bool = True) -> Float[Tensor, "B 3 H W"]:
        """Decode scaled latents to pixels in [-1, 1], float32. tiled: large pictures a few rows at a time, the same but for rounding.

        In half precision the decoder can overflow (the cause of black pictures), SDXL's in float16 nearly always; then it is run again in
        float32 and stays there, which a warning says once.
        """
        pictures = max(1, 2**18 // (latents[0, 0].numel() * self.config.vae.factor**2))  # at a time: the decoder is the peak of memory
        return torch.cat([self._decode(z, tiled) for z in (latents / self.config.vae.scaling_factor).split(pictures)])

    def _decode(self, z: Float[Tensor, "B C h w"], tiled: bool) -> Float[Tensor, "B 3 H W"]:
        from minidiff.tiled_decode import decode_tiled, should_tile

        dtype = self.vae.post_quant_conv.weight.dtype
        decode = partial(decode_tiled, self.vae) if tiled and should_tile(self.config.vae, z) else self.vae.decode
        pixels = decode(z.to(dtype))
        if not pixels.isfinite().all() and dtype.itemsize < 4:
            # The stack level points past no_grad's wrapper, to the line that called decode.
            warnings.warn(f"the decoder overflowed in {dtype}: decoded again in float32, as all pictures from now on", stacklevel=4)
            try:
                self.vae.float()
                pixels = decode(z.float())
            except BaseException:
                self.vae.to(dtype)
                raise
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
        negative_prompt: str | None = None,
        seed: int = 0,
        batch: int = 1,
        size: int | tuple[int, int] | None = None,
        spacing: str | None = None,
        eta: float = 0.0,
    ) -> list[Image.Image]:
        """Make pictures of each prompt, on the seeds seed, seed + 1, ...

        Args:
            prompts: one or several.
            steps, sampler, guidance_scale, negative_prompt, size, spacing, eta: as in `denoise`.
            seed: of each prompt's first picture, 0..2^64-1.
            batch: pictures per prompt.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        *_, last = self.denoise(
            [prompt for prompt in prompts for _ in range(batch)],
            steps=steps,
            sampler=sampler,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            seeds=[seed + i for _ in prompts for i in range(batch)],
            size=size,
            spacing=spacing,
            eta=eta,
        )
        return to_images(self.decode(last.x_t))

    def check_channels(self) -> None:
        """Raise ValueError for a U-Net that is told more than text, as an inpainting model's."""
        latent_channels = self.config.vae.latent_channels
        if self.config.unet.in_channels != latent_channels:
            raise ValueError(
                f"this U-Net has {self.config.unet.in_channels} input channels, not {latent_channels}: an inpainting model, "
                "which needs a picture and a mask beside the prompt; for text alone load a text-to-image checkpoint"
            )

    def pixel_size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        """Return the (width, height) of pictures: of `size`, as `denoise` takes it. Raises ValueError for what the VAE cannot do."""
        size = self.config.image_size if size is None else size
        width, height = (size, size) if isinstance(size, int) else size
        factor = self.config.vae.factor
        if width < factor or height < factor or width % factor or height % factor:
            raise ValueError(f"size {width} x {height}: width and height must be multiples of {factor} pixels, at least {factor}")
        return width, height

    def _latent_shape(self, size: int | tuple[int, int] | None) -> tuple[int, int, int]:
        width, height = self.pixel_size(size)
        return self.config.vae.latent_channels, height // self.config.vae.factor, width // self.config.vae.factor


def pair_prompts(prompts: str | Sequence[str], seeds: Sequence[int]) -> tuple[list[str], list[int]]:
    """Return as many prompts as seeds: a single one of either goes with all of the other. Raises ValueError for other numbers of them."""
    prompts, seeds = [prompts] if isinstance(prompts, str) else list(prompts), list(seeds)
    if not prompts or not seeds:
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds make no picture; give at least one of each")
    if len(prompts) != len(seeds) and 1 not in (len(prompts), len(seeds)):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds do not pair up; give one of either, or as many of each")
    count = max(len(prompts), len(seeds))
    return prompts * (count // len(prompts)), seeds * (count // len(seeds))


def channels_last(module: nn.Module) -> None:
    """Lay out 16-bit convolution weights as their kernels want them on a CPU or CUDA; what they compute is laid out in the same way.

    Values and shapes stay. In float32 nothing is gained: a CPU's kernels copy into a layout of their own either way.
    """
    weights = [part.weight for part in module.modules() if isinstance(part, nn.Conv2d)]
    if all(weight.dtype.itemsize == 2 and weight.device.type in ("cpu", "cuda") for weight in weights):
        module.to(memory_format=torch.channels_last)


def noise_source(seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device) -> Callable[[], Float[Tensor, "B C h w"]]:
    """Return a function that draws a unit normal for each seed, picture by picture on the CPU.

    A seed thus gives the same noise alone, in any batch and for any device. Raises ValueError for a seed outside 0..2^64-1.
    """
    for seed in seeds:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed {seed} is outside 0..2^64-1")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)


def to_images(pixels: Float[Tensor, "B 3 H W"]) -> list[Image.Image]:
    """Convert pixels in [-1, 1] to 8-bit pictures, rounded to the nearest value."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    return [Image.fromarray(picture) for picture in rearrange(values, "B C H W -> B H W C").numpy()]
