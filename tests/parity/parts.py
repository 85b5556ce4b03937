"""Every block and every whole model beside its reference: what is computed on both sides, on which inputs.

A comparison builds the two, and yields (our output, the reference's output). `largest_errors` judges them, for the parity tests and for
the tests that make a mistake on purpose.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.conditioning import Conditioning
from minidiff.config import UNetConfig
from minidiff.pipeline import noise_source
from minidiff.two_encoders import SizeNumbers
from tests.parity.check import largest_error
from tests.parity.models import BUNDLED, INPAINTING, ODD, SD1, SD2, SDXL, Shape, open_clips, pipelines, text_encoders, unets, vaes

Outputs = Iterator[tuple[Tensor, Tensor]]

# A variance of 4e-6 is between the two eps that Stable Diffusion's GroupNorms have, 1e-5 and 1e-6: at unit variance float32 could not
# tell them apart.
FAINT = 2e-3


def noise(*size: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def features(block: nn.Module, shape: Shape, dtype: torch.dtype) -> Tensor:
    """What a block whose first layer is a GroupNorm is given."""
    norm = next(module for module in block.modules() if isinstance(module, nn.GroupNorm))
    return FAINT * noise(2, norm.num_channels, *shape.latent, dtype=dtype)


def time(config: UNetConfig, dtype: torch.dtype) -> Tensor:
    return noise(2, 4 * config.widths[0], dtype=dtype, seed=2)


def context(config: UNetConfig, dtype: torch.dtype) -> Tensor:
    return noise(2, 7, config.context_width, dtype=dtype, seed=3)


# ------------------------------------------------------------------------------------------------------------- U-Net


def time_embedding(shape: Shape, dtype: torch.dtype) -> Outputs:
    ours, theirs = unets(shape, dtype)
    t = torch.tensor([0, 1, 500, 999])
    yield ours.time_embedding(t), F.silu(theirs.time_embedding(theirs.time_proj(t).to(dtype)))  # theirs takes the SiLU in every ResBlock


def res_block(shape: Shape, dtype: torch.dtype) -> Outputs:
    ours, theirs = unets(shape, dtype)
    pairs = [
        (ours.down[0].blocks[0], theirs.down_blocks[0].resnets[0]),
        (ours.down[1].blocks[0], theirs.down_blocks[1].resnets[0]),  # the width changes
        (ours.up[0].blocks[0], theirs.up_blocks[0].resnets[0]),  # takes a skip
    ]
    for a, b in pairs:
        x, temb = features(a, shape, dtype), time(shape.unet, dtype)
        yield a(x, F.silu(temb)), b(x, temb)


def spatial_transformer(shape: Shape, dtype: torch.dtype) -> Outputs:
    ours, theirs = unets(shape, dtype)
    for a, b in [(level.transformers[0], other.attentions[0]) for level, other in zip(ours.down, theirs.down_blocks) if level.transformers]:
        x, words = features(a, shape, dtype), context(shape.unet, dtype)
        yield a(x, words), b(x, words, return_dict=False)[0]


def transformer_block(shape: Shape, dtype: torch.dtype) -> Outputs:
    ours, theirs = unets(shape, dtype)
    x, words = noise(2, 30, shape.unet.widths[1], dtype=dtype), context(shape.unet, dtype)
    yield (
        ours.down[1].transformers[0].blocks[0](x, words),
        theirs.down_blocks[1].attentions[0].transformer_blocks[0](x, encoder_hidden_states=words),
    )


def attention(shape: Shape, dtype: torch.dtype) -> Outputs:
    ours, theirs = unets(shape, dtype)
    a, b = ours.middle.transformer.blocks[0], theirs.mid_block.attentions[0].transformer_blocks[0]
    x, words = noise(2, 30, shape.unet.widths[-1], dtype=dtype), context(shape.unet, dtype)
    yield a.self_attention(x), b.attn1(x)
    yield a.cross_attention(x, words), b.attn2(x, encoder_hidden_states=words)


def feed_forward(shape: Shape, dtype: torch.dtype) -> Outputs:
    ours, theirs = unets(shape, dtype)
    x = noise(2, 30, shape.unet.widths[-1], dtype=dtype)
    yield ours.middle.transformer.blocks[0].feed_forward(x), theirs.mid_block.attentions[0].transformer_blocks[0].ff(x)


def levels(shape: Shape, dtype: torch.dtype) -> Outputs:
    """The way down and up, level by level, and the middle; every level on both sides is given what diffusers' level before it gave."""
    ours, theirs = unets(shape, dtype)
    temb, words = time(shape.unet, dtype), context(shape.unet, dtype)
    x = noise(2, shape.unet.widths[0], *shape.latent, dtype=dtype)
    skips = [x]
    for a, b, attends in zip(ours.down, theirs.down_blocks, shape.unet.attention):
        x, outputs = b(x, temb, words) if attends else b(x, temb)
        yield from zip(a(skips[-1], F.silu(temb), words), outputs, strict=True)
        skips += outputs
    x = theirs.mid_block(skips[-1], temb, encoder_hidden_states=words)
    yield ours.middle(skips[-1], F.silu(temb), words), x
    for a, b, attends in zip(ours.up, theirs.up_blocks, reversed(shape.unet.attention)):
        own, skips, taken = list(skips), skips[: -len(b.resnets)], tuple(skips[-len(b.resnets) :])
        size = skips[-1].shape[2:] if skips else None
        extra = dict(encoder_hidden_states=words) if attends else {}
        y = b(x, res_hidden_states_tuple=taken, temb=temb, upsample_size=size, **extra)
        yield a(x, own, F.silu(temb), words), y
        x = y


