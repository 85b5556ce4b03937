"""How well the bundled model edits: fixed scenes, fixed seeds, nothing selected; the tables of editing/README.md.

    a scene with one subject, and another subject's name -> image to image, inpainting -> judge: is it there? pixels: is the rest kept?
    the same scenes, hole by hole                         -> every known way of blending, side by side
    drawn pictures and scenes                             -> DDIM inversion and back

A scene is composed at the scenes' size, and resized to the model's.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.bundled.evaluate import mean_with_error
from minidiff.bundled.judge import Judge
from minidiff.editing.canvas import make_canvas, resize
from minidiff.editing.image_to_image import image_to_image
from minidiff.editing.inpaint import Known, keep_known, same_noise
from minidiff.editing.inversion import invert
from minidiff.editing.masks import Mask, feather, to_cells
from minidiff.editing.start import Sampling, add_noise, encode, encode_rows, first_noise
from minidiff.evaluation.alignment import text_alignment
from minidiff.markdown import format_fixed, markdown_table
from minidiff.pictures import to_pixels
from minidiff.pipeline import StableDiffusion, noise_source
from minidiff.samplers import Level
from minidiff.scenes.art import SIZE, STYLES, common_backgrounds, subject_names
from minidiff.scenes.scenes import Item, caption_of, choose, compose

PARTS = ("blends", "edits", "inversion")
STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
INVERSION_STEPS = (10, 20, 50)
INVERTED = 8  # pictures of each kind


@dataclass(frozen=True, eq=False)
class SceneEdit:
    """A scene with one subject, and the prompt that asks for another one there.

    old, subject: theirs. pixels: in [-1, 1]. mask: the old subject's box and a margin.
    """

    caption: str
    prompt: str
    old: str
    subject: str
    pixels: Float[Tensor, "1 3 H W"]
    mask: Mask


def scene_edits(count: int, size: int) -> list[SceneEdit]:
    """Compose scenes of training subjects at `size` pixels, each with another subject to put in its place. Always the same ones."""
    return [_scene_edit(np.random.default_rng([13, i]), size) for i in range(count)]


def _scene_edit(rng: np.random.Generator, size: int) -> SceneEdit:
    names, style = subject_names(held_out=False), choose(rng, STYLES)
    while True:
        old, new = (choose(rng, names) for _ in range(2))
        if old != new and (backgrounds := common_backgrounds([(old, None), (new, None)])):
            break
    background = choose(rng, backgrounds)
    px = round(SIZE * rng.uniform(0.5, 0.65))
    centre = tuple(float(c) for c in SIZE / 2 + (rng.random(2) - 0.5) * 0.8 * (SIZE - px - SIZE / 8))
    settings = {"background": background, "style": style, "shade": rng.normal(0, 5, 3).tolist(), "gradient": float(rng.uniform(-0.1, 0.1))}
    scene = compose([Item(old, px, (centre[0], centre[1]))], **settings)
    mask = torch.zeros(1, 1, SIZE, SIZE)
    left, top, right, bottom = scene.objects[0].box
    margin = SIZE // 32
    mask[:, :, max(0, top - margin) : bottom + margin, max(0, left - margin) : right + margin] = 1
    pixels = to_pixels(scene.image[None])
    return SceneEdit(
        scene.caption,
        caption_of([Item(new)], None, background, None),
        old,
        new,
        resize(pixels, size, size),
        (resize(mask, size, size) >= 0.5).float(),
    )


# --- ways to blend ----------------------------------------------------------------------------------------------------


# What a model that knows nothing of masks may be given outside the hole after each step: the original's latent with this noise.
WAYS = {
    "same": ("the noise of the start", "diffusers, minidiff"),
    "fresh": ("fresh noise each time", "CompVis"),
    "none": ("no noise", "A1111 with DDIM"),
    "nothing": ("nothing", ""),
}


def blend(
    sd: StableDiffusion, edit: SceneEdit, way: str, seeds: Sequence[int], sampling: Sampling
) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B 3 H W"]]:
    """Repaint the masked part of a scene; return the decoded pixels, and these pasted over the original.

    Args:
        sd: a model whose U-Net takes the latent alone.
        edit: the scene and what is asked for.
        way: of WAYS.
        seeds: one per picture.
        sampling: steps and sampler.
    """
    canvas = make_canvas(edit.pixels, edit.mask, sd.config.vae.factor)
    x_0 = encode_rows(sd, canvas.pixels, len(seeds))
    trajectory = sampling.denoise(sd, [edit.prompt] * len(seeds), seeds, x_0)
    if way != "nothing":
        known = known_latents(way, x_0, seeds, sampling.levels(sd.schedule))
        trajectory = keep_known(trajectory, known, to_cells(canvas.mask, sd.config.vae.factor).to(x_0.device))
    *_, last = trajectory
    decoded = sd.decode(last.x_t).cpu()
    return decoded, canvas.finish(decoded)


def known_latents(way: str, x_0: Float[Tensor, "B C h w"], seeds: Sequence[int], visited: Sequence[Level]) -> Known:
    """Return the known latents by the step that they follow.

    Args:
        way: of WAYS, but for "nothing".
        x_0: of the original.
        seeds: one per picture.
        visited: the loop's levels.
    """
    if way == "none":
        return lambda i: x_0
    if way == "same":
        return same_noise(x_0, first_noise(seeds, x_0), visited)
    draw = noise_source([seed + 2**32 for seed in seeds], (x_0.shape[1], x_0.shape[2], x_0.shape[3]), x_0.device)
    return lambda i: x_0 if i + 2 == len(visited) else add_noise(x_0, visited[i + 1], draw())


def found(judge: Judge, pixels: Float[Tensor, "B 3 H W"], subject: str) -> list[float]:
    """Return 1 for each picture in which the judge finds the subject rather than any other, else 0."""
    likeliest = judge.read(pixels.to(judge.log_scale.device)).shares().argmax(dim=1)
    return (likeliest == judge.config.subjects.index(subject)).float().tolist()


def mean_change(pixels: Float[Tensor, "B 3 H W"], original: Float[Tensor, "1 3 H W"], where: Mask) -> list[float]:
    """Return the mean absolute change of each picture where the mask is 1, of 255."""
    return (127.5 * ((pixels - original).abs() * where).sum(dim=(1, 2, 3)) / (3 * where.sum())).tolist()


Row = dict[str, Any]


def measure_blends(
    sd: StableDiffusion, judge: Judge, edits: Sequence[SceneEdit], seeds: Sequence[int], sampling: Sampling
) -> Iterator[Row]:
    """Measure every way to blend: how well the subject is seen, and how far what was decoded is off the original just outside the hole.

    Args:
        sd: a model whose U-Net takes the latent alone.
        judge: of the scenes.
        edits: scenes.
        seeds: each edit is made on each.
        sampling: steps and sampler.
    """
    for way, (title, users) in WAYS.items():
        right, alignment, rim = [], [], []
        for edit in edits:
            decoded, pasted = blend(sd, edit, way, seeds, sampling)
            right += found(judge, pasted, edit.subject)
            alignment += text_alignment(judge.encode_pictures(pasted), judge.encode_texts([edit.prompt] * len(seeds))).tolist()
            rim += mean_change(decoded, edit.pixels, rim_of(edit.mask, sd.config.vae.factor))
        yield {"way": title, "users": users, "found": measured(right), "alignment": measured(alignment), "rim": measured(rim)}


def rim_of(mask: Mask, width: int) -> Mask:
    """Return what lies outside a mask within `width` pixels of it."""
    return feather(mask, width).sign() - mask


# --- edits ------------------------------------------------------------------------------------------------------------


def measure_edits(sd: StableDiffusion, judge: Judge, edits: Sequence[SceneEdit], seeds: Sequence[int], sampling: Sampling) -> Iterator[Row]:
    """Measure image to image by strength, and inpainting: how often the subject is found, and how much changes outside its place.

    Args:
        sd: the model.
        judge: of the scenes.
        edits: scenes.
        seeds: each edit is made on each.
        sampling: steps and sampler.
    """
    ways: dict[str, Callable[[SceneEdit], Tensor]] = {
        f"image to image, strength {strength}": lambda edit, strength=strength: _image_to_image(sd, edit, strength, seeds, sampling)
        for strength in STRENGTHS
    }
    ways["inpainting"] = lambda edit: blend(sd, edit, "same", seeds, sampling)[1]
    for title, way in ways.items():
        right, changed = [], []
        for edit in edits:
            made = way(edit)
            right += found(judge, made, edit.subject)
            changed += mean_change(made, edit.pixels, 1 - edit.mask)
        yield {"way": title, "found": measured(right), "changed": measured(changed)}


def _image_to_image(sd: StableDiffusion, edit: SceneEdit, strength: float, seeds: Sequence[int], sampling: Sampling) -> Tensor:
    *_, last = image_to_image(sd, edit.prompt, edit.pixels, strength=strength, seeds=seeds, sampling=sampling)
    return sd.decode(last.x_t).cpu()


# --- inversion --------------------------------------------------------------------------------------------------------


def measure_inversion(sd: StableDiffusion, edits: Sequence[SceneEdit]) -> Iterator[Row]:
    """Measure inversion and back: the RMS error of latents, and the pictures' PSNR against the VAE's own reconstruction.

    The pictures are scenes, and what the model draws of their captions; scales are 1 and the model's own, on both ways.
    """
    captions, seeds = [edit.caption for edit in edits], range(len(edits))
    scenes = encode(sd, torch.cat([edit.pixels for edit in edits]))
    *_, last = sd.denoise(captions, seeds=seeds)
    for kind, x_0 in (("drawn", last.x_t), ("scenes", scenes)):
        for steps in INVERSION_STEPS:
            for scale in (1.0, sd.config.guidance_scale):
                *_, first = invert(sd, captions, x_0, steps=steps, guidance_scale=scale)
                *_, back = sd.denoise(captions, seeds=seeds, steps=steps, guidance_scale=scale, x=first.x_t)
                error = (back.x_t - x_0).square().mean().sqrt().item()
                off = (sd.decode(back.x_t) - sd.decode(x_0)).square().mean(dim=(1, 2, 3))
                psnr = (10 * (4 / off).log10()).mean().item()  # pixels are in [-1, 1]
                yield {"pictures": kind, "steps": steps, "scale": scale, "rms": error, "psnr": psnr}


# --- tables -----------------------------------------------------------------------------------------------------------


def measured(values: Sequence[float]) -> dict[str, float]:
    """Return mean, standard error and count by their names."""
    return asdict(mean_with_error(values))


def percent(measured: dict[str, float]) -> str:
    """Format a share with its standard error, in percent."""
    return f"{100 * measured['value']:.0f} ± {100 * measured['error']:.0f} %"


def number(measured: dict[str, float], digits: int) -> str:
    """Format a mean with its standard error."""
    return f"{measured['value']:.{digits}f} ± {measured['error']:.{digits}f}"


def blends_table(rows: Sequence[Row]) -> str:
    """Format the rows of `measure_blends`."""
    return markdown_table(
        ("put back outside the hole", "by", "subject found", "text alignment", "off the original at the rim, of 255"),
        [(row["way"], row["users"], percent(row["found"]), number(row["alignment"], 3), number(row["rim"], 1)) for row in rows],
    )


def edits_table(rows: Sequence[Row]) -> str:
    """Format the rows of `measure_edits`; each change also as a share of that of the same seeds drawn anew, at strength 1."""
    (anew,) = [row["changed"]["value"] for row in rows if row["way"].endswith(" 1.0")]
    return markdown_table(
        ("edit", "subject found", "changed outside, of 255", "of drawn anew"),
        [(row["way"], percent(row["found"]), number(row["changed"], 1), f"{100 * row['changed']['value'] / anew:.0f} %") for row in rows],
    )


def inversion_table(rows: Sequence[Row]) -> str:
    """Format the rows of `measure_inversion`."""
    return markdown_table(
        ("pictures", "steps", "guidance scale", "RMS error of latents", "PSNR, dB"),
        [(row["pictures"], row["steps"], f"{row['scale']:g}", format_fixed(row["rms"], 3), format_fixed(row["psnr"], 1)) for row in rows],
    )


def measure(part: str, sd: StableDiffusion, judge: Judge, *, count: int, seeds: Sequence[int], steps: int) -> str:
    """Measure one of PARTS and format its table.

    Args:
        part: of PARTS.
        sd: the model.
        judge: of the scenes.
        count: scenes; inversion takes INVERTED of them.
        seeds: each edit is made on each, each way to blend on the first.
        steps: of DDIM; inversion has its own.

    Raises ValueError as `check_measurable` does.
    """
    check_measurable(sd, judge, count, seeds)
    scenes, sampling = scene_edits(count, sd.config.image_size), Sampling(steps)
    if part == "blends":
        return blends_table(list(measure_blends(sd, judge, scenes, seeds[:1], sampling)))
    if part == "edits":
        return edits_table(list(measure_edits(sd, judge, scenes, seeds, sampling)))
    return inversion_table(list(measure_inversion(sd, scenes[:INVERTED])))


def check_measurable(sd: StableDiffusion, judge: Judge, count: int, seeds: Sequence[int]) -> None:
    """Raise ValueError for a model of another picture size than the judge's, no scenes or no seeds.

    Args:
        sd, judge, count, seeds: as in `measure`.
    """
    if sd.config.image_size != judge.config.image_size:
        raise ValueError(
            f"the model draws {sd.config.image_size} pixels, the judge reads {judge.config.image_size}; this judge knows the scenes only"
        )
    if count < 1 or not seeds:
        raise ValueError(f"{count} scenes and {len(seeds)} seeds: no picture to judge; give at least one of each")


def renew_tables(text: str, tables: dict[str, str]) -> str:
    """Return a text with new tables between its marks, as <!-- blends --> and <!-- end of blends -->.

    Raises ValueError for a missing mark.
    """
    for name, table in tables.items():
        opening, closing = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if opening not in text or closing not in text:
            raise ValueError(f"no place for the table {name!r}: write {opening.strip()} and {closing} where it is to stand")
        before, rest = text.split(opening, 1)
        text = f"{before}{opening}{table}\n{closing}{rest.split(closing, 1)[1]}"
    return text
