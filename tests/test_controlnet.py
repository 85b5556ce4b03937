"""ControlNet: nothing at the start, the first gradient, intervals, batches, and what it is used together with."""

from dataclasses import replace
from math import inf

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minidiff import cuda_graph, pipeline, tiled_decode
from minidiff.adapters.custom_diffusion import create_custom_diffusion
from minidiff.adapters.lora import create_lora
from minidiff.attention_maps import with_attention_maps
from minidiff.conditioning import Conditioning
from minidiff.config import SD1
from minidiff.controlnet import Control, ControlNet, controlled, controlnet_config, create_controlnet
from minidiff.schedule import NoiseSchedule
from minidiff.trainers.engine.diffusion_loss import NoiseSample, diffusion_loss
from minidiff.unet import UNet
from tests.small_models import small_config, small_model
from tests.test_cuda_graph import trace

CLOSE = dict(rtol=1e-4, atol=1e-5)  # float32, another order of rows


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def trained(sd, seed=1):
    """A ControlNet that does something."""
    net = create_controlnet(sd.config, sd.unet, generator(seed)).requires_grad_(False)
    for conv in (*net.zero_convs, net.hint_block.conv_out):
        conv.weight.copy_(0.3 * torch.randn(conv.weight.shape, generator=generator(seed)) / conv.weight[0].numel() ** 0.5)
        conv.bias.copy_(0.1 * torch.randn(conv.bias.shape, generator=generator(seed + 1)))
    return net


def hints(rows=1, size=(32, 32), seed=0):
    return torch.rand(rows, 3, *size, generator=generator(seed))


def latents(sd, controls=(), prompts="a cat", timesteps=None, guess_mode=False, **options):
    model = controlled(sd.predict, controls, timesteps, guess_mode) if controls else None
    return torch.stack([step.x_t for step in sd.denoise(prompts, steps=4, model=model, **options)])


# --- at the start -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_channels", [4, 9])
def test_a_new_controlnet_changes_no_bit(in_channels):
    sd = small_model(small_config(in_channels=in_channels))
    net = create_controlnet(sd.config, sd.unet, generator())
    x, t = torch.randn(2, in_channels, 8, 8, generator=generator()), torch.tensor([10, 900])
    told = Conditioning(torch.randn(4, 5, 16, generator=generator(1)))
    for guess_mode in (False, True):
        steered = controlled(sd.unet, [Control(net, hints())], guess_mode=guess_mode)
        assert torch.equal(steered(x, t, told), sd.unet(x, t, told))
    assert torch.equal(net.conv_in.weight, sd.unet.conv_in.weight[:, :4])
    if in_channels == 4:
        assert torch.equal(latents(sd, [Control(net, hints())]), latents(sd))


def test_the_hint_block_is_drawn_from_the_generator_alone():
    sd = small_model()
    nets = [create_controlnet(sd.config, sd.unet, generator(seed)) for seed in (0, 0, 1)]
    first, same, other = (net.hint_block.convs[1].weight for net in nets)
    assert torch.equal(first, same) and not torch.equal(first, other)


def loss_of(sd, net):
    noise = NoiseSample(torch.tensor([100, 700]), torch.randn(2, 4, 8, 8, generator=generator(2)))
    x_0, context = torch.randn(2, 4, 8, 8, generator=generator(3)), torch.randn(2, 5, 16, generator=generator(4))

    def unet(x_t, t, context):
        return sd.unet(x_t, t, Conditioning(context, residuals=net(x_t, t, context, net.hint_block(hints(2)))))

    return diffusion_loss(unet, NoiseSchedule(sd.config.schedule), x_0, context, noise).mean()


def test_the_first_gradient_is_in_the_zero_convolutions_alone_and_the_second_behind_them():
    sd = small_model()
    sd.unet.requires_grad_(False)
    net = create_controlnet(sd.config, sd.unet, generator())

    def moved():
        return {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}

    loss_of(sd, net).backward()
    assert moved() == {name for name, _ in net.named_parameters() if name.startswith("zero_convs.")}
    with torch.no_grad():
        for p in net.parameters():
            p.sub_(p.grad * 0.1)
    net.zero_grad()
    loss_of(sd, net).backward()
    # The rest of the hint block stands behind its own zero convolution, and waits one step more.
    waiting = {name for name, _ in net.named_parameters() if name.startswith("hint_block.convs.")}
    assert moved() == {name for name, _ in net.named_parameters()} - waiting
    assert all(p.grad is None for p in sd.unet.parameters())


# --- when it runs -----------------------------------------------------------------------------------------------------


def counted(net):
    calls = []
    net.register_forward_pre_hook(lambda module, args: calls.append(int(args[1][0])))
    return calls


def test_it_runs_within_its_interval_and_not_at_scale_0():
    sd = small_model()
    timesteps = [step.t for step in sd.denoise("a cat", steps=4)]
    nets = [trained(sd, seed) for seed in range(3)]
    calls = [counted(net) for net in nets]
    controls = [Control(nets[0], hints()), Control(nets[1], hints(), 1.0, 0.25, 0.75), Control(nets[2], hints(), 0.0)]
    latents(sd, controls, timesteps=timesteps)
    assert calls == [timesteps, timesteps[1:3], []]
    assert Control(nets[0], hints()).interval(None) == (inf, -inf)
    outside = [Control(nets[0], hints(), 0.0)]
    assert torch.equal(latents(sd, outside), latents(sd))