# Six different numbers, some beyond what float16 and bfloat16 count in ones.
SIZES = torch.tensor([[1025.0, 2049.0, 3.0, 517.0, 768.0, 1280.0], [511.0, 640.0, 259.0, 0.0, 1024.0, 1536.0]])


def unet(shape: Shape, dtype: torch.dtype) -> Outputs:
    ours, theirs = unets(shape, dtype)
    x, words = noise(2, shape.unet.in_channels, *shape.latent, dtype=dtype), context(shape.unet, dtype)
    t = torch.tensor([1, 999])
    # In float64 too both sides start from the timestep's float32 cosines and sines, which are equal to the bit.
    if shape.unet.pooled_width is None:
        yield ours(x, t, words), theirs(x, t, words).sample
        return
    told = Conditioning(words, noise(2, shape.unet.pooled_width, dtype=dtype, seed=5), SIZES)
    yield ours(x, t, told), theirs(x, t, words, added_cond_kwargs={"text_embeds": told.pooled, "time_ids": SIZES}).sample


# --------------------------------------------------------------------------------------------------------------- VAE


def vae_res_block(shape: Shape, dtype: torch.dtype) -> Outputs:
    ours, theirs = vaes(shape, dtype)
    pairs = [
        (ours.encoder.down[0].blocks[0], theirs.encoder.down_blocks[0].resnets[0]),
        (ours.encoder.down[1].blocks[0], theirs.encoder.down_blocks[1].resnets[0]),
        (ours.decoder.up[-1].blocks[0], theirs.decoder.up_blocks[-1].resnets[0]),
    ]
    for a, b in pairs:
        x = features(a, shape, dtype)
        yield a(x), b(x, None)


def vae_attention(shape: Shape, dtype: torch.dtype) -> Outputs:
    ours, theirs = vaes(shape, dtype)
    x = features(ours.encoder.middle.attention, shape, dtype)
    yield ours.encoder.middle.attention(x), theirs.encoder.mid_block.attentions[0](x)


def vae_levels(shape: Shape, dtype: torch.dtype) -> Outputs:
    ours, theirs = vaes(shape, dtype)
    for a, b in [*zip(ours.encoder.down, theirs.encoder.down_blocks), *zip(ours.decoder.up, theirs.decoder.up_blocks)]:
        x = noise(2, a.blocks[0].conv_1.in_channels, *(2 * side for side in shape.latent), dtype=dtype)
        yield a(x), b(x)


def encoder(shape: Shape, dtype: torch.dtype) -> Outputs:
    ours, theirs = vaes(shape, dtype)
    pixels = noise(1, 3, *(shape.vae.factor * side for side in shape.latent), dtype=dtype)
    a, b = ours.encode(pixels), theirs.encode(pixels).latent_dist
    yield a.mean, b.mean
    yield a.logvar, b.logvar
    yield a.kl(), b.kl()


def decoder(shape: Shape, dtype: torch.dtype) -> Outputs:
    ours, theirs = vaes(shape, dtype)
    z = noise(1, shape.vae.latent_channels, *shape.latent, dtype=dtype)
    yield ours.decode(z), theirs.decode(z).sample


# ------------------------------------------------------------------------------------------------------ text encoder


def tokens(shape: Shape) -> Tensor:
    size = (2, shape.text.context_length)
    return torch.randint(0, shape.text.vocab_size, size, generator=torch.Generator().manual_seed(4))


