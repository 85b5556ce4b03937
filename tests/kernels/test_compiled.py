"""What the compiler makes of the self-attention kernels, for GPUs that need not be there: A100 (8.0), H100 and H200 (9.0), and others."""

from collections.abc import Callable
from itertools import product

import pytest
import torch

from minidiff.kernels.self_attention import fused_self_attention
from tests.kernels.compile_kernels import assert_compiled_well, built

# name: tokens, head width, heads, causal. A name that appears in several places has the same kernels there.
SHAPES = {
    "SD 1.5, 512 and 768, level 1": (4096, 40, 8, False),
    "SD 1.5, 512 and 768, level 2": (1024, 80, 8, False),
    "SD 1.5, 512 and 768, level 3; 512, middle": (256, 160, 8, False),
    "SD 1.5, 768, middle": (144, 160, 8, False),
    "SD 2.1, 512 and 768, levels 1 and 2": (4096, 64, 5, False),
    "SD 2.1, 512 and 768, level 3; 512, middle": (256, 64, 20, False),
    "SD 2.1, 768, middle": (144, 64, 20, False),
    "SDXL, 1024, levels 2 and 3": (4096, 64, 10, False),
    "text encoders": (77, 64, 12, True),
    "bundled model, levels 1 and 2": (256, 32, 2, False),
    "bundled model, middle": (16, 32, 5, False),
    "bundled model, text encoder": (32, 32, 4, True),
    "bundled model, VAE": (256, 96, 1, False),
}


NARROW = "tokens that start at odd addresses"


def trained(N: int, d: int, heads: int, causal: bool, dtype: torch.dtype, more: int = 0) -> Callable[[], None]:
    """Forward and backward from one fused projection, which is `more` wider than it need be; on numbers that nobody has set."""

    def call():
        x = torch.empty(2, N, 3 * heads * d + more, dtype=dtype, requires_grad=True)
        out = fused_self_attention(*x[..., : 3 * heads * d].chunk(3, dim=-1), heads, causal)
        torch.autograd.grad(out, x, torch.empty_like(out))

    return call


CASES = {
    f"{name}, {dtype}": trained(*shape, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32) for name, shape in SHAPES.items()
}
CASES[NARROW] = trained(256, 32, 2, False, torch.float16, more=1)


QUICK = list(product(("float16", "bfloat16"), (80, 90)))
SLOW = [*product(("float32",), (80, 90)), *product(("bfloat16",), (86, 89, 100, 120))]


@pytest.mark.parametrize(("dtype", "capability"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_every_shape_of_stable_diffusion_compiles_to_what_was_meant(dtype, capability):
    kernels = built(__name__, capability, f"torch.{dtype}")
    assert {kernel.kernel for kernel in kernels} == {"forward_kernel", "delta_kernel", "dk_dv_kernel", "dq_kernel"}
    for kernel in kernels:
        # For 10.0 Triton 3.8 keeps up to 32 bytes of the bundled model's forward pass in memory, with registers to spare: slower, not wrong.
        if not (capability == 100 and kernel.kernel == "forward_kernel" and kernel.case.startswith("bundled")):
            assert_compiled_well(kernel, capability)
        if dtype != "float32" and kernel.kernel != "delta_kernel":
            assert kernel.tensor_core > 0, f"{kernel} multiplies matrices without tensor cores"


def test_loads_of_two_bytes_would_be_noticed():
    assert max(kernel.narrow_loads for kernel in built(__name__, 90, NARROW)) > 0
