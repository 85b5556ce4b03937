"""Several concepts of Custom Diffusion in one, in closed form: eq. 4 and 5 of the paper.

    minimise |W C_reg^T - W0 C_reg^T|^2   so that   W C^T = V      W: the merged keys (or values) of one layer
    W = W0 + (V - W0 C^T) (d C^T)^-1 d                              with d = C (C_reg^T C_reg)^-1

C are the text features of the target captions, V the keys and values that each concept gives them; C_reg are those of many other captions,
whose keys and values should stay.

Paper: Kumari et al. 2023, "Multi-concept customization of text-to-image diffusion".
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.adapters.custom_diffusion import CustomDiffusion, some_layers
from minidiff.adapters.tokens import NewTokens
from minidiff.pipeline import StableDiffusion

BATCH = 64  # captions that are encoded at once
NEAR = 1e-5  # relative distance of two rows of features that count as one: ten roundings of float32
WORST_CONDITION = 1e7  # 1 / the precision of float32, in which the features come: beyond it their smallest directions are rounding errors


@dataclass(frozen=True)
class MergeReport:
    """How well a merge went.

    rows: constraints, one per token of the target captions; regularisation_rows: tokens of the regularisation captions.
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
    """Return one Custom Diffusion with the words of all, computed in float64, and how well it went. The model is left as it was.

    Args:
        sd: the model that the concepts were trained on
        concepts: of keys and values, not attached
        targets: for each concept its captions, such as ["photo of a <new1> cat"]. Their tokens get the keys and values that the concept
            gives them, from the new word on: earlier tokens do not know of it (the encoder is causal)
        regularisation: captions, about 1000, whose tokens should keep the model's keys and values as far as possible. As in the original,
            the start token and the padding are in neither set of tokens, the end token is in both; equal rows count once
        ridge: added to the diagonal of C_reg^T C_reg

    Raises ValueError for concepts with other layers than keys and values, two with the same word, captions of two concepts that coincide,
    and too few regularisation captions.
    """
    began = time.perf_counter()
    _check_concepts(concepts, targets, regularisation, ridge)
    words = {name: rows for concept in concepts if concept.tokens for name, rows in concept.tokens.rows.items()}
    tokens = NewTokens(words)
    tokens.to(sd.device).attach(sd)
    try:
        rows = [_target_rows(sd, concept, captions) for concept, captions in zip(concepts, targets)]
        C_reg = torch.unique(torch.cat(_features(sd, regularisation)), dim=0)
    finally:
        tokens.detach()
    _check_captions(rows)
    C = torch.cat([features for features, _ in rows])
    directions, condition, condition_reg = merge_directions(C, C_reg, ridge, [caption for _, captions in rows for caption in captions])

    layers, residual, drift = {}, torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for name in dict.fromkeys(name for concept in concepts for name in concept.names):
        W0 = next(c for c in concepts if name in c.names).model_layers(sd)[name].weight.double()
        # A concept that does not change the layer asks for W0.
        wanted = [concept.layers[name].to(W0) if name in concept.names else W0 for concept in concepts]
        asked = torch.cat([features @ (W - W0).T for W, (features, _) in zip(wanted, rows)])
        change = asked.T @ directions
        layers[name] = W0 + change
        residual += _squares(C @ change.T - asked, asked + C @ W0.T)
        drift += _squares(C_reg @ change.T, C_reg @ W0.T)
    ratios = [float((part / whole).sqrt()) for part, whole in (residual, drift)]
    seconds = time.perf_counter() - began
    return CustomDiffusion(layers, tokens if words else None), MergeReport(
        len(C), len(C_reg), ratios[0], ratios[1], condition, condition_reg, seconds
    )


def merge_directions(
    C: Float[Tensor, "s D"], C_reg: Float[Tensor, "n D"], ridge: float = 0.0, captions: Sequence[str] = ()
) -> tuple[Float[Tensor, "s D"], float, float]:
    """Return (d C^T)^-1 d with d = C (C_reg^T C_reg + ridge)^-1, and the condition numbers of d C^T and of C_reg^T C_reg + ridge.

    asked^T times the first is the change W - W0 with (W - W0) C^T = asked^T that has the smallest |(W - W0) C_reg^T|^2 + ridge |W - W0|^2.
    Two QR decompositions take the place of both matrices, so that only the square root of each condition number counts.

    Args:
        C: a row of features per token of the target captions
        C_reg: a row per token that should stay
        ridge: from 0
        captions: the caption of each row of C, for errors

    Raises ValueError if one of the two matrices is singular to the precision of float32.
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
    for i, concept in enumerate(concepts):
        if others := [name for name in concept.names if not name.endswith((".to_k", ".to_v"))]:
            raise ValueError(f"concept {i + 1} has {some_layers(others)}; only keys and values are maps of the text, and can be merged")
    words = [word for concept in concepts if concept.tokens for word in concept.tokens.names]
    if twice := [word for word in words if words.count(word) > 1]:
        raise ValueError(f"two concepts have a word {twice[0]!r}; rename one of them")


def _features(sd: StableDiffusion, captions: Sequence[str]) -> list[Tensor]:
    """Return for each caption the rows of its words and of the end token.

    The padding is left out: its rows are many and nearly alike, and as constraints they would take up most directions that there are.
    """
    contexts = torch.cat([sd.encode_prompts(captions[i : i + BATCH]) for i in range(0, len(captions), BATCH)]).double()
    return [rows[1 : len(sd.tokenizer.encode(caption)) + 2] for rows, caption in zip(contexts, captions)]  # a cut caption has no padding


def _target_rows(sd: StableDiffusion, concept: CustomDiffusion, captions: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Return the rows whose keys and values a concept determines, [s, D], and the caption of each."""
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
    near = _near(features, features)
    keep = [i for i in range(len(features)) if not near[i, :i].any()]  # the first of equal rows
    return features[keep], [sources[i] for i in keep]


def _near(a: Tensor, b: Tensor) -> Tensor:
    """Return whether row i of a is row j of b, up to rounding."""
    distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return distance <= NEAR * a.norm(dim=1)[:, None]


def _check_captions(rows: Sequence[tuple[Tensor, list[str]]]):
    """Raise ValueError if two concepts determine the same tokens."""
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
