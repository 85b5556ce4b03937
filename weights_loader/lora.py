"""LoRA files in and out: the same low-rank changes under the names of three programs.

    ours       unet.down.0.transformers.0.blocks.0.cross_attention.to_k                   down, up, alpha
    diffusers  unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k         .lora_A.weight, .lora_B.weight
    kohya      lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k    .lora_down.weight, .lora_up.weight, .alpha

The change to a layer's weight is (alpha / rank) up @ down. kohya's files hold the alpha of each layer; diffusers' hold peft's config as
JSON in the metadata, peft's own in adapter_config.json beside the file; where nothing is said, alpha is the rank. A name is a layer's
place in a diffusers model, so the rules of dialects.py name it. kohya's has underscores in place of dots, which cannot be undone by
itself: it is looked up among the names that the model really has.

Left out: LoHa, LoKr, DoRA and Tucker's middle factor, which are other products than up @ down. Each is refused by name.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minidiff.adapters.lora import PARTS, LoRA, LowRank, layers_of
from minidiff.pipeline import StableDiffusion
from weights_loader import detect
from weights_loader.families import part_names
from weights_loader.metadata import FORMAT, settings_to_metadata
from weights_loader.name_table import TensorLocation, canonical_name, name_table
from weights_loader.read import Checkpoint, read
from weights_loader.report import SHOWN, nearest, some
from weights_loader.write import write_safetensors

NAMES = ("diffusers", "kohya")
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
PEFT_METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's config
PEFT_CONFIG = "adapter_config.json"  # where peft does
PEFT_ALPHA = 8  # peft's lora_alpha where its config does not say one
FOLDER = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_model.safetensors", "adapter_model.bin")

# What the name of a tensor ends with; before it stands the layer. peft may put the name of an adapter behind lora_A.
END = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?P<peft>[AB])(?:\.[^.]+)?|[._]lora(?:_linear_layer)?\.(?P<older>down|up)|\.lora_(?P<kohya>down|up))\.weight"
    r"|(?P<scaled>.+)\.alpha"
)
HALVES = {"A": "down", "B": "up", "down": "down", "up": "up"}
# Older spellings of a layer's name.
SPELLINGS = (
    (r"^base_model\.model\.", ""),  # peft's wrapper
    (r"\.processor\.to_out$", ".to_out.0"),  # diffusers before 0.20 kept a LoRA in the attention's processor, ...
    (r"\.processor\.to_([qkv])$", r".to_\1"),
    (r"self_attn\.to_out$", "self_attn.out_proj"),  # ... and called the text encoder's layers like the U-Net's
    (r"self_attn\.to_([qkv])$", r"self_attn.\1_proj"),
    (r"^(text_encoder\.)?encoder\.layers\.", r"\1text_model.encoder.layers."),  # transformers 5
    (r"^lora_te1_", "lora_te_"),
)
# (pattern of a tensor's name, what a file with such a name is)
REFUSED = (
    (r"^(lora_)?transformer[._]|(double|single|single_transformer|joint)_blocks", "a LoRA for a diffusion transformer (Flux, SD 3)"),
    (r"^lora_te2_|^text_encoder_2\.|transformer_blocks[._][1-9]", "a LoRA for Stable Diffusion XL"),
    (r"\.hada_|\.lokr_|\.oft_", "a LoHa, LoKr or OFT, which change a weight by another product than a LoRA's"),
    (r"dora_scale|lora_magnitude_vector", "a DoRA, which scales the weight too"),
    (r"\.lora_mid\.", "a LoRA with Tucker's middle factor"),
    (r"^(unet|text_encoder):\d+:(up|down)$", "a LoRA of cloneofsimo/lora, which numbers its layers instead of naming them"),
)
CONTEXT_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}


@dataclass(frozen=True, eq=False)
class Factors:
    """The change (alpha / rank) up @ down of one layer: down (rank, in, ...), up (out, rank, ...), with kernels for a convolution."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


# -------------------------------------------------------------------------------------------------------------- reading


