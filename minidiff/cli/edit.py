"""The flags of `minidiff generate` that start from a picture: which ones belong together, the files, and the edit that they ask for."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from minidiff.cli.again import WORK_SIZE
from minidiff.cli.control import Frame
from minidiff.cli.flags import File, Number, Text, Whole
from minidiff.cli.model import print_notes

if TYPE_CHECKING:
    from torch import Tensor

    from minidiff.editing.canvas import Canvas
    from minidiff.editing.start import Sampling, Steer
    from minidiff.pipeline import StableDiffusion
    from minidiff.samplers import Step

STRENGTH = {False: 0.5, True: 1.0}  # by whether there is a mask; editing/README.md has what 0.5 keeps


@dataclass(frozen=True)
class EditFlags:
    """Start from a picture.

    Args:
        image: a picture to start from
        strength: how much of it is replaced by noise, 0 to 1; 0.5 by default, 1 where a mask says what is kept
        fit: how it is brought to another size: crop, resize (distorted) or pad (edges stretched outward)
        mask: a picture of the same size, white where IMAGE is repainted; or one that is transparent there
        outpaint: add a border and paint it, in pixels, as left=64,top=32
        only_masked: work on the part around the mask at the model's size (or --size), and put it back
        feather: over how many pixels around the mask old and new are blended; a latent cell by default
    """

    image: File = None
    strength: Number = None
    fit: Literal["crop", "resize", "pad"] = "crop"
    mask: File = None
    outpaint: Text = None
    only_masked: bool = False
    feather: Whole = None

    def settings(self, job: "Edit | None" = None) -> dict[str, object]:
        """Return what a PNG tells of the edit. job: as it was made ready, for the size of the part that is worked on."""
        if self.image is None:
            return {}
        names = {"Image": self.image, "Denoising strength": self.chosen_strength, "Fit": self.fit, "Mask": self.mask}
        if self.only_masked and job is not None and job.canvas is not None:
            names[WORK_SIZE] = "{1}x{0}".format(*job.canvas.inner)
        return {**names, "Outpaint": self.outpaint, "Only masked": self.only_masked, "Feather": self.feather}

    @property
    def has_mask(self) -> bool:
        """Say whether a part of the picture is to be kept."""
        return self.mask is not None or self.outpaint is not None

    @property
    def chosen_strength(self) -> float:
        """Return the strength that was given, or the default of this kind of edit."""
        return STRENGTH[self.has_mask] if self.strength is None else self.strength


@dataclass(frozen=True)
class Edit:
    """A picture read and made ready for a model: what is denoised from, and with a mask the way back to the whole picture.

    frame: the way from the picture to what is worked on, which hints of its size take too.
    """

    pixels: "Tensor"
    canvas: "Canvas | None"
    strength: float
    frame: Frame | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Return (width, height) of what is worked on."""
        height, width = (self.pixels if self.canvas is None else self.canvas.pixels).shape[2:]
        return width, height

    def denoise(
        self, sd: "StableDiffusion", prompts: Sequence[str], seeds: Sequence[int], sampling: "Sampling", steer: "Steer | None" = None
    ) -> "Generator[Step, Tensor | None, None]":
        """Run the edit on a model, one step at a time.

        Args:
            sd: the model
            prompts, seeds: one of each per picture
            sampling: steps, sampler and the like
            steer: adds ControlNets to the model
        """
        from minidiff.editing.image_to_image import image_to_image
        from minidiff.editing.inpaint import inpaint

        if self.canvas is None:
            return image_to_image(sd, prompts, self.pixels, strength=self.strength, seeds=seeds, sampling=sampling, steer=steer)
        pixels, mask = self.canvas.pixels, self.canvas.mask
        return inpaint(sd, prompts, pixels, mask, strength=self.strength, seeds=seeds, sampling=sampling, steer=steer)

    def finish(self, pixels: "Tensor") -> "Tensor":
        """Return the decoded pixels as they are, or laid over the original."""
        return pixels if self.canvas is None else self.canvas.finish(pixels.cpu())


