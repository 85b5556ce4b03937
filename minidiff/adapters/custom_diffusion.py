"""Custom Diffusion: a new concept in the keys and values of cross-attention, and in a new word.

    context --+-- W_k -- keys ----.
              '-- W_v -- values --+-- cross-attention      W_k and W_v of every block are trained, the rest stands still

Paper: Kumari et al. 2023, "Multi-concept customization of text-to-image diffusion". The trained matrices are kept whole and beside the
model: a forward hook gives a layer's output by them, and removing it takes them back bit for bit. Here too: the compression of the changes
(by singular values) and the merge of several concepts in closed form (eq. 4 and 5).

Left out: training on several concepts at once, which needs nothing but several words here.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.adapters.tokens import NewTokens
from minidiff.pipeline import StableDiffusion

LAYER_SETS = {"keys and values": ("to_k", "to_v"), "cross_attention": ("to_q", "to_k", "to_v", "to_out")}
BATCH = 64  # captions that are encoded at once
NEAR = 1e-5  # relative distance of two rows of features that count as one: ten roundings of float32
WORST_CONDITION = 1e7  # 1 / the precision of float32, in which the features come: beyond it their smallest directions are rounding errors


class CustomDiffusion(nn.Module):
    """Whole weights in the place of the model's: layers["unet....cross_attention.to_k"] is W [out, in], float32.

    biases: the same for to_out, the only projection that has one; where none is given the model's stays. tokens: the new words that
    belong to the weights, attached and detached with them.
    """

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
        self._sd: StableDiffusion | None = None
        self._handles = []

    @property
    def layers(self) -> dict[str, nn.Parameter]:
        return dict(zip(self.names, self.weights))

    @property
    def biases(self) -> dict[str, nn.Parameter]:
        return dict(zip(self.bias_names, self.bias_vectors))

    @property
    def attached(self) -> bool:
        return self._sd is not None

    def attach(self, sd: StableDiffusion):
        """Move to sd's device; from now on its layers compute with these weights, and a LoRA on one adds to that, whichever came first.

        Raises ValueError, and changes nothing, where this or another Custom Diffusion is on a layer already, where a layer is absent or of
        another shape, and as NewTokens does.
        """
        if self.attached:
            raise ValueError("this Custom Diffusion is attached already; detach() it first")
        bases = _base_layers(self, sd)
        if taken := [name for name, base in bases.items() if is_replaced(base)]:
            raise ValueError(f"another Custom Diffusion is on {_some(taken)}; detach it first, or merge the two with merge_concepts")
        if self.tokens is not None:
            self.tokens.attach(sd)
        self.to(sd.device)
        biases = self.biases
        for name, base in bases.items():
            hook = partial(_replaced_output, self.layers[name], biases.get(name), name.endswith((".to_k", ".to_v")))
            self._handles.append(base.register_forward_hook(hook, prepend=True))
        self._sd = sd

    def detach(self):
        """The model is as it was before `attach`; without effect where this is not attached."""
        for handle in self._handles:
            handle.remove()
        if self.attached and self.tokens is not None:
            self.tokens.detach()
        self._handles, self._sd = [], None

    def deltas(self, sd: StableDiffusion | None = None) -> dict[str, Tensor]:
        """{layer: W - W0}, float32, against the model that this is attached to or the one given. Biases are not among them."""
        sd = sd or self._sd
        if sd is None:
            raise ValueError("no model to take the difference to: attach the Custom Diffusion, or give the model")
        layers = {name: W.detach() for name, W in self.layers.items()}
        return {name: layers[name] - base.weight.detach().to(layers[name]) for name, base in _base_layers(self, sd).items()}


def _replaced_output(
    W: Tensor, bias: Tensor | None, of_context: bool, layer: nn.Linear, args: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """The hook: W x in float32, rounded to the dtype that the layer gave."""
    bias = layer.bias if bias is None else bias
    y = F.linear(args[0].to(W.dtype), W, None if bias is None else bias.to(W.dtype))
    if of_context:
        # As the original: the start token, the same in every prompt, shall not carry the concept. Its value is W's, without a gradient.
        y = torch.cat([y[:, :1].detach(), y[:, 1:]], dim=1)
    return y.to(output.dtype)


def is_replaced(layer: nn.Module) -> bool:
    """Whether a Custom Diffusion that is attached gives the layer's output, so that the layer's own weight has no effect."""
    return any(isinstance(hook, partial) and hook.func is _replaced_output for hook in layer._forward_hooks.values())


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more layers"


def _base_layers(delta: CustomDiffusion, sd: StableDiffusion) -> dict[str, nn.Linear]:
    """The model's own layers by name. Raises ValueError with those that are absent or have other shapes."""
    modules = {f"unet.{name}": module for name, module in sd.unet.named_modules() if ".cross_attention.to_" in name}
    wrong = []
    for name, W in delta.layers.items():
        if name not in modules:
            wrong.append(f"no layer {name} in the model's cross-attentions")
        elif W.shape != modules[name].weight.shape:
            wrong.append(f"{name} has shape {tuple(W.shape)}, the model's {tuple(modules[name].weight.shape)}")
    for name, bias in delta.biases.items():
        if name in modules and (modules[name].bias is None or bias.shape != modules[name].bias.shape):
            wrong.append(f"{name} has a bias of shape {tuple(bias.shape)}, the model's layer has none such")
    if wrong:
        raise ValueError("not a Custom Diffusion for this model: " + "; ".join(wrong[:4]) + ("; ..." if len(wrong) > 4 else ""))
    return {name: modules[name] for name in delta.names}