def text_block(shape: Shape, dtype: torch.dtype) -> Outputs:
    ours, theirs = text_encoders(shape, dtype)
    _, *states, _ = theirs(tokens(shape), output_hidden_states=True).hidden_states
    assert len(states) == shape.text.layers - 1
    for block, x, y in zip(ours.blocks[1:], states, states[1:]):
        yield block(x), y


def text_encoder(shape: Shape, dtype: torch.dtype) -> Outputs:
    ours, theirs = text_encoders(shape, dtype)
    yield ours(tokens(shape)), theirs(tokens(shape)).last_hidden_state


def ended_tokens(shape: Shape) -> Tensor:
    """Tokens with an end each, at another place and with another padding behind it, as the two encoders of SDXL have."""
    rows = tokens(shape).clamp(max=49405)
    rows[0, 5:], rows[1, 11], rows[1, 12:] = 49407, 49407, 0
    return rows


ENDS = torch.tensor([5, 11])


def penultimate(shape: Shape, dtype: torch.dtype) -> Outputs:
    """Both encoders of SDXL: what enters the last block, and the second one's pooled vector."""
    rows = ended_tokens(shape)
    for second in (False, True):
        ours, theirs = text_encoders(shape, dtype, second)
        answer = theirs(rows, output_hidden_states=True)
        yield ours(rows), answer.hidden_states[-2]
    yield ours.pool(ours(rows), ENDS), answer.text_embeds


def open_clip_pooled(shape: Shape, dtype: torch.dtype) -> Outputs:
    """As SDXL's original runs it: the last block's input, and the pooled vector at the highest id."""
    ours, theirs = open_clips(shape, dtype)
    rows = ended_tokens(shape)
    x = theirs.token_embedding(rows) + theirs.positional_embedding
    for block in theirs.transformer.resblocks[:-1]:
        x = block(x, attn_mask=theirs.attn_mask)
    yield ours(rows), x
    yield ours.pool(ours(rows), ENDS), theirs(rows)


def open_clip_block(shape: Shape, dtype: torch.dtype) -> Outputs:
    ours, theirs = open_clips(shape, dtype)
    x = noise(2, shape.text.context_length, shape.text.width, dtype=dtype)
    yield ours.blocks[1](x), theirs.transformer.resblocks[1](x, attn_mask=theirs.attn_mask)


def open_clip_penultimate(shape: Shape, dtype: torch.dtype) -> Outputs:
    """As Stable Diffusion 2's code runs it: all blocks but the last, then the final LayerNorm."""
    ours, theirs = open_clips(shape, dtype)
    x = theirs.token_embedding(tokens(shape)) + theirs.positional_embedding
    for block in theirs.transformer.resblocks[:-1]:
        x = block(x, attn_mask=theirs.attn_mask)
    yield ours(tokens(shape)), theirs.ln_final(x)


# ------------------------------------------------------------------------------------------------------ the whole path

PROMPTS, NEGATIVE = ["a red apple on a blue table, oil painting", "cats"], "blurry"


def pipeline(shape: Shape, dtype: torch.dtype) -> Outputs:
    """Prompts to pictures with guidance: context, latents after a few steps, pixels. v in Stable Diffusion 2's shape, else eps."""
    ours, theirs = pipelines(shape, dtype)
    yield ours.encode_prompts([*PROMPTS, NEGATIVE]), theirs.encode_prompt([*PROMPTS, NEGATIVE], "cpu", 1, False)[0]

    seeds, (height, width) = [0, 1], shape.latent
    size = (shape.vae.factor * width, shape.vae.factor * height)
    *_, step = ours.denoise(PROMPTS, steps=5, guidance_scale=3.0, negative_prompt=NEGATIVE, seeds=seeds, size=size)
    pixels = ours.decode(step.x_t)
    x = noise_source(seeds, (shape.vae.latent_channels, height, width), torch.device("cpu"))().to(dtype)

    def their(output: str) -> Tensor:
        settings = dict(num_inference_steps=5, guidance_scale=3.0, width=size[0], height=size[1], latents=x, output_type=output)
        return theirs(PROMPTS, negative_prompt=[NEGATIVE] * 2, **settings).images

    # After decoding, which must leave the latent as it was. A random model's latents grow: at unit size, the tolerance means what it says.
    latent = their("latent")
    yield step.x_t / latent.std(), latent / latent.std()
    yield (pixels + 1) / 2, their("pt")


