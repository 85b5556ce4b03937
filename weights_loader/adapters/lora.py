"""LoRA files in and out: the same changes under the names of several programs.

    file -> Dialect.parse -> {the file's layer: change} -> fit -> {our layer: LayerChange} -> LoRA
    LoRA -> Dialect.pack -> file

    ours       unet.down.0.transformers.0.blocks.0.cross_attention.to_k
    diffusers  unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k         peft.py
    kohya      lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k    kohya.py

Left out: LoHa, LoKr, DoRA and Tucker's middle factor, which are other products than up @ down. Each is refused by name (lora_file.py).
"""

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from minidiff.adapters.layer_change import LayerChange
from minidiff.adapters.layers import PARTS, layers_of
from minidiff.adapters.lora import LoRA
from minidiff.adapters.low_rank import LowRank
from minidiff.pipeline import StableDiffusion
from weights_loader.adapters.common import misfit, weights_file
from weights_loader.adapters.kohya import KOHYA
from weights_loader.adapters.lora_file import Dialect, Factors, StoredChange
from weights_loader.adapters.origin import describe_origin
from weights_loader.adapters.peft import PEFT
from weights_loader.detect import describe
from weights_loader.families import family_of_config, made_for_another, part_names
from weights_loader.metadata import FORMAT, settings_to_metadata
from weights_loader.name_table import TensorLocation, name_table
from weights_loader.read import Checkpoint, read
from weights_loader.write import write_safetensors

DIALECTS: tuple[Dialect, ...] = (KOHYA, PEFT)  # the first that matches a file reads it
# In a folder that diffusers' save_lora_weights or peft's save_pretrained made.
FOLDER = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_model.safetensors", "adapter_model.bin")


# --- reading ----------------------------------------------------------------------------------------------------------


def read_lora(path: str | Path, sd: StableDiffusion, weight: float = 1.0) -> LoRA:
    """Read a LoRA from a file in any of the dialects, or from a folder that diffusers or peft wrote; float32, not attached.

    weight: the factor that it is used with (LoRA.weight).
    Raises FileNotFoundError, and ValueError for what is no LoRA and for one that does not fit the model, with the layers and widths
    that disagree. A tensor that is not understood is an error too: half a LoRA silently draws another picture.
    """
    path = weights_file(path, FOLDER, "LoRA")
    checkpoint = read(path)
    try:
        return LoRA(fit(parse(checkpoint), sd), weight)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def dialect_of(names: list[str]) -> Dialect | None:
    """Return the dialect of a file by the names of its tensors; None if it is no LoRA."""
    return next((dialect for dialect in DIALECTS if dialect.matches(names)), None)


def parse(checkpoint: Checkpoint) -> Mapping[str, StoredChange]:
    """Return the changes by the layer's name in the file. Raises ValueError for what is no LoRA, and as the dialects do."""
    names = list(checkpoint.tensors)
    dialect = dialect_of(names)
    if dialect is None:
        raise ValueError(f"given as a LoRA, but it is {describe(names)}")
    return dialect.parse(checkpoint)


def layer_locations(sd: StableDiffusion, dialect: Dialect, unet_layout: str = "diffusers") -> dict[str, TensorLocation]:
    """Return {our layer: where a LoRA file has it}, for all linear layers and convolutions of the U-Net and the text encoders.

    unet_layout: whose names and numbers the U-Net's layers have; those of SDXL occur in both.
    """
    assert dialect.layer_name is not None, f"{dialect.name} has no names of its own"
    names = {part: part_names(sd.config, part, unet_layout if part == "unet" else "diffusers") for part in PARTS if part in sd.parts}
    tables = {part: name_table(sd.parts[part], own) for part, own in names.items()}
    result = {}
    for ours in layers_of(sd):
        part, layer = ours.split(".", 1)
        location = tables[part][f"{layer}.weight"]
        theirs = location.name.removesuffix(".weight").removeprefix(names[part].prefix if part == "unet" else "")
        result[ours] = TensorLocation(dialect.layer_name(part, theirs), convolution=location.convolution)
    assert len({location.name for location in result.values()}) == len(result), f"two layers have one name in {dialect.name} files"
    return result


def _ldm_layers(sd: StableDiffusion) -> dict[str, str]:
    """Return {layer in the file: our layer} of the U-Net for files that number it as the original: OneTrainer's and ComfyUI's."""
    names = part_names(sd.config, "unet", "ldm")
    result = {}
    for ours, location in name_table(sd.unet, names).items():
        theirs = location.name.removeprefix(names.prefix).removesuffix(".weight")
        if ours.endswith(".weight") and f"unet.{ours.removesuffix('.weight')}" in layers_of(sd):
            for name in (f"lora_unet_{theirs.replace('.', '_')}", f"diffusion_model.{theirs}", f"lora_unet.{theirs}"):
                result[name] = f"unet.{ours.removesuffix('.weight')}"
    return result