def create_custom_diffusion(sd: StableDiffusion, layers: str = "keys and values", tokens: NewTokens | None = None) -> CustomDiffusion:
    """To be trained, not attached; the weights start as the model's.

    layers: "keys and values", or "cross_attention" for all of it, which the authors take for faces.
    """
    if layers not in LAYER_SETS:
        raise ValueError(f"layers {layers!r} unknown; choose {', '.join(LAYER_SETS)}")
    chosen = {
        f"unet.{name}": module
        for name, module in sd.unet.named_modules()
        if ".cross_attention." in name and name.rpartition(".")[2] in LAYER_SETS[layers]
    }
    biases = {name: module.bias for name, module in chosen.items() if module.bias is not None}
    return CustomDiffusion({name: module.weight for name, module in chosen.items()}, tokens, biases)


# ----------------------------------------------------------------------------------------------------------- compression


@dataclass(frozen=True)
class Compressed:
    """Changes as products u @ v of u [out, r] and v [r, in].

    error: the Frobenius norm of what was left out over that of the changes. size and full_size: bytes in float32.
    """

    layers: dict[str, tuple[Tensor, Tensor]]
    error: float
    size: int
    full_size: int

    def deltas(self) -> dict[str, Tensor]:
        return {name: u @ v for name, (u, v) in self.layers.items()}


