"""Every kernel of ours that SDXL runs at 1024 x 1024, compiled for GPUs that need not be there: A100 (8.0) and H100, H200 (9.0).

The shapes are not listed but asked of the model: U-Net, text encoders and VAE run on tensors without contents, and say what they would launch.
The VAE is never trained, so of its kernels the forward pass counts alone.
"""

from functools import cache, partial
from unittest import mock

import pytest
import torch

from minidiff import attention, blocks
from minidiff.conditioning import Conditioning
from minidiff.config import SDXL
from minidiff.kernels.group_norm_silu import fused_group_norm_silu
from minidiff.two_encoders import text_configs
from tests.kernels import test_compiled, test_cross_attention, test_geglu, test_group_norm_silu
from tests.kernels.compile_kernels import assert_compiled_well, built
from weights_loader.empty_parts import empty_parts

KERNELS = {
    "self-attention": {"forward_kernel", "delta_kernel", "dk_dv_kernel", "dq_kernel"},
    "cross-attention": {"forward_kernel", "backward_kernel", "add_strips_kernel"},
    "U-Net's GroupNorm": {"statistics_kernel", "normalise_kernel", "sums_kernel", "gradient_kernel"},
    "VAE's GroupNorm": {"statistics_kernel", "normalise_kernel"},
    "GEGLU": {"forward_kernel", "backward_kernel"},
}


@cache
def shapes() -> dict[str, set[tuple]]:
    """Self-attention: (tokens, head width, heads, causal); cross-attention: (tokens, keys, head width, heads); GroupNorm: (C, H, W); GEGLU: (tokens, 2 F)."""
    found = {kind: set() for kind in KERNELS}

    def note_kernel(part, operation, x, shape):
        found[{"group_norm_silu": f"{part}'s GroupNorm", "geglu": "GEGLU"}[operation]].add(tuple(shape))
        return False

    def note_attention(q, k, v, heads, causal=False):
        (N, d), L = (q.shape[1], q.shape[2] // heads), k.shape[1]
        if N != L:
            found["cross-attention"].add((N, L, d, heads))
        elif d < 512:  # the VAE's single head, 512 wide, is left to PyTorch
            found["self-attention"].add((N, d, heads, causal))
        return "pytorch"

    parts, cells = empty_parts(SDXL), SDXL.image_size // SDXL.vae.factor
    empty = partial(torch.empty, device="meta")
    with (
        torch.no_grad(),
        mock.patch.object(attention, "select_backend", note_attention),
        mock.patch.object(blocks, "select_kernel") as asked,
    ):
        for name, (_, config) in text_configs(SDXL).items():
            parts.encoders[name](torch.zeros(1, config.context_length, dtype=torch.int64, device="meta"))
        told = Conditioning(empty(1, 77, SDXL.unet.context_width), empty(1, SDXL.unet.pooled_width or 0), empty(1, 6))
        asked.side_effect = partial(note_kernel, "U-Net")
        parts.unet(empty(1, 4, cells, cells), torch.zeros(1, dtype=torch.int64, device="meta"), told)
        asked.side_effect = partial(note_kernel, "VAE")
        parts.vae.encode(empty(1, 3, SDXL.image_size, SDXL.image_size))
        parts.vae.decode(empty(1, 4, cells, cells))
    return found


def test_the_shapes_are_those_of_the_paper():
    found = shapes()
    assert found["self-attention"] == {(4096, 64, 10, False), (1024, 64, 20, False), (77, 64, 12, True), (77, 64, 20, True)}
    assert found["cross-attention"] == {(4096, 77, 64, 10), (1024, 77, 64, 20)}
    assert found["GEGLU"] == {(4096, 2 * 4 * 640), (1024, 2 * 4 * 1280)}
    unet = {(320, 128), (640, 128), (960, 128), (320, 64), (640, 64), (960, 64), (1280, 64), (1920, 64)}
    unet |= {(640, 32), (1280, 32), (1920, 32), (2560, 32)}
    vae = {(512, 128), (512, 256), (512, 512), (256, 256), (256, 512), (256, 1024), (128, 512), (128, 1024)}
    assert found["U-Net's GroupNorm"] == {(C, side, side) for C, side in unet}
    assert found["VAE's GroupNorm"] == {(C, side, side) for C, side in vae}


def normalise(C, H, W):
    x, weight = torch.empty(1, C, H, W, dtype=torch.bfloat16).to(memory_format=torch.channels_last), torch.empty(C, dtype=torch.bfloat16)
    with torch.no_grad():
        fused_group_norm_silu(x, 32, weight, weight, 1e-6, True)


def cases():
    """{name: what launches the kernels of a shape, forward and backward}, for compile_kernels.py."""
    calls = {
        "self-attention": lambda shape: test_compiled.trained(*shape, dtype=torch.bfloat16),
        "cross-attention": lambda shape: partial(test_cross_attention.call, 2, *shape, torch.bfloat16),
        "U-Net's GroupNorm": lambda shape: partial(test_group_norm_silu.both_ways, *shape),
        "VAE's GroupNorm": lambda shape: partial(normalise, *shape),
        "GEGLU": lambda shape: partial(test_geglu.both_ways, shape[0], shape[1] // 2),
    }
    return {f"{kind} {shape}": calls[kind](shape) for kind, found in shapes().items() for shape in sorted(found)}


def __getattr__(name):
    """CASES are made when compile_kernels.py asks for them, not while tests are collected."""
    if name == "CASES":
        return cases()
    raise AttributeError(name)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", KERNELS)
def test_they_compile_without_spills_and_with_wide_loads(kind, capability):
    kernels = built(__name__, capability, kind)
    assert {kernel.kernel for kernel in kernels} == KERNELS[kind]
    for kernel in kernels:
        few = 2 if kind.endswith("GroupNorm") else 0  # of weight and bias: once a program
        assert_compiled_well(kernel, capability, narrow_loads=min(kernel.narrow_loads, few))
        multiplies = kind.endswith("attention") and kernel.kernel not in ("delta_kernel", "add_strips_kernel")
        assert (kernel.tensor_core > 0) == multiplies, kernel