def read_lora(path: str | Path, sd: StableDiffusion) -> LoRA:
    """The LoRA of a file in any of the three namings, or of a folder that diffusers or peft wrote; float32, not attached.

    Raises FileNotFoundError, and ValueError for what is no LoRA and for one that does not fit the model, with the layers and widths
    that disagree. A tensor that is not understood is an error too: half a LoRA draws another picture and says nothing.
    """
    path = find_lora(path)
    checkpoint = read(path)
    try:
        return lora_from_factors(fit(parse(checkpoint.tensors, peft_config(checkpoint)), sd))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def find_lora(path: str | Path) -> Path:
    """The file itself, or the one in a folder that diffusers' save_lora_weights or peft's save_pretrained made."""
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in FOLDER if (path / name).is_file()), None)
        if found is None:
            what = "a whole model, given as a LoRA" if (path / "model_index.json").is_file() else "no LoRA in this folder"
            raise ValueError(f"{path}: {what}; expected a file, or a folder with {' or '.join(FOLDER[::2])}")
        return found
    return path


def parse(tensors: dict[str, Tensor], config: dict[str, object]) -> dict[str, Factors]:
    """The factors by the layer's name in the file, older spellings mended; config: what `peft_config` gives.

    Raises ValueError for what is no LoRA or one of another kind, for a tensor that is no part of one, and for half a pair.
    """
    if detect.kind(list(tensors)) != "lora":
        raise ValueError(f"given as a LoRA, but it is {detect.describe(list(tensors))}")
    for pattern, what in REFUSED:
        if name := next((name for name in tensors if re.search(pattern, name)), None):
            raise ValueError(f"{what}; not supported (by the tensor {name})")
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = END.fullmatch(name)
        if match is None:
            raise ValueError(f"tensor {name!r} is no part of a LoRA; expected names that end in .lora_A.weight, .lora_down.weight, .alpha")
        layer = canonical_name(match["layer"] or match["scaled"], SPELLINGS)
        kind = "alpha" if match["scaled"] else HALVES[match["peft"] or match["older"] or match["kohya"]]
        if kind in found.setdefault(layer, {}):
            raise ValueError(f"{layer} has two tensors for {kind}; two LoRAs in one file? Split them")
        found[layer][kind] = tensor
    result = {}
    for layer, halves in found.items():
        if absent := [kind for kind in ("down", "up") if kind not in halves]:
            raise ValueError(f"{layer} has no {' and no '.join(absent)} half; saved in part?")
        result[layer] = Factors(halves["down"], halves["up"], _alpha(layer, halves, config))
    return result


def peft_config(checkpoint: Checkpoint) -> dict[str, object]:
    """peft's config: of the metadata that diffusers writes ("unet.r": 4, ...), or of the adapter_config.json beside peft's file; or {}."""
    beside = checkpoint.path.with_name(PEFT_CONFIG)
    if PEFT_METADATA in checkpoint.metadata:
        where, text = f"metadata {PEFT_METADATA}", checkpoint.metadata[PEFT_METADATA]
    elif checkpoint.path.name.startswith("adapter_model.") and beside.is_file():
        where, text = PEFT_CONFIG, beside.read_text(encoding="utf-8")
    else:
        return {}
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{where}: {config!r}; expected an object")
    return config


def _alpha(layer: str, halves: dict[str, Tensor], config: dict[str, object]) -> float:
    rank = halves["down"].shape[0] if halves["down"].dim() else 0
    if "alpha" in halves:
        if halves["alpha"].numel() != 1:
            raise ValueError(f"{layer}: alpha has shape {tuple(halves['alpha'].shape)}; expected one number")
        return _finite(layer, halves["alpha"].item()) or float(rank)  # kohya's scripts take 0 for the rank
    part = next((part for part in PARTS if layer.startswith(f"{part}.")), None)
    if part:
        config = {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}
    if not config:
        return float(rank)
    alpha, patterns = config.get("lora_alpha", PEFT_ALPHA), config.get("alpha_pattern") or {}
    # To peft a key is a regular expression for the end of the name, and the first that matches counts. Programs write plain names.
    if not isinstance(patterns, dict) or not all(re.fullmatch(r"\^?[\w.]+", pattern) for pattern in patterns):
        raise ValueError(f"peft's config has alpha_pattern {patterns!r}; only plain names of layers are read")
    names = (pattern for pattern in patterns if f".{layer}".endswith("." + pattern.removeprefix("^")))
    alpha = _finite(layer, patterns.get(next(names, None), alpha))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha  # there the scale is alpha / sqrt(rank)


def _finite(layer: str, alpha: object) -> float:
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"{layer}: alpha is {alpha!r}; expected a finite number")
    return float(alpha)