def compress(deltas: Mapping[str, Tensor], share: float = 0.6, rank: int | None = None) -> Compressed:
    """Each change by its leading singular values: the fewest whose sum is at least `share` of all of them, or `rank` many.

    In float64. An unchanged layer keeps rank 1 of zeros. Raises ValueError for a share outside (0, 1] and a rank below 1.
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
    """W0 + change for each layer, as of Compressed.deltas(); tokens and biases are those of the Custom Diffusion that it came from.

    Raises ValueError for layers that the model lacks or has in another shape.
    """
    bases = _base_layers(CustomDiffusion(deltas), sd)
    weights = {name: base.weight.detach().float() for name, base in bases.items()}
    return CustomDiffusion({name: W0 + deltas[name].to(W0.device) for name, W0 in weights.items()}, tokens, biases)


# ----------------------------------------------------------------------------------------------------------------- merge


@dataclass(frozen=True)
class MergeReport:
    """How well a merge went.

    rows: constraints, one a token of the target captions; regularisation_rows: the same of the regularisation captions.
    residual: |W C^T - V| / |V|, drift: |W C_reg^T - W0 C_reg^T| / |W0 C_reg^T|, Frobenius norms over all layers.
    condition: of d C^T, the matrix that is inverted; regularisation_condition: of C_reg^T C_reg + ridge.
    """

    rows: int
    regularisation_rows: int
    residual: float
    drift: float
    condition: float
    regularisation_condition: float
    seconds: float


@torch.no_grad()
def merge_concepts(
    sd: StableDiffusion,
    concepts: Sequence[CustomDiffusion],
    targets: Sequence[Sequence[str]],
    regularisation: Sequence[str],
    ridge: float = 0.0,
) -> tuple[CustomDiffusion, MergeReport]:
    """One Custom Diffusion with the words of all, by eq. 4 and 5 of the paper, in float64.

    targets: for each concept its captions, such as ["photo of a <new1> cat"]. Their tokens get the keys and values that the concept gives
    them, from the new word on: what stands before it does not know of it (the encoder is causal).
    regularisation: captions, about 1000, whose tokens shall keep the model's keys and values as far as possible. As in the original, the
    start token and the padding are in neither, the end token is; equal rows count once.
    ridge: added to the diagonal of C_reg^T C_reg. The concepts must not be attached.
    Raises ValueError for concepts with other layers than keys and values, two with the same word, captions of two concepts that coincide,
    and too few regularisation captions.
    """
    began = time.perf_counter()
    _check_concepts(concepts, targets, regularisation, ridge)
    words = {name: rows for concept in concepts if concept.tokens for name, rows in concept.tokens.rows.items()}
    tokens = NewTokens(words) if words else None
    if tokens:
        tokens.to(sd.device).attach(sd)
    try:
        rows = [_target_rows(sd, concept, captions) for concept, captions in zip(concepts, targets)]
        C_reg = torch.unique(torch.cat(_features(sd, regularisation)), dim=0)
    finally:
        if tokens:
            tokens.detach()
    _check_captions(rows)
    C = torch.cat([features for features, _ in rows])
    directions, condition, condition_reg = merge_directions(C, C_reg, ridge, [caption for _, captions in rows for caption in captions])

    layers, residual, drift = {}, torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for name in dict.fromkeys(name for concept in concepts for name in concept.names):
        W0 = _base_layers(next(c for c in concepts if name in c.names), sd)[name].weight.double()
        asked = torch.cat([features @ (_weight(concept, name, W0) - W0).T for concept, (features, _) in zip(concepts, rows)])
        change = asked.T @ directions
        layers[name] = W0 + change
        residual += _squares(C @ change.T - asked, asked + C @ W0.T)
        drift += _squares(C_reg @ change.T, C_reg @ W0.T)
    ratios = [float((part / whole).sqrt()) for part, whole in (residual, drift)]
    seconds = time.perf_counter() - began
    return CustomDiffusion(layers, tokens), MergeReport(len(C), len(C_reg), *ratios, condition, condition_reg, seconds)


def merge_directions(
    C: Float[Tensor, "s D"], C_reg: Float[Tensor, "n D"], ridge: float = 0.0, captions: Sequence[str] = ()
) -> tuple[Float[Tensor, "s D"], float, float]:
    """(d C^T)^-1 d with d = C (C_reg^T C_reg + ridge)^-1: asked^T times it is the change W - W0 with (W - W0) C^T = asked^T.

    It has the smallest |(W - W0) C_reg^T|^2 + ridge |W - W0|^2 of all changes with that. Also returns the condition numbers of d C^T and of
    C_reg^T C_reg + ridge. By two QR decompositions, so that neither matrix is formed and its condition enters by its square root.
    Raises ValueError where either is singular to the precision of float32; captions, one a row of C, are named in it.
    """
    D = C.shape[1]
    ridge_rows = ridge**0.5 * torch.eye(D, dtype=C.dtype, device=C.device)
    R_reg = torch.linalg.qr(torch.cat([C_reg, ridge_rows])).R  # R_reg^T R_reg = C_reg^T C_reg + ridge
    worst_reg = float(torch.linalg.cond(R_reg))
    if not worst_reg < WORST_CONDITION:
        raise ValueError(
            f"{len(C_reg)} different tokens of the regularisation captions do not fix a map of {D} channels "
            f"(condition {worst_reg**2:.1e}); give more captions, or a ridge such as 1e-3"
        )
    A = torch.linalg.solve_triangular(R_reg.T, C.T, upper=False)  # A^T A = d C^T
    if len(C) > D:
        raise ValueError(f"{len(C)} different tokens in the target captions, and a map of {D} channels can hold {D}; give fewer captions")
    worst = float(torch.linalg.cond(A))
    if not worst < WORST_CONDITION:
        # The smallest singular value's direction is the sum of rows that is nearly nothing: the largest of it are the rows to blame.
        blamed = torch.linalg.svd(A, full_matrices=False).Vh[-1].abs().topk(min(2, len(C))).indices.tolist()
        names = " and ".join(dict.fromkeys(repr(captions[i]) for i in blamed)) if captions else "of C"
        raise ValueError(
            f"tokens of the target captions coincide or depend on each other (condition {worst**2:.1e}), most of all in {names}; "
            "leave one out"
        )
    Q, R = torch.linalg.qr(A)
    return torch.linalg.solve_triangular(R, torch.linalg.solve_triangular(R_reg, Q, upper=True).T, upper=True), worst**2, worst_reg**2


def _check_concepts(concepts: Sequence[CustomDiffusion], targets: Sequence[Sequence[str]], regularisation: Sequence[str], ridge: float):
    if not concepts or len(concepts) != len(targets) or not all(targets) or any(isinstance(captions, str) for captions in targets):
        raise ValueError(f"{len(concepts)} concepts and {len(targets)} lists of target captions; give each concept a list of at least one")
    if not regularisation or not ridge >= 0:
        raise ValueError(f"{len(regularisation)} regularisation captions, ridge {ridge}; expected at least one, and a ridge of 0 or more")
    seen = []
    for i, concept in enumerate(concepts):
        if others := [name for name in concept.names if not name.endswith((".to_k", ".to_v"))]:
            raise ValueError(f"concept {i + 1} has {_some(others)}; only keys and values are maps of the text, and can be merged")
        for word in concept.tokens.names if concept.tokens else ():
            if word in seen:
                raise ValueError(f"two concepts have a word {word!r}; rename one of them")
            seen.append(word)


def _features(sd: StableDiffusion, captions: Sequence[str]) -> list[Tensor]:
    """Of each caption the rows of its words and of the end token.

    Not of the padding: its rows are many and nearly alike, and as constraints they would take up most directions that there are.
    """
    contexts = torch.cat([sd.encode_prompts(captions[i : i + BATCH]) for i in range(0, len(captions), BATCH)]).double()
    return [rows[1 : len(sd.tokenizer.encode(caption)) + 2] for rows, caption in zip(contexts, captions)]  # a cut caption has no padding


def _target_rows(sd: StableDiffusion, concept: CustomDiffusion, captions: Sequence[str]) -> tuple[Tensor, list[str]]:
    """The rows that are asked for, [s, D], and for each its caption."""
    own = {sd.tokenizer.clean(name) for name in (concept.tokens.names if concept.tokens else ())}
    features, sources = [], []
    for caption, rows in zip(captions, _features(sd, captions)):
        new = [positions[0] for word, positions in sd.tokenizer.words(caption) if word in own]
        if own and not new:
            raise ValueError(f"target caption {caption!r} has none of its concept's words {', '.join(sorted(own))}; put one in")
        rows = rows[min(new, default=1) - 1 :]
        features.append(rows)
        sources += [caption] * len(rows)
    features = torch.cat(features)
    keep = _first_of_equals(features)
    return features[keep], [sources[i] for i in keep]


def _first_of_equals(rows: Tensor) -> list[int]:
    near = _near(rows, rows)
    return [i for i in range(len(rows)) if not near[i, :i].any()]


def _near(a: Tensor, b: Tensor) -> Tensor:
    """Whether row i of a is row j of b, but for rounding."""
    distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return distance <= NEAR * a.norm(dim=1)[:, None]


def _check_captions(rows: Sequence[tuple[Tensor, list[str]]]):
    """Raises ValueError where two concepts ask something of the same tokens."""
    for i, (features, captions) in enumerate(rows):
        for j, (others, other_captions) in enumerate(rows[:i]):
            if len(pairs := _near(features, others).nonzero()):
                here, there = pairs[0].tolist()
                raise ValueError(
                    f"captions of concepts {j + 1} and {i + 1} coincide: {other_captions[there]!r} and {captions[here]!r} have tokens "
                    f"of the same features ({len(pairs)} in all), which cannot have two values; put each concept's own word in"
                )


def _squares(*tensors: Tensor) -> Tensor:
    return torch.stack([tensor.square().sum().cpu() for tensor in tensors])


def _weight(concept: CustomDiffusion, name: str, W0: Tensor) -> Tensor:
    """A concept without the layer leaves it as it is."""
    return concept.layers[name].to(W0) if name in concept.names else W0
