"""The conditioning object, the text side, and what plugs in there: a source of conditioning, residuals, another model."""

from dataclasses import replace

import pytest
import torch

from minidiff.conditioning import Conditioning, TextSide, as_conditioning, concatenate
from minidiff.guidance import guide, guided
from minidiff.unet import UNet
from tests.small_models import small_config, small_model

CLOSE = dict(rtol=1e-10, atol=1e-10)  # float64, through a whole model


def full(rows=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    context, pooled, residual = (torch.randn(rows, *shape, generator=generator) for shape in ((5, 16), (8,), (16, 4, 4)))
    return Conditioning(context, pooled, torch.full((rows, 6), 512.0), (residual, 2 * residual))


@pytest.fixture(scope="module")
def sdxl():
    """A whole model whose U-Net is told a pooled vector and sizes."""
    config = small_config()
    config = replace(config, unet=replace(config.unet, pooled_width=16, attention=(0, 2, 1)))
    sd = small_model(config)
    sd.text = ToyTextSide(sd.text.tokenizers, sd.text.encoders)
    return sd


class ToyTextSide(TextSide):
    """The pooled vector is the mean of the context."""

    def __call__(self, prompts, size=None):
        context = super().__call__(prompts).context
        width, height = size
        return Conditioning(context, context.mean(dim=1), torch.tensor([[height, width, 0, 0, height, width]] * len(context)).float())


# --- the object -------------------------------------------------------------------------------------------------------


def test_its_tensors_go_out_and_in_again():
    told = full()
    again = told.with_tensors(told.tensors())
    assert all(a is b for a, b in zip(told.tensors(), again.tensors(), strict=True)) and len(told) == 2
    alone = Conditioning(told.context)
    assert len(alone.tensors()) == 1 and alone.pooled is None and alone.size is None and alone.residuals == ()


def test_size_numbers_stay_float32():
    half = full().to(torch.device("cpu"), torch.bfloat16)
    assert [x.dtype for x in half.tensors()] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16]


def test_a_row_is_repeated_and_rows_are_put_one_behind_the_other():
    one = full(rows=1)
    many = one.expand(3)
    assert len(many) == 3 and all(torch.equal(x, y.expand_as(x)) for x, y in zip(many.tensors(), one.tensors()))
    both = concatenate(many, full(rows=3, seed=1))
    assert (
        len(both) == 6
        and torch.equal(both.pooled[3:], full(rows=3, seed=1).pooled)
        and torch.equal(both.residuals[1][:3], many.residuals[1])
    )


@pytest.mark.parametrize(
    "other, message",
    [
        (full(rows=3), r"context has shape \(2, 5, 16\) and \(3, 5, 16\)"),
        (replace(full(), pooled=None), r"pooled has shape \(2, 8\) and None"),
        (replace(full(), residuals=()), r"residuals has shape .* and \(\)"),
    ],
)
def test_two_that_do_not_match_are_refused(other, message):
    with pytest.raises(ValueError, match=message):
        concatenate(full(), other)


def test_a_plain_tensor_is_a_context():
    context = full().context
    assert as_conditioning(context).context is context and as_conditioning(told := full()) is told


def test_the_text_side_gives_what_the_encoder_does_and_knows_its_parts():
    sd = small_model()
    told = sd.text(["a cat", "a dog"])
    assert torch.equal(told.context, sd.text_encoder(sd.tokenizer(["a cat", "a dog"])))
    assert torch.equal(told.context, sd.encode_prompts(["a cat", "a dog"])) and told.pooled is None
    assert (
        list(sd.parts) == ["text_encoder", "unet", "vae"]
        and sd.parts["text_encoder"] is sd.text.encoders["text_encoder"] is sd.text_encoder
    )


# --- in the U-Net -----------------------------------------------------------------------------------------------------