def layer_places(sd: StableDiffusion, names: str) -> dict[str, TensorLocation]:
    """{our layer: where a LoRA file has it}, for all linear layers and convolutions of the U-Net and the text encoder.

    Raises ValueError for an unknown naming.
    """
    if names not in NAMES:
        raise ValueError(f"names {names!r} unknown; choose {' or '.join(NAMES)}")
    tables = {part: name_table(getattr(sd, part), part_names(sd.config, part, "diffusers")) for part in PARTS}
    result = {}
    for ours in layers_of(sd):
        part, layer = ours.split(".", 1)
        place = tables[part][f"{layer}.weight"]
        theirs = place.name.removesuffix(".weight")
        theirs = f"{part}.{theirs}" if names == "diffusers" else KOHYA[part] + theirs.replace(".", "_")
        result[ours] = TensorLocation(theirs, convolution=place.convolution)
    assert len({place.name for place in result.values()}) == len(result), f"two layers have one name in {names} files"
    return result


def fit(factors: dict[str, Factors], sd: StableDiffusion) -> dict[str, Factors]:
    """The factors by our layers' names and in our shapes. Raises ValueError with those that the model lacks or has in another width."""
    places = {place.name: ours for names in NAMES for ours, place in layer_places(sd, names).items()}
    # Files of one part alone leave its name out.
    places |= {name.split(".", 1)[1]: ours for name, ours in places.items() if "." in name}
    layers, result, unknown, wrong = layers_of(sd), {}, [], []
    for name, one in factors.items():
        if name not in places:
            unknown.append(name)
            continue
        ours = places[name]
        weight = layers[ours].weight
        one = Factors(*(_as_weight(half, weight) for half in (one.down, one.up)), one.alpha)
        if problem := _misfit(one, weight):
            wrong.append(f"{name}: {problem}")
        elif ours in result:
            raise ValueError(f"the layer {name} occurs under two names; two LoRAs in one file? Split them")
        result[ours] = one
    if unknown or wrong:
        lines = [f"not a LoRA for this model: {len(unknown)} of its {len(factors)} layers are not there, {len(wrong)} have other widths"]
        lines += some([f"no layer {name}{nearest(name, list(places))}" for name in unknown[:SHOWN]], len(unknown))
        lines += some(wrong, len(wrong))
        raise ValueError("\n".join(lines) + _likely_cause(factors, sd))
    return result


def _as_weight(half: Tensor, weight: Tensor) -> Tensor:
    """float32; a 1x1 convolution becomes a matrix where the layer is one here."""
    half = half.float()
    return half[:, :, 0, 0] if weight.dim() == 2 and half.shape[2:] == (1, 1) else half


def _misfit(factors: Factors, weight: Tensor) -> str | None:
    down, up = tuple(factors.down.shape), tuple(factors.up.shape)
    rank = down[0] if down else 0
    expected = (rank, *weight.shape[1:]), (weight.shape[0], rank, *(1,) * (weight.dim() - 2))
    if rank and (down, up) == expected:
        return None
    return f"down {down} and up {up}; this layer needs {expected[0]} and {expected[1]}"


def _likely_cause(factors: dict[str, Factors], sd: StableDiffusion) -> str:
    widths = Counter(one.down.shape[1] for name, one in factors.items() if re.search(r"attn2[._]to_[kv]$", name) and one.down.dim() > 1)
    ours = sd.config.unet.context_width
    if not widths or widths.most_common(1)[0][0] == ours:
        return ""
    width = widths.most_common(1)[0][0]
    return f"\n  likely cause: made for {CONTEXT_WIDTHS.get(width, 'another model')} (context of width {width}; this model's is {ours})"


def lora_from_factors(factors: dict[str, Factors]) -> LoRA:
    """Factors under our layers' names as a module."""
    return LoRA({name: LowRank(one.down, one.up, one.alpha) for name, one in factors.items()})


# -------------------------------------------------------------------------------------------------------------- writing