def check_flags(flags: EditFlags) -> None:
    """Raise ValueError for flags that mean nothing without another."""
    given = {"strength": flags.strength is not None, "mask": flags.mask is not None, "outpaint": flags.outpaint is not None}
    given |= {"only-masked": flags.only_masked, "feather": flags.feather is not None, "fit": flags.fit != "crop"}
    if flags.image is None:
        for name in (name for name, is_given in given.items() if is_given):
            raise ValueError(f"--{name} without --image; give the picture to start from")
    for name in ("only-masked", "feather"):
        if given[name] and not flags.has_mask:
            raise ValueError(f"--{name} without --mask; give the mask of what is repainted")
    if flags.only_masked and flags.outpaint is not None:
        raise ValueError("--only-masked and --outpaint do not go together: a border needs the whole picture in view; leave one out")


def read_edit(flags: EditFlags) -> "tuple[Tensor, Tensor | None] | None":
    """Read the picture, and the mask if there is one, with a border if it is asked for; None without a picture.

    Raises ValueError or OSError for files that are not there or do not fit together.
    """
    import numpy as np

    from minidiff.editing.canvas import outpaint, read_sides
    from minidiff.editing.masks import check_mask, load_mask
    from minidiff.pictures import load_picture, to_pixels

    check_flags(flags)
    if flags.image is None:
        return None
    pixels, mask = to_pixels(np.array(load_picture(flags.image))[None]), None
    if flags.mask is not None:
        mask = load_mask(flags.mask)
        if mask.shape[2:] != pixels.shape[2:]:
            sizes = [f"{one.shape[3]} x {one.shape[2]}" for one in (mask, pixels)]
            raise ValueError(f"{flags.mask}: a mask of {sizes[0]} pixels for a picture of {sizes[1]}; save it in the picture's size")
    if flags.outpaint is not None:
        pixels, mask = outpaint(pixels, read_sides(flags.outpaint), mask)
    if mask is not None:
        check_mask(mask)
    return pixels, mask


def check_model(flags: EditFlags, sd: "StableDiffusion") -> None:
    """Raise ValueError for an inpainting model without a mask."""
    channels = sd.config.unet.in_channels
    if channels != sd.config.vae.latent_channels and not flags.has_mask:
        raise ValueError(
            f"a U-Net of {channels} channels: an inpainting model, which needs a picture and a mask beside the prompt; "
            "give --image and --mask, or load a text-to-image checkpoint"
        )


def prepare_edit(flags: EditFlags, read: "tuple[Tensor, Tensor | None]", sd: "StableDiffusion", size: int | tuple[int, int] | None) -> Edit:
    """Bring what was read to a size that the model works at, and print what is worth saying.

    Args:
        flags: of the edit
        read: picture and mask
        sd: the model
        size: as --size says it; None is to scale for a picture alone, and its own size with a mask
    """
    from minidiff.editing.canvas import fit, make_canvas, usual_size
    from minidiff.editing.masks import grow_small_mask

    (pixels, mask), config = read, sd.config
    factor, strength, read_size = config.vae.factor, flags.chosen_strength, (pixels.shape[3], pixels.shape[2])
    width, height = (size, size) if isinstance(size, int) else size or (None, None)
    if mask is None:
        if width is None or height is None:
            width, height = usual_size(pixels.shape[3], pixels.shape[2], config.image_size, factor)
        frame = Frame(read_size, partial(fit, width=width, height=height, how=flags.fit))
        return Edit(frame.follow(pixels), None, strength, frame)
    work_at, fitted = None, None
    if flags.only_masked:
        work_at = (config.image_size, config.image_size) if width is None or height is None else (width, height)
    elif width is not None and height is not None:
        fitted = partial(fit, width=width, height=height, how=flags.fit)
        pixels, mask = fitted(pixels), (fitted(mask) >= 0.5).float()
    if not flags.only_masked:
        mask, note = grow_small_mask(mask, factor)
        print_notes([note] if note else [])
    canvas = make_canvas(pixels, mask, factor, work_at, flags.feather)
    follow = canvas.follow if fitted is None else lambda hint: canvas.follow(fitted(hint))
    return Edit(pixels, canvas, strength, Frame(read_size, follow))
