"""The attention layers of Stable Diffusion: their shapes, inputs that are hard for them, and exact results."""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from minidiff.config import ModelConfig
from minidiff.two_encoders import text_configs

KINDS = ("normal", "logits near 60", "one dominant key", "large mean", "equal rows")


@dataclass(frozen=True)
class AttentionCase:
    """An attention layer. calls: how often a U-Net step runs it. backward: training differentiates it."""

    where: str
    tokens: int
    keys: int
    heads: int
    head_dim: int
    calls: int
    batch: int
    dtype: str
    causal: bool = False
    backward: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.tokens} x {self.keys}, {self.heads} x {self.head_dim}, {self.dtype}"


def directions(case: AttentionCase) -> tuple[str, ...]:
    """Return what is timed: the forward pass, and both passes if training differentiates it."""
    return ("forward", "both") if case.backward else ("forward",)


def list_cases(name: str, config: ModelConfig, size: int, batch: int, dtype: str) -> list[AttentionCase]:
    """List all attention layers of a model: the U-Net's with guidance, the text encoder's, and the decoder's single one.

    Args:
        name: Of the model, for the cases' names.
        config: Of the model.
        size: Pixels a side.
        batch: 2 is one picture with guidance.
        dtype: Of the inputs.
    """
    unet, cells = config.unet, size // config.vae.factor
    words, cases = config.text_encoder.context_length, []
    for i, (width, heads) in enumerate(zip(unet.widths, unet.heads)):
        # Each level on the way down, and one more on the way up; the middle has another, at the last level's resolution.
        depth = unet.attention[i]
        calls = (2 * unet.blocks_per_level + 1) * depth + (i == len(unet.widths) - 1) * max(1, depth)
        side = -(-cells // 2**i)
        for kind, keys in (("self", side * side), ("cross", words)) if calls else ():
            cases.append(AttentionCase(f"{name} {size} {kind}", side * side, keys, heads, width // heads, calls, batch, dtype))
    for _, text in text_configs(config).values():
        cases.append(AttentionCase(f"{name} text", words, words, text.heads, text.width // text.heads, 0, batch, dtype, causal=True))
    cases.append(
        AttentionCase(f"{name} {size} decoder", cells * cells, cells * cells, 1, config.vae.widths[-1], 0, 1, dtype, backward=False)
    )
    return list(dict.fromkeys(cases))


def inputs(case: AttentionCase, kind: str) -> dict[str, Tensor]:
    """Draw q, k, v and the gradient of the output, float32 on the CPU. A comment says what is hard about each kind."""
    generator = torch.Generator().manual_seed(0)
    B, h, d = case.batch, case.heads, case.head_dim
    lengths = (case.tokens, case.keys, case.keys, case.tokens)
    q, k, v, grad = (torch.randn(B, tokens, h * d, generator=generator) for tokens in lengths)
    if kind == "logits near 60":  # a common part of q and k: all exponentials are e^60 times what they would be
        common = (60 / d**0.5) ** 0.5
        q, k = q / d**0.25 + common, k / d**0.25 + common
    elif kind == "one dominant key":  # the softmax is nearly a choice
        q = q + 2
        k[:, case.keys // 2] = 5
    elif kind == "large mean":  # the differences between values are small beside the values
        v = v + 100
    elif kind == "equal rows":  # every query asks the same
        q = q[:, :1].expand_as(q).contiguous()
    return {"q": q, "k": k, "v": v, "grad": grad}


def exact(case: AttentionCase, tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Compute the output and the gradients in float64, one head at a time, of inputs rounded to the case's dtype."""
    dtype = getattr(torch, case.dtype)
    rounded = [rearrange(x.to(dtype).to(device), "B N (h d) -> (B h) N d", h=case.heads) for x in tensors.values()]
    rows = {name: [] for name in ("out", "dq", "dk", "dv")}
    for head in zip(*rounded):
        q, k, v = (x.double().requires_grad_(case.backward) for x in head[:3])
        logits = q @ k.T / case.head_dim**0.5
        if case.causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
        out = logits.softmax(-1) @ v
        rows["out"].append(out.detach())
        if case.backward:
            for name, gradient in zip(("dq", "dk", "dv"), torch.autograd.grad(out, (q, k, v), head[3].double())):
                rows[name].append(gradient)
    # Half precision is compared in float32, 10,000 times as exact: half the bytes to keep.
    kept = torch.float64 if case.dtype == "float32" else torch.float32
    return {
        name: rearrange(torch.stack(heads), "(B h) N d -> B N (h d)", h=case.heads).to("cpu", kept) for name, heads in rows.items() if heads
    }
