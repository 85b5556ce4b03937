"""The mistakes that re-implementations of Stable Diffusion have made, each made here on purpose: the parity check must notice.

A mistake is a patch of our code. Every test first lets the check pass on the unpatched code, so that it fails for the mistake alone.
"""

import re
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import minidiff.attention
import minidiff.blocks
import minidiff.guidance
import minidiff.text_encoder
import minidiff.unet
import minidiff.vae
from minidiff.pipeline import StableDiffusion
from minidiff.schedule import NoiseSchedule
from minidiff.text_encoder import TextEncoder
from minidiff.tokenizer import Tokenizer
from tests.parity import models, parts
from tests.parity.check import NotEqual
from tests.parity.models import BUNDLED, ODD, SD1, SD2
from tests.parity.parts import largest_errors

holds = cache(largest_errors)  # once for all mistakes


@pytest.fixture
def trap(monkeypatch):
    """trap(mistake, comparison, shape, dtype): the comparison holds, and no longer does once mistake(monkeypatch) is made."""

    def check(mistake, compare, shape, dtype=torch.float32):
        holds(compare, shape, dtype)
        mistake(monkeypatch)
        with pytest.raises(NotEqual):
            largest_errors(compare, shape, dtype)

    return check


def instead(**changes):
    """torch.nn.functional for one of our modules alone, with some of its functions replaced: the references use the real one."""
    return type("functional", (), {**{name: staticmethod(f) for name, f in vars(F).items() if callable(f)}, **changes})


# ------------------------------------------------------------------------------------------------------------ norms


@pytest.mark.parametrize("place, eps", [(minidiff.unet, 1e-6), (minidiff.vae, 1e-5)], ids=["U-Net", "VAE"])
def test_the_group_norm_eps_of_the_other_model_is_noticed_in_float32(place, eps, trap):
    compare = parts.res_block if place is minidiff.unet else parts.vae_res_block
    trap(lambda patch: patch.setattr(place, "EPS", eps), compare, SD1)


def with_eps(pattern, eps):
    """The mistake of another eps in the norms whose names match; there must be some."""

    def mistake(patch):
        make = models.with_weights_of

        def patched(*args):
            model = make(*args)
            norms = [m for name, m in model.named_modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm)) and re.search(pattern, name)]
            assert norms and all(m.eps != eps for m in norms)
            for norm in norms:
                norm.eps = eps
            return model

        patch.setattr(models, "with_weights_of", patched)

    return mistake


@pytest.mark.parametrize("shape", [SD1, SD2, BUNDLED], ids=str)
def test_the_eps_of_the_resblocks_at_the_transformers_norm_is_noticed_in_float32(shape, trap):
    trap(with_eps(r"transformers?(\.\d+)?\.norm$", 1e-5), parts.spatial_transformer, shape)


def test_pytorchs_own_eps_at_the_vaes_attention_is_noticed_in_float32(trap):
    trap(with_eps(r"attention\.norm$", 1e-5), parts.vae_attention, SD1)


@pytest.mark.parametrize(
    "pattern, eps, compare",
    [
        (r"(blocks\.\d|block_\d)\.norm_1$", 1e-6, parts.unet),
        (r"(blocks\.\d|block_\d)\.norm_2$", 1e-6, parts.unet),
        (r"transformers?(\.\d+)?\.norm$", 1e-5, parts.unet),
        (r"\.blocks\.0\.norm_1$", 1e-6, parts.unet),
        (r"\.blocks\.0\.norm_2$", 1e-6, parts.unet),
        (r"\.blocks\.0\.norm_3$", 1e-6, parts.unet),
        (r"^norm_out$", 1e-6, parts.unet),
        (r"encoder\..*(blocks\.\d|block_\d)\.norm_\d$", 1e-5, parts.encoder),
        (r"encoder\..*attention\.norm$", 1e-5, parts.encoder),
        (r"encoder\.norm_out$", 1e-5, parts.encoder),
        (r"decoder\..*(blocks\.\d|block_\d)\.norm_\d$", 1e-5, parts.decoder),
        (r"decoder\..*attention\.norm$", 1e-5, parts.decoder),
        (r"decoder\.norm_out$", 1e-5, parts.decoder),
        (r"norm_1$", 1e-6, parts.text_encoder),
        (r"norm_2$", 1e-6, parts.text_encoder),
        (r"norm_out$", 1e-6, parts.text_encoder),
    ],
)
def test_a_wrong_eps_at_one_kind_of_norm_is_noticed_in_the_whole_model_in_float64(pattern, eps, compare, trap):
    trap(with_eps(pattern, eps), compare, BUNDLED, torch.float64)


# ------------------------------------------------------------------------------------------------------------- U-Net


def test_sin_before_cos_is_noticed(trap):
    right = minidiff.blocks.timestep_embedding

    def mistake(patch):
        patch.setattr(minidiff.blocks, "timestep_embedding", lambda t, width: right(t, width).roll(width // 2, dims=-1))

    trap(mistake, parts.time_embedding, SD1)


def test_geglus_halves_swapped_are_noticed(trap):
    def swapped(self, x):
        gate, value = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))

    trap(lambda patch: patch.setattr(minidiff.blocks.FeedForward, "forward", swapped), parts.feed_forward, SD1)


def test_the_approximate_gelu_in_geglu_is_noticed(trap):
    def approximate(self, x):
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate, approximate="tanh"))

    trap(lambda patch: patch.setattr(minidiff.blocks.FeedForward, "forward", approximate), parts.feed_forward, SD1)


