"""What the tests of the attention kernels share: cases that cover every pair, inputs of every kind, the exact answer and what may be off, PyTorch's error."""

import math
import random
from collections.abc import Callable
from itertools import combinations, product

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from minidiff.kernels.tiles import DEVICE

KINDS = ("normal", "logits around 60", "one dominant key", "large mean", "equal rows")


def every_pair(factors: dict[str, tuple], seed: int, fits: Callable[..., bool]) -> list[dict]:
    """Cases, drawn until any two values of any two factors meet in one of them (where some case that fits has both)."""

    def pairs(case: tuple) -> set:
        return set(combinations(enumerate(case), 2))

    draw = random.Random(seed)
    possible = [case for case in product(*factors.values()) if fits(**dict(zip(factors, case)))]
    left, cases = set().union(*map(pairs, possible)), []
    while left:
        case = max(draw.sample(possible, 100), key=lambda case: len(pairs(case) & left))
        if not pairs(case) & left:
            wanted = min(left, key=repr)
            case = draw.choice([case for case in possible if wanted in pairs(case)])
        left -= pairs(case)
        cases.append(dict(zip(factors, case)))
    return cases


def inputs(B: int, N: int, L: int, D: int, dtype: torch.dtype, kind: str = "normal", d: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and the gradient of the answer."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(B, n, D, generator=generator) for n in (N, L, L, N))
    if kind == "logits around 60":
        q, k = q * math.sqrt(20), k * math.sqrt(20)  # a spread of 20
    if kind == "one dominant key":
        q = q + 1
        k[:, L // 2] = 40 / math.sqrt(d)  # a logit of 40 where others are around 1
    if kind == "large mean":
        q, k, v = q + 4, k + 4, v + 20
    if kind == "equal rows":
        q, k = q[:, :1].expand_as(q), k[:, :1].expand_as(k)
    return tuple(x.to(DEVICE, dtype, copy=True) for x in (q, k, v, dout))


def answer_and_gradients(function: Callable, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *rest) -> tuple[Tensor, ...]:
    """O, dQ, dK and dV of function(q, k, v, *rest)."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = function(q, k, v, *rest)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def exact_and_allowed(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, heads: int, causal: bool = False, rounded_products: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """In float64: O, dQ, dK and dV, and how far each number may be off, from the roundings that the kernels cannot do without.

    Rounded to the dtype are P and dS for their products, and results, of which O is read again for delta; everything else is float32,
    where logits have an error of some eps |S|, which is a relative one of P and dP's terms. eps is twice the largest error of
    rounding: Triton's interpreter cuts bfloat16 off.

    rounded_products: whether the dtype also holds S - max S, dP, and what each tile of queries adds to dK and dV.
    """
    dtype = q.dtype
    q, k, v, dout = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v, dout))
    scale = 1 / math.sqrt(q.shape[-1])
    S = q @ k.mT * scale
    if causal:
        S = S.masked_fill(torch.ones_like(S, dtype=torch.bool).triu(1), -torch.inf)
    P = S.softmax(-1)
    dP = dout @ v.mT
    dS = P * (dP - (P * dP).sum(-1, keepdim=True))
    products = dout.abs() @ v.abs().mT
    terms = P * (products + (P * products).sum(-1, keepdim=True))  # of dS, before they cancel

    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny  # below tiny steps are eps tiny
    fp32 = 8 * torch.finfo(torch.float32).eps * (1 + float((q.abs() @ k.abs().mT * scale).max()))
    P_off = (eps + fp32) * P + eps * tiny
    delta_off = eps * (dout * (P @ v)).abs().sum(-1, keepdim=True)
    dS_off = eps * dS.abs() + P * delta_off + fp32 * terms + eps * tiny
    if rounded_products:
        S_off = eps * (S.amax(-1, keepdim=True) - S)
        P_off += 2 * P * (S_off + (P * S_off).sum(-1, keepdim=True))
        dS_off += 2 * terms * (S_off + (P * S_off).sum(-1, keepdim=True)) + eps * P * (dP.abs() + (P * dP.abs()).sum(-1, keepdim=True))
    exact = P @ v, scale * dS @ k, scale * dS.mT @ q, P.mT @ dout
    off = P_off @ v.abs(), scale * dS_off @ k.abs(), scale * dS_off.mT @ q.abs(), P_off.mT @ dout.abs()
    if rounded_products:
        off = *off[:2], off[2] + eps * scale * dS.abs().mT @ q.abs(), off[3] + eps * P.mT @ dout.abs()
    return [tuple(y.transpose(1, 2).flatten(-2) for y in (x, x_off + eps * (x.abs() + tiny))) for x, x_off in zip(exact, off)]


def rms(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).square().mean().sqrt())


def least_errors_of_pytorch(tensors: tuple[Tensor, ...], exact: list[Tensor], heads: int, causal: bool = False) -> list[float]:
    """For O, dQ, dK and dV the least RMS error of PyTorch's backends that take the shape."""

    def theirs(q, k, v):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(-2)

    errors = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
        try:
            with sdpa_kernel(backend):
                errors.append([rms(x, y) for x, y in zip(answer_and_gradients(theirs, *tensors), exact)])
        except RuntimeError:  # refuses the shape
            continue
    return list(map(min, zip(*errors)))
