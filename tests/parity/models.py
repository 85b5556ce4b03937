"""Small models of Stable Diffusion's shapes with random weights: the reference library's, and ours with the same numbers.

The weights go from the reference into ours by the name map of weights_loader, so that the map is tested with them.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import diffusers
import open_clip
import torch
import transformers
from torch import Tensor, nn

from minidiff.config import ModelConfig, ScheduleConfig, TextEncoderConfig, TokenizerConfig, UNetConfig, VAEConfig
from minidiff.pipeline import StableDiffusion
from minidiff.text_encoder import TextEncoder
from minidiff.two_encoders import text_configs, text_side
from minidiff.unet import UNet
from minidiff.vae import VAE
from weights_loader.dialects import TEXT_DIFFUSERS_ALIASES
from weights_loader.families.shared import DIFFUSERS
from weights_loader.families.stable_diffusion_2 import STABLE_DIFFUSION_2
from weights_loader.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from weights_loader.name_table import PartNames, canonical_name, from_file, name_table


@dataclass(frozen=True)
class Shape:
    """A family in small. latent: height and width of what its U-Net is given."""

    name: str
    unet: UNetConfig
    vae: VAEConfig
    text: TextEncoderConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    latent: tuple[int, int] = (16, 16)
    text_2: TextEncoderConfig | None = None

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(self.tokenizer, self.text, self.unet, self.vae, self.schedule, text_encoder_2=self.text_2)

    def __str__(self) -> str:
        return self.name


LEVELS = dict(widths=(16, 32, 48, 48), groups=8)
# A bias or a context of the wrong width cannot hide: no two widths are equal but those that are in Stable Diffusion.
SD1 = Shape(
    "SD 1",
    UNetConfig(**LEVELS, heads=(2, 2, 2, 2), context_width=24),
    VAEConfig(**LEVELS),
    TextEncoderConfig(vocab_size=49408, width=24, layers=3, heads=4),
)
SD2 = Shape(
    "SD 2",
    UNetConfig(**LEVELS, heads=(1, 2, 3, 3), context_width=40, linear_projection=True),
    VAEConfig(**LEVELS),
    TextEncoderConfig(vocab_size=49408, width=40, layers=3, heads=5, activation="gelu"),
    TokenizerConfig(cleaning="open_clip", padding="zero"),
    ScheduleConfig(prediction="v"),
)
INPAINTING = Shape("inpainting", UNetConfig(**LEVELS, in_channels=9, heads=(2, 2, 2, 2), context_width=24), SD1.vae, SD1.text)
# 10 x 14 halves to 5 x 7, 3 x 4, 2 x 2: the way up must go to the skips' sizes. The VAE is given 80 x 112 pixels.
ODD = Shape("SD 1, odd size", SD1.unet, SD1.vae, SD1.text, latent=(10, 14))
BUNDLED = Shape(
    "bundled",
    UNetConfig(widths=(64, 128, 160), blocks_per_level=1, attention=(True, True, False), heads=(2, 4, 5), context_width=128),
    VAEConfig(widths=(24, 48, 96), blocks_per_level=1, groups=8),
    TextEncoderConfig(vocab_size=800, context_length=32, width=128, layers=2, heads=4),
)
# Three levels, the first without transformers, the others deeper; heads and all widths differ.
SDXL = Shape(
    "SDXL",
    UNetConfig(
        widths=(16, 32, 48), groups=8, attention=(0, 2, 3), heads=(1, 2, 3), context_width=64, linear_projection=True, pooled_width=20
    ),
    VAEConfig(**LEVELS, scaling_factor=0.13025),
    TextEncoderConfig(vocab_size=49408, width=24, layers=3, heads=4, penultimate=True),
    text_2=TextEncoderConfig(vocab_size=49408, width=40, layers=3, heads=5, activation="gelu", penultimate=True, projection=20),
)


def randomise(module: nn.Module) -> nn.Module:
    """Fresh random weights that keep activations at unit size; norms too, or a mistake in their weight, bias or eps would hide."""
    generator = torch.Generator().manual_seed(0)
    norms = {id(p) for m in module.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm)) for p in m.parameters()}
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if p.ndim == 1:
                noise = 0.3 * noise + (1.0 if id(p) in norms and name.endswith("weight") else 0.0)
            elif "embedding" not in name or "time" in name or "controlnet" in name:
                noise = noise / p[0].numel() ** 0.5
            p.copy_(noise)
    return module.eval().requires_grad_(False)


@cache
def diffusers_unet(config: UNetConfig, dtype: torch.dtype) -> diffusers.UNet2DConditionModel:
    kinds = ["CrossAttn" if has else "" for has in config.attention]
    unet = diffusers.UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=config.widths,
        layers_per_block=config.blocks_per_level,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        attention_head_dim=config.heads,  # its name notwithstanding, the number of heads
        cross_attention_dim=config.context_width,
        use_linear_projection=config.linear_projection,
        sample_size=64,  # the image-to-image pipelines compare it with 64, and nothing else here depends on it
        norm_num_groups=config.groups,
        **({} if config.pooled_width is None else added_embedding(config)),
    )
    return randomise(unet.to(dtype))


def added_embedding(config: UNetConfig) -> dict[str, object]:
    return dict(
        transformer_layers_per_block=[max(1, depth) for depth in config.attention],  # a level without transformers has none to count
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=config.pooled_width + 6 * 256,
    )


@cache
def diffusers_vae(config: VAEConfig, dtype: torch.dtype) -> diffusers.AutoencoderKL:
    n = len(config.widths)
    vae = diffusers.AutoencoderKL(
        block_out_channels=config.widths,
        layers_per_block=config.blocks_per_level,
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
        scaling_factor=config.scaling_factor,
    )
    return randomise(vae.to(dtype))


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@cache
def transformers_text(config: TextEncoderConfig, dtype: torch.dtype) -> transformers.CLIPTextModel:
    kind = transformers.CLIPTextModelWithProjection if config.projection else transformers.CLIPTextModel
    text = kind(
        transformers.CLIPTextConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.context_length,
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            hidden_act=config.activation,
            projection_dim=config.projection or config.width,
            bos_token_id=49406,
            eos_token_id=49407,  # of which the first is pooled
        )
    )
    # Before version 5 transformers makes the causal mask in PyTorch's default dtype, where float64's least number does not fit into float32.
    text.forward = default_dtype(dtype)(text.forward)
    return randomise(text.to(dtype))


@cache
def open_clip_text(config: TextEncoderConfig, dtype: torch.dtype) -> open_clip.transformer.TextTransformer:
    """One block more than we have for Stable Diffusion 2, which takes the penultimate layer and has no pooled vector."""
    text = open_clip.transformer.TextTransformer(
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        width=config.width,
        layers=config.layers + (not config.penultimate),
        heads=config.heads,
        output_dim=config.projection or config.width,
    )
    return randomise(text.to(dtype))


def with_weights_of(ours: UNet | VAE | TextEncoder, names: PartNames, tensors: dict[str, Tensor]) -> UNet | VAE | TextEncoder:
    """Our module, made on the meta device, given the tensors of a reference under these names."""
    own = ours.state_dict()
    weights = {name: from_file(tensors[place.name], place, own[name]) for name, place in name_table(ours, names).items()}
    ours.load_state_dict(weights, assign=True)
    return ours.eval().requires_grad_(False)


def unets(shape: Shape, dtype: torch.dtype) -> tuple[UNet, diffusers.UNet2DConditionModel]:
    theirs = diffusers_unet(shape.unet, dtype)
    with torch.device("meta"):
        ours = UNet(shape.unet)
    return with_weights_of(ours, DIFFUSERS["unet"], theirs.state_dict()), theirs


def vaes(shape: Shape, dtype: torch.dtype) -> tuple[VAE, diffusers.AutoencoderKL]:
    theirs = diffusers_vae(shape.vae, dtype)
    with torch.device("meta"):
        ours = VAE(shape.vae)
    return with_weights_of(ours, DIFFUSERS["vae"], theirs.state_dict()), theirs


def text_encoders(shape: Shape, dtype: torch.dtype, second: bool = False) -> tuple[TextEncoder, transformers.CLIPTextModel]:
    config = shape.text_2 if second else shape.text
    theirs = transformers_text(config, dtype)
    with torch.device("meta"):
        ours = TextEncoder(config)
    names = STABLE_DIFFUSION_XL.names["diffusers"]["text_encoder_2" if second else "text_encoder"]
    tensors = {canonical_name(name, TEXT_DIFFUSERS_ALIASES): tensor for name, tensor in theirs.state_dict().items()}
    return with_weights_of(ours, names, tensors), theirs


def open_clips(shape: Shape, dtype: torch.dtype) -> tuple[TextEncoder, open_clip.transformer.TextTransformer]:
    config = shape.text_2 or shape.text
    theirs = open_clip_text(config, dtype)
    with torch.device("meta"):
        ours = TextEncoder(config)
    ldm = STABLE_DIFFUSION_XL.names["ldm"]
    names = ldm["text_encoder_2"] if shape.text_2 else STABLE_DIFFUSION_2.names["ldm"]["text_encoder"]
    return with_weights_of(ours, names, {names.prefix + name: tensor for name, tensor in theirs.state_dict().items()}), theirs


@cache
def clip_tokenizer(pad_token: str) -> transformers.CLIPTokenizer:
    """CLIP's, made of open_clip's list of merges: the files of a checkpoint are not here."""
    words = open_clip.tokenizer.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = {names.get(piece, piece): i for piece, i in words.encoder.items()}
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        merges = [" ".join(merge) for merge in words.bpe_ranks]
        (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
        return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token=pad_token)


def ddim(shape: Shape) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(
        beta_start=shape.schedule.beta_start,
        beta_end=shape.schedule.beta_end,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[shape.schedule.prediction],
    )


def pipelines(shape: Shape, dtype: torch.dtype) -> tuple[StableDiffusion, diffusers.DiffusionPipeline]:
    parts = {"unet": unets(shape, dtype), "vae": vaes(shape, dtype)}
    texts = {name: text_encoders(shape, dtype, name == "text_encoder_2") for name in text_configs(shape.config)}
    text = text_side(shape.config, {name: pair[0] for name, pair in texts.items()})
    ours = StableDiffusion(shape.config, text, parts["unet"][0], parts["vae"][0])
    if shape.text_2:
        theirs = diffusers.StableDiffusionXLPipeline(
            tokenizer=clip_tokenizer("<|endoftext|>"),
            tokenizer_2=clip_tokenizer("!"),
            scheduler=ddim(shape),
            add_watermarker=False,
            **{name: pair[1] for name, pair in (parts | texts).items()},
        )
        theirs.set_progress_bar_config(disable=True)
        return ours, theirs
    theirs = diffusers.StableDiffusionPipeline(
        tokenizer=clip_tokenizer("<|endoftext|>" if shape.tokenizer.padding == "end" else "!"),  # "!" is token 0
        scheduler=ddim(shape),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **{name: pair[1] for name, pair in (parts | texts).items()},
    )
    theirs.set_progress_bar_config(disable=True)
    return ours, theirs
