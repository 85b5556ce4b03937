"""Check that kernels and the whole model compute what they should: the first stages of `minidiff bench gpu`, in a process of their own.

    kernel        inputs -> our kernel, three times -> equal bits? RMS errors against float64, next to those of PyTorch's operations
    whole model   the same weights and inputs -> text encoder, U-Net and decoder in float32 on the CPU, and on the device

An error is relative to the exact result's root mean square. A kernel may be off by 1.1 times what PyTorch's best operation is in the same
dtype, plus ROUNDING.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minidiff.bench.attention_cases import KINDS, AttentionCase, exact, inputs, list_cases
from minidiff.bench.common import model_config
from minidiff.bench.contender import Refused, serve
from minidiff.bench.pipelines import minidiff_model, start_worker
from minidiff.kernels.cross_attention import fused_cross_attention
from minidiff.kernels.dispatch import attention_backend
from minidiff.kernels.geglu import fused_geglu
from minidiff.kernels.group_norm_silu import fused_group_norm_silu
from minidiff.kernels.self_attention import fused_self_attention
from minidiff.kernels.tiles import WIDEST_HEAD

ERROR_TOLERANCE = 1.1  # times the error of PyTorch's best operation
# Added to it, in eps of the dtype: where a 16-bit result is exact to its last digit, float32's own roundings; in float32, whose sums
# PyTorch takes in another order, a rounding more.
ROUNDING = {torch.float16: 0.01, torch.bfloat16: 0.01, torch.float32: 1.0}
# Of whole parts against float32 on the CPU: float32 sums in another order, as the parity tests allow; and 8 bits through some 60 layers,
# which gather about 0.01, where a wrong kernel gives 1.
MODEL_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)
# (B, C, groups, H, W), of which GroupNorm + SiLU takes the mean of Stable Diffusion 1's U-Net and decoder at 512 pixels.
NORMS = ((2, 320, 32, 64, 64), (2, 1280, 32, 16, 16), (2, 2560, 32, 8, 8), (1, 128, 32, 512, 512), (1, 512, 32, 64, 64))
GATES = ((2, 4096, 2560), (2, 1024, 5120), (2, 256, 10240))  # (B, N, D) that GEGLU halves, likewise
SMALL_ATTENTION = (("self", 20, 20, False), ("cross", 20, 13, False), ("text", 9, 9, True))  # (where, tokens, keys, causal)
SMALL_NORMS, SMALL_GATES = ((2, 12, 4, 3, 5),), ((3, 5, 26),)

Run = Callable[[], tuple[Tensor, ...]]
Check = Callable[[], dict]


# ------------------------------------------------------------------------------------------------------------- kernels


def kernel_checks(device: torch.device, miniature: bool) -> dict[str, Check]:
    """Return a check per kernel, shape, dtype and kind of input, by name.

    miniature: small shapes in float32, for Triton's interpreter, which cuts bfloat16 off where a GPU rounds, and easy inputs: float32's
        errors at large logits are bounded by the tests of the kernels.
    """
    dtypes = (torch.float32,) if miniature else (torch.bfloat16, torch.float16)
    checks: dict[str, Check] = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        if miniature:
            cases = [AttentionCase(where, N, L, 2, 24, 1, 2, name, causal) for where, N, L, causal in SMALL_ATTENTION]
        else:
            cases = [case for case in list_cases("sd1", model_config("sd1"), 512, 2, name) if case.head_dim <= WIDEST_HEAD]
        for case in cases:
            checks |= {
                f"attention, {case}, {kind}": partial(check_attention, case, kind, device) for kind in KINDS[: 1 if miniature else None]
            }
        for shape in SMALL_NORMS if miniature else NORMS:
            checks[f"GroupNorm + SiLU, {shape}, {name}"] = partial(check_group_norm_silu, shape, dtype, device)
        for shape in SMALL_GATES if miniature else GATES:
            checks[f"GEGLU, {shape}, {name}"] = partial(check_geglu, shape, dtype, device)
    return checks


def check_attention(case: AttentionCase, kind: str, device: torch.device) -> dict:
    """Check our kernel for this shape, forward and backward, against PyTorch's best backend."""
    drawn = inputs(case, kind)
    exactly = exact(case, drawn, device)
    q, k, v, grad = (drawn[name].to(device, getattr(torch, case.dtype)) for name in ("q", "k", "v", "grad"))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if case.tokens == case.keys:
            return fused_self_attention(q, k, v, case.heads, case.causal)
        return fused_cross_attention(q, k, v, case.heads)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (rearrange(x, "B N (h d) -> B h N d", h=case.heads) for x in (q, k, v))
        return rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=case.causal), "B h N d -> B N (h d)")

    def with_backend(backend: SDPBackend) -> tuple[Tensor, ...]:
        with sdpa_kernel(backend):
            return forward_and_backward(theirs, (q, k, v), grad)

    return judge(partial(forward_and_backward, ours, (q, k, v), grad), [partial(with_backend, one) for one in BACKENDS], exactly)


