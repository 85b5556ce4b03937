"""ControlNet against diffusers' ControlNetModel and pipelines: residuals, whole trajectories, and the mistakes that others have made."""

from dataclasses import replace
from functools import cache, partial
from math import log2

import diffusers
import pytest
import torch

import minidiff.controlnet
from minidiff.conditioning import Conditioning
from minidiff.config import ModelConfig
from minidiff.controlnet import HINT_WIDTHS, Control, ControlNet, ControlNetConfig, controlled
from minidiff.editing.image_to_image import image_to_image
from minidiff.editing.inpaint import inpaint
from minidiff.editing.start import Sampling, Start, encode, first_noise
from minidiff.guidance import guided
from minidiff.pipeline import noise_source
from minidiff.samplers import levels, sample
from tests.editing.small import last, left_half, picture
from tests.parity.check import NotEqual, largest_error
from tests.parity.models import (
    BUNDLED,
    INPAINTING,
    ODD,
    SD1,
    SD2,
    SDXL,
    Shape,
    added_embedding,
    pipelines,
    randomise,
    unets,
    with_weights_of,
)
from tests.parity.parts import NEGATIVE, PROMPTS, SIZES, context, noise
from weights_loader.controlnet import NAMES

FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@cache
def controlnets(shape: Shape, dtype: torch.dtype, seed: int = 0, pooled: bool = False) -> tuple[ControlNet, diffusers.ControlNetModel]:
    """Both with random weights everywhere, also in the zero convolutions, where a mistake would hide."""
    unet, widths = replace(shape.unet, in_channels=4), HINT_WIDTHS[: int(log2(shape.vae.factor)) + 1]
    theirs = diffusers.ControlNetModel(
        block_out_channels=unet.widths,
        layers_per_block=unet.blocks_per_level,
        down_block_types=tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in unet.attention),
        attention_head_dim=unet.heads,
        cross_attention_dim=unet.context_width,
        use_linear_projection=unet.linear_projection,
        norm_num_groups=unet.groups,
        conditioning_embedding_out_channels=widths,
        global_pool_conditions=pooled,
        **({} if unet.pooled_width is None else added_embedding(unet)),
    )
    theirs = randomise(theirs.to(dtype))
    if seed:
        with torch.no_grad():
            for p in theirs.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * p.abs())
    with torch.device("meta"):
        ours = ControlNet(ControlNetConfig(unet, widths, pooled=pooled))
    return with_weights_of(ours, NAMES["diffusers"], theirs.state_dict()), theirs


def hints(shape: Shape, dtype: torch.dtype, rows: int = 2, seed: int = 5) -> torch.Tensor:
    size = (side * shape.vae.factor for side in shape.latent)
    return noise(rows, 3, *size, dtype=torch.float32, seed=seed).sigmoid().to(dtype)  # diffusers' pipeline rounds hints to float32


# --- one call ---------------------------------------------------------------------------------------------------------


def residuals(shape: Shape, dtype: torch.dtype, guess_mode=False, scale=1.0):
    ours, theirs = controlnets(shape, dtype)
    x, t, told, hint = noise(2, 4, *shape.latent, dtype=dtype), torch.tensor([1, 999]), context(shape.unet, dtype), hints(shape, dtype)
    conditioning, added = Conditioning(told), {}
    if width := shape.unet.pooled_width:
        conditioning = Conditioning(told, noise(2, width, dtype=dtype, seed=5), SIZES)
        added = {"added_cond_kwargs": {"text_embeds": conditioning.pooled, "time_ids": SIZES}}
    skips, middle = theirs(x, t, told, hint, conditioning_scale=scale, guess_mode=guess_mode, return_dict=False, **added)
    found = []
    with torch.no_grad():
        control = Control(ours, hint, scale)
        controlled(lambda x_t, t, told: found.extend(told.residuals) or x_t, [control], guess_mode=guess_mode)(x, t, conditioning)
    yield from zip(found, [*skips, middle], strict=True)


@FLOATS
@pytest.mark.parametrize("shape", [SD1, SD2, ODD, BUNDLED, SDXL], ids=str)
@pytest.mark.parametrize("guess_mode", [False, True])
def test_the_residuals_are_those_of_diffusers(shape, dtype, guess_mode, record_property):
    error = max(largest_error(a, b) for a, b in residuals(shape, dtype, guess_mode, 1.0 if guess_mode else 0.7))
    record_property("parity", ("ControlNet", "diffusers ControlNetModel", str(dtype)[6:], error))