def fit(changes: Mapping[str, StoredChange], sd: StableDiffusion) -> dict[str, LayerChange]:
    """Return the changes by our names of the layers and in our shapes.

    Raises ValueError with those that the model lacks or has in another width.
    """
    named = [dialect for dialect in DIALECTS if dialect.layer_name]
    ours_of = {location.name: ours for dialect in named for ours, location in layer_locations(sd, dialect).items()}
    ours_of |= _ldm_layers(sd)
    # Files of one part alone leave its name out; of two text encoders the first is meant.
    ours_of = {name.split(".", 1)[1]: ours for name, ours in reversed(ours_of.items()) if "." in name} | ours_of
    layers, result, unknown, wrong = layers_of(sd), {}, [], []
    for name, change in changes.items():
        if name not in ours_of:
            unknown.append(name)
            continue
        ours = ours_of[name]
        if ours in result:
            raise ValueError(f"the layer {name} occurs under two names; two LoRAs in one file? Split them")
        try:
            result[ours] = change.to_change(layers[ours].weight)
        except ValueError as error:
            wrong.append(f"{name}: {error}")
    if unknown or wrong:
        counts = f"{len(unknown)} of its {len(changes)} layers are not there, {len(wrong)} have other widths"
        raise ValueError(misfit(f"not a LoRA for this model: {counts}", unknown, list(ours_of), wrong) + _likely_cause(changes, sd))
    return result


def _likely_cause(changes: Mapping[str, StoredChange], sd: StableDiffusion) -> str:
    factors = {name: one for name, one in changes.items() if isinstance(one, Factors) and one.down.dim() > 1}
    widths = Counter(one.down.shape[1] for name, one in factors.items() if re.search(r"attn2[._]to_[kv]$", name))
    another = made_for_another(sd.config, widths.most_common(1)[0][0] if widths else None, changes)
    return f"\n  likely cause: {another}" if another else ""


# --- writing ----------------------------------------------------------------------------------------------------------


def write_lora(path: str | Path, lora: LoRA, sd: StableDiffusion, names: str = "kohya", settings: dict[str, object] | None = None) -> None:
    """Write a LoRA of low-rank changes as .safetensors, in the dtype it has. The multiplier lora.weight belongs to its use: it stays out.

    Args:
        path: the file
        lora: attached or not
        sd: a model that it fits
        names: the dialect, "kohya", which the web interfaces and diffusers read, or "diffusers" for diffusers and peft alone
        settings: what it was made with, kept as JSON in the metadata; the rest of the metadata is that of origin.py

    Raises ValueError for an unknown dialect, another suffix, other changes than low-rank ones and as `check_names` does, FileNotFoundError
    without the folder.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a LoRA is written as .safetensors; name it {path.with_suffix('.safetensors').name}")
    check_names(lora, names)
    tensors, metadata = pack(lora, sd, names)
    origin = describe_origin("lora", path, sd, settings)
    write_safetensors(path, tensors, FORMAT | settings_to_metadata(settings or {}) | origin | metadata)


def check_names(lora: LoRA, names: str) -> None:
    """Raise ValueError where a dialect's readers would take another alpha than the LoRA has: they take the rank where they find none."""
    tells_alpha = {dialect.name: dialect.tells_alpha for dialect in DIALECTS}.get(names, True)
    scaled = {name: one for name, one in lora.layers.items() if isinstance(one, LowRank) and one.alpha != one.rank}
    if scaled and not tells_alpha:
        name, one = next(iter(scaled.items()))
        raise ValueError(
            f"names {names!r}: most programs that read them take the rank for alpha, and {len(scaled)} layers have another ({name}: rank "
            f"{one.rank}, alpha {one.alpha:g}); take the names 'kohya', or an alpha that is the rank"
        )


def pack(lora: LoRA, sd: StableDiffusion, names: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and metadata of a file: `parse` and `fit` the other way."""
    written = {dialect.name: dialect for dialect in DIALECTS if dialect.pack and dialect.layer_name}
    if names not in written or (write := written[names].pack) is None:
        raise ValueError(f"names {names!r} unknown; choose {' or '.join(sorted(written))}")
    layout = family_of_config(sd.config).kohya_layout if names == "kohya" else "diffusers"
    locations, changes = layer_locations(sd, written[names], layout), {}
    for name, change in lora.layers.items():
        if not isinstance(change, LowRank):
            raise ValueError(f"{name} has a {type(change).__name__}, and files of {names} hold low-rank changes only")
        changes[locations[name]] = change
    return write(changes, sd)


# --- command line -----------------------------------------------------------------------------------------------------


def parse_weighted(text: str) -> tuple[str, float]:
    """Split "style.safetensors:0.7" into ("style.safetensors", 0.7); without a number after the last colon the weight is 1.

    Raises ValueError for a weight that is not finite, or that is no number after a name that ends as a file's does.
    """
    file, colon, weight = text.rpartition(":")
    if not colon or not file or Path(text).exists():
        return text, 1.0
    try:
        number = float(weight)
    except ValueError:
        # A drive letter (C:\loras\x.safetensors), or a name with a colon in it: what follows is the end of a path.
        if Path(file).suffix in (".safetensors", ".ckpt", ".pt", ".bin") and not Path(weight).suffix:
            raise ValueError(f"weight {weight!r} of {file} is no number; write {file}:0.7") from None
        return text, 1.0
    if not math.isfinite(number):
        raise ValueError(f"weight {weight} of {file}: expected a finite number, such as 0.7")
    return file, number
