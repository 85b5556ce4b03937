"""The numbers that make one Stable Diffusion differ from another.

Every model of this package is a plain module built from one of these frozen dataclasses. Stable Diffusion 1.x, 2.x, XL, the
9-channel inpainting model and the small model that ships with the project run through the same code with other numbers.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal

SIZE_NUMBERS = 6  # that SDXL is told: height and width of the original, top and left of the crop, height and width of the picture


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ValueError, with the choices there are, unless the value is one of them. name: what is chosen, such as "sampler"."""
    if value not in choices:
        raise ValueError(f"{name} {value!r} unknown; choose {', '.join(choices)}")


@dataclass(frozen=True)
class TokenizerConfig:
    """Words to integers. Defaults: Stable Diffusion 1.x.

    merges: the byte-pair merges in order, one "left right" per line, as in CLIP's merges.txt; None means CLIP's own 48,894.
    cleaning: how text is normalised before it is split. "clip" is what transformers' CLIPTokenizer does (used with SD 1.x),
        "open_clip" what open_clip does (used with SD 2.x): Unicode repair by ftfy, HTML entities, lower case.
    padding: "end" repeats the end-of-text token (SD 1.x), "zero" uses token 0 (SD 2.x, and SDXL's second encoder).
    added: words of the checkpoint's own behind the vocabulary of the merges, one id each, in the order of their ids: a personalised model's
        "<cat>", whose row is in the text encoder's table.
    """

    merges: tuple[str, ...] | None = None
    cleaning: Literal["clip", "open_clip"] = "clip"
    padding: Literal["end", "zero"] = "end"
    context_length: int = 77
    added: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextEncoderConfig:
    """The CLIP text transformer (Radford et al. 2021). Defaults: ViT-L/14's, as in Stable Diffusion 1.x.

    layers counts the blocks that are run. Stable Diffusion 2.x conditions on the penultimate layer of a 24-block OpenCLIP
    ViT-H, so it has layers=23 here: block 24 of its files is carried along, never computed.
    penultimate: the context is what enters the last block, without the final LayerNorm, as in both encoders of SDXL; the last block then
        serves the pooled vector alone.
    projection: width of the pooled vector that a penultimate encoder makes of the end token; None for one that makes none.
    """

    vocab_size: int = 49408
    context_length: int = 77
    width: int = 768
    layers: int = 12
    heads: int = 12
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    penultimate: bool = False
    projection: int | None = None

    def __post_init__(self):
        if self.projection and not self.penultimate:
            raise ValueError(f"TextEncoderConfig: projection {self.projection}; only a penultimate encoder has a pooled vector")
        if self.heads < 1 or self.width % self.heads:
            raise ValueError(f"TextEncoderConfig: width {self.width} does not divide into {self.heads} heads")
        check_choice("TextEncoderConfig: activation", self.activation, ("quick_gelu", "gelu"))