def check_group_norm_silu(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict:
    """Check SiLU(GroupNorm(x)) with x channels-last. shape: (B, C, groups, H, W)."""
    B, C, groups, H, W = shape
    generator = torch.Generator().manual_seed(0)
    x, grad = 0.7 + torch.randn(B, C, H, W, generator=generator), torch.randn(B, C, H, W, generator=generator)
    weight, bias = 1 + 0.3 * torch.randn(C, generator=generator), 0.5 * torch.randn(C, generator=generator)
    x, grad = (y.to(device, dtype).to(memory_format=torch.channels_last) for y in (x, grad))
    given = x, weight.to(device, dtype), bias.to(device, dtype)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fused_group_norm_silu(x, groups, weight, bias, 1e-5)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, groups, weight, bias, 1e-5))

    exactly: dict[str, Tensor] = dict(
        zip(("out", "dx", "dweight", "dbias"), forward_and_backward(theirs, [y.double() for y in given], grad.double()))
    )
    return judge(partial(forward_and_backward, ours, given, grad), [partial(forward_and_backward, theirs, given, grad)], exactly)


def check_geglu(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict:
    """Check value * GELU(gate). shape: of both side by side."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(device, dtype)
    grad = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator).to(device, dtype)

    def theirs(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)

    exactly: dict[str, Tensor] = dict(zip(("out", "dx"), forward_and_backward(theirs, [x.double()], grad.double())))
    return judge(partial(forward_and_backward, fused_geglu, [x], grad), [partial(forward_and_backward, theirs, [x], grad)], exactly)


def forward_and_backward(function: Callable[..., Tensor], given: tuple[Tensor, ...] | list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Return function(*given) and the gradients of all that is given."""
    leaves = [x.detach().requires_grad_() for x in given]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def judge(ours: Run, theirs: list[Run], exactly: Mapping[str, Tensor]) -> dict:
    """Run ours three times and compare; see the module's docstring. Ways of PyTorch that refuse the shape are passed over.

    Return errors and what is allowed by tensor, bit_equal, and ok for all of it.
    """
    runs = [ours() for _ in range(3)]
    others = []
    for run in theirs:
        try:
            others.append(relative_errors(run(), exactly))
        except RuntimeError:  # this backend has no kernel for the shape
            continue
    if not others:
        raise Refused("PyTorch has no operation to compare with")
    rounding = ROUNDING[runs[0][0].dtype] * torch.finfo(runs[0][0].dtype).eps
    errors = relative_errors(runs[0], exactly)
    allowed = {name: ERROR_TOLERANCE * min(other[name] for other in others) + rounding for name in errors}
    bit_equal = all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run))
    return verdict(errors, allowed, bit_equal)


def relative_errors(found: tuple[Tensor, ...], exactly: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the RMS of each difference over the RMS of the exact tensor."""
    errors = {}
    for x, (name, y) in zip(found, exactly.items(), strict=True):
        y = y.to(x.device, torch.float64)
        errors[name] = float((x.double() - y).square().mean().sqrt() / y.square().mean().sqrt())
    return errors


def verdict(errors: dict[str, float], allowed: dict[str, float], bit_equal: bool) -> dict:
    """Put a check's answer together. An error that is no number is too large."""
    within = all(errors[name] <= allowed[name] for name in errors)
    return {"errors": errors, "allowed": allowed, "bit_equal": bit_equal, "ok": within and bit_equal}


# --------------------------------------------------------------------------------------------------------- whole model


def model_checks(job: dict, device: torch.device) -> dict[str, Check]:
    """Return a check per part and dtype of the model in job["folder"], by name; on a GPU the U-Net with our kernels alone as well."""
    sd = minidiff_model(job, torch.device("cpu"), torch.float32)
    generator, config = torch.Generator().manual_seed(0), sd.config
    cells, text = job["size"] // config.vae.factor, config.text_encoder
    x_t = torch.randn(2, config.unet.in_channels, cells, cells, generator=generator)
    context = torch.randn(2, text.context_length, config.unet.context_width, generator=generator)
    z = torch.randn(1, config.vae.latent_channels, cells // 2, cells // 2, generator=generator)
    parts: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
        "text encoder": (sd.text_encoder, (sd.tokenizer(["a red apple", ""]),)),
        "U-Net": (sd.unet, (x_t, torch.tensor([501, 20]), context)),
        "decoder": (nn.Sequential(sd.vae.post_quant_conv, sd.vae.decoder), (z,)),
    }
    known: dict[str, Tensor] = {}

    def check(name: str, dtype: str, backend: str) -> dict:
        module, given = parts[name]
        with torch.no_grad():
            if name not in known:
                known[name] = module(*given)
            there = copy.deepcopy(module).to(device, getattr(torch, dtype)).to(memory_format=torch.channels_last)
            moved = [x.to(device, getattr(torch, dtype)) if x.is_floating_point() else x.to(device) for x in given]
            with attention_backend(backend):
                runs = [there(*moved) for _ in range(3)]
        bit_equal = all(torch.equal(runs[0], run) for run in runs[1:])
        return verdict(relative_errors((runs[0],), {"out": known[name]}), {"out": MODEL_TOLERANCE[dtype]}, bit_equal)

    checks: dict[str, Check] = {
        f"{name}, {dtype}": partial(check, name, dtype, "auto") for name in parts for dtype in ("float32", "bfloat16")
    }
    if device.type == "cuda":
        checks["U-Net, bfloat16, our kernels alone"] = partial(check, "U-Net", "bfloat16", "triton")
    return checks


def prepare(job: dict) -> Callable[[dict], dict]:
    """Return the function that answers: the names of the checks, then one check after the other."""
    peak, device, _ = start_worker(job)
    peak.stop()  # nobody asks for it
    checks = kernel_checks(device, job["miniature"]) if job["what"] == "kernels" else model_checks(job, device)
    return lambda request: {"names": list(checks)} if request["do"] == "list" else checks[request["name"]]()


if __name__ == "__main__":
    serve(prepare)
