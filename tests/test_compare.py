"""Two models side by side: equal ones agree everywhere, a planted mistake is found in the layer that has it."""

import copy
import dataclasses
import math

import pytest
import torch

from minidiff import blocks
from minidiff.compare import compare_models
from tests.small_models import small_config, small_model

PROMPT = "a red apple"


@pytest.fixture(scope="module")
def sd():
    return small_model()


def compare(a, b, t=500):
    return compare_models(a, b, PROMPT, t, seed=0)


def first_of(differences, tolerance=1e-6):
    return next((d.layer for d in differences if d.relative > tolerance), None)


def test_a_model_agrees_with_itself_in_every_layer_in_the_order_they_run(sd):
    differences = compare(sd, copy.deepcopy(sd))
    assert all(d.absolute == d.relative == 0 for d in differences)
    layers = [d.layer for d in differences]
    assert len(layers) == len(set(layers))
    leaves = [
        f"{part}.{name}"
        for part in ("text_encoder", "unet", "vae")
        for name, module in getattr(sd, part).named_modules()
        if not list(module.children()) and next(module.parameters(), None) is not None
    ]
    # the text encoder takes the rows of its position embedding without calling it
    assert set(leaves) - set(layers) == {"text_encoder.position_embedding"}
    shown = [
        "text_encoder.token_embedding",
        "text_encoder",
        "unet.time_embedding.linear_1",
        "unet.down.0.blocks.0.norm_1",
        "unet",
        "vae.encoder",
        "vae.quant_conv",
        "vae.post_quant_conv",
        "vae.decoder.conv_in",
        "vae.decoder",
    ]
    assert sorted(shown, key=layers.index) == shown


def plant_weight(path):
    """Adds to one weight."""

    def plant(sd):
        part, _, name = path.partition(".")
        getattr(sd, part).get_submodule(name).weight.data.view(-1)[0] += 0.5

    return path, plant


def plant_eps(sd):
    sd.unet.up[1].blocks[0].norm_2.eps = 1e-1


def plant_transpose(sd):
    to_q = sd.unet.middle.transformer.blocks[0].cross_attention.to_q
    to_q.weight.data = to_q.weight.data.T.contiguous()


def plant_heads(sd):
    sd.unet.down[1].transformers[0].blocks[0].self_attention.heads = 4


def plant_activation(sd):
    sd.text_encoder.blocks[1].activation = torch.nn.functional.gelu


@pytest.mark.parametrize(
    "layer, plant",
    [
        plant_weight("text_encoder.blocks.0.linear_1"),
        plant_weight("unet.conv_in"),
        plant_weight("unet.down.0.transformers.0.blocks.0.feed_forward.proj_in"),
        plant_weight("vae.encoder.middle.attention.attention.to_v"),
        plant_weight("vae.quant_conv"),
        plant_weight("vae.post_quant_conv"),
        plant_weight("vae.decoder.up.1.blocks.0.conv_1"),
        ("unet.up.1.blocks.0.norm_2", plant_eps),
        ("unet.middle.transformer.blocks.0.cross_attention.to_q", plant_transpose),
        ("unet.down.1.transformers.0.blocks.0.self_attention.to_out", plant_heads),  # its inputs are the first to show it
        ("text_encoder.blocks.1.linear_2", plant_activation),
    ],
)
def test_one_planted_change_is_found_in_the_layer_that_has_it(sd, layer, plant):
    changed = copy.deepcopy(sd)
    plant(changed)
    differences = compare(sd, changed)
    assert first_of(differences) == layer
    # the parts that it is not in are judged by themselves: they get the same inputs
    part = layer.split(".")[0]
    others = [d for d in differences if not d.layer.startswith(part)]
    assert others and all(d.absolute == 0 for d in others)


def test_swapped_halves_of_the_time_embedding_are_found_in_its_first_layer(sd, monkeypatch):
    """A mistake in a function is in both models; one of them is made to call the right one."""
    right = blocks.timestep_embedding
    swapped = copy.deepcopy(sd)
    mistaken = {swapped.unet.time_embedding}

    def forward(self, t):
        waves = right(t, self.width)
        if self in mistaken:
            waves = torch.cat(waves.chunk(2, dim=-1)[::-1], dim=-1)
        return self.linear_2(torch.nn.functional.silu(self.linear_1(waves)))

    monkeypatch.setattr(blocks.TimeEmbedding, "forward", forward)
    assert first_of(compare(sd, swapped)) == "unet.time_embedding.linear_1"
    mistaken.clear()
    assert first_of(compare(sd, swapped)) is None


def test_the_same_weights_in_half_precision_differ_a_little_everywhere(sd):
    half = copy.deepcopy(sd)
    for module in (half.text_encoder, half.unet, half.vae):
        module.half()
    differences = compare(sd, half)
    assert 0 < max(d.relative for d in differences) < 0.05  # fp16 has 11 bits, over some thirty layers
    assert all(p.dtype == torch.float16 for p in half.unet.parameters())
    # the other way round as well: floats are given in each module's own dtype
    assert 0 < max(d.relative for d in compare(half, sd)) < 0.05


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_layer_that_is_not_finite_never_counts_as_equal(sd, value):
    broken = copy.deepcopy(sd)
    broken.unet.conv_in.bias.data[0] = value
    for other in (sd, broken):
        differences = compare(other, broken)
        assert first_of(differences) == "unet.conv_in"
        found = next(d for d in differences if d.layer == "unet.conv_in")
        assert found.absolute == found.relative == math.inf


def test_relative_is_to_the_largest_value_of_the_first(sd):
    changed = copy.deepcopy(sd)
    changed.unet.conv_in.bias.data += 0.25
    found = next(d for d in compare(sd, changed) if d.layer == "unet.conv_in")
    assert found.absolute == pytest.approx(0.25, rel=1e-5)  # fp32
    x = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0))[None]
    with torch.no_grad():
        assert found.relative == pytest.approx(0.25 / sd.unet.conv_in(x).abs().max().item(), rel=1e-5)


def with_unet(**changes):
    config = small_config()
    return small_model(dataclasses.replace(config, unet=dataclasses.replace(config.unet, **changes)))


def test_models_of_other_shapes_are_refused_with_the_first_weight_that_has_another(sd):
    with pytest.raises(ValueError, match=r"unet.conv_in.weight is \(16, 4, 3, 3\) in the first and \(16, 9, 3, 3\) in the second"):
        compare(sd, with_unet(in_channels=9))
    shallow = copy.deepcopy(sd)
    del shallow.text_encoder.blocks[1]
    with pytest.raises(ValueError, match=r"text_encoder.blocks.1.norm_1.weight is \(16,\) in the first and missing in the second"):
        compare(sd, shallow)
    with pytest.raises(ValueError, match=r"text_encoder.blocks.1.norm_1.weight is missing in the first and \(16,\) in the second"):
        compare(shallow, sd)


def test_models_that_differ_in_numbers_that_are_not_in_the_weights_are_compared(sd):
    assert first_of(compare(sd, with_unet(groups=4))) == "unet.down.0.blocks.0.norm_1"


@pytest.mark.parametrize("t", [-1, 1000])
def test_a_timestep_outside_the_schedule_is_refused(sd, t):
    with pytest.raises(ValueError, match=rf"t {t} is outside 0\.\.999"):
        compare(sd, sd, t)


def test_comparing_leaves_no_hook_and_no_gradient(sd):
    compare(sd, sd)
    for part in sd.parts.values():
        assert all(not module._forward_hooks and not module._forward_pre_hooks for module in part.modules())
    assert torch.is_grad_enabled() and all(p.grad is None for p in sd.unet.parameters())