@dataclass(frozen=True)
class UNetConfig:
    """The denoiser (Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models"). Defaults: SD 1.x.

    One entry of widths, attention and heads per resolution level, highest resolution first; the middle takes the last level's
    width, heads and depth, and always has attention.
    attention: transformer blocks in each transformer of the level; 0 is a level without transformers.
    pooled_width: of the pooled text vector that is added to the time embedding together with the picture's sizes, as in SDXL; None for
        models that are told neither.
    """

    in_channels: int = 4
    out_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    blocks_per_level: int = 2
    attention: tuple[int, ...] = (1, 1, 1, 0)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context_width: int = 768
    linear_projection: bool = False  # how files store proj_in and proj_out: SD 2.x as Linears, SD 1.x as 1x1 convolutions; the same map
    pooled_width: int | None = None
    groups: int = 32

    def __post_init__(self):
        _check_levels("UNetConfig", self.widths, self.groups)
        for name in ("attention", "heads"):
            if len(getattr(self, name)) != len(self.widths):
                raise ValueError(f"UNetConfig: {name} {getattr(self, name)}, widths {self.widths}; give one of each per level")
        for width, heads in zip(self.widths, self.heads):
            if heads < 1 or width % heads:
                raise ValueError(f"UNetConfig: width {width} does not divide into {heads} heads")

    @property
    def skip_widths(self) -> tuple[int, ...]:
        """Return the channels of each skip, in the order of the way down: of the first convolution, every block, every downsampling."""
        *others, last = self.widths
        levels = [width for width in others for _ in range(self.blocks_per_level + 1)]
        return (self.widths[0], *levels, *(last,) * self.blocks_per_level)


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder between pixels and latents (Rombach et al. 2022, section 3.1). Defaults: SD 1.x and 2.x.

    scaling_factor brings the latents to unit variance; the pipeline multiplies by it, the VAE itself never does.
    """

    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks_per_level: int = 2
    latent_channels: int = 4
    groups: int = 32
    scaling_factor: float = 0.18215

    def __post_init__(self):
        _check_levels("VAEConfig", self.widths, self.groups)

    @property
    def factor(self) -> int:
        """Return how many pixels wide a latent cell is: each level but the last halves the resolution."""
        return 2 ** (len(self.widths) - 1)


@dataclass(frozen=True)
class ScheduleConfig:
    """The forward process (Ho et al. 2020) and what the U-Net predicts. Defaults: SD 1.x.

    prediction: "eps" the noise, "v" the velocity sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans and Ho 2022).
    zero_terminal_snr: rescale so that the last timestep is pure noise (Lin et al. 2023, algorithm 1).
    spacing: which timesteps a sampler visits unless told otherwise; "leading" is the original's, "trailing" belongs to
        models with zero terminal SNR (Lin et al. 2023, table 2).
    """

    timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    prediction: Literal["eps", "v"] = "eps"
    zero_terminal_snr: bool = False
    spacing: Literal["leading", "linspace", "trailing"] = "leading"


@dataclass(frozen=True)
class ModelConfig:
    """A whole Stable Diffusion. Defaults: SD 1.x.

    text_encoder_2: of models with two, whose contexts are put side by side along channels; tokenizer_2 belongs to it.
    zero_negative: whether no negative prompt means zeros to such a model, else the empty prompt.
    image_size and guidance_scale are what the model was made for, in pixels and as in classifier-free guidance.
    """

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    image_size: int = 512
    guidance_scale: float = 7.5
    text_encoder_2: TextEncoderConfig | None = None
    tokenizer_2: TokenizerConfig = TokenizerConfig(cleaning="open_clip", padding="zero")
    zero_negative: bool = True


def _check_levels(name: str, widths: tuple[int, ...], groups: int):
    if not widths:
        raise ValueError(f"{name}: widths is empty; give one width per resolution level")
    for width in widths:
        if groups < 1 or width % groups:
            raise ValueError(f"{name}: width {width} does not divide into {groups} normalisation groups")


SD1 = ModelConfig()

# Stable Diffusion 2.x: OpenCLIP ViT-H text, 64-wide heads. The 768-pixel models predict v, the 512-pixel "base" ones eps.
SD2 = ModelConfig(
    tokenizer=TokenizerConfig(cleaning="open_clip", padding="zero"),
    text_encoder=TextEncoderConfig(width=1024, layers=23, heads=16, activation="gelu"),
    unet=UNetConfig(heads=(5, 10, 20, 20), context_width=1024, linear_projection=True),
    schedule=ScheduleConfig(prediction="v"),
    image_size=768,
)

# Stable Diffusion XL base (Podell et al. 2023): CLIP ViT-L/14 and OpenCLIP ViT-bigG, three levels with transformers 0, 2 and 10 deep,
# the pooled vector and the picture's sizes added to the time, and a VAE of another scale.
SDXL = ModelConfig(
    text_encoder=TextEncoderConfig(penultimate=True),
    text_encoder_2=TextEncoderConfig(width=1280, layers=32, heads=20, activation="gelu", penultimate=True, projection=1280),
    unet=UNetConfig(
        widths=(320, 640, 1280), attention=(0, 2, 10), heads=(5, 10, 20), context_width=2048, linear_projection=True, pooled_width=1280
    ),
    vae=VAEConfig(scaling_factor=0.13025),
    image_size=1024,
    guidance_scale=5.0,
)
# SDXL-Turbo (Sauer et al. 2023) and merges with Lightning's LoRA (Lin et al. 2024) are SDXL distilled to 1 to 8 steps without guidance.
SDXL_TURBO = replace(SDXL, schedule=ScheduleConfig(spacing="trailing"), image_size=512, guidance_scale=1.0)
