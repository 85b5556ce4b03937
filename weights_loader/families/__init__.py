"""The families of models that can be loaded: one object each, and this table.

    base.py                what is asked of a family
    stable_diffusion_1.py  stable_diffusion_2.py  stable_diffusion_xl.py  own_size.py (the bundled model)
    shared.py              what these have in common
    sizes.py               the numbers of a model that shapes tell

To add a family, write its file and put its object in the table.
"""

import re
from collections.abc import Collection
from dataclasses import replace

from minidiff.config import ModelConfig
from weights_loader.families.base import Family, differences
from weights_loader.families.own_size import OWN_SIZE_CLIP, OWN_SIZE_OPEN_CLIP, OWN_SIZE_XL
from weights_loader.families.sizes import Shapes, config_sizes
from weights_loader.families.stable_diffusion_1 import STABLE_DIFFUSION_1
from weights_loader.families.stable_diffusion_2 import STABLE_DIFFUSION_2
from weights_loader.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from weights_loader.name_table import PartNames

# The first that fits is taken, so those of any size come last.
FAMILIES: tuple[Family, ...] = (
    STABLE_DIFFUSION_1,
    STABLE_DIFFUSION_2,
    STABLE_DIFFUSION_XL,
    OWN_SIZE_CLIP,
    OWN_SIZE_OPEN_CLIP,
    OWN_SIZE_XL,
)

NEAR = 2  # how many numbers of a model a single missing tensor can change

__all__ = [
    "FAMILIES",
    "Family",
    "Shapes",
    "config_sizes",
    "differences",
    "family_config",
    "family_of_config",
    "family_of_names",
    "family_of_pipeline",
    "family_of_shapes",
    "made_for_another",
    "part_names",
]


def family_of_config(config: ModelConfig) -> Family:
    """Return the family of a model with this config."""
    return next(family for family in FAMILIES if family.owns(config))


def family_of_names(names: Collection[str]) -> Family:
    """Return the family whose marker is among the names of a file in LDM names; Stable Diffusion 1 if there is none."""
    return next((family for family in FAMILIES if family.marked(names)), STABLE_DIFFUSION_1)


def family_of_shapes(shapes: Shapes) -> Family | None:
    """Return the family that has exactly the sizes of a file in LDM names."""
    return next((family for family in FAMILIES if not family.any_size and not family.differences(family.sizes(shapes))), None)


def family_of_pipeline(name: str | None) -> Family:
    """Return the family of a diffusers folder by the class that its model_index.json names. Raises ValueError for an unknown one."""
    family = next((family for family in FAMILIES if name in family.pipelines), None)
    if family is None:
        known = dict.fromkeys(pipeline for family in FAMILIES for pipeline in family.pipelines)
        raise ValueError(f"a {name}, not supported; supported are {', '.join(known)}")
    return family


def made_for_another(config: ModelConfig, width: int | None, names: Collection[str] = ()) -> str | None:
    """Say of a small file, naming both families, that it was made for another one than the model's; return None if nothing says so.

    Args:
        config: of the model.
        width: of the text that the file's layers take, or of its words, which decides; None if it shows none.
        names: of its layers or tensors.
    """
    ours, own = family_of_config(config), config.unet.context_width
    if width == own:
        return None
    if width is None:
        others = (family for family in FAMILIES if family.only and family.only != ours.only)
        theirs = next((family.name for family in others if any(re.search(family.only or "", name) for name in names)), None)
    else:
        public = {family.config.unet.context_width: family.name for family in FAMILIES if not family.any_size}
        theirs = f"{public.get(width, 'another model')} (context of width {width})"
    return theirs and f"made for {theirs}, and this model is {ours.name_of(config)} (of width {own})"


def family_config(shapes: Shapes) -> ModelConfig:
    """Return the config of a public model, by the shapes of its tensors in LDM names; the prediction is its family's default.

    A model with almost all numbers of a family is taken as one with missing weights, so that the account of its tensors can name them.
    Raises ValueError, with the numbers found, for any other.
    """
    marked = [family for family in FAMILIES if family.marked(shapes)] or [STABLE_DIFFUSION_1]
    family = min(marked, key=lambda family: len(_apart(family, shapes)))
    found, base = family.sizes(shapes), family.config
    depths, known = found["U-Net attention"], base.unet.attention
    if len(depths) == len(known) and depths != known and all(a <= b for a, b in zip(depths, known)) and family.distilled:
        raise ValueError(f"{family.distilled}: its transformers have {depths} blocks a level, not {known}; not supported")
    if len(_apart(family, shapes)) > NEAR:
        numbers = ", ".join(f"{key} {value}" for key, value in found.items() if value)
        raise ValueError(
            "a model of no known family: heads, normalisation groups and schedule cannot be read off the tensors, and the file's metadata "
            f"does not name them; pass config=ModelConfig(...). Found {numbers}"
        )
    inputs = found["U-Net input channels"] or base.unet.in_channels
    if inputs not in family.variants:
        kind = family.other_variants.get(inputs, "another task")
        raise ValueError(
            f"a {family.name} whose U-Net takes {inputs} channels, made for {kind}; supported are "
            + " and".join(f"{what and f', for{what},'} {count}" for count, what in family.variants.items()).strip()
        )
    return replace(
        base,
        text_encoder=replace(base.text_encoder, vocab_size=found["vocabulary"] or base.text_encoder.vocab_size),
        text_encoder_2=base.text_encoder_2
        and replace(base.text_encoder_2, vocab_size=found["vocabulary 2"] or base.text_encoder_2.vocab_size),
        unet=replace(base.unet, in_channels=inputs, linear_projection=bool(found["linear projection"])),
    )


def _apart(family: Family, shapes: Shapes) -> list[str]:
    """Return the numbers that differ from the family's. A VAE from a file in diffusers names shows no sizes under LDM names."""
    found = family.sizes(shapes)
    return [key for key in family.differences(found) if found["VAE widths"] or not key.startswith(("VAE", "latent"))]


def part_names(config: ModelConfig, part: str, layout: str) -> PartNames:
    """Return how files of a layout name a part of a model with this config. Raises ValueError for an unknown layout."""
    return family_of_config(config).part_names(part, layout)
