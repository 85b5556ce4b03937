"""The parts together: seeds, batches, step counts, sizes, long prompts, overflow, and what is refused before the first step."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch

from minidiff.guidance import guide
from minidiff.pipeline import noise_source, to_images
from minidiff.samplers import SAMPLERS, levels
from tests.small_models import small_config, small_model

PROMPT = "a red apple on a blue background"


@pytest.fixture(scope="module")
def sd():
    return small_model()


@pytest.fixture(scope="module")
def eps_sd():
    return small_model(small_config("eps"))


def bytes_of(image):
    return np.asarray(image).astype(int)


class Calls:
    """Counts the calls of a module and the rows each was given, while open."""

    def __init__(self, module):
        self.rows = []
        self.handle = module.register_forward_pre_hook(lambda module, args: self.rows.append(len(args[0])))

    def __enter__(self):
        return self.rows

    def __exit__(self, *error):
        self.handle.remove()


# --- seeds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler, eta", [*((name, 0.0) for name in SAMPLERS), *((name, 1.0) for name, row in SAMPLERS.items() if row.takes_eta)]
)
def test_a_seed_gives_one_picture_alone_and_in_any_batch(sd, sampler, eta):
    prompts, seeds = [PROMPT, "a cat", "a dog and a pear", PROMPT], [11, 3, 11, 4]
    *_, last = sd.denoise(prompts, seeds=seeds, steps=4, sampler=sampler, eta=eta)
    batch = [bytes_of(image) for image in to_images(sd.decode(last.x_t))]
    for prompt, seed, expected in zip(prompts, seeds, batch):
        (alone,) = sd.generate(prompt, seed=seed, steps=4, sampler=sampler, eta=eta)
        assert np.abs(bytes_of(alone) - expected).max() <= 1  # 1/255: fp32, summed in another order
    for i, j in ((0, 1), (0, 2), (0, 3)):  # another prompt and seed, another prompt, another seed
        assert np.abs(batch[i] - batch[j]).max() > 25


def test_generate_pairs_each_prompt_with_the_seeds_that_follow(sd):
    images = sd.generate([PROMPT, "a cat"], seed=5, batch=2, steps=2)
    *_, last = sd.denoise([PROMPT, PROMPT, "a cat", "a cat"], seeds=[5, 6, 5, 6], steps=2)
    expected = to_images(sd.decode(last.x_t))
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    assert {(image.mode, image.size) for image in images} == {("RGB", (32, 32))}


def test_one_prompt_serves_all_seeds_and_one_seed_all_prompts(sd):
    for few, many in (
        ({"prompts": PROMPT, "seeds": [1, 2]}, {"prompts": [PROMPT, PROMPT], "seeds": [1, 2]}),
        ({"prompts": [PROMPT, "a cat"], "seeds": [1]}, {"prompts": [PROMPT, "a cat"], "seeds": [1, 1]}),
    ):
        for one, other in zip(sd.denoise(steps=2, **few), sd.denoise(steps=2, **many), strict=True):
            assert torch.equal(one.x_t, other.x_t)


def test_the_starting_noise_is_torch_randn_of_the_seed_on_the_cpu(sd):
    """At scale 1 and zero terminal SNR the first model call sees the noise as it was drawn."""
    seen = []
    handle = sd.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    try:
        next(sd.denoise([PROMPT, "a cat"], seeds=[42, 2**64 - 1], guidance_scale=1, size=(40, 32)))
    finally:
        handle.remove()
    for row, seed in zip(seen[0], [42, 2**64 - 1], strict=True):
        assert torch.equal(row, torch.randn(4, 8, 10, generator=torch.Generator().manual_seed(seed)))


def test_each_seed_draws_on_from_its_own_generator():
    draw = noise_source([1, 2], (4, 2, 2), torch.device("cpu"))
    first, second = draw(), draw()
    generator = torch.Generator().manual_seed(2)
    for drawn in (first, second):
        assert torch.equal(drawn[1], torch.randn(4, 2, 2, generator=generator))
    assert not torch.equal(first, second)


def test_the_global_generator_is_neither_used_nor_moved(sd):
    before = torch.get_rng_state()
    first = sd.generate(PROMPT, steps=2, sampler="ddpm")[0].tobytes()
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert sd.generate(PROMPT, steps=2, sampler="ddpm")[0].tobytes() == first


# --- steps, guidance --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 5])
def test_n_steps_are_n_steps_and_the_samplers_number_of_calls(eps_sd, sampler, steps):
    with Calls(eps_sd.unet.conv_out) as rows:
        walk = list(eps_sd.denoise([PROMPT, "a cat"], steps=steps, sampler=sampler))
    assert [step.i for step in walk] == list(range(steps))
    assert rows == [4] * SAMPLERS[sampler].model_calls(steps)  # both halves of guidance in one call
    assert all(step.x_t.shape == step.x0_hat.shape == (2, 4, 8, 8) and step.x_t.dtype == torch.float32 for step in walk)
    assert all(step.attention_maps is None for step in walk)
    assert all(step.t > later.t for step, later in zip(walk, walk[1:]))


def test_guidance_scale_1_runs_no_unconditional_half(sd):
    with Calls(sd.unet) as unet_rows, Calls(sd.text_encoder) as text_rows:
        list(sd.denoise([PROMPT, "a cat"], steps=2, guidance_scale=1))
    assert unet_rows == [2, 2] and text_rows == [2]


def test_the_first_step_is_the_guided_prediction_worked_out_by_hand(sd):
    """ddim from zero terminal SNR: x_t is noise alone, so that x0_hat is minus the guided v."""
    negative, scale = "a blue car", 3.0
    step = next(sd.denoise(PROMPT, seeds=[8], guidance_scale=scale, negative_prompt=negative, steps=4))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    t = torch.tensor([999])
    with torch.no_grad():
        uncond, cond = (sd.unet(x, t, sd.text_encoder(sd.tokenizer([text]))) for text in (negative, PROMPT))
    torch.testing.assert_close(step.x0_hat, -guide(uncond, cond, scale), rtol=1e-4, atol=1e-5)  # fp32, alone and as a batch of two
    assert step.t == 999


def test_a_negative_prompt_changes_the_picture_and_the_empty_one_is_the_default(sd):
    plain, empty = sd.generate(PROMPT, steps=2)[0], sd.generate(PROMPT, steps=2, negative_prompt="")[0]
    negative = sd.generate(PROMPT, steps=2, negative_prompt="a car")[0]
    assert plain.tobytes() == empty.tobytes()
    assert np.abs(bytes_of(plain) - bytes_of(negative)).max() > 5


def test_the_models_own_guidance_scale_and_spacing_are_the_defaults(sd):
    default, given, weaker, otherwise_spaced = (
        next(sd.denoise(PROMPT, steps=3, guidance_scale=scale, spacing=spacing)).x_t
        for scale, spacing in ((None, None), (4.0, "trailing"), (2, None), (None, "leading"))
    )
    assert torch.equal(default, given)
    assert not torch.equal(default, weaker) and not torch.equal(default, otherwise_spaced)


def test_denoise_is_lazy_and_leaves_the_grad_mode_to_the_caller(sd):
    with Calls(sd.unet) as rows:
        walk = sd.denoise(PROMPT, steps=3)
        assert rows == []
        for count, step in enumerate(walk, start=1):
            assert len(rows) == count and torch.is_grad_enabled() and not step.x_t.requires_grad
    with torch.no_grad():
        for _ in sd.denoise(PROMPT, steps=2):
            assert not torch.is_grad_enabled()
    walk = sd.denoise(PROMPT, steps=3)
    next(walk)
    walk.close()
    assert torch.is_grad_enabled()


def test_what_is_asked_of_the_model_between_steps_does_not_change_the_walk(sd):
    expected = [step.x_t for step in sd.denoise(PROMPT, steps=3, sampler="plms")]
    for step, x_t in zip(sd.denoise(PROMPT, steps=3, sampler="plms"), expected, strict=True):
        assert torch.equal(step.x_t, x_t)
        sd.generate("a cat", steps=1)


# --- a start and a hand on the loop -----------------------------------------------------------------------------------

DETERMINISTIC = [name for name, row in SAMPLERS.items() if not row.draws_noise and not row.multistep]


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_denoising_begins_at_any_level(sd, sampler):
    settings = dict(prompts=[PROMPT, "a cat"], seeds=[1, 2], steps=5, sampler=sampler)
    whole = list(sd.denoise(**settings))
    rest = list(sd.denoise(**settings, start=2, x=whole[1].x_t))
    assert [step.i for step in rest] == [2, 3, 4]
    assert all(torch.equal(step.x_t, expected.x_t) for step, expected in zip(rest, whole[2:], strict=True))


def test_an_image_is_the_start_of_another(sd):
    """The later the start, the nearer the end to the image."""
    image = latents_for(sd)
    visited = levels(sd.schedule, "ddim", 8, "trailing")
    noise = noise_source([1, 2], (4, 8, 8), sd.device)()
    distances = []
    for start in (0, 4, 7):
        x = visited[start].sqrt_alpha_bar * image + visited[start].sqrt_one_minus_alpha_bar * noise
        *_, last = sd.denoise(PROMPT, seeds=[1, 2], steps=8, start=start, x=x)
        distances.append((last.x_t - image).square().mean())
    assert distances == sorted(distances, reverse=True) and distances[0] > 10 * distances[-1]


def test_fresh_noise_is_never_the_noise_that_x_may_have_been_made_with(sd):
    draw = noise_source([3], (4, 8, 8), sd.device)
    first, second = draw(), draw()
    step = next(sd.denoise(PROMPT, seeds=[3], steps=4, start=2, x=first, sampler="ddpm"))
    without = next(sd.denoise(PROMPT, seeds=[4], steps=4, start=2, x=first, sampler="ddpm"))
    other = noise_source([4], (4, 8, 8), sd.device)
    other()
    ratio = (step.x_t - without.x_t) / (second - other())
    assert ratio.std() < 1e-3 * ratio.mean().abs()  # fp32: the two steps differ by their second draws alone


def test_a_latent_that_is_sent_replaces_the_one_that_was_yielded(sd):
    plain = [step.x_t for step in sd.denoise(PROMPT, steps=4)]
    steps = sd.denoise(PROMPT, steps=4)
    first = next(steps)
    assert torch.equal(steps.send(first.x_t).x_t, plain[1])
    changed = steps.send(torch.zeros_like(first.x_t)).x_t
    assert not torch.equal(changed, plain[2]) and not torch.equal(next(steps).x_t, plain[3])


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "plms"])
def test_odd_sizes_make_pictures_of_that_size(sd, sampler):
    (image,) = sd.generate(PROMPT, steps=2, size=(72, 56), sampler=sampler)  # 18 x 14 cells, then 9 x 7, 5 x 4
    assert image.size == (72, 56)
    assert bytes_of(image).std() > 10
    assert sd.generate(PROMPT, steps=1, size=20)[0].size == (20, 20)


def test_the_models_own_size_is_the_default(sd):
    assert next(sd.denoise(PROMPT, steps=1)).x_t.shape == next(sd.denoise(PROMPT, steps=1, size=32)).x_t.shape


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompts": ["a", "b"], "seeds": [1, 2, 3]}, "2 prompts and 3 seeds do not pair up"),
        ({"prompts": []}, "0 prompts and 1 seeds make no picture"),
        ({"seeds": []}, "1 prompts and 0 seeds make no picture"),
        ({"seeds": [-1]}, "seed -1 is outside"),
        ({"seeds": [2**64]}, "seed 18446744073709551616 is outside"),
        ({"size": 30}, "size 30 x 30: width and height must be multiples of 4 pixels"),
        ({"size": (32, 33)}, "size 32 x 33: .*multiples of 4"),
        ({"size": 0}, "size 0 x 0"),
        ({"size": (-4, 32)}, "size -4 x 32"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan is not a finite number"),
        ({"guidance_scale": float("inf")}, "guidance_scale inf"),
        ({"steps": 0}, r"steps 0 is outside 1\.\.1000"),
        ({"steps": 1001}, r"steps 1001 is outside 1\.\.1000"),
        ({"sampler": "ddmp"}, "sampler 'ddmp' unknown; choose ddpm, ddim"),
        ({"spacing": "even"}, "spacing 'even' unknown; choose leading"),
        ({"eta": 1.5}, r"eta 1.5 is outside 0\.\.1"),
        ({"eta": float("nan")}, "eta nan is outside"),
        ({"eta": 0.5, "sampler": "euler"}, "eta 0.5 belongs to sampler 'ddim'"),
        ({"start": 3}, "start 3 needs x, the latents at that level"),
        ({"start": 30, "x": torch.zeros(1, 4, 8, 8)}, r"start 30 is outside 0\.\.29"),
        ({"x": torch.zeros(2, 4, 8, 8)}, r"x has shape \(2, 4, 8, 8\); expected \(1, 4, 8, 8\), for 1 pictures"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_first_step(sd, options, message):
    with Calls(sd.unet) as rows, pytest.raises(ValueError, match=message):
        sd.denoise(**{"prompts": PROMPT, **options})
    assert rows == []


@pytest.mark.parametrize("batch", [0, -1])
def test_an_empty_batch_is_refused(sd, batch):
    with pytest.raises(ValueError, match="0 prompts and 0 seeds make no picture"):
        sd.generate(PROMPT, batch=batch)


def test_an_inpainting_model_says_that_it_needs_a_picture_and_a_mask():
    inpainting = small_model(small_config(in_channels=9))
    message = "9 input channels, not 4: an inpainting model, which needs a picture and a mask"
    with Calls(inpainting.unet) as rows, pytest.raises(ValueError, match=message):
        inpainting.denoise(PROMPT)
    assert rows == []


# --- long prompts -----------------------------------------------------------------------------------------------------


def test_a_prompt_that_is_too_long_is_cut_with_a_warning_that_shows_what_was_lost(sd):
    kept = " ".join(["cat"] * 30)  # 32 positions less start and end
    with pytest.warns(UserWarning, match="the prompt has 32 tokens and the model reads 30; cut off: 'red apple'"):
        cut = next(sd.denoise(f"{kept} red apple", steps=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cut.x_t, next(sd.denoise(kept, steps=1)).x_t)
    with pytest.warns(UserWarning, match="cut off: 'car'"):
        sd.denoise("a cat", negative_prompt=f"{kept} car")


# --- decoding ---------------------------------------------------------------------------------------------------------


def latents_for(sd, seed=0):
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_decode_undoes_the_scaling_and_clamps_and_leaves_the_latents(sd):
    latents = latents_for(sd)
    kept = latents.clone()
    pixels = sd.decode(latents)
    with torch.no_grad():
        expected = sd.vae.decode(latents / 0.18215)
    assert expected.abs().max() > 1  # else the clamp would not be seen
    torch.testing.assert_close(pixels, expected.clamp(-1, 1), rtol=0, atol=0)
    assert torch.equal(latents, kept) and not pixels.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_gives_nearly_the_same_float32_pixels(sd, dtype):
    half = small_model()
    for module in (half.text_encoder, half.unet, half.vae):
        module.to(dtype)
    *_, last = half.denoise(PROMPT, steps=2)
    assert last.x_t.dtype == torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = half.decode(latents_for(sd))
    assert pixels.dtype == torch.float32
    assert (pixels - sd.decode(latents_for(sd))).abs().mean() < 0.05  # bf16 has 8 bits, over some thirty layers


def overflowing_model():
    """Its first convolution gives more than float16 can hold; in float32 the GroupNorms bring that back to an ordinary range."""
    half = small_model()
    half.vae.to(torch.float16)
    with torch.no_grad():
        half.vae.decoder.conv_in.weight.mul_(1e6 / half.vae.decoder.conv_in.weight.abs().max()).clamp_(-6e4, 6e4)
    return half


def test_an_overflow_of_the_decoder_is_repeated_in_float32_and_said():
    half = overflowing_model()
    kept = {name: p.clone() for name, p in half.vae.state_dict().items()}
    latents = latents_for(half)
    assert not half.vae.decode((latents / 0.18215).half()).isfinite().all()
    with pytest.warns(UserWarning, match="the decoder overflowed in torch.float16: decoded again in float32") as caught:
        pixels = half.decode(latents)
    assert len(caught) == 1
    assert pixels.isfinite().all() and pixels.dtype == torch.float32
    full = small_model()
    full.vae.load_state_dict(kept)
    torch.testing.assert_close(pixels, full.decode(latents), rtol=0, atol=0)
    for name, p in half.vae.state_dict().items():
        assert p.dtype == torch.float32 and torch.equal(p, kept[name].float()), name
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once, and not tried again
        assert torch.equal(half.decode(latents), pixels)


def test_the_decoder_gets_its_dtype_back_when_the_second_try_fails(monkeypatch):
    half = overflowing_model()

    def decode(z):
        if z.dtype == torch.float32:
            raise MemoryError
        return torch.full((1, 3, 4, 4), torch.nan)

    monkeypatch.setattr(half.vae, "decode", decode)
    with pytest.warns(UserWarning, match="again in float32"), pytest.raises(MemoryError):
        half.decode(latents_for(half))
    assert half.vae.decoder.conv_in.weight.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_picture_that_is_not_finite_in_full_precision_is_an_error(dtype):
    broken = small_model()
    broken.vae.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="not finite"):
            broken.decode(torch.full((1, 4, 8, 8), torch.nan))
    assert broken.vae.decoder.conv_in.weight.dtype == dtype


def test_pixels_become_bytes_rounded_to_the_nearest_value():
    pixels = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.001, 1.0, 2.0]).expand(1, 3, 1, 7)
    kept = pixels.clone()
    (image,) = to_images(pixels)
    assert bytes_of(image)[0, :, 0].tolist() == [0, 0, 64, 128, 128, 255, 255]  # 63.75, 127.5 to even, 127.6
    assert torch.equal(pixels, kept)


def test_the_prompt_and_settings_given_are_not_changed(sd):
    prompts, seeds = [PROMPT], [1, 2]
    list(sd.denoise(prompts, seeds=seeds, steps=1))
    assert (prompts, seeds) == ([PROMPT], [1, 2])


def test_a_model_in_float64_agrees_with_float32(sd):
    double = small_model()
    for module in (double.text_encoder, double.unet, double.vae):
        module.double()
    assert dataclasses.asdict(double.config) == dataclasses.asdict(sd.config) and double.dtype == torch.float64
    one, other = (sd.generate(PROMPT, steps=3)[0] for sd in (sd, double))
    assert np.abs(bytes_of(one) - bytes_of(other)).max() <= 1  # fp32 against float64, one rounding of a byte
