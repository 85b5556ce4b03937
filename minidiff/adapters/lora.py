"""LoRA: a low-rank change beside the frozen weights of chosen layers.

    x ----------------- W0 -----------------+--> W0 x + (alpha / r) up down x
      \\- dropout - down - up - (alpha / r) -/

Paper: Hu et al. 2021, "LoRA: low-rank adaptation of large language models" (section 4.1). In Stable Diffusion W0 is a projection of the
attentions, any linear layer or a convolution, of the U-Net and the text encoder. The model's own modules and weights stay as they are:
the change is added to a layer's output by a forward hook, and removing the hook takes it back, bit for bit.

Left out: DoRA, LoHa, LoKr, and rsLoRA's scale alpha / sqrt(r), which is an alpha r times sqrt(r).
"""

import math
import re
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.adapters.custom_diffusion import is_replaced
from minidiff.pipeline import StableDiffusion

PARTS = ("unet", "text_encoder")

# Sets of layers that the public trainers choose, to be added up: PATTERNS["attention"] + PATTERNS["text_encoder"].
TRANSFORMER = r"^unet\..*\.transformers?\."
PATTERNS = {
    "attention": (r"^unet\..*attention\.to_(q|k|v|out)$",),  # diffusers
    "transformer": (TRANSFORMER,),  # kohya: every linear layer of the transformers, proj_in and proj_out too
    "conv": (TRANSFORMER, r"^unet\..*\.(conv_1|conv_2|skip|time_projection|downsample|upsample)$"),  # kohya with conv_dim, LoCon
    "text_encoder": (r"^text_encoder\..*attention\.to_(q|k|v|out)$",),  # diffusers
}
INITS = ("gaussian", "kaiming")
SHARES = ("sum", "frobenius", "ratio")


class LowRank(nn.Module):
    """The change (alpha / r) up down of one layer.

    down: [r, in], or [r, in, kh, kw] of a convolution; up: [out, r], or [out, r, 1, 1]; both are copied. A convolution is given its stride
    and padding by the layer it is attached to. dropout: probability, on the input, in training mode; drawn from PyTorch's global generator.
    """

    def __init__(self, down: Float[Tensor, "r ..."], up: Float[Tensor, "out r ..."], alpha: float, dropout: float = 0.0):
        super().__init__()
        self.down, self.up = _bare_layer(down), _bare_layer(up)
        self.rank, self.alpha = down.shape[0], alpha
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The layer's input to what is added to its output, in the dtype of the factors (float32; lower under autocast)."""
        return self.alpha / self.rank * self.up(self.down(self.dropout(x.to(self.down.weight.dtype))))

    def delta(self) -> Float[Tensor, "out ..."]:
        """The change as one float32 tensor of the weight's shape."""
        down, up = self.down.weight.float(), self.up.weight.float()
        return self.alpha / self.rank * einsum(up.flatten(1), down, "out r, r ... -> out ...")


