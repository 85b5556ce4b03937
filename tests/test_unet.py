"""The U-Net's size, its invariants and what it refuses. tests/parity holds it against diffusers."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from minidiff.config import SD1, SD2, UNetConfig
from minidiff.unet import UNet

SMALL = UNetConfig(widths=(8, 16, 16), blocks_per_level=1, attention=(True, True, False), heads=(2, 2, 4), context_width=6, groups=4)
CLOSE = dict(rtol=1e-10, atol=1e-10)  # float64, through a whole model


def small(**changes) -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet(replace(SMALL, **changes)).double()


def inputs(B=2, C=4, H=8, W=8, L=5):
    generator = torch.Generator().manual_seed(0)
    x, words = (torch.randn(size, generator=generator, dtype=torch.float64) for size in [(B, C, H, W), (B, L, 6)])
    return x, torch.arange(B) * 400 + 3, words


@pytest.mark.parametrize(
    "config, count",
    [
        (SD1.unet, 859_520_964),  # counted in the original class
        (SD2.unet, 865_910_724),
        # Five more channels at the 3x3 entrance.
        (replace(SD1.unet, in_channels=9), 859_520_964 + 5 * 9 * 320),
    ],
    ids=["SD 1", "SD 2", "inpainting"],
)
def test_the_number_of_parameters_is_stable_diffusions(config, count):
    with torch.device("meta"):
        unet = UNet(config)
    assert sum(p.numel() for p in unet.parameters()) == count


def test_the_answer_has_the_latents_shape_and_dtype():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, t, words = inputs()
        answer = small().to(dtype)(x.to(dtype), t, words.to(dtype))
        assert answer.shape == x.shape and answer.dtype == dtype and answer.isfinite().all()


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (10, 14), (8, 3)])
def test_any_size_goes_down_and_comes_up_again(size):
    x, t, words = inputs(H=size[0], W=size[1])
    assert small()(x, t, words).shape == x.shape


def test_an_inpainting_unet_takes_nine_channels_and_answers_with_four():
    x, t, words = inputs(C=9)
    assert small(in_channels=9)(x, t, words).shape == (2, 4, 8, 8)
    with pytest.raises(RuntimeError, match="to have 9 channels, but got 4"):
        small(in_channels=9)(x[:, :4], t, words)


def test_a_row_of_the_batch_knows_nothing_of_the_others():
    unet, (x, t, words) = small(), inputs(B=3)
    together = unet(x, t, words)
    for row in range(3):
        alone = unet(x[row : row + 1], t[row : row + 1], words[row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1], **CLOSE)


@pytest.mark.parametrize("attention", [(True, True, False), (False, True, False), (False, False, False)])
def test_several_texts_for_each_latent_are_as_many_calls(attention):
    """Where the first cross-attention stands differs; the middle always has one."""
    unet, (x, t, _), (_, _, words) = small(attention=attention), inputs(), inputs(B=6)
    together = unet(x, t, words)
    assert together.shape == (6, *x.shape[1:])
    for row in range(0, 6, 2):
        torch.testing.assert_close(together[row : row + 2], unet(x, t, words[row : row + 2]), **CLOSE)
    torch.testing.assert_close(together, unet(x.repeat(3, 1, 1, 1), t.repeat(3), words), **CLOSE)


def test_what_comes_before_the_first_cross_attention_runs_once_for_all_texts():
    unet, (x, t, _), (_, _, words) = small(), inputs(), inputs(B=6)
    rows = {}
    for name, module in unet.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: rows.update({name: len(args[0])}))
    unet(x, t, words)
    block = "down.0.transformers.0.blocks.0"
    once = "conv_in", "down.0.blocks.0", f"{block}.self_attention", "up.2.blocks.1.time_projection"
    for_each = f"{block}.cross_attention", f"{block}.feed_forward", "down.1.blocks.0", "up.2.blocks.1", "conv_out"
    assert {rows[name] for name in once} == {2} and {rows[name] for name in for_each} == {6}


def test_texts_that_are_no_multiple_of_the_latents_are_refused():
    unet, (x, t, _), (_, _, words) = small(), inputs(), inputs(B=3)
    with pytest.raises(ValueError, match="a context of 3 rows for an x_t of 2; expected as many, or a multiple"):
        unet(x, t, words)


def test_the_same_inputs_give_the_same_bits():
    unet, given = small().float(), inputs()
    x, t, words = given[0].float(), given[1], given[2].float()
    assert torch.equal(unet(x, t, words), unet(x, t, words))


def test_each_input_matters():
    unet, (x, t, words) = small(), inputs()
    answer = unet(x, t, words)
    for other in (unet(x + 0.1, t, words), unet(x, t + 1, words), unet(x, t, words + 0.1)):
        assert (answer - other).abs().max() > 1e-4


def test_the_order_of_the_words_does_not_matter_here():
    """Where a word stands is written into its vector by the text encoder."""
    unet, (x, t, words) = small(), inputs()
    torch.testing.assert_close(unet(x, t, words.flip(1)), unet(x, t, words), **CLOSE)


def test_a_timestep_may_be_an_integer_or_a_float():
    unet, (x, t, words) = small(), inputs()
    assert torch.equal(unet(x, t.float(), words), unet(x, t, words))


def test_a_gradient_reaches_every_parameter_and_every_input():
    unet, (x, t, words) = small(), inputs()
    x, words = x.requires_grad_(), words.requires_grad_()
    unet(x, t, words).square().sum().backward()
    without = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == [] and x.grad.any() and words.grad.any()


def test_attention_stands_where_the_config_says_and_always_in_the_middle():
    unet = small()
    assert [len(level.transformers) for level in unet.down] == [1, 1, 0]
    assert [len(level.transformers) for level in unet.up] == [0, 2, 2]
    assert unet.middle.transformer.blocks[0].self_attention.heads == 4
    assert [level.transformers[0].blocks[0].self_attention.heads for level in unet.down[:2]] == [2, 2]


def test_every_group_norm_has_the_eps_of_its_place():
    eps = {name: m.eps for name, m in small().named_modules() if isinstance(m, nn.GroupNorm)}
    inside = {name for name in eps if "transformer" in name}
    assert inside and {eps[name] for name in inside} == {1e-6}
    assert {eps[name] for name in eps if name not in inside} == {1e-5}
