"""The blocks: against formulas written again in plain steps, and what must leave them unchanged. tests/parity has the libraries."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minidiff.blocks import (
    FeedForward,
    ResBlock,
    SpatialTransformer,
    TimeEmbedding,
    TransformerBlock,
    geglu,
    norm_silu,
    tile_rows,
    timestep_embedding,
)
from minidiff.kernels import geglu as geglu_kernel
from minidiff.kernels import group_norm_silu, tiles
from minidiff.kernels.dispatch import attention_backend

CLOSE = dict(rtol=1e-11, atol=1e-11)  # float64, over a few hundred additions a value


def noise(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------- time embedding


def test_the_timestep_embedding_is_cosines_then_sines_of_falling_frequencies():
    t = torch.tensor([0, 1, 37, 999])
    waves = timestep_embedding(t, 8)
    for row, time in zip(waves, t.tolist()):
        angles = [time * 10000 ** (-i / 4) for i in range(4)]
        expected = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        # float32 angles up to 999, of which one rounding is 6e-5
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-4)


def test_timestep_0_has_all_cosines_at_1_and_all_sines_at_0():
    assert timestep_embedding(torch.tensor([0]), 6).tolist() == [[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]


def test_the_timestep_embedding_is_float32_for_any_timestep_dtype():
    t = [1, 500]
    as_int = timestep_embedding(torch.tensor(t), 32)
    assert as_int.dtype == torch.float32
    for dtype in (torch.int32, torch.float16, torch.float32, torch.float64):
        assert torch.equal(timestep_embedding(torch.tensor(t, dtype=dtype), 32), as_int)


def test_every_timestep_has_an_embedding_of_its_own():
    waves = timestep_embedding(torch.arange(1000), 32)
    assert torch.pdist(waves).min() > 0.01


def test_between_two_timesteps_the_embedding_is_between_them():
    low, middle, high = timestep_embedding(torch.tensor([10.0, 10.25, 11.0]), 32)
    assert (middle - low).norm() < (high - low).norm()
    assert not torch.equal(middle, low)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_time_vector_has_the_weights_dtype_and_four_times_the_width(dtype):
    time = TimeEmbedding(16).to(dtype)(torch.tensor([5]))
    assert time.shape == (1, 64) and time.dtype == dtype


def test_the_time_vector_is_two_layers_of_the_waves_each_with_a_silu():
    module, t = TimeEmbedding(16), torch.tensor([5, 700])
    expected = module.linear_2(F.silu(module.linear_1(timestep_embedding(t, 16))))
    assert torch.equal(module(t), F.silu(expected))


def test_rows_are_repeated_in_turn_and_left_alone_where_there_are_enough():
    x = noise(2, 3)
    assert tile_rows(x, 2) is x
    assert torch.equal(tile_rows(x, 6), x.repeat(3, 1))
    pictures = noise(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    assert tile_rows(pictures, 4).is_contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------------- ResBlock


def group_norm(x, norm):
    """GroupNorm by its definition (Wu and He 2018): each group of channels to mean 0 and variance 1, the eps under the root."""
    B, C = x.shape[:2]
    grouped = x.reshape(B, norm.num_groups, -1)
    mean, variance = grouped.mean(-1, keepdim=True), grouped.var(-1, keepdim=True, unbiased=False)
    normal = ((grouped - mean) / (variance + norm.eps).sqrt()).reshape(x.shape)
    return normal * norm.weight[:, None, None] + norm.bias[:, None, None]


def with_random_norms(module):
    for m in module.modules():
        if isinstance(m, (nn.GroupNorm, nn.LayerNorm)):
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
    return module.double()


@pytest.mark.parametrize("c_out", [8, 12])
@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_a_resblock_is_its_formula(c_out, eps):
    block = with_random_norms(ResBlock(8, c_out, 4, eps, time_width=10))
    x, time = 2e-3 * noise(2, 8, 5, 6), noise(2, 10, seed=1)  # faint, so that eps matters
    h = block.conv_1(F.silu(group_norm(x, block.norm_1)))
    h = h + block.time_projection(time).reshape(2, c_out, 1, 1)
    h = block.conv_2(F.silu(group_norm(h, block.norm_2)))
    skip = x if c_out == 8 else torch.einsum("oc,bchw->bohw", block.skip.weight[:, :, 0, 0], x) + block.skip.bias[:, None, None]
    assert block.norm_1.eps == block.norm_2.eps == eps
    torch.testing.assert_close(block(x, time), h + skip, **CLOSE)


def test_a_resblock_whose_last_convolution_is_zero_is_its_skip():
    block = ResBlock(8, 8, 4, 1e-5, 10)
    nn.init.zeros_(block.conv_2.weight)
    nn.init.zeros_(block.conv_2.bias)
    x = noise(1, 8, 4, 4).float()
    assert torch.equal(block(x, noise(1, 10).float()), x)


def test_a_resblock_of_the_vae_has_no_time():
    block = ResBlock(8, 8, 4, 1e-6)
    assert block.time_projection is None and not any("time" in name for name, _ in block.named_parameters())


def test_a_resblock_does_not_mix_the_rows_of_a_batch():
    block = ResBlock(8, 12, 4, 1e-5, 10).double()
    x, time = noise(3, 8, 4, 4), noise(3, 10)
    torch.testing.assert_close(block(x, time)[1:2], block(x[1:2], time[1:2]), **CLOSE)


CASES = pytest.mark.parametrize(
    ("name", "as_it_should_be", "by_kernel"),
    [("auto", True, False), ("pytorch", True, False), ("triton", True, True), ("triton", False, False)],
)


def counted(monkeypatch, module, name):
    """A list that grows with every call of the module's function."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: calls.append(name) or function(*args))
    return calls