def test_the_number_of_heads_taken_for_their_width_is_noticed(trap):
    """diffusers' attention_head_dim of 8 means 8 heads in SD 1."""

    def mistake(patch):
        right = minidiff.attention.Attention.__init__

        def init(self, width, heads, *args, **kwargs):
            right(self, width, width // heads, *args, **kwargs)

        patch.setattr(minidiff.attention.Attention, "__init__", init)

    trap(mistake, parts.attention, SD1)


def test_an_odd_size_doubled_on_the_way_up_does_not_fit(monkeypatch):
    """Not a wrong number, but a crash: what the way up would do without looking at the skip's size."""
    twice = instead(interpolate=staticmethod(lambda x, size, mode: F.interpolate(x, scale_factor=2, mode=mode)))
    holds(parts.unet, ODD, torch.float32)
    monkeypatch.setattr(minidiff.unet, "F", twice)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        largest_errors(parts.unet, ODD, torch.float32)


# --------------------------------------------------------------------------------------------------------------- VAE


@pytest.mark.parametrize("compare", [parts.vae_levels, parts.encoder])
def test_padding_on_both_sides_in_the_vaes_downsampling_is_noticed(compare, trap):
    both = instead(pad=staticmethod(lambda x, pad: F.pad(x, (1, 1, 1, 1))))
    trap(lambda patch: patch.setattr(minidiff.vae, "F", both), compare, SD1)


def test_a_logvar_taken_for_a_standard_deviation_is_noticed(trap):
    def mistake(patch):
        right = minidiff.vae.DiagonalGaussian
        patch.setattr(minidiff.vae, "DiagonalGaussian", lambda mean, logvar: right(mean, logvar / 2))

    trap(mistake, parts.encoder, SD1)


# ------------------------------------------------------------------------------------------------------ text encoder


def test_gelu_for_quick_gelu_is_noticed(trap):
    trap(lambda patch: patch.setattr(minidiff.text_encoder, "quick_gelu", F.gelu), parts.text_encoder, SD1)


@pytest.mark.parametrize("compare", [parts.text_encoder, parts.open_clip_penultimate])
def test_quick_gelu_for_gelu_is_noticed(compare, trap):
    quick = instead(gelu=staticmethod(minidiff.text_encoder.quick_gelu))
    trap(lambda patch: patch.setattr(minidiff.text_encoder, "F", quick), compare, SD2)


@pytest.mark.parametrize("compare, shape", [(parts.text_encoder, SD1), (parts.open_clip_penultimate, SD2)])
def test_a_forgotten_causal_mask_is_noticed(compare, shape, trap):
    right = minidiff.attention.attention
    trap(
        lambda patch: patch.setattr(minidiff.attention, "attention", lambda q, k, v, heads, causal: right(q, k, v, heads)),
        compare,
        shape,
    )


def test_the_last_layer_for_the_penultimate_is_noticed(trap):
    def mistake(patch):
        right = TextEncoder.__init__
        patch.setattr(TextEncoder, "__init__", lambda self, config: right(self, replace(config, layers=config.layers + 1)))

    trap(mistake, parts.open_clip_penultimate, SD2)


@pytest.mark.parametrize("compare, shape", [(parts.text_encoder, SD1), (parts.open_clip_penultimate, SD2)])
def test_a_forgotten_final_layer_norm_is_noticed(compare, shape, trap):
    def mistake(patch):
        make = models.with_weights_of

        def without_norm(*args):
            model = make(*args)
            model.norm_out = nn.Identity()
            return model

        patch.setattr(models, "with_weights_of", without_norm)

    trap(mistake, compare, shape)


# --------------------------------------------------------------------------------------------------- the whole path


@pytest.mark.parametrize("shape", [SD1, SD2], ids=str)
def test_the_other_familys_padding_token_is_noticed(shape, trap):
    def mistake(patch):
        right = Tokenizer.__init__
        other = {"end": "zero", "zero": "end"}
        patch.setattr(Tokenizer, "__init__", lambda self, config: right(self, replace(config, padding=other[config.padding])))

    trap(mistake, parts.pipeline, shape)


def test_timesteps_that_do_not_count_from_one_are_noticed(trap):
    right = NoiseSchedule.timesteps
    trap(lambda patch: patch.setattr(NoiseSchedule, "timesteps", lambda *args: right(*args) - 1), parts.pipeline, SD1)


def test_guidance_on_three_of_four_channels_is_noticed(trap):
    right = minidiff.guidance.guide

    def three(uncond, cond, guidance_scale):
        return torch.cat([right(uncond, cond, guidance_scale)[:, :3], uncond[:, 3:]], dim=1)

    trap(lambda patch: patch.setattr(minidiff.guidance, "guide", three), parts.pipeline, SD1)


def test_a_negative_prompt_that_is_ignored_is_noticed(trap):
    right = StableDiffusion.denoise

    def ignoring(self, *args, negative_prompt, **kwargs):
        return right(self, *args, **kwargs)

    trap(lambda patch: patch.setattr(StableDiffusion, "denoise", ignoring), parts.pipeline, SD1)


def test_latents_decoded_without_dividing_by_the_scaling_factor_are_noticed(trap):
    right = StableDiffusion.decode
    trap(
        lambda patch: patch.setattr(StableDiffusion, "decode", lambda self, x: right(self, x * self.config.vae.scaling_factor)),
        parts.pipeline,
        SD1,
    )


def test_scaling_the_callers_latents_in_place_is_noticed(trap):
    def in_place(self, latents):
        latents /= self.config.vae.scaling_factor
        return self.vae.decode(latents).clamp(-1, 1)

    trap(lambda patch: patch.setattr(StableDiffusion, "decode", in_place), parts.pipeline, SD1)


def test_eps_taken_for_v_is_noticed(trap):
    def mistake(patch):
        right = NoiseSchedule.__init__
        patch.setattr(NoiseSchedule, "__init__", lambda self, config: right(self, replace(config, prediction="eps")))

    trap(mistake, parts.pipeline, SD2)