@pytest.mark.parametrize("sampler", ["heun", "plms"])
def test_samplers_with_two_calls_a_step_keep_to_it(sampler):
    sd, steps = small_model(), 4
    timesteps = [step.t for step in sd.denoise("a cat", steps=steps, sampler=sampler)]
    net = trained(sd)
    calls = counted(net)
    latents(sd, [Control(net, hints(), 1.0, 0.0, 0.5)], timesteps=timesteps, sampler=sampler)
    assert set(calls) == set(timesteps[:2])


def test_from_a_picture_an_interval_is_a_share_of_the_steps_that_are_left():
    sd = small_model()
    timesteps = [step.t for step in sd.denoise("a cat", steps=4)]
    net, x = trained(sd), torch.randn(1, 4, 8, 8, generator=generator())
    calls = counted(net)
    latents(sd, [Control(net, hints(), 1.0, 0.0, 0.5)], timesteps=timesteps[2:], start=2, x=x)
    assert calls == timesteps[2:3]


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_batch_of_hints_is_as_many_pictures():
    sd = small_model()
    net, both = trained(sd), torch.cat([10 * hints(), hints(seed=1)])  # far apart
    together = latents(sd, [Control(net, both)], ["a cat", "a dog"], seeds=[0, 1])
    for i, prompt in enumerate(["a cat", "a dog"]):
        alone = latents(sd, [Control(net, both[i : i + 1])], prompt, seeds=[i])
        torch.testing.assert_close(together[:, i : i + 1], alone, **CLOSE)
    one = latents(sd, [Control(net, both[:1])], ["a cat", "a dog"], seeds=[0, 1])
    torch.testing.assert_close(one[:, 0], together[:, 0], **CLOSE)
    assert (one[:, 1] - together[:, 1]).abs().max() > 0.001


@pytest.mark.parametrize("size", [(8, 8), (9, 7)])  # an odd one is rounded on the way down
def test_the_shared_prefix_sees_through_it(size):
    sd = small_model()
    net, (h, w) = trained(sd), size
    x, t = torch.randn(2, 4, h, w, generator=generator()), torch.tensor([10, 900])
    told = Conditioning(torch.randn(4, 5, 16, generator=generator(1)))
    steered = controlled(sd.predict, [Control(net, hints(2, (4 * h, 4 * w)))])
    together = steered(x, t, told)
    for half in (slice(2), slice(2, 4)):
        torch.testing.assert_close(together[half], steered(x, t, Conditioning(told.context[half])), **CLOSE)


def test_guess_mode_acts_on_the_texts_half_alone():
    sd = small_model()
    x, t, told = (
        torch.randn(1, 4, 8, 8, generator=generator()),
        torch.tensor([500]),
        Conditioning(torch.randn(2, 5, 16, generator=generator(1))),
    )
    steered = controlled(sd.predict, [Control(trained(sd), hints())], guess_mode=True)(x, t, told)
    plain = sd.predict(x, t, told)
    torch.testing.assert_close(steered[:1], plain[:1], **CLOSE)
    assert (steered[1] - plain[1]).abs().max() > 0.01


def test_residuals_of_several_are_summed():
    sd = small_model()
    net = trained(sd)
    twice = latents(sd, [Control(net, hints(), 0.25), Control(net, hints(), 0.5)])
    torch.testing.assert_close(twice, latents(sd, [Control(net, hints(), 0.75)]), **CLOSE)


def test_colours_are_reversed_for_files_that_want_it():
    sd = small_model()
    net = trained(sd)
    expected = latents(sd, [Control(net, hints().flip(1))])
    net.config = replace(net.config, channel_order="bgr")
    assert torch.equal(latents(sd, [Control(net, hints())]), expected)


# --- together with ----------------------------------------------------------------------------------------------------


def lora(sd):
    made = create_lora(sd, ("cross_attention",), rank=2, alpha=2.0, init="kaiming", generator=generator())
    with torch.no_grad():
        for low in made.layers.values():
            low.up.weight.copy_(torch.randn(low.up.weight.shape, generator=generator(1)))
    return made


def custom_diffusion(sd):
    made = create_custom_diffusion(sd)
    with torch.no_grad():
        for weight in made.weights:
            weight.mul_(2)
    return made


@pytest.mark.parametrize("make", [lora, custom_diffusion])
def test_adapters_change_the_unet_and_not_the_controlnet(make):
    sd = small_model()
    net, found = trained(sd), []
    net.register_forward_hook(lambda module, args, output: found.append(output[-1]))
    plain = latents(sd, [Control(net, hints())])
    adapter = make(sd)
    adapter.attach(sd)
    assert (latents(sd, [Control(net, hints())]) - plain).abs().max() > 1e-3
    assert torch.equal(found[0], found[4])  # of the first steps, at the same x_t