def unet_and_inputs(rows=4, **changes):
    config = replace(small_config().unet, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(config).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    x, context, pooled = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((2, 4, 9, 7), (rows, 5, 16), (rows, 8)))
    sizes = torch.tensor([[512.0, 512, 0, 0, 512, 512], [640, 512, 0, 64, 512, 512]]).repeat(rows // 2, 1)
    return unet, x, torch.tensor([3, 700]), Conditioning(context, pooled, sizes)


def test_no_parameter_is_added_where_the_config_asks_for_no_embedding():
    unet, x, t, told = unet_and_inputs()
    assert unet.added_embedding is None and torch.equal(unet(x, t, told), unet(x, t, told.context))


def test_pooled_vector_and_sizes_matter_and_are_asked_for():
    unet, x, t, told = unet_and_inputs(pooled_width=8)
    answer = unet(x, t, told)
    for other in (replace(told, pooled=told.pooled + 1), replace(told, size=told.size + 100)):
        assert (unet(x, t, other) - answer).abs().max() > 1e-4
    with pytest.raises(ValueError, match="told a pooled vector and the picture's sizes; give a Conditioning"):
        unet(x, t, told.context)


@pytest.mark.parametrize("pooled_width", [None, 8])
def test_several_conditionings_for_each_latent_are_as_many_calls(pooled_width):
    unet, x, t, told = unet_and_inputs(pooled_width=pooled_width)
    skips, middle, _ = unet.encode(x, t, told)
    told = replace(told, residuals=tuple(0.1 * tensor for tensor in (*skips, middle)))  # of 2 rows or 4, as they come
    together = unet(x, t, told)
    for half in (slice(2), slice(2, 4)):
        part = [tensor if len(tensor) == 2 else tensor[half] for tensor in told.tensors()]
        torch.testing.assert_close(unet(x, t, told.with_tensors(part)), together[half], **CLOSE)


def test_the_way_down_is_what_forward_begins_with():
    unet, x, t, told = unet_and_inputs()
    outputs = {}
    handles = [unet.conv_in.register_forward_hook(lambda module, args, output: outputs.update(first=output))]
    handles += [unet.middle.register_forward_hook(lambda module, args, output: outputs.update(middle=output))]
    unet(x, t, told)
    for handle in handles:
        handle.remove()
    skips, middle, _ = unet.encode(x, t, told)
    assert torch.equal(skips[0], outputs["first"]) and torch.equal(middle, outputs["middle"])
    assert len(skips) == sum(len(level.blocks) for level in unet.up)
    hint = torch.ones_like(skips[0])
    assert torch.equal(unet.encode(x, t, told, hint)[0][0], skips[0] + 1)


def test_residuals_of_another_number_are_refused():
    unet, x, t, told = unet_and_inputs()
    with pytest.raises(ValueError, match="1 residuals for 6 skips and the middle; give one for each"):
        unet(x, t, replace(told, residuals=(x,)))


# --- through guidance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooled_width", [None, 8])
def test_guidance_of_conditionings_is_two_calls(pooled_width):
    unet, x, t, told = unet_and_inputs(pooled_width=pooled_width)
    uncond, cond = (told.with_tensors([tensor[half] for tensor in told.tensors()]) for half in (slice(2), slice(2, 4)))
    expected = guide(unet(x, t, uncond), unet(x, t, cond), 3.0)
    for shared_prefix in (False, True):
        torch.testing.assert_close(guided(unet, cond, uncond, 3.0, shared_prefix)(x, t), expected, rtol=1e-9, atol=1e-9)


# --- in a picture -----------------------------------------------------------------------------------------------------


def test_another_text_side_is_a_source_of_conditioning(sdxl):
    """A toy of SDXL: nothing but the text side and the numbers of the U-Net differ."""
    *_, last = sdxl.denoise("a cat", steps=2, negative_prompt="a dog", size=(40, 32))
    assert last.x_t.isfinite().all()
    other = next(sdxl.denoise("a cat", steps=2, size=(40, 32), seeds=[0])).x_t
    wide = sdxl.text(["a cat"], (40, 32))
    assert wide.size.tolist() == [[32, 40, 0, 0, 32, 40]]
    sdxl.unet.added_embedding.linear_2.weight.data.mul_(2)
    assert not torch.equal(next(sdxl.denoise("a cat", steps=2, size=(40, 32), seeds=[0])).x_t, other)


def test_a_toy_controlnet_is_a_model_around_predict():
    """Its residuals are those of another U-Net's way down, computed for each x_t."""
    sd, copied = small_model(), small_model(seed=1).unet
    seen = []

    def controlled(scale):
        def model(x_t, t, told):
            skips, middle, _ = copied.encode(x_t, t, told, hint=torch.ones(1, 16, 8, 8))
            seen.append((len(x_t), len(told)))
            return sd.predict(x_t, t, replace(told, residuals=tuple(scale * r for r in (*skips, middle))))

        return model

    plain = [step.x_t for step in sd.denoise("a cat", steps=3)]
    assert all(torch.equal(step.x_t, x_t) for step, x_t in zip(sd.denoise("a cat", steps=3, model=controlled(0.0)), plain, strict=True))
    *_, last = sd.denoise("a cat", steps=3, model=controlled(0.3))
    assert not torch.allclose(last.x_t, plain[-1]) and not last.x_t.requires_grad
    assert set(seen) == {(1, 2)}  # guidance asks about one latent and two texts


def test_an_inpainting_models_channels_are_added_by_a_model_around_predict():
    sd = small_model(small_config(in_channels=9))
    mask_and_picture = torch.randn(1, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    shown = []

    def model(x_t, t, told):
        shown.append(x_t.shape)
        return sd.predict(torch.cat([x_t, mask_and_picture.expand(len(x_t), -1, -1, -1)], dim=1), t, told)

    *_, last = sd.denoise(["a cat", "a dog"], seeds=[0, 1], steps=2, model=model)
    assert last.x_t.shape == (2, 4, 8, 8) and shown == [(2, 4, 8, 8)] * 2