@FLOATS
@pytest.mark.parametrize("shape", [SD1, BUNDLED], ids=str)
def test_the_hint_block_is_diffusers(shape, dtype, record_property):
    ours, theirs = controlnets(shape, dtype)
    hint = hints(shape, dtype)
    error = largest_error(ours.hint_block(hint), theirs.controlnet_cond_embedding(hint))
    record_property("parity", ("ControlNet: hint block", "diffusers ControlNetConditioningEmbedding", str(dtype)[6:], error))


def test_residuals_averaged_over_space_are_diffusers_global_pool_conditions():
    ours, theirs = controlnets(SD1, torch.float64, pooled=True)
    x, t, told, hint = (
        noise(2, 4, 16, 16, dtype=torch.float64),
        torch.tensor([1, 999]),
        context(SD1.unet, torch.float64),
        hints(SD1, torch.float64),
    )
    *skips, middle = (r for part in theirs(x, t, told, hint, return_dict=False) for r in (part if isinstance(part, list) else [part]))
    found = []
    with torch.no_grad():
        controlled(lambda x_t, t, told: found.extend(told.residuals) or x_t, [Control(ours, hint)])(x, t, Conditioning(told))
    for a, b in zip(found, [*skips, middle], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@FLOATS
def test_an_inpainting_unet_is_steered_by_a_controlnet_that_sees_four_channels(dtype):
    (unet, their_unet), (ours, theirs) = unets(INPAINTING, dtype), controlnets(INPAINTING, dtype)
    x, t, told, hint = noise(2, 9, 16, 16, dtype=dtype), torch.tensor([1, 999]), context(SD1.unet, dtype), hints(SD1, dtype)
    skips, middle = theirs(x[:, :4], t, told, hint, return_dict=False)
    expected = their_unet(x, t, told, down_block_additional_residuals=skips, mid_block_additional_residual=middle).sample
    largest_error(controlled(unet, [Control(ours, hint)])(x, t, Conditioning(told)), expected)


# --- a whole picture --------------------------------------------------------------------------------------------------


def their_trajectory(shape, dtype, controls, x, steps, **settings) -> torch.Tensor:
    _, text_to_image = pipelines(shape, dtype)
    nets, pictures, scales, starts, ends = zip(*controls)
    one = len(controls) == 1
    kind = diffusers.StableDiffusionXLControlNetPipeline if shape.text_2 else diffusers.StableDiffusionControlNetPipeline
    pipeline = kind(
        **text_to_image.components,
        controlnet=nets[0] if one else diffusers.MultiControlNetModel(list(nets)),
        **({"add_watermarker": False} if shape.text_2 else {"requires_safety_checker": False}),
    )
    pipeline.set_progress_bar_config(disable=True)
    if dtype == torch.float64:  # as installed its table is float32, which hides errors of 1e-6
        pipeline.scheduler.alphas_cumprod = pipelines(shape, dtype)[0].schedule.alpha_bar
        pipeline.scheduler.final_alpha_cumprod = pipeline.scheduler.alphas_cumprod[0]
    latents = []
    pipeline(
        PROMPTS,
        image=pictures[0] if one else list(pictures),
        negative_prompt=[NEGATIVE] * len(PROMPTS),
        num_inference_steps=steps,
        latents=x,
        controlnet_conditioning_scale=scales[0] if one else list(scales),
        control_guidance_start=starts[0] if one else list(starts),
        control_guidance_end=ends[0] if one else list(ends),
        output_type="latent",
        callback_on_step_end=lambda pipe, i, t, given: latents.append(given["latents"].clone()) or given,
        **settings,
    )
    return torch.stack(latents)


def our_steps(shape, dtype, controls, x, theirs, guidance_scale, guess_mode=False) -> torch.Tensor:
    """As StableDiffusion.denoise does it, but with latents in float64; each step begins at their latent, so that no error grows."""
    steps = len(theirs)
    ours, _ = pipelines(shape, dtype)
    visited = [level.t for level in levels(ours.schedule, "ddim", steps, "leading")[:-1]]
    model = controlled(ours.predict, [Control(*control) for control in controls], visited, guess_mode)
    with torch.no_grad():
        height, width = (side * shape.vae.factor for side in shape.latent)
        cond, uncond = ours.text.guided(PROMPTS, NEGATIVE, (width, height))
        walk = sample(guided(model, cond, uncond, guidance_scale, shared_prefix=True), x, ours.schedule, steps=steps)
        return torch.stack([next(walk).x_t, *(walk.send(x_t).x_t for x_t in theirs[:-1])])


def trajectories(shape=SD1, dtype=torch.float64, chosen=((0, 1.0, 0.0, 1.0),), steps=4, guidance_scale=3.0, guess_mode=False):
    """chosen: (seed of the ControlNet and its hint, scale, start, end) for each."""
    nets = [controlnets(shape, dtype, seed) for seed, *_ in chosen]
    pictures = [hints(shape, dtype, seed=5 + seed) for seed, *_ in chosen]
    x = noise_source([0, 1], (4, *shape.latent), torch.device("cpu"))().to(dtype)

    def given(side):
        return [(pair[side], hint, *rest) for pair, hint, (_, *rest) in zip(nets, pictures, chosen)]

    theirs = their_trajectory(shape, dtype, given(1), x, steps, guidance_scale=guidance_scale, guess_mode=guess_mode)
    return our_steps(shape, dtype, given(0), x, theirs, guidance_scale, guess_mode), theirs


CASES = {
    "one": dict(),
    "SD 2": dict(shape=SD2),
    "SDXL": dict(shape=SDXL),
    "SDXL in guess mode": dict(shape=SDXL, guess_mode=True),
    "odd size": dict(shape=ODD),
    "guess mode": dict(guess_mode=True),
    "guess mode without guidance": dict(guess_mode=True, guidance_scale=1.0),
    "without guidance": dict(guidance_scale=1.0),
    "two": dict(chosen=((0, 0.5, 0.0, 1.0), (1, 0.75, 0.0, 1.0))),
    "two in turn": dict(chosen=((0, 1.0, 0.0, 0.5), (1, 0.5, 0.25, 1.0)), steps=8),
    "start and end": dict(chosen=((0, 1.0, 0.1, 0.8),), steps=10),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with NumPy 2
@pytest.mark.parametrize("case", CASES)
def test_every_latent_on_the_way_is_diffusers(case, record_property):
    ours, theirs = trajectories(**CASES[case])
    # The U-Net's answers agree to 1e-12 at most, and guidance and the step make less than ten times as much of it.
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    record_property(
        "parity", (f"ControlNet: {case}, trajectory", "diffusers ControlNet pipeline", "float64", (ours - theirs).abs().max().item())
    )


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_in_float32_too():
    ours, theirs = trajectories(dtype=torch.float32, steps=2)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # 1e-5 a call, of which guidance makes 5 times as much,


@pytest.mark.parametrize(
    "n, start, end, first, last", [(20, 0.1, 0.8, 2, 15), (20, 0.0, 0.33, 0, 5), (7, 0.3, 1.0, 3, 6), (10, 0.1, 0.3, 1, 2)]
)
def test_the_steps_of_an_interval_are_diffusers(n, start, end, first, last):
    keep = [i for i in range(n) if not (i / n < start or (i + 1) / n > end)]  # pipeline_controlnet.py, controlnet_keep
    assert (keep[0], keep[-1]) == (first, last)
    timesteps = list(range(999, 999 - n, -1))
    highest, lowest = Control(controlnets(SD1, torch.float32)[0], hints(SD1, torch.float32), 1.0, start, end).interval(timesteps)
    assert [i for i, t in enumerate(timesteps) if highest >= t >= lowest] == keep


EDITS = {
    "image to image": (SD1, diffusers.StableDiffusionControlNetImg2ImgPipeline),
    "SDXL image to image": (SDXL, diffusers.StableDiffusionXLControlNetImg2ImgPipeline),
    "4 channels inpainting": (SD1, diffusers.StableDiffusionControlNetInpaintPipeline),
    "9 channels inpainting": (INPAINTING, diffusers.StableDiffusionControlNetInpaintPipeline),
}


@pytest.mark.filterwarnings("ignore")  # of diffusers, on models of this size
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("start, end", [(0.0, 1.0), (0.0, 0.5)])
def test_pictures_that_start_from_a_picture_are_steered_as_by_diffusers(edit, start, end, monkeypatch):
    """An interval is of the steps that are left; an inpainting hint has -1 in the hole."""
    (shape, kind), dtype = EDITS[edit], torch.float32
    (ours, text_to_image), (net, their_net) = pipelines(shape, dtype), controlnets(shape, dtype)
    pipeline = kind(**text_to_image.components, controlnet=their_net, **({} if shape.text_2 else {"requires_safety_checker": False}))
    pipeline.set_progress_bar_config(disable=True)
    side, is_inpainting = 8 * 16, "inpainting" in edit
    pixels, mask, hint = torch.cat([picture(i, side, side) for i in range(2)]), left_half(side, side), hints(shape, dtype)
    if is_inpainting:
        hint = torch.where(mask > 0, -1.0, hint)
    x_0 = encode(ours, pixels)
    eps = first_noise([0, 1], x_0)
    if is_inpainting:
        monkeypatch.setattr(f"{kind.__module__}.retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
    monkeypatch.setattr(f"{kind.__module__}.randn_tensor", lambda *_, **__: eps)
    given = dict(image=(pixels + 1) / 2, mask_image=mask, height=side, width=side) if is_inpainting else dict(image=x_0)
    settings = dict(strength=0.6, num_inference_steps=10, guidance_scale=3.0, output_type="latent")
    settings |= dict(control_guidance_start=start, control_guidance_end=end, controlnet_conditioning_scale=0.8)
    expected = pipeline(PROMPTS, control_image=hint, negative_prompt=[NEGATIVE] * 2, **given, **settings).images

    sampling = Sampling(10, "ddim", 3.0, NEGATIVE, spacing="leading")
    visited = sampling.levels(ours.schedule)
    begin = Start(4, 10, visited[4])  # theirs counts steps: int(0.6 x 10) of them are taken
    for room in ("image_to_image", "inpaint"):
        monkeypatch.setattr(f"minidiff.editing.{room}.find_start", lambda *_: begin)
    steer = partial(controlled, controls=[Control(net, hint, 0.8, start, end)], timesteps=[level.t for level in visited[4:-1]])
    settings = dict(strength=0.6, seeds=[0, 1], sampling=sampling, steer=steer)
    walk = inpaint(ours, PROMPTS, pixels, mask, **settings) if is_inpainting else image_to_image(ours, PROMPTS, pixels, **settings)
    actual = last(walk)
    largest_error(actual / expected.std(), expected / expected.std())


# --- traps ------------------------------------------------------------------------------------------------------------


def notices(mistake, monkeypatch) -> None:
    """The residuals agree with diffusers, and no longer do once the mistake is made."""
    for a, b in residuals(SD1, torch.float32):
        largest_error(a, b)
    mistake(monkeypatch)
    with pytest.raises(NotEqual):
        for a, b in residuals(SD1, torch.float32):
            largest_error(a, b)


def test_a_hint_in_minus_1_to_1_is_noticed(monkeypatch):
    right = minidiff.controlnet.prepare_hint
    notices(lambda patch: patch.setattr(minidiff.controlnet, "prepare_hint", lambda hint, net: 2 * right(hint, net) - 1), monkeypatch)


def test_blue_before_red_is_noticed(monkeypatch):
    right = minidiff.controlnet.prepare_hint
    notices(lambda patch: patch.setattr(minidiff.controlnet, "prepare_hint", lambda hint, net: right(hint, net).flip(1)), monkeypatch)


def test_a_hint_added_to_the_latent_before_the_first_convolution_is_noticed(monkeypatch):
    right = ControlNet.encode
    wrong = lambda self, x_t, t, context, hint: right(self, x_t + hint[:, :4], t, context)
    notices(lambda patch: patch.setattr(ControlNet, "encode", wrong), monkeypatch)


def steered(unet, residuals, x, t, told):
    return unet(x, t, Conditioning(told, residuals=tuple(residuals)))


def test_residuals_in_another_order_or_on_the_other_side_are_noticed():
    (unet, their_unet), (ours, theirs) = unets(SD1, torch.float64), controlnets(SD1, torch.float64)
    double = torch.float64
    x, t, told, hint = noise(2, 4, 16, 16, dtype=double), torch.tensor([1, 999]), context(SD1.unet, double), hints(SD1, double)
    skips, middle = theirs(x, t, told, hint, return_dict=False)
    expected = their_unet(x, t, told, down_block_additional_residuals=skips, mid_block_additional_residual=middle).sample
    right = list(ours(x, t, told, ours.hint_block(hint)))
    largest_error(steered(unet, right, x, t, told), expected)

    # The first three skips have one shape, and so have the last ones: their order is not told by a shape.
    swapped = [right[1], right[0], *right[2:]]
    with pytest.raises(NotEqual):
        largest_error(steered(unet, swapped, x, t, told), expected)

    # Added where the encoder goes on, in place of the skip alone: the second level then sees them twice.
    with torch.no_grad():
        handles = [unet.conv_in.register_forward_hook(lambda module, args, output: output + right[0])]
        wrong = steered(unet, [torch.zeros_like(right[0]), *right[1:]], x, t, told)
    for handle in handles:
        handle.remove()
    with pytest.raises(NotEqual):
        largest_error(wrong, expected)


def test_models_of_other_sizes_have_their_own_hint_block():
    bundled = ModelConfig(unet=BUNDLED.unet, vae=BUNDLED.vae)
    assert minidiff.controlnet.controlnet_config(bundled).hint_widths == (16, 32, 96)
    assert minidiff.controlnet.controlnet_config(ModelConfig()).hint_widths == (16, 32, 96, 256)
