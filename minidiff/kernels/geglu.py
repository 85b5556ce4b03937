"""GEGLU in Triton: a value times the GELU of a gate, in the feed-forward part of every transformer block, and its gradients.

    x = [value, gate]       y = value * gelu(gate)       gelu(g) = g Phi(g)       Phi(g) = (1 + erf(g / sqrt 2)) / 2

(Shazeer 2020, "GLU variants improve transformer"; Hendrycks and Gimpel 2016, "Gaussian error linear units".) Equal to
`minidiff.blocks.geglu` on PyTorch's own operations, which go through memory twice: GELU of the gate, then the product. Here each number is
read once and written once. In the backward pass, with phi(g) = exp(-g^2 / 2) / sqrt(2 pi), the slope of Phi:

    dvalue = dy gelu(gate)       dgate = dy value (Phi(gate) + gate phi(gate))

Calculated in float32, kept in the dtype of x. Left out: GELU's approximation by tanh, which Stable Diffusion does not use.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from minidiff.kernels.tiles import device_of, jit, no_kernel_for, register_operation, tl, triton

BLOCK = 1024  # results of a program: with 4 warps 8 a thread, which are 16 bytes of 16-bit numbers, the widest load there is
WARPS = 4
SQRT_HALF = tl.constexpr(math.sqrt(0.5))
SLOPE_AT_0 = tl.constexpr(1 / math.sqrt(2 * math.pi))


@jit
def _load(x, i, size, F: tl.constexpr):
    """Where results i of all rows' have their value in x, [rows, 2 F], and value and gate in float32."""
    at = x + i // F * (2 * F) + i % F
    value = tl.load(at, mask=i < size, other=0.0).to(tl.float32)
    gate = tl.load(at + F, mask=i < size, other=0.0).to(tl.float32)
    return value, gate


@jit
def _Phi(g):
    return 0.5 + 0.5 * tl.math.erf(g * SQRT_HALF)


@jit
def forward_kernel(x, y, size, F: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value, gate = _load(x, i, size, F)
    tl.store(y + i, (value * (gate * _Phi(gate))).to(y.dtype.element_ty), mask=i < size)


@jit
def backward_kernel(dy, x, dx, size, F: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value, gate = _load(x, i, size, F)
    dy_i = tl.load(dy + i, mask=i < size, other=0.0).to(tl.float32)
    Phi = _Phi(gate)
    dvalue = dy_i * (gate * Phi)
    dgate = dy_i * value * (Phi + gate * (SLOPE_AT_0 * tl.exp(-0.5 * gate * gate)))
    at = dx + i // F * (2 * F) + i % F
    tl.store(at, dvalue.to(dx.dtype.element_ty), mask=i < size)
    tl.store(at + F, dgate.to(dx.dtype.element_ty), mask=i < size)


def fused_geglu(x: Float[Tensor, "... D"]) -> Float[Tensor, "... F"]:
    """Multiply the first half of x's last axis by the GELU of its second half. float16, bfloat16 or float32.

    Twice the same inputs, twice the same bits, forward and backward. Raises ValueError for what `unsupported` names.
    """
    if reason := unsupported(x):
        raise ValueError(f"fused GEGLU: {reason}")
    return run_geglu(x)


def run_geglu(x: Float[Tensor, "... D"]) -> Float[Tensor, "... F"]:
    """Compute `fused_geglu` of a tensor that `unsupported` was asked about, without asking again."""
    return _GEGLU.apply(x)


def unsupported(x: Tensor) -> str | None:
    """Why `fused_geglu` does not take this tensor, as the end of a sentence; None if it does."""
    if reason := no_kernel_for(x):
        return reason
    if x.ndim == 0 or x.shape[-1] % 2 or x.numel() == 0:
        return f"shape {tuple(x.shape)}; the last axis is to be a value and a gate side by side"
    if not x.is_contiguous():
        return f"strides {x.stride()}; the kernel takes contiguous tensors"
    if x.numel() >= 2**31:
        return "2^31 elements or more; the kernel counts in 32 bits"
    return None


def _forward(x: Tensor) -> Tensor:
    y = _forward_shape(x)
    with device_of(x):
        forward_kernel[(triton.cdiv(y.numel(), BLOCK),)](x, y, y.numel(), y.shape[-1], BLOCK, num_warps=WARPS)
    return y


def _forward_shape(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _backward(dy: Tensor, x: Tensor) -> Tensor:
    dy, dx = dy.contiguous(), torch.empty_like(x)
    with device_of(x):
        backward_kernel[(triton.cdiv(dy.numel(), BLOCK),)](dy, x, dx, dy.numel(), dy.shape[-1], BLOCK, num_warps=WARPS)
    return dx


def _backward_shape(dy: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x)


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.ops.minidiff.geglu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.minidiff.geglu_backward(dy, x)


register_operation("geglu", _forward, _backward, shapes=_forward_shape, backward_shapes=_backward_shape)
