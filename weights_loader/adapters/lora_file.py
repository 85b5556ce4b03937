"""What all dialects of LoRA files share: what a dialect is, low-rank changes as a file holds them, and kinds that are refused by name.

a layer of a file      two halves, and alpha or not           -> LowRank
....to_k               .lora_A.weight, .lora_B.weight            down [r, in], up [out, r]: the change is (alpha / r) up @ down
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from minidiff.adapters.layer_change import LayerChange
from minidiff.adapters.low_rank import LowRank
from minidiff.pipeline import StableDiffusion
from weights_loader.brief import brief
from weights_loader.dialects import Aliases
from weights_loader.name_table import TensorLocation, canonical_name
from weights_loader.read import Checkpoint


@runtime_checkable
class StoredChange(Protocol):
    """The change of one layer as a file holds it."""

    def to_change(self, weight: Tensor) -> LayerChange:
        """Return the change for a layer of this weight. Raises ValueError with both shapes if they disagree."""
        ...


Placed = Mapping[TensorLocation, LowRank]  # changes, by where a file has their layers


@dataclass(frozen=True)
class Dialect:
    """How some programs store a LoRA. A new dialect is one file with one of these, and its line in lora.DIALECTS.

    name: for `write_lora` and `inspect`.
    matches: whether a file with tensors of these names is in this dialect.
    parse: the changes by the file's name of the layer; raises ValueError for what it does not understand.
    layer_name: (part, the layer's name in that part of a diffusers model) -> its name in the file; None if layers have the names of another
        dialect.
    pack: (changes, the model they belong to) -> the tensors and metadata of a file; None for a dialect that is only read.
    tells_alpha: whether every program that reads such files finds each layer's alpha in them.
    """

    name: str
    matches: Callable[[Sequence[str]], bool]
    parse: Callable[[Checkpoint], Mapping[str, StoredChange]]
    layer_name: Callable[[str, str], str] | None = None
    pack: Callable[[Placed, StableDiffusion], tuple[dict[str, Tensor], dict[str, str]]] | None = None
    tells_alpha: bool = True


def named_halves(changes: Placed, down: str, up: str) -> dict[str, Tensor]:
    """Return both halves of each layer, named by the layer and these ends."""
    result = {}
    for location, change in changes.items():
        kernel = (..., None, None) if location.convolution else ...
        result[f"{location.name}.{down}.weight"] = change.down.weight.detach()[kernel]
        result[f"{location.name}.{up}.weight"] = change.up.weight.detach()[kernel]
    return result


# --- reading ----------------------------------------------------------------------------------------------------------

# What the name of a tensor ends with, after the layer. peft may put the name of an adapter after lora_A.
END = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?P<peft>[AB])(?:\.[^.]+)?|[._]lora(?:_linear_layer)?\.(?P<older>down|up)|\.lora_(?P<kohya>down|up))\.weight"
    r"|(?P<scaled>.+)\.alpha"
)
ALPHA = re.compile(r".+\.alpha")
HALVES = {"A": "down", "B": "up", "down": "down", "up": "up"}
# (pattern of a tensor's name, what a file with such a name is)
REFUSED = (
    (r"^(lora_)?transformer[._]|(double|single|single_transformer|joint)_blocks", "a LoRA for a diffusion transformer (Flux, SD 3)"),
    (r"\.hada_|\.lokr_", "a LoHa or LoKr, which change a weight by another product than a LoRA's"),
    (r"\.b?oft_(blocks|[RS])|^oft_", "an OFT or BOFT, which rotates the weight"),
    (r"dora_scale|lora_magnitude_vector", "a DoRA, which scales the weight too"),
    (r"\.lora_mid\.", "a LoRA with Tucker's middle factor"),
    (r"\.on_input$|\.ia3_l", "an IA3, which scales the rows or columns of a weight"),
    (r"\.[ab][12]\.weight$", "a GLoRA, which changes the weight by four factors"),
    (r"\.diff(_b)?$", "whole differences of weights or biases (.diff), in place of or beside a LoRA's two factors"),
    (r"\.[wb]_norm$", "changes of normalisation layers"),
    (r"\.lora_E(\.|$)|\.ranknum", "an AdaLora, which has singular values between a LoRA's two factors"),
    (r"\.lora_embedding_[AB]", "a LoRA of an embedding table"),
    (r"\.lora_[AB](\.[^.]+)?\.bias$", "a LoRA with biases of its own (lora_bias)"),
    (r"vera_lambda|fourierft_|\.(hra_u|bone_|miss_|shira_|vblora_|randlora_|c3a_|waveft_|road_)", "one of peft's other methods than LoRA"),
    (
        r"^bundle_emb\.",
        "a LoRA with learned words bundled into it (OneTrainer), which belong into files of their own",
    ),
    (r"^(unet|text_encoder):\d+:(up|down)$", "a LoRA of cloneofsimo/lora, which numbers its layers instead of naming them"),
)


@dataclass(frozen=True, eq=False)
class Factors:
    """A low-rank change as a file holds it: down (rank, in, ...), up (out, rank, ...), with kernels for a convolution."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Return the number of rows of `down`."""
        return self.down.shape[0]

    def to_change(self, weight: Tensor) -> LowRank:
        """Return the change for a layer of this weight, float32; a 1x1 convolution becomes a matrix if the layer is one here."""
        down, up = (_as_weight(half, weight) for half in (self.down, self.up))
        rank = down.shape[0] if down.dim() else 0
        expected = (rank, *weight.shape[1:]), (weight.shape[0], rank, *(1,) * (weight.dim() - 2))
        if not rank or (tuple(down.shape), tuple(up.shape)) != expected:
            raise ValueError(f"down {tuple(down.shape)} and up {tuple(up.shape)}; this layer needs {expected[0]} and {expected[1]}")
        return LowRank(down, up, self.alpha)


def _as_weight(half: Tensor, weight: Tensor) -> Tensor:
    half = half.float()
    return half[:, :, 0, 0] if weight.dim() == 2 and half.shape[2:] == (1, 1) else half


def tensors_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the tensors of a file, and the alphas that a .pt holds as Python numbers, as tensors."""
    numbers = {name: torch.tensor(number, dtype=torch.float64) for name, number in checkpoint.numbers.items() if ALPHA.fullmatch(name)}
    return checkpoint.tensors | numbers


def parse_factors(tensors: Mapping[str, Tensor], aliases: Aliases, default_alpha: Callable[[str, int], float]) -> dict[str, Factors]:
    """Return the low-rank changes of a file by layer.

    Args:
        tensors: everything in the file
        aliases: older names of layers
        default_alpha: (layer, rank) -> its alpha, for a layer whose alpha is not among the tensors

    Raises ValueError for a kind that is refused by name, for a tensor that is no part of a LoRA, and for half a pair.
    """
    refuse(tensors)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = END.fullmatch(name)
        if match is None:
            raise ValueError(
                f"tensor {brief(name)} is no part of a LoRA; expected names that end in .lora_A.weight, .lora_down.weight, .alpha"
            )
        layer = canonical_name(match["layer"] or match["scaled"], aliases)
        kind = "alpha" if match["scaled"] else HALVES[match["peft"] or match["older"] or match["kohya"]]
        if kind in found.setdefault(layer, {}):
            raise ValueError(f"{layer} has two tensors for {kind}; two LoRAs in one file? Split them")
        found[layer][kind] = tensor
    result = {}
    for layer, halves in found.items():
        if absent := [kind for kind in ("down", "up") if kind not in halves]:
            raise ValueError(f"{layer} has no {' and no '.join(absent)} half; saved in part?")
        rank = halves["down"].shape[0] if halves["down"].dim() else 0
        alpha = _stated_alpha(layer, halves["alpha"], rank) if "alpha" in halves else default_alpha(layer, rank)
        result[layer] = Factors(halves["down"], halves["up"], alpha)
    return result


def refuse(names: Mapping[str, Tensor] | Sequence[str]) -> None:
    """Raise ValueError for the names of a LoRA that is none of the kinds read here."""
    for pattern, what in REFUSED:
        if name := next((name for name in names if re.search(pattern, name)), None):
            raise ValueError(f"{what}; not supported (by the tensor {name})")


def _stated_alpha(layer: str, alpha: Tensor, rank: int) -> float:
    if alpha.numel() != 1:
        raise ValueError(f"{layer}: alpha has shape {tuple(alpha.shape)}; expected one number")
    return finite(layer, alpha.item()) or float(rank)  # kohya's scripts take 0 for the rank


def finite(layer: str, alpha: object) -> float:
    """Return an alpha as a float. Raises ValueError for what is no finite number."""
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"{layer}: alpha is {brief(alpha)}; expected a finite number")
    return float(alpha)
