"""Heat maps: DAAM's aggregation by hand, the picture as it was, overlap in closed form, Stable Diffusion's sizes."""

import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from minidiff.attention_maps import control_attention
from minidiff.blocks import SpatialTransformer
from minidiff.config import UNetConfig
from minidiff.heat_maps import HeatMaps, lay_over, overlap
from minidiff.samplers import SAMPLERS
from minidiff.unet import UNet
from tests.small_models import small_model, xl_config

PROMPT = "a crocodile on a lawn"
CROCODILE = [2, 3, 4, 5, 6]


@pytest.fixture(scope="module")
def sd():
    return small_model()


def watch(sd, prompts, positions, **settings):
    heat = HeatMaps(len(prompts), positions)
    steps = list(heat.watch(sd.denoise(prompts, seeds=list(range(len(prompts))), **settings), sd.unet))
    return heat, steps


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_words_map_is_daams(sd, guidance_scale):
    """Sum over steps for each layer and head, bicubic, cut off at 0, the mean of all; then the mean over the word's tokens."""
    prompts, sums, x_of = ["a cat", PROMPT], {}, {}
    handles = []
    for name, module in sd.unet.named_modules():
        if isinstance(module, SpatialTransformer) and "middle" not in name:
            module.register_forward_pre_hook(lambda m, args, name=name: x_of.update({name: args[0].shape[2]}))

            def hook(attention, args, output, name=name):
                q, k = (rearrange(y, "B N (h d) -> B h N d", h=attention.heads) for y in (attention.to_q(args[0]), attention.to_k(args[1])))
                weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)[-1]  # of the last row: the second prompt's
                sums[name] = sums.get(name, 0) + rearrange(weights, "h (H W) L -> h L H W", H=x_of[name])

            handles.append(module.blocks[0].cross_attention.register_forward_hook(hook))
    heat, _ = watch(sd, prompts, [*CROCODILE, 1], steps=3, guidance_scale=guidance_scale)
    for module in sd.unet.modules():
        module._forward_hooks.clear(), module._forward_pre_hooks.clear()
    heads = [
        F.interpolate(m[head][None, None, position], size=(8, 8), mode="bicubic").clamp(min=0)[0, 0]
        for m in (rearrange(m, "h L H W -> L h H W").transpose(0, 1) for m in sums.values())
        for head in range(m.shape[0])
        for position in CROCODILE
    ]
    torch.testing.assert_close(heat.word(CROCODILE)[1], torch.stack(heads).mean(dim=0), rtol=1e-4, atol=1e-5)  # fp32
    assert len(heat.sums) == 6


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_watching_changes_no_bit_and_leaves_no_hook(sd, sampler):
    _, steps = watch(sd, [PROMPT, "a cat"], CROCODILE, steps=3, sampler=sampler)
    plain = list(sd.denoise([PROMPT, "a cat"], seeds=[0, 1], steps=3, sampler=sampler))
    assert all(torch.equal(a.x_t, b.x_t) for a, b in zip(steps, plain, strict=True))
    assert not any(module._forward_pre_hooks for module in sd.unet.modules())


def test_sdxl_and_odd_sizes_have_maps():
    heat, _ = watch(small_model(xl_config()), [PROMPT], CROCODILE, steps=1, size=(72, 56))
    assert heat.word(CROCODILE).shape == (1, 7, 9)  # its first level has no attention
    heat, _ = watch(small_model(), [PROMPT], CROCODILE, steps=1, size=(72, 56))
    assert heat.word([2]).shape == (1, 14, 18)


@pytest.mark.parametrize("cells", [64, pytest.param(96, marks=pytest.mark.slow)])
def test_at_stable_diffusions_sizes_the_map_is_the_latents(cells):
    """The layout of Stable Diffusion 1.5 with few channels: 64 x 64 cells for 512 pixels, 96 x 96 for 768."""
    unet = UNet(
        UNetConfig(widths=(8, 16, 32, 32), blocks_per_level=2, attention=(1, 1, 1, 0), heads=(2, 2, 2, 2), context_width=8, groups=4)
    )
    heat = HeatMaps(1, [1, 2])
    with torch.no_grad(), control_attention(unet, heat._add, ("cross",)):
        unet(torch.zeros(1, 4, cells, cells), torch.tensor([5]), torch.randn(2, 77, 8, generator=torch.Generator().manual_seed(0)))
    assert heat.word([1, 2]).shape == (1, cells, cells)
    assert sorted({m.shape[2] for m in heat.sums.values()}) == [cells // 4, cells // 2, cells] and len(heat.sums) == 15


def test_overlap_of_half_and_of_nothing():
    a, b = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)
    a[0, :2], b[0, 1:3], a[1, 0], b[1, 1] = 3.0, 0.5, 1.0, 1.0
    torch.testing.assert_close(overlap(a, b), torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(overlap(a, 7 * a), torch.ones(2))


def test_a_map_dims_what_was_not_looked_at():
    pixels, heat = torch.ones(1, 3, 4, 4), torch.zeros(1, 4, 4)
    heat[0, :, 2:] = 5.0
    laid = (lay_over(pixels, heat) + 1) / 2
    torch.testing.assert_close(laid[0, 0], torch.tensor([0.25, 0.25, 1, 1]).expand(4, 4))


def test_words_that_were_not_recorded_are_refused(sd):
    heat = HeatMaps(1, [1, 2])
    with pytest.raises(ValueError, match=r"positions \[3\]: expected at least one of those recorded, \[1, 2\]"):
        heat.word([3])
    with pytest.raises(ValueError, match=r"positions \[\]"):
        heat.word([])
    with pytest.raises(ValueError, match="HeatMaps.watch"):
        heat.word([1])
