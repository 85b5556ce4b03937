"""The VAE's size, its invariants, its Gaussian and what it refuses. tests/parity holds it against diffusers."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn
from torch.distributions import Normal, kl_divergence

from minidiff.config import SD1, VAEConfig
from minidiff.vae import VAE, DiagonalGaussian

SMALL = VAEConfig(widths=(8, 16, 16), blocks_per_level=1, groups=4)  # 4 pixels a latent cell
CLOSE = dict(rtol=1e-10, atol=1e-10)  # float64, through a whole model


def small(config=SMALL) -> VAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VAE(config).double()


def noise(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_number_of_parameters_is_stable_diffusions():
    with torch.device("meta"):
        vae = VAE(SD1.vae)
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863  # counted in the original class


@pytest.mark.parametrize("size", [(16, 16), (4, 4), (20, 12)])
def test_a_picture_becomes_latents_of_a_quarter_the_size_and_comes_back(size):
    vae, pixels = small(), noise(2, 3, *size)
    latents = vae.encode(pixels)
    assert latents.mean.shape == latents.logvar.shape == (2, 4, size[0] // 4, size[1] // 4)
    assert vae.decode(latents.mean).shape == pixels.shape


@pytest.mark.parametrize("height, width", [(16, 18), (15, 16), (17, 17), (2, 4)])
def test_a_size_that_does_not_divide_is_refused_with_the_multiple(height, width):
    message = f"picture of {width} x {height} pixels: the VAE needs multiples of 4; crop or resize it"
    with pytest.raises(ValueError, match=message):
        small().encode(torch.zeros(1, 3, height, width, dtype=torch.float64))


def test_a_picture_of_four_channels_is_refused():
    with pytest.raises(TypeCheckError):
        small().encode(noise(1, 4, 16, 16))


def test_the_factor_is_one_halving_a_level_but_the_last():
    assert SD1.vae.factor == 8
    assert SMALL.factor == 4
    assert VAEConfig(widths=(32,)).factor == 1


def test_a_row_of_the_batch_knows_nothing_of_the_others():
    vae, pixels, z = small(), noise(3, 3, 16, 16), noise(3, 4, 4, 4)
    torch.testing.assert_close(vae.encode(pixels[1:2]).mean, vae.encode(pixels).mean[1:2], **CLOSE)
    torch.testing.assert_close(vae.decode(z[1:2]), vae.decode(z)[1:2], **CLOSE)


def test_the_vae_never_scales():
    """The scaling factor is the diffuser's business: with another one the VAE gives the same."""
    other = small(VAEConfig(widths=(8, 16, 16), blocks_per_level=1, groups=4, scaling_factor=7.0))
    pixels, z = noise(1, 3, 16, 16), noise(1, 4, 4, 4)
    assert torch.equal(other.encode(pixels).mean, small().encode(pixels).mean)
    assert torch.equal(other.decode(z), small().decode(z))


def test_downsampling_pads_right_and_bottom_only():
    """A convolution that picks the first of its nine values then reads pixel (2i, 2j); padded on the left, it would read (2i-1, 2j-1)."""
    level = small().encoder.down[0]
    level.blocks = nn.ModuleList()
    nn.init.zeros_(level.downsample.bias)
    nn.init.zeros_(level.downsample.weight)
    level.downsample.weight.data[range(8), range(8), 0, 0] = 1
    x = noise(1, 8, 6, 6)
    assert torch.equal(level(x), x[:, :, ::2, ::2])
    level.downsample.weight.data = level.downsample.weight.data.flip(2, 3)  # the last of the nine
    assert torch.equal(level(x)[:, :, :2, :2], x[:, :, 2::2, 2::2])
    assert not level(x)[:, :, 2].any() and not level(x)[:, :, :, 2].any()  # from the padding


def test_every_group_norm_has_eps_1e_6():
    assert {m.eps for m in small().modules() if isinstance(m, nn.GroupNorm)} == {1e-6}


def test_a_gradient_reaches_every_parameter():
    vae = small()
    latents = vae.encode(noise(1, 3, 16, 16))
    (vae.decode(latents.sample(torch.Generator().manual_seed(0))).square().sum() + latents.kl().sum()).backward()
    # But the keys' biases: they add the same to all logits of a row, which softmax does not see.
    without = [name for name, p in vae.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in without if not name.endswith("to_k.bias")] == []


def test_logvar_stays_where_its_exponential_is_a_number():
    vae = small()
    nn.init.constant_(vae.quant_conv.bias, 1e4)
    assert vae.encode(noise(1, 3, 16, 16)).logvar.unique().tolist() == [20.0]
    nn.init.constant_(vae.quant_conv.bias, -1e4)
    assert vae.encode(noise(1, 3, 16, 16)).logvar.unique().tolist() == [-30.0]


# ---------------------------------------------------------------------------------------------------------- Gaussian


def test_the_kl_divergence_is_that_of_torch_distributions():
    mean, logvar = 2 * noise(3, 4, 5, 6), noise(3, 4, 5, 6, seed=1)
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(DiagonalGaussian(mean, logvar).kl(), expected, **CLOSE)
    assert DiagonalGaussian(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)).kl().item() == 0


def test_samples_have_the_mean_and_the_variance_they_should():
    n = 200_000
    mean, logvar = torch.tensor([-1.0, 3.0]), torch.tensor([-2.0, 1.0])
    shape = (1, 2, n, 1)
    gaussian = DiagonalGaussian(mean.reshape(1, 2, 1, 1).expand(shape), logvar.reshape(1, 2, 1, 1).expand(shape))
    drawn = gaussian.sample(torch.Generator().manual_seed(0))
    std = (logvar / 2).exp()
    # Five standard errors: std / sqrt(n) of a mean, std / sqrt(2 n) of a standard deviation.
    assert ((drawn.mean(dim=(0, 2, 3)) - mean).abs() < 5 * std / math.sqrt(n)).all()
    assert ((drawn.std(dim=(0, 2, 3)) - std).abs() < 5 * std / math.sqrt(2 * n)).all()


def test_a_sample_is_the_generators_alone():
    gaussian = DiagonalGaussian(noise(1, 4, 3, 3), noise(1, 4, 3, 3, seed=1))
    first, again = (gaussian.sample(torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, gaussian.sample(torch.Generator().manual_seed(6)))
    state = torch.get_rng_state()
    gaussian.sample(torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_gaussian_without_spread_gives_its_mean():
    mean = noise(1, 4, 3, 3)
    drawn = DiagonalGaussian(mean, torch.full_like(mean, -30.0)).sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, mean, rtol=0, atol=5 * math.exp(-15))  # five standard deviations


def test_a_mean_and_a_logvar_of_different_shape_are_refused():
    with pytest.raises(TypeCheckError):
        DiagonalGaussian(torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 3, 2))