def _bare_layer(weight: Tensor) -> nn.Linear | nn.Conv2d:
    """A linear layer or a convolution around the weight, without bias; nothing is drawn at random."""
    c_out, c_in, *kernel = weight.shape
    if kernel:
        layer = nn.Conv2d(c_in, c_out, tuple(kernel), bias=False, device="meta")
    else:
        layer = nn.Linear(c_in, c_out, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    return layer


class LoRA(nn.Module):
    """Low-rank changes by the names of the layers they belong to, as "unet.down.0.transformers.0.blocks.0.cross_attention.to_k".

    weight: a factor on all of them, which may be changed at any time: 1 as trained, 0 without effect. Several LoRAs on one model add up.
    """

    def __init__(self, layers: dict[str, LowRank], weight: float = 1.0):
        super().__init__()
        # The names of submodules may not have dots.
        self.by_name = nn.ModuleDict({name.replace(".", "/"): layer for name, layer in layers.items()})
        self.weight = weight
        self._handles = []

    @property
    def layers(self) -> dict[str, LowRank]:
        return {name.replace("/", "."): layer for name, layer in self.by_name.items()}

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def attach(self, sd: StableDiffusion):
        """Move to the model's device; from now on its layers give W0 x + weight (alpha / r) up down x, in the dtype that they had.

        Raises ValueError if it is attached already, or does not fit the model, with the layers that are absent or of other widths.
        """
        if self.attached:
            raise ValueError("this LoRA is attached already; detach() it first")
        pairs = _fit(self, sd)
        for low, layer in pairs:
            low.to(layer.weight.device)
            if isinstance(layer, nn.Conv2d):
                low.down.stride, low.down.padding = layer.stride, layer.padding
        # Not a lambda: a deep copy of the model shall have a copy of the LoRA on it.
        self._handles = [layer.register_forward_hook(partial(self._add, low)) for low, layer in pairs]

    def _add(self, low: LowRank, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        change = self.weight * low(args[0])
        if change.shape != output.shape:
            raise ValueError(
                f"a LoRA's change has shape {tuple(change.shape)}, but {tuple(output.shape)} is what another adapter makes of the layer's "
                "output, as prefix tuning does; attach the LoRA before it"
            )
        # The sum of a layer's half precision and the change's float32 is float32, and is rounded once.
        return (output + change).to(output.dtype)

    def detach(self):
        """The model is as it was before `attach`; without effect on a LoRA that is not attached."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


# ---------------------------------------------------------------------------------------------------------------- layers


def layers_of(sd: StableDiffusion, kinds: tuple[type, ...] = (nn.Linear, nn.Conv2d)) -> dict[str, nn.Module]:
    """The modules of some kinds in the U-Net and the text encoder, by their names with the part in front."""
    return {f"{part}.{name}": m for part in PARTS for name, m in getattr(sd, part).named_modules() if isinstance(m, kinds)}


def choose(names: list[str], patterns: tuple[str, ...]) -> list[str]:
    """The names in which one of the regular expressions is found, in their own order.

    Raises ValueError for no pattern, one that is no regular expression, and one that is found nowhere, with the nearest names.
    """
    if not patterns:
        raise ValueError(f"no pattern chooses no layer; give one or more, such as {PATTERNS['attention'][0]!r}")
    for pattern in patterns:
        try:
            found = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
        if not found:
            raise ValueError(f"pattern {pattern!r} matches no layer; {_near(pattern, names)}")
    return [name for name in names if any(re.search(pattern, name) for pattern in patterns)]


def _near(pattern: str, names: list[str]) -> str:
    # A pattern is usually the end of a name, so it is compared with all ends; the first layer of each end stands for it.
    ends = {}
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            ends.setdefault(".".join(parts[i:]), name)
    near = get_close_matches(re.sub(r"[\\^$]", "", pattern), ends, n=3, cutoff=0.6)
    shown = dict.fromkeys(ends[end] for end in near) or names[:: max(1, len(names) // 3)][:3]
    return f"{'near' if near else 'there'} are {', '.join(shown)}"


def _fit(lora: LoRA, sd: StableDiffusion) -> list[tuple[LowRank, nn.Module]]:
    """Each change with the model's layer that it belongs to. Raises ValueError for what does not fit."""
    layers, pairs, wrong = layers_of(sd), [], []
    for name, low in lora.layers.items():
        if name not in layers:
            wrong.append(f"no layer {name}; {_near(name, list(layers))}")
            continue
        expected = tuple(layers[name].weight.shape)
        shape = (low.up.weight.shape[0], *low.down.weight.shape[1:])
        if shape != expected:
            wrong.append(f"{name}: a change of shape {shape}, for a weight of shape {expected}")
        pairs.append((low, layers[name]))
    if wrong:
        more = [f"and {len(wrong) - 5} more"] if len(wrong) > 5 else []
        raise ValueError("\n  ".join([f"this LoRA does not fit the model: {len(wrong)} of {len(lora.layers)} layers", *wrong[:5], *more]))
    return pairs


# ---------------------------------------------------------------------------------------------------------------- making


def create_lora(
    sd: StableDiffusion,
    patterns: tuple[str, ...],
    *,
    rank: int,
    alpha: float,
    init: str = "gaussian",
    dropout: float = 0.0,
    generator: torch.Generator,
) -> LoRA:
    """A new LoRA that changes nothing yet: up is zero, down is random, both float32 on the model's device. Not attached.

    patterns: regular expressions searched in the full names of linear layers and convolutions; see PATTERNS. alpha: the change is scaled by
    alpha / rank, so alpha = rank (diffusers) is a scale of 1. init: of down, "gaussian" normal with std 1 / rank (diffusers), "kaiming"
    uniform within 1 / sqrt(fan in) (the paper's code, kohya). A rank beyond a layer's min(in, out) is taken as it is, as in peft: the
    change then reaches any matrix, and the surplus costs memory only. Raises ValueError for numbers out of range, and as `choose` does.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: expected a whole number from 1, such as 4")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha {alpha}: expected a number above 0, such as the rank")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}: expected a probability from 0 to below 1")
    if init not in INITS:
        raise ValueError(f"init {init!r} unknown; choose {' or '.join(INITS)}")
    layers = layers_of(sd)
    changes = {}
    for name in choose(list(layers), patterns):
        weight = layers[name].weight
        down = _first_down((rank, *weight.shape[1:]), init, generator).to(weight.device)
        up = torch.zeros(weight.shape[0], rank, *(1,) * (weight.dim() - 2), device=weight.device)
        changes[name] = LowRank(down, up, float(alpha), dropout)
    return LoRA(changes)


def _first_down(shape: tuple[int, ...], init: str, generator: torch.Generator) -> Tensor:
    if init == "gaussian":
        return torch.randn(shape, generator=generator, device=generator.device) / shape[0]
    # He et al.'s uniform with a = sqrt(5): the bound sqrt(6 / ((1 + 5) fan in)).
    return (2 * torch.rand(shape, generator=generator, device=generator.device) - 1) / math.sqrt(math.prod(shape[1:]))


def merge_lora(sd: StableDiffusion, lora: LoRA) -> Callable[[], None]:
    """Put the change into the model's weights: W0 + weight delta, summed in float32, in the weights' dtype.

    Returns a function that puts the very same base weights back; who drops it frees their memory. Several merges are undone last first.
    Raises ValueError for a LoRA that is attached, which would count twice, for one that does not fit, and where a Custom Diffusion is
    attached to one of its layers, which would hide the change.
    """
    if lora.attached:
        raise ValueError("this LoRA is attached, so merging would apply it twice; detach() it first")
    pairs = _fit(lora, sd)
    if hidden := [name for name, (_, layer) in zip(lora.layers, pairs) if is_replaced(layer)]:
        raise ValueError(
            f"a Custom Diffusion stands in the place of {len(hidden)} of the weights to be changed, {hidden[0]} for one; "
            "detach it first, or attach the LoRA instead of merging it"
        )
    changed = []
    for low, layer in pairs:
        base = layer.weight.data
        with torch.no_grad():
            layer.weight.data = (base.float() + lora.weight * low.delta().to(base.device)).to(base.dtype)
        changed.append((layer, base, layer.weight.data_ptr()))

    def undo():
        if any(layer.weight.data_ptr() != merged for layer, _, merged in changed):
            raise ValueError("the weights are not those of this merge any more; undo later merges first, before the model is moved or cast")
        for layer, base, _ in changed:
            layer.weight.data = base

    return undo


# ------------------------------------------------------------------------------------------------------------ extraction


@torch.no_grad()
def extract_lora(
    base: StableDiffusion,
    tuned: StableDiffusion,
    patterns: tuple[str, ...],
    *,
    rank: int | None = None,
    share: float | None = None,
    of: str = "sum",
    clamp: float = 1.0,
) -> LoRA:
    """The LoRA that turns one model into the other, by the singular values s of each layer's tuned - base. alpha = rank; not attached.

    rank: how many are kept, or with `share` at most; a layer that has fewer keeps all of its own. share of:
        "sum"        the fewest that make up this share of the sum of s
        "frobenius"  the fewest whose norm is this share of the norm of s, the change's Frobenius norm
        "ratio"      those above this share of the largest one (kohya's sv_ratio is 1 / share)
    s goes into up. clamp: both factors are cut off at this quantile of all their values; 1 does not, and keeps the closest matrix of the
    rank (Eckart and Young). kohya's 0.99 costs accuracy: a change of rank 16 and 2 % noise is met at rank 32 within 9 % instead of 2 %.
    Layers that are equal are left out.
    Raises ValueError for models of different shapes, models without a difference, numbers out of range, and as `choose` does.
    """
    if rank is None and share is None:
        raise ValueError("how much to keep is not said; give a rank, such as 32, or a share, such as 0.9")
    if rank is not None and rank < 1:
        raise ValueError(f"rank {rank}: expected a whole number from 1, such as 32")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share {share}: expected a number above 0, up to 1")
    if of not in SHARES:
        raise ValueError(f"share of {of!r} unknown; choose {', '.join(SHARES)}")
    if not 0 < clamp <= 1:
        raise ValueError(f"clamp {clamp}: expected a quantile above 0, up to 1, which does not clamp")
    ours, theirs = layers_of(base), layers_of(tuned)
    changes = {}
    for name in choose(list(ours), patterns):
        if name not in theirs or ours[name].weight.shape != theirs[name].weight.shape:
            raise ValueError(f"{name} is absent or of another shape in the tuned model; extract from two models of one kind")
        delta = theirs[name].weight.float() - ours[name].weight.float().to(theirs[name].weight.device)
        if delta.any():
            down, up = _factors(delta, rank, share, of, clamp)
            changes[name] = LowRank(down.to(base.device), up.to(base.device), float(len(down)))
    if not changes:
        raise ValueError("the two models are equal in the layers chosen: there is nothing to extract")
    return LoRA(changes)


def _factors(delta: Tensor, rank: int | None, share: float | None, of: str, clamp: float) -> tuple[Tensor, Tensor]:
    u, s, v = torch.linalg.svd(delta.flatten(1), full_matrices=False)
    r = min(rank or len(s), len(s) if share is None else kept(s, share, of))
    down, up = v[:r], u[:, :r] * s[:r]
    if clamp < 1:
        # NumPy's: PyTorch's quantile takes no more than 2^24 values.
        limit = float(np.quantile(torch.cat([down.flatten(), up.flatten()]).cpu().numpy(), clamp))
        down, up = down.clamp(-limit, limit), up.clamp(-limit, limit)
    return down.reshape(r, *delta.shape[1:]), up.reshape(-1, r, *(1,) * (delta.dim() - 2))


def kept(s: Float[Tensor, " n"], share: float, of: str) -> int:
    """How many of the falling singular values `share` keeps, at least one; `of` as in `extract_lora`."""
    if of == "ratio":
        return max(1, int((s > share * s[0]).sum()))
    so_far = s.double().cumsum(0) if of == "sum" else s.double().square().cumsum(0).sqrt()
    # As many as stay below the share, and the one that reaches it.
    return min(len(s), int((so_far < share * so_far[-1]).sum()) + 1)