def test_attention_maps_are_those_of_the_unet():
    sd = small_model()
    model = controlled(sd.predict, [Control(trained(sd), hints())])
    steps = list(with_attention_maps(sd.denoise("a cat", steps=2, model=model), sd.unet))
    plain = list(with_attention_maps(sd.denoise("a cat", steps=2), sd.unet))
    assert steps[0].attention_maps.keys() == plain[0].attention_maps.keys()
    for weights in steps[0].attention_maps.values():
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones_like(weights[..., 0]))
    up = [name for name in steps[0].attention_maps if name.startswith("up.")]
    assert any(not torch.allclose(steps[0].attention_maps[name], plain[0].attention_maps[name]) for name in up)


def test_the_cuda_graph_takes_the_residuals_as_inputs(monkeypatch):
    """On the CPU a capture is a trace. An interval costs a second capture, and no more in the next picture."""
    captures = []
    monkeypatch.setattr(pipeline, "GRAPH_DEVICES", ("cpu",))
    monkeypatch.setitem(cuda_graph.CAPTURE, "cpu", lambda f, device: captures.append(1) or trace(f, device))
    sd = small_model()
    net = trained(sd)
    timesteps = [
        step.t for step in sd.denoise("a cat", steps=6, model=lambda x_t, t, told: sd.unet(x_t, t, told).chunk(2)[0].repeat(2, 1, 1, 1))
    ]
    controls = [Control(net, hints(), 1.0, 0.0, 0.5)]

    def picture(predict, seed):
        model = controlled(predict, controls, timesteps)
        return torch.stack([step.x_t for step in sd.denoise("a cat", steps=6, seeds=[seed], model=model)])

    for seed in range(3):
        assert torch.equal(picture(sd.predict, seed), picture(lambda x_t, t, told: sd.unet(x_t, t, told), seed))
    assert len(captures) == 2


def test_what_it_costs_by_count():
    """At 512 x 512 pixels with guidance a ControlNet adds a third of the U-Net's operations (the authors' report of time says the same)."""
    with torch.device("meta"):
        unet, net = UNet(SD1.unet), ControlNet(controlnet_config(SD1))
        x, t, context, hint = torch.empty(2, 4, 64, 64), torch.empty(2), torch.empty(2, 77, 768), torch.empty(2, 3, 512, 512)
    counts = []
    for run in (lambda: unet(x, t, context), lambda: net(x, t, context, net.hint_block(hint))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        counts.append(counter.get_total_flops() / 1e12)
    assert counts == [pytest.approx(1.607, abs=0.001), pytest.approx(0.567, abs=0.001)]


# --- what is wrong is said --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "numbers, message",
    [
        ((1.0, 0.5, 0.5), "control from 0.5 to 0.5: an empty interval; give shares of the steps"),
        ((1.0, 0.8, 0.2), "control from 0.8 to 0.2: an empty interval"),
        ((1.0, 0.0, 1.5), "control from 0 to 1.5"),
        ((float("nan"), 0.0, 1.0), "control scale nan is not a finite number"),
    ],
)
def test_numbers_out_of_range_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        Control(trained(small_model()), hints(), *numbers)


def test_an_interval_without_a_step_is_refused_before_the_first():
    sd = small_model()
    with pytest.raises(ValueError, match="control from 0.3 to 0.4 contains none of the 4 steps; widen it, or take more steps"):
        latents(sd, [Control(trained(sd), hints(), 1.0, 0.3, 0.4)], timesteps=[999, 749, 499, 249])
    with pytest.raises(ValueError, match="control from 0 to 0.5 needs the timesteps"):
        latents(sd, [Control(trained(sd), hints(), 1.0, 0.0, 0.5)])


@pytest.mark.parametrize(
    "rows, size, message",
    [
        (1, (64, 32), "a hint of 32 x 64 pixels for a picture of 32 x 32; give one of that size"),
        (1, (33, 32), "a hint of 32 x 33 pixels: both must be multiples of 4"),
        (3, (32, 32), "3 hints for 2 pictures; give one for each, or one for all"),
    ],
)
def test_hints_of_another_shape_are_refused(rows, size, message):
    sd = small_model()
    with pytest.raises(ValueError, match=message):
        latents(sd, [Control(trained(sd), hints(rows, size))], ["a cat", "a dog"], seeds=[0, 1])


def test_a_large_steered_picture_is_decoded_in_strips_as_whole(monkeypatch):
    sd = small_model()
    control = [Control(trained(sd), hints(size=(96, 64)))]
    x_t = latents(sd, control, size=(64, 96))[-1]
    assert (x_t - latents(sd, size=(64, 96))[-1]).abs().max() > 0.01
    whole, strips = sd.decode(x_t, tiled=False), []
    monkeypatch.setitem(tiled_decode.VALUES_WORTH_IT, "cpu", 1)
    real = tiled_decode.decode_tiled
    monkeypatch.setattr(tiled_decode, "decode_tiled", lambda vae, z: strips.append(z) or real(vae, z, 5))
    torch.testing.assert_close(sd.decode(x_t), whole, rtol=0, atol=1e-5)  # the order of the sums in a few GroupNorms
    assert len(strips) == 1
