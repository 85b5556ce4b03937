"""The mistakes that Stable Diffusion XL invites, each made on purpose: the comparison with diffusers must notice."""

from dataclasses import replace

import pytest
import torch

from minidiff.conditioning import Conditioning
from minidiff.pipeline import StableDiffusion
from minidiff.text_encoder import TextEncoder
from minidiff.tokenizer import Tokenizer
from minidiff.two_encoders import SizeNumbers, TwoEncoders
from tests.parity import models, parts
from tests.parity.check import NotEqual
from tests.parity.models import SDXL
from tests.parity.parts import largest_errors
from tests.parity.test_traps import holds


@pytest.fixture
def trap(monkeypatch):
    """trap(mistake, comparison): the comparison holds, and no longer does once mistake(monkeypatch) is made."""

    def check(mistake, compare):
        holds(compare, SDXL, torch.float32)
        mistake(monkeypatch)
        with pytest.raises(NotEqual):
            largest_errors(compare, SDXL, torch.float32)

    return check


@pytest.mark.parametrize("compare", [parts.penultimate, parts.open_clip_pooled])
def test_the_final_layer_norm_on_the_context_is_noticed(compare, trap):
    right = TextEncoder.forward
    trap(lambda patch: patch.setattr(TextEncoder, "forward", lambda self, tokens: self.norm_out(right(self, tokens))), compare)


@pytest.mark.parametrize("compare", [parts.penultimate, parts.open_clip_pooled])
def test_a_pooled_vector_of_the_penultimate_layer_is_noticed(compare, trap):
    def skipping(self, context, ends):
        return self.projection(self.norm_out(context)[torch.arange(len(context)), ends])

    trap(lambda patch: patch.setattr(TextEncoder, "pool", skipping), compare)


def test_an_untransposed_projection_is_noticed(trap):
    def mistake(patch):
        right = models.with_weights_of

        def square(ours, names, tensors):
            model = right(ours, names, tensors)
            if isinstance(model, TextEncoder) and model.projection is not None:
                weight = model.projection.weight
                model.projection.weight = torch.nn.Parameter(weight.mT.reshape(weight.shape), requires_grad=False)
            return model

        patch.setattr(models, "with_weights_of", square)

    trap(mistake, parts.open_clip_pooled)


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_the_other_encoders_padding_is_noticed(name, trap):
    def mistake(patch):
        right = TwoEncoders.__init__
        other = {"end": "zero", "zero": "end"}

        def init(self, tokenizers, encoders, **others):
            config = tokenizers[name].config
            right(self, tokenizers | {name: Tokenizer(replace(config, padding=other[config.padding]))}, encoders, **others)

        patch.setattr(TwoEncoders, "__init__", init)

    trap(mistake, parts.sdxl_pipeline)


def test_widths_before_heights_among_the_size_numbers_are_noticed(trap):
    def swapped(self, size):
        return [number for pair in (self.original or size, self.crop, self.target or size) for number in pair]

    trap(lambda patch: patch.setattr(SizeNumbers, "row", swapped), parts.sdxl_pipeline)


def test_size_numbers_in_half_precision_are_noticed(trap):
    right = StableDiffusion.predict

    def rounded(self, x_t, t, told):
        return right(self, x_t, t, Conditioning(told.context, told.pooled, told.size.to(torch.bfloat16).float()))

    trap(lambda patch: patch.setattr(StableDiffusion, "predict", rounded), parts.sdxl_pipeline)


def test_an_empty_prompt_in_place_of_zeros_is_noticed(trap):
    right = TwoEncoders.guided
    trap(
        lambda patch: patch.setattr(
            TwoEncoders, "guided", lambda self, prompts, negative, size: right(self, prompts, negative or "", size)
        ),
        parts.sdxl_pipeline,
    )


def test_zeros_in_place_of_an_empty_prompt_are_noticed(trap):
    right = TwoEncoders.guided
    trap(
        lambda patch: patch.setattr(
            TwoEncoders, "guided", lambda self, prompts, negative, size: right(self, prompts, negative or None, size)
        ),
        parts.sdxl_pipeline,
    )


def test_stable_diffusion_1s_factor_is_noticed(trap):
    right = StableDiffusion.decode
    trap(
        lambda patch: patch.setattr(StableDiffusion, "decode", lambda self, x: right(self, x * self.config.vae.scaling_factor / 0.18215)),
        parts.sdxl_pipeline,
    )