def write_lora(path: str | Path, lora: LoRA, sd: StableDiffusion, names: str = "diffusers", settings: dict[str, object] | None = None):
    """Write a LoRA as .safetensors, in the dtype it has, for diffusers and peft ("diffusers") or for the web interfaces ("kohya").

    diffusers reads kohya's names too, but takes the commonest alpha for all of them: give a LoRA of several alphas its own names.
    settings: what it was made with, kept as JSON in the metadata. The multiplier lora.weight belongs to its use and is not written.
    Raises ValueError for an unknown naming or another suffix, FileNotFoundError without the folder.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a LoRA is written as .safetensors; name it {path.with_suffix('.safetensors').name}")
    tensors, metadata = lora_to_file(factors_of(lora), sd, names)
    write_safetensors(path, tensors, FORMAT | settings_to_metadata(settings or {}) | metadata)


def factors_of(lora: LoRA) -> dict[str, Factors]:
    return {name: Factors(layer.down.weight.detach(), layer.up.weight.detach(), float(layer.alpha)) for name, layer in lora.layers.items()}


def lora_to_file(factors: dict[str, Factors], sd: StableDiffusion, names: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file: `parse` and `fit` the other way."""
    places = layer_places(sd, names)
    down, up = ("lora_A", "lora_B") if names == "diffusers" else ("lora_down", "lora_up")
    # Where ranks differ and each alpha is its rank, as after an extraction, alphas are left out: every program takes the rank then. Written
    # out, diffusers would take the commonest of them for all attention layers.
    implied = len({one.rank for one in factors.values()}) > 1 and all(one.alpha == one.rank for one in factors.values())
    tensors = {}
    for ours, one in factors.items():
        place = places[ours]
        kernel = (..., None, None) if place.convolution else ...
        tensors[f"{place.name}.{down}.weight"] = one.down[kernel]
        tensors[f"{place.name}.{up}.weight"] = one.up[kernel]
        if names == "kohya" and not implied:
            alpha = torch.tensor(one.alpha, dtype=torch.float64)
            tensors[f"{place.name}.alpha"] = alpha.float() if alpha.float() == alpha else alpha
    if names == "kohya":
        return tensors, _kohya_metadata(factors, sd)
    return tensors, {PEFT_METADATA: json.dumps(_peft_metadata(factors, places), sort_keys=True)}


def _kohya_metadata(factors: dict[str, Factors], sd: StableDiffusion) -> dict[str, str]:
    """What web interfaces show and sort by."""
    rank, alpha = _commonest(factors)
    version = {768: "sd_v1", 1024: "sd_v2"}.get(sd.config.unet.context_width)
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
    return metadata | ({"ss_base_model_version": version} if version else {})


def _commonest(factors: dict[str, Factors]) -> tuple[int, float]:
    """Rank and alpha."""
    ranks, alphas = Counter(one.rank for one in factors.values()), Counter(one.alpha for one in factors.values())
    return ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]


def _peft_metadata(factors: dict[str, Factors], places: dict[str, TensorLocation]) -> dict[str, object]:
    """peft's config of each part: the commonest rank and alpha, and the layers that differ.

    A layer is named from inside the part, and the text encoder's without `text_model.`, which transformers 5 does not have: peft compares
    the end of the name.
    """
    result = {}
    for part in PARTS:
        layers = {
            places[ours].name.removeprefix(f"{part}.").removeprefix("text_model."): one
            for ours, one in factors.items()
            if ours.startswith(f"{part}.")
        }
        if not layers:
            continue
        rank, alpha = _commonest(layers)
        result |= {
            f"{part}.peft_type": "LORA",
            f"{part}.r": rank,
            f"{part}.lora_alpha": alpha,
            f"{part}.rank_pattern": {name: one.rank for name, one in layers.items() if one.rank != rank},
            f"{part}.alpha_pattern": {name: one.alpha for name, one in layers.items() if one.alpha != alpha},
            f"{part}.target_modules": list(layers),
        }
    return result


# -------------------------------------------------------------------------------------------------------- command line


def parse_weighted(text: str) -> tuple[str, float]:
    """ "style.safetensors:0.7" -> ("style.safetensors", 0.7); without a number behind the last colon the weight is 1.

    Raises ValueError for a weight that is not finite, or is no number behind a name that ends a file's.
    """
    file, colon, weight = text.rpartition(":")
    if not colon or not file or Path(text).exists():
        return text, 1.0
    try:
        number = float(weight)
    except ValueError:
        # A drive letter (C:\loras\x.safetensors), or a name with a colon in it: what stands behind is the end of a path.
        if Path(file).suffix in (".safetensors", ".ckpt", ".pt", ".bin") and not Path(weight).suffix:
            raise ValueError(f"weight {weight!r} of {file} is no number; write {file}:0.7") from None
        return text, 1.0
    if not math.isfinite(number):
        raise ValueError(f"weight {weight} of {file}: expected a finite number, such as 0.7")
    return file, number