@CASES
def test_norm_and_silu_are_one_kernel_where_kernels_are_asked_for_and_the_input_is_channels_last(
    monkeypatch, name, as_it_should_be, by_kernel
):
    calls = counted(monkeypatch, group_norm_silu, "run_group_norm_silu")
    norm, x = nn.GroupNorm(4, 8).to(tiles.DEVICE), noise(2, 8, 5, 6).float().to(tiles.DEVICE)
    with attention_backend(name):
        out = norm_silu(norm, x.to(memory_format=torch.channels_last) if as_it_should_be else x)
    torch.testing.assert_close(out, F.silu(group_norm(x, norm)), rtol=1e-4, atol=1e-5)  # fp32 parity
    assert bool(calls) == by_kernel


@CASES
def test_the_geglu_is_one_kernel_where_kernels_are_asked_for_and_the_input_is_contiguous(monkeypatch, name, as_it_should_be, by_kernel):
    calls = counted(monkeypatch, geglu_kernel, "run_geglu")
    x = noise(2, 3, 16).float().to(tiles.DEVICE)
    with attention_backend(name):
        out = geglu(x if as_it_should_be else x.transpose(0, 1).contiguous().transpose(0, 1))
    torch.testing.assert_close(out, x[..., :8] * F.gelu(x[..., 8:]), rtol=1e-4, atol=1e-5)  # fp32 parity
    assert bool(calls) == by_kernel


# ------------------------------------------------------------------------------------------------------ transformers


def test_the_feed_forward_is_a_value_times_the_exact_gelu_of_a_gate():
    layer = FeedForward(6).double()
    x = noise(2, 3, 6)
    projected = x @ layer.proj_in.weight.T + layer.proj_in.bias
    value, gate = projected[..., :24], projected[..., 24:]
    gelu = gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
    torch.testing.assert_close(layer(x), (value * gelu) @ layer.proj_out.weight.T + layer.proj_out.bias, **CLOSE)


def test_a_closed_gate_lets_nothing_through():
    layer = FeedForward(6)
    with torch.no_grad():
        layer.proj_in.weight[24:] = 0
        layer.proj_in.bias[24:] = 0
    assert torch.equal(layer(torch.randn(2, 3, 6)), layer.proj_out.bias.expand(2, 3, 6))


def test_a_transformer_block_does_not_know_the_order_of_cells_or_of_words():
    block = with_random_norms(TransformerBlock(8, 2, 6))
    x, words = noise(2, 5, 8), noise(2, 4, 6, seed=1)
    cells, order = torch.tensor([4, 2, 0, 1, 3]), torch.tensor([2, 0, 3, 1])
    out = block(x, words)
    torch.testing.assert_close(block(x[:, cells], words), out[:, cells], **CLOSE)
    torch.testing.assert_close(block(x, words[:, order]), out, **CLOSE)


def test_each_part_of_a_transformer_block_adds_to_what_it_is_given():
    block = TransformerBlock(8, 2, 6)
    for layer in (block.self_attention.to_out, block.cross_attention.to_out, block.feed_forward.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    x, words = noise(1, 5, 8).float(), noise(1, 4, 6).float()
    assert torch.equal(block(x, words), x)
    nn.init.ones_(block.cross_attention.to_out.bias)
    torch.testing.assert_close(block(x, words), x + 1)  # one part alone is heard


def test_a_spatial_transformer_is_the_block_on_a_row_of_cells():
    transformer = with_random_norms(SpatialTransformer(8, 2, 6, groups=4))
    x, words = 1e-3 * noise(2, 8, 3, 5), noise(2, 4, 6, seed=1)
    cells = group_norm(x, transformer.norm).flatten(2).transpose(1, 2)
    out = transformer.proj_out(transformer.blocks[0](transformer.proj_in(cells), words))
    assert transformer.norm.eps == 1e-6
    torch.testing.assert_close(transformer(x, words), x + out.transpose(1, 2).reshape(x.shape), **CLOSE)


def test_a_spatial_transformers_projections_are_1x1_convolutions():
    transformer = SpatialTransformer(8, 2, 6, groups=4).double()
    x = noise(2, 8, 3, 5)
    as_convolution = F.conv2d(x, transformer.proj_in.weight[:, :, None, None], transformer.proj_in.bias)
    as_matrix = transformer.proj_in(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(as_matrix, as_convolution, **CLOSE)


def test_words_of_the_wrong_width_are_refused():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        TransformerBlock(8, 2, 6)(torch.zeros(1, 5, 8), torch.zeros(1, 4, 7))