def sdxl_pipeline(shape: Shape, dtype: torch.dtype) -> Outputs:
    """Prompts to pictures by SDXL: negative prompts left out, empty and given, size numbers and another prompt for the second encoder."""
    ours, theirs = pipelines(shape, dtype)
    prompts = [*PROMPTS, ""]
    context, _, pooled, _ = theirs.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    encoded = ours.text(prompts, (128, 128))
    yield encoded.context, context
    yield encoded.pooled, pooled

    seeds, (height, width) = [0, 1], shape.latent
    size = (shape.vae.factor * width, shape.vae.factor * height)
    x = noise_source(seeds, (shape.vae.latent_channels, height, width), torch.device("cpu"))().to(dtype)
    sizes = SizeNumbers(original=(1025, 640), crop=(3, 517), target=(768, 1280))
    their_sizes = dict(original_size=(640, 1025), crops_coords_top_left=(517, 3), target_size=(1280, 768))
    for negative, text, more in (
        (None, None, {}),
        ("", None, {}),
        (NEGATIVE, replace(ours.text, sizes=sizes), their_sizes),
        (None, replace(ours.text, prompt_2="a dog"), {"prompt_2": ["a dog"] * 2}),
    ):
        *_, step = ours.denoise(PROMPTS, steps=3, guidance_scale=3.0, negative_prompt=negative, seeds=seeds, size=size, text=text)
        settings = dict(num_inference_steps=3, guidance_scale=3.0, width=size[0], height=size[1], latents=x, output_type="latent")
        given = None if negative is None else [negative] * 2
        latent = theirs(PROMPTS, negative_prompt=given, **settings, **more).images
        yield step.x_t / latent.std(), latent / latent.std()
    yield (ours.decode(step.x_t) + 1) / 2, theirs(PROMPTS, **settings | {"output_type": "pt"}, **more).images


# ---------------------------------------------------------------------------------------------------------- the list


@dataclass(frozen=True)
class Part:
    name: str
    reference: str
    compare: Callable[[Shape, torch.dtype], Outputs]
    shapes: tuple[Shape, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)

    def __str__(self) -> str:
        return self.name


ALL = (SD1, SD2, SDXL, INPAINTING, ODD, BUNDLED)
FAMILIES = (SD1, SD2, SDXL, BUNDLED)
ONE_ENCODER = (SD1, SD2, BUNDLED)
PARTS = (
    Part("U-Net: time embedding", "diffusers", time_embedding, FAMILIES),
    Part("U-Net: ResBlock", "diffusers ResnetBlock2D", res_block, FAMILIES),
    Part("U-Net: attention", "diffusers Attention", attention, FAMILIES),
    Part("U-Net: feed-forward", "diffusers FeedForward", feed_forward, FAMILIES),
    Part("U-Net: TransformerBlock", "diffusers BasicTransformerBlock", transformer_block, FAMILIES),
    Part("U-Net: SpatialTransformer", "diffusers Transformer2DModel", spatial_transformer, FAMILIES),
    Part("U-Net: levels and middle", "diffusers", levels, ALL),
    Part("U-Net", "diffusers UNet2DConditionModel", unet, ALL),
    Part("VAE: ResBlock", "diffusers ResnetBlock2D", vae_res_block, (SD1, BUNDLED)),
    Part("VAE: attention", "diffusers Attention", vae_attention, (SD1, BUNDLED)),
    Part("VAE: levels", "diffusers", vae_levels, (SD1, BUNDLED)),
    Part("VAE: encoder", "diffusers AutoencoderKL", encoder, (SD1, ODD, BUNDLED)),
    Part("VAE: decoder", "diffusers AutoencoderKL", decoder, (SD1, ODD, BUNDLED)),
    Part("text encoder: block", "transformers CLIPEncoderLayer", text_block, (SD1, SD2)),
    Part("text encoder", "transformers CLIPTextModel", text_encoder, ONE_ENCODER),
    Part("text encoder: block", "open_clip ResidualAttentionBlock", open_clip_block, (SD2,)),
    Part("text encoder, penultimate layer", "open_clip", open_clip_penultimate, (SD2,)),
    Part("text encoders of SDXL, pooled vector", "transformers CLIPTextModelWithProjection", penultimate, (SDXL,)),
    Part("text encoder of SDXL, pooled vector", "open_clip", open_clip_pooled, (SDXL,)),
    Part("prompt to picture", "diffusers StableDiffusionXLPipeline", sdxl_pipeline, (SDXL,), (torch.float32,)),
    Part("prompt to picture", "diffusers StableDiffusionPipeline", pipeline, (SD1, SD2), (torch.float32,)),
)


def largest_errors(compare: Callable[[Shape, torch.dtype], Outputs], shape: Shape, dtype: torch.dtype) -> float:
    """The largest error of all outputs of a comparison. Raises NotEqual where one is too far off."""
    errors = [largest_error(ours, theirs) for ours, theirs in compare(shape, dtype)]
    assert errors
    return max(errors)
