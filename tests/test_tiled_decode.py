"""Decoding in strips: the same picture as the whole decoder's, whatever the strips, and how much memory it holds."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import weights_loader
from minidiff import tiled_decode
from minidiff.config import SD1, VAEConfig
from minidiff.tiled_decode import decode_tiled, should_tile
from minidiff.vae import VAE
from tests.small_models import small_model

SMALL = VAEConfig(widths=(8, 16, 16), blocks_per_level=1, groups=4)  # 4 pixels a latent cell
# The statistics are summed in another order, and a convolution of fewer rows may be too. Through a dozen layers that is some hundred units
# in the last place of values near 1. bfloat16 rounds each layer's output to 8 digits: a dozen roundings of 2^-9, some now the other way.
CLOSE = {torch.float32: dict(rtol=1e-5, atol=1e-5), torch.bfloat16: dict(rtol=2**-5, atol=2**-5)}


def small(config=SMALL, dtype=torch.float32) -> VAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VAE(config).to(dtype)


def latents(B, h, w, dtype=torch.float32, channels=4):
    return torch.randn(B, channels, h, w, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_equal_but_for_rounding(vae, z, rows):
    with torch.no_grad():
        whole, in_strips = vae.decode(z), decode_tiled(vae, z, rows)
    assert in_strips.dtype == whole.dtype and whole.abs().max() > 0.1
    torch.testing.assert_close(in_strips, whole, **CLOSE[z.dtype])


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("rows", [1, 3, 8, 1000])
@pytest.mark.parametrize("B, h, w", [(1, 7, 5), (2, 1, 3), (3, 8, 8)])
def test_strips_give_the_whole_picture_but_for_rounding(B, h, w, rows, dtype):
    assert_equal_but_for_rounding(small(dtype=dtype), latents(B, h, w, dtype), rows)


@pytest.mark.parametrize("dtype", CLOSE)
def test_with_the_channels_innermost_too(dtype):
    vae = small(dtype=dtype).to(memory_format=torch.channels_last)
    z = latents(2, 7, 5, dtype).to(memory_format=torch.channels_last)
    assert_equal_but_for_rounding(vae, z, 3)
    assert decode_tiled(vae, z, 3).is_contiguous(memory_format=torch.channels_last)


def test_a_decoder_of_one_level_never_grows():
    assert_equal_but_for_rounding(small(VAEConfig(widths=(8,), blocks_per_level=1, groups=4)), latents(1, 9, 6), 2)


@pytest.mark.parametrize("rows", [None, 5])
def test_the_bundled_vae_draws_the_same_picture(rows):
    vae = weights_loader.load("tiny").vae
    z = latents(2, 16, 16, channels=vae.config.latent_channels) / vae.config.scaling_factor
    with torch.no_grad():
        whole = vae.decode(z)
    torch.testing.assert_close(decode_tiled(vae, z, rows), whole, rtol=1e-4, atol=1e-4)  # weights and latents are larger than above


@pytest.mark.parametrize("mean", [100.0, -3000.0])
def test_statistics_keep_their_digits_where_the_mean_is_large(mean):
    """In float64 the whole map's; E[x^2] - E[x]^2 in float32 would lose 3000^2 / 2^24, half of a variance of 1."""
    norm = torch.nn.GroupNorm(2, 6, eps=1e-6)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 11, 5, generator=torch.Generator().manual_seed(0)) + mean
    x += torch.arange(11.0)[:, None]  # strips unlike each other
    kept, silu_of_norm = tiled_decode._with_norm_statistics(x.split(2, dim=2), norm)
    assert torch.equal(torch.cat(list(kept), dim=2), x)
    expected = torch.nn.functional.silu(norm.double()(x.double()))
    torch.testing.assert_close(silu_of_norm(x).double(), expected, rtol=1e-5, atol=20 * abs(mean) * 2**-24)  # a few roundings of the mean


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that were made inside and lived at once, at most. What a kernel holds for itself is not seen."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return

        def freed():
            self.alive.remove(key)
            self.now -= size

        weakref.finalize(storage, freed)
        self.alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)


def peak(decode) -> int:
    with torch.no_grad(), PeakMemory() as memory:
        decode()
    return memory.peak


@pytest.mark.parametrize("rows", [4, 8, 16])
def test_memory_is_one_feature_map_and_seven_strips(rows):
    """As in Stable Diffusion, the last level gets twice the channels that it has. The whole decoder holds three such maps."""
    vae, z = small(VAEConfig(widths=(16, 32, 64), blocks_per_level=2, groups=8)), latents(1, 64, 64)
    row = 256 * 32 * 4  # bytes: width, channels, float32
    assert peak(lambda: decode_tiled(vae, z, rows)) <= (256 + 7 * (rows + 2)) * row
    assert peak(lambda: vae.decode(z)) >= 3 * 256 * row


def test_strips_of_no_rows_are_refused():
    with pytest.raises(ValueError, match="strips of 0 rows: give at least 1"):
        decode_tiled(small(), latents(1, 4, 4), 0)


def test_large_pictures_are_worth_it():
    def worth(B, size, device="cpu", config=SD1.vae):
        return should_tile(config, torch.empty(B, 4, size // config.factor, size // config.factor, device=device))

    assert worth(1, 512) and worth(4, 256) and not worth(1, 256)
    assert worth(1, 1024, "meta") and not worth(1, 512, "meta")  # not a CPU: more memory, and dearer launches
    assert not worth(16, 64, config=small_model().config.vae)


def test_the_pipeline_decodes_large_pictures_in_strips_unless_told_otherwise(monkeypatch):
    sd, z, calls = small_model(), latents(2, 8, 8), []
    monkeypatch.setattr("minidiff.tiled_decode.decode_tiled", lambda vae, z: calls.append(len(z)) or decode_tiled(vae, z, 5))
    whole = sd.decode(z)
    assert not calls
    monkeypatch.setitem(tiled_decode.VALUES_WORTH_IT, "cpu", 2**14)  # two pictures of 32 x 32 pixels, 8 channels
    torch.testing.assert_close(sd.decode(z), whole, **CLOSE[torch.float32])
    assert calls == [2]
    assert torch.equal(sd.decode(z, tiled=False), whole) and calls == [2]
