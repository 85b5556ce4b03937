"""What minidiff knows about a family of models: one object per family, which the rest of this folder's code asks."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minidiff.config import ModelConfig
from weights_loader.families.sizes import Shapes, config_sizes, sizes
from weights_loader.name_table import LAYOUTS, PartNames

# Models that differ in these numbers alone are of one family: a personalised one has more words, an inpainting one more inputs.
VARYING = ("vocabulary", "vocabulary 2", "U-Net input channels", "linear projection")

Rules = tuple[tuple[str, str], ...]  # (pattern of a tensor's name, what is said about it)


@dataclass(frozen=True)
class Family:
    """A family of models: the same parts and sizes, other weights.

    Args:
        name: as `minidiff inspect` shows it.
        config: the numbers of the public model.
        names: how files name each part of a model: {layout: {part: names}}.
        marker: a pattern of one tensor that every whole file in LDM names has, and no other family's file; None if only metadata tell.
        any_size: the models differ in their numbers, and each file states its own in its metadata.
        image_sizes: pixels of the models with each prediction, where they differ from config.image_size.
        variants: {input channels of the U-Net: what is added to the name}.
        other_variants: the same for models that are refused, by what they are made for.
        ignored: (pattern, why nothing is lost without the tensor).
        extra: patterns of tensors that are kept and written back, though nothing is computed with them. With a group "block" only where
            that is the number of a block of the text encoder that is not run.
        unused_text_layers: how many blocks of the text encoder a whole file has that are not run.
        refused: (pattern, what a file with such a tensor is): another kind of model.
        parts_alone: the same for parts of a model. A whole model has such tensors too, so they count only if it has no U-Net.
        pipelines: diffusers' classes for this family: for pictures from text, for inpainting, and others that load the same parts.
        settings: {part: {setting of its config.json in a diffusers folder: the only value that is supported}}.
        kohya_layout: in whose names kohya's scripts write the U-Net's layers into a LoRA.
        distilled: what models are called whose transformers have fewer blocks; they are refused.
        only: a pattern of layers and tensors that small files (LoRAs, ControlNets) have for this family alone.
    """

    name: str
    config: ModelConfig
    names: Mapping[str, Mapping[str, PartNames]] = field(repr=False)
    marker: str | None
    any_size: bool = False
    image_sizes: Mapping[str, int] = field(default_factory=dict)
    variants: Mapping[int, str] = field(default_factory=dict)
    other_variants: Mapping[int, str] = field(default_factory=dict)
    ignored: Rules = field(default=(), repr=False)
    extra: tuple[str, ...] = field(default=(), repr=False)
    unused_text_layers: int = 0
    refused: Rules = field(default=(), repr=False)
    parts_alone: Rules = field(default=(), repr=False)
    pipelines: tuple[str, ...] = ()
    settings: Mapping[str, Mapping[str, object]] = field(default_factory=dict, repr=False)
    kohya_layout: str = "diffusers"
    distilled: str = "smaller models"
    only: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the names of the parts, in the order in which files list them."""
        return tuple(self.names["ldm"])

    def part_names(self, part: str, layout: str) -> PartNames:
        """Return how files of a layout name a part. Raises ValueError for an unknown layout."""
        if layout not in self.names:
            raise ValueError(f"layout {layout!r} unknown; choose {' or '.join(LAYOUTS)}")
        return self.names[layout][part]

    def part_of(self, name: str) -> str | None:
        """Return the part that a tensor of a file in LDM names belongs to."""
        return next((part for part, names in self.names["ldm"].items() if names.belongs(name)), None)

    def marked(self, names: Iterable[str]) -> bool:
        """Return whether a file with these tensors is of this family."""
        return self.marker is not None and any(re.search(self.marker, name) for name in names)

    def sizes(self, shapes: Shapes) -> dict[str, Any]:
        """Return what the shapes of a file in LDM names tell of its config; see families/sizes.py."""
        found = sizes(shapes, self.names["ldm"], self.config)
        run = self.config.text_encoder.layers
        if found["text encoder layers"] == run + self.unused_text_layers:
            found["text encoder layers"] = run
        return found

    def differences(self, numbers: Mapping[str, object]) -> dict[str, str]:
        """Return where numbers, of `sizes` or `config_sizes`, are not this family's, and both values."""
        return differences(numbers, self.config)

    def owns(self, config: ModelConfig) -> bool:
        """Return whether a model with this config has the parts and names of this family."""
        ours = self.config.text_encoder, self.config.text_encoder_2
        theirs = config.text_encoder, config.text_encoder_2
        same_text_encoders = [one and one.activation for one in ours] == [one and one.activation for one in theirs]
        return same_text_encoders and (self.any_size or not self.differences(config_sizes(config)))

    def name_of(self, config: ModelConfig) -> str:
        """Return the family's name and that of the variant, as "Stable Diffusion 1.x inpainting"."""
        return self.name + self.variants.get(config.unet.in_channels, "")

    def keeps(self, name: str, config: ModelConfig) -> bool:
        """Return whether a tensor is kept unused."""
        found = [match for pattern in self.extra if (match := re.search(pattern, name))]
        run = config.text_encoder.layers
        return any(int(match.groupdict().get("block") or run) >= run for match in found)


def differences(numbers: Mapping[str, object], config: ModelConfig) -> dict[str, str]:
    """Return where the numbers are not those of a config, and both values, apart from what varies within a family."""
    known = config_sizes(config)
    return {key: f"{numbers[key]}, not {known[key]}" for key in known if key not in VARYING and numbers[key] != known[key]}
