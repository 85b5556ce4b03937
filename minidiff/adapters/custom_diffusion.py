"""Custom Diffusion: a new concept in the keys and values of cross-attention, and in a new word.

    context --+-- W_k -- keys ----.
              '-- W_v -- values --+-- cross-attention      W_k and W_v of every block are trained, the rest is frozen

Paper: Kumari et al. 2023, "Multi-concept customization of text-to-image diffusion". The trained matrices are kept whole and outside the
model: a forward hook gives a layer's output by them, and removing it takes them back bit for bit. Also here: the compression of the changes
by singular values. The merge of several concepts in closed form is in merge_concepts.py.

Left out: training on several concepts at once, which needs no more than several words here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.adapters.base import Adapter, Hook
from minidiff.adapters.layers import modules_of
from minidiff.adapters.tokens import NewTokens
from minidiff.config import check_choice
from minidiff.pipeline import StableDiffusion

LAYER_SETS = {"keys and values": ("to_k", "to_v"), "cross_attention": ("to_q", "to_k", "to_v", "to_out")}


class CustomDiffusion(Adapter):
    """Whole weights in place of the model's: layers["unet....cross_attention.to_k"] is W [out, in], float32.

    biases: the same for to_out, the only projection that has one; where none is given the model's stays. tokens: the new words that
    belong to the weights, attached and detached with them.
    """

    title = "this Custom Diffusion"

    def __init__(self, layers: Mapping[str, Tensor], tokens: NewTokens | None = None, biases: Mapping[str, Tensor] | None = None):
        super().__init__()
        biases = biases or {}
        if stray := [name for name in biases if name not in layers]:
            raise ValueError(f"a bias without a weight for {', '.join(stray)}; give both")
        self.names, self.bias_names = tuple(layers), tuple(biases)
        # Lists: the names of nn.ParameterDict must not have a dot in them.
        self.weights = nn.ParameterList(nn.Parameter(W.detach().float().clone()) for W in layers.values())
        self.bias_vectors = nn.ParameterList(nn.Parameter(bias.detach().float().clone()) for bias in biases.values())
        self.tokens = tokens

    @property
    def layers(self) -> dict[str, nn.Parameter]:
        """Return the weights by layer."""
        return dict(zip(self.names, self.weights))

    @property
    def biases(self) -> dict[str, nn.Parameter]:
        """Return the biases by layer."""
        return dict(zip(self.bias_names, self.bias_vectors))

    def fit(self, sd: StableDiffusion) -> Sequence[Hook]:
        """Return a hook per layer, which computes with these weights; a LoRA on the layer adds to that.

        Raises ValueError if a layer is absent or of another shape, or has another Custom Diffusion on it already.
        """
        layers = self.model_layers(sd)
        if taken := [name for name, layer in layers.items() if any(other.changes(layer, "replace") for other in sd.attached)]:
            raise ValueError(f"another Custom Diffusion is on {some_layers(taken)}; detach it first, or merge the two with merge_concepts")
        weights, biases = self.layers, self.biases
        outputs = {name: partial(self._output, weights[name], biases.get(name), name.endswith((".to_k", ".to_v"))) for name in layers}
        return [Hook(layer, outputs[name], "replace") for name, layer in layers.items()]

    def attach(self, sd: StableDiffusion) -> None:
        """Attach the words as every Adapter, and then the weights; neither if one of the two raises ValueError."""
        if self.tokens is None or self.attached:
            super().attach(sd)
            return
        self.tokens.attach(sd)
        try:
            super().attach(sd)
        except ValueError:
            self.tokens.detach()
            raise

    def detach(self) -> None:
        """Leave the model as it was before `attach`. Does nothing if this is not attached."""
        if self.attached and self.tokens is not None:
            self.tokens.detach()
        super().detach()

    def _output(
        self, W: Tensor, bias: Tensor | None, of_context: bool, layer: nn.Linear, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        """Return W x + bias in float32, rounded to the dtype of the layer's output."""
        bias = layer.bias if bias is None else bias
        y = F.linear(args[0].to(W.dtype), W, None if bias is None else bias.to(W.dtype))
        if of_context:
            # As in the original: the start token, the same in every prompt, should not carry the concept. Its value is W's, without a
            # gradient.
            y = torch.cat([y[:, :1].detach(), y[:, 1:]], dim=1)
        return y.to(output.dtype)

    def model_layers(self, sd: StableDiffusion) -> dict[str, nn.Linear]:
        """Return the model's own layers by name. Raises ValueError with those that are absent or have other shapes."""
        modules = cross_attention_layers(sd)
        wrong = []
        for name, W in self.layers.items():
            if name not in modules:
                wrong.append(f"no layer {name} in the model's cross-attentions")
            elif W.shape != modules[name].weight.shape:
                wrong.append(f"{name} has shape {tuple(W.shape)}, the model's {tuple(modules[name].weight.shape)}")
        for name, bias in self.biases.items():
            if name in modules and (modules[name].bias is None or bias.shape != modules[name].bias.shape):
                wrong.append(f"{name} has a bias of shape {tuple(bias.shape)}, the model's layer has none such")
        if wrong:
            raise ValueError("not a Custom Diffusion for this model: " + "; ".join(wrong[:4]) + ("; ..." if len(wrong) > 4 else ""))
        return {name: modules[name] for name in self.names}

    def deltas(self, sd: StableDiffusion | None = None) -> dict[str, Tensor]:
        """Return {layer: W - W0}, float32, against the given model or the one that this is attached to. Biases are not included."""
        sd = sd or self._sd
        if sd is None:
            raise ValueError("no model to take the difference to: attach the Custom Diffusion, or give the model")
        layers = {name: W.detach() for name, W in self.layers.items()}
        return {name: layers[name] - base.weight.detach().to(layers[name]) for name, base in self.model_layers(sd).items()}


