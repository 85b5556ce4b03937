"""The text side of Stable Diffusion XL, and small whole models of its kind."""

from dataclasses import replace

import pytest
import torch

from minidiff.config import SDXL, SDXL_TURBO, TextEncoderConfig
from minidiff.schedule import NoiseSchedule
from minidiff.two_encoders import SizeNumbers, TwoEncoders, text_configs
from tests.small_models import small_config, small_model, xl_config

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def sd():
    return small_model(xl_config())


def test_the_numbers_are_those_of_the_paper():
    # Podell et al. 2023, table 1: transformer blocks, channel multipliers, context of 2048, pooled vector of bigG
    assert SDXL.unet.attention == (0, 2, 10) and SDXL.unet.widths == (320, 640, 1280) and SDXL.unet.pooled_width == 1280
    first, second = SDXL.text_encoder, SDXL.text_encoder_2
    assert first.width + second.width == SDXL.unet.context_width == 2048
    assert (second.layers, second.heads, second.projection) == (32, 20, 1280) and first.projection is None
    assert (SDXL.vae.scaling_factor, SDXL.image_size) == (0.13025, 1024)
    assert [heads * 64 for heads in SDXL.unet.heads] == list(SDXL.unet.widths)


def test_turbo_visits_the_last_timesteps_without_guidance():
    assert SDXL_TURBO.guidance_scale == 1 and SDXL_TURBO.unet == SDXL.unet
    schedule = NoiseSchedule(SDXL_TURBO.schedule)
    assert [schedule.timesteps(steps).tolist() for steps in (1, 2, 4)] == [[999], [999, 499], [999, 749, 499, 249]]


def test_only_a_penultimate_encoder_has_a_projection():
    with pytest.raises(ValueError, match="projection 20; only a penultimate encoder has a pooled vector"):
        TextEncoderConfig(projection=20)


def test_heights_come_before_widths_and_top_before_left():
    sizes = SizeNumbers(original=(1, 2), crop=(3, 4), target=(5, 6))
    assert sizes.row((7, 8)) == [2, 1, 4, 3, 6, 5]
    assert SizeNumbers().row((7, 8)) == [8, 7, 0, 0, 8, 7]


def test_contexts_lie_side_by_side_and_sizes_are_float32(sd):
    first, second = (sd.text.encoders[name](sd.text.tokens(name, [PROMPT])) for name in ("text_encoder", "text_encoder_2"))
    encoded = sd.text([PROMPT], (2049, 257))
    assert torch.equal(encoded.context, torch.cat([first, second], dim=-1))
    assert encoded.size.dtype == torch.float32 and encoded.size.tolist() == [[257, 2049, 0, 0, 257, 2049]]
    assert encoded.pooled.shape == (1, 20)
    assert [numbers.padding for numbers, _ in text_configs(sd.config).values()] == ["end", "zero"]


def test_in_half_precision_the_sizes_stay_float32():
    sd = small_model(xl_config())
    for part in sd.parts.values():
        part.bfloat16()
    encoded = sd.text([PROMPT], (2049, 257))
    assert encoded.context.dtype == torch.bfloat16 and encoded.size[0, :2].tolist() == [257, 2049]
    x = torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16)
    assert sd.unet(x, torch.tensor([5]), encoded).dtype == torch.bfloat16


def test_a_size_is_needed(sd):
    with pytest.raises(ValueError, match="told the size of the picture; give size="):
        sd.text([PROMPT])


def test_a_negative_prompt_left_out_is_zeros_and_an_empty_one_is_encoded(sd):
    cond, left_out = sd.text.guided([PROMPT, "a cat"], None, (64, 32))
    assert not left_out.context.any() and not left_out.pooled.any() and left_out.size[1].tolist() == [32, 64, 0, 0, 32, 64]
    _, empty = sd.text.guided([PROMPT, "a cat"], "", (64, 32))
    expected = sd.text([""], (64, 32))
    torch.testing.assert_close(empty.context[:1], expected.context)  # float32, another batch
    torch.testing.assert_close(empty.pooled[1:], expected.pooled)
    assert len(cond) == len(left_out) == len(empty) == 2


def test_a_model_may_take_a_negative_prompt_left_out_for_the_empty_one():
    sd = small_model(replace(xl_config(), zero_negative=False))
    sides = [sd.text.guided([PROMPT], negative, (64, 32))[1].tensors() for negative in (None, "")]
    assert all(map(torch.equal, *sides)) and sides[0][0].any()


def test_one_encoder_takes_a_negative_prompt_left_out_for_an_empty_one():
    sd = small_model()
    for negative in (None, ""):
        _, away = sd.text.guided([PROMPT], negative, (32, 32))
        torch.testing.assert_close(away.context, sd.text([""]).context)


def test_a_second_prompt_goes_to_the_second_encoder_alone(sd):
    plain, other = sd.text([PROMPT], (32, 32)), replace(sd.text, prompt_2="a cat")([PROMPT], (32, 32))
    cat = sd.text(["a cat"], (32, 32))
    assert torch.equal(other.context[..., :16], plain.context[..., :16]) and torch.equal(other.context[..., 16:], cat.context[..., 16:])
    assert torch.equal(other.pooled, cat.pooled)
    empty = replace(sd.text, prompt_2="")([PROMPT], (32, 32))
    assert torch.equal(empty.pooled, sd.text([""], (32, 32)).pooled)
    assert isinstance(sd.text, TwoEncoders) and sd.text.prompt_2 is None, "the model's own text side has changed"


def test_pictures_depend_on_every_thing_that_is_told(sd):
    def latent(**given):
        text = replace(sd.text, prompt_2=given.pop("prompt_2", None), sizes=given.pop("sizes", SizeNumbers()))
        *_, step = sd.denoise(PROMPT, steps=2, size=32, text=text, **given)
        return step.x_t

    plain = latent()
    for given in (
        {"negative_prompt": ""},
        {"prompt_2": "a cat"},
        {"sizes": SizeNumbers(original=(512, 512))},
        {"sizes": SizeNumbers(crop=(0, 256))},
        {"sizes": SizeNumbers(target=(512, 512))},
    ):
        assert (latent(**given) - plain).abs().max() > 1e-4, given
    assert torch.equal(latent(), plain)


def test_prompts_are_encoded_for_looking_at_too(sd):
    assert sd.encode_prompts([PROMPT, ""]).shape == (2, 32, 40)


def test_a_long_prompt_is_cut_in_both_and_pooled_at_its_end(sd):
    with pytest.warns(UserWarning, match="cut off"):
        encoded = sd.text(["apple " * 60], (32, 32))
    second = sd.text.encoders["text_encoder_2"]
    assert torch.equal(encoded.pooled, second.pool(encoded.context[..., 16:], torch.tensor([31])))


def test_a_small_config_has_one_encoder():
    assert list(text_configs(small_config())) == ["text_encoder"]
    assert list(text_configs(replace(small_config(), text_encoder_2=xl_config().text_encoder_2))) == ["text_encoder", "text_encoder_2"]