def cross_attention_layers(sd: StableDiffusion) -> dict[str, nn.Linear]:
    """Return the projections of all cross-attentions by name: to_q, to_k, to_v, to_out."""
    return {name: m for name, m in modules_of(sd, (nn.Linear,)).items() if ".cross_attention.to_" in name}


def some_layers(names: Sequence[str]) -> str:
    """Name the first of several layers, and say how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more layers"


def create_custom_diffusion(sd: StableDiffusion, layers: str = "keys and values", tokens: NewTokens | None = None) -> CustomDiffusion:
    """Return a Custom Diffusion to be trained, not attached; the weights start as the model's.

    layers: "keys and values", or "cross_attention" for all of its projections, which is what the authors use for faces.
    """
    check_choice("layers", layers, LAYER_SETS)
    chosen = {name: m for name, m in cross_attention_layers(sd).items() if name.rpartition(".")[2] in LAYER_SETS[layers]}
    biases = {name: module.bias for name, module in chosen.items() if module.bias is not None}
    return CustomDiffusion({name: module.weight for name, module in chosen.items()}, tokens, biases)


# --- compression -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compressed:
    """Changes as products u @ v, layers[name] = u [out, r], v [r, in].

    error: the Frobenius norm of what was left out, relative to that of the changes. size and full_size: bytes in float32, with and without
    compression.
    """

    layers: dict[str, tuple[Tensor, Tensor]]
    error: float
    size: int
    full_size: int

    def deltas(self) -> dict[str, Tensor]:
        """Return u @ v by layer."""
        return {name: u @ v for name, (u, v) in self.layers.items()}


def compress(deltas: Mapping[str, Tensor], share: float = 0.6, rank: int | None = None) -> Compressed:
    """Keep the leading singular values of each change: the fewest whose sum is at least `share` of the sum of all, or `rank` of them.

    Computed in float64. An unchanged layer keeps rank 1 of zeros. Raises ValueError for a share outside (0, 1] and a rank below 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share {share}: expected more than 0 and at most 1")
    if rank is not None and rank < 1:
        raise ValueError(f"rank {rank}: expected at least 1")
    layers, lost, total = {}, 0.0, 0.0
    for name, delta in deltas.items():
        u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
        sums = s.cumsum(0)
        # The last sums differ from the whole by rounding: a share of 1 is everything.
        r = rank if rank is not None else int((sums < share * sums[-1] * (1 - 1e-12)).sum()) + 1
        r = min(r, len(s))
        layers[name] = (u[:, :r] * s[:r]).float(), vh[:r].float()
        lost, total = lost + float(s[r:].square().sum()), total + float(s.square().sum())
    size = sum(4 * (u.numel() + v.numel()) for u, v in layers.values())
    return Compressed(layers, (lost / total) ** 0.5 if total else 0.0, size, sum(4 * delta.numel() for delta in deltas.values()))


def from_deltas(
    sd: StableDiffusion, deltas: Mapping[str, Tensor], tokens: NewTokens | None = None, biases: Mapping[str, Tensor] | None = None
) -> CustomDiffusion:
    """Return a Custom Diffusion with W0 + delta for each layer: the inverse of `deltas` and of Compressed.deltas.

    Args:
        sd: the model whose weights are W0
        deltas: W - W0 by layer, [out, in]
        tokens, biases: those of the Custom Diffusion that the changes came from

    Raises ValueError for layers that the model lacks or has in another shape.
    """
    bases = CustomDiffusion(deltas).model_layers(sd)
    weights = {name: base.weight.detach().float() for name, base in bases.items()}
    return CustomDiffusion({name: W0 + deltas[name].to(W0.device) for name, W0 in weights.items()}, tokens, biases)
