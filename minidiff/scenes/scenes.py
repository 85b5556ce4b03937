"""Captioned 128 x 128 scenes: the pictures and words from which the bundled model is trained.

Where Stable Diffusion had LAION's photographs, the bundled model has one or two emoji on a coloured background:

    rng -> sample_scene -> compose -> Scene(image, caption, mask, objects, ...)

Captions, in full:  [a photo of] [a|an] [small|large] [colour] SUBJECT [on a COLOUR background] [in STYLE style]
or two objects joined by `and`, `left of` or `above`; one caption in ten says the class ("an animal") for the subject.
20 subjects are held out of training, so that personalisation can be tried on things the model never saw; and so is
one in ten of the pairs (subject, subject) and (subject, tint), to see whether it composes what it knows.
Labels come from the Scene itself: nobody has to parse a caption.

Left out: perspective, overlap, more than two objects, backgrounds with content.
"""

import functools
import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from minidiff.scenes.art import (
    COLOURS,
    HERE,
    SIZE,
    STYLES,
    common_backgrounds,
    known,
    paint_background,
    scaled_size,
    sprite,
    subject_names,
    subjects,
)

RELATIONS = ("and", "left of", "above")
MEDIA = (
    "photo",
    "picture",
    "image",
    "icon",
)  # "a photo of ...", as people and the templates of personalisation write; it means nothing here
# Lengths are shares of SIZE: of an object that has the scene to itself, by the word for its size; of each of two objects; and how far
# off the middle line two objects may stand.
LENGTHS = {None: (0.69, 0.875), "small": (0.44, 0.56), "large": (0.875, 0.97)}
LENGTHS_OF_TWO, OFF_MIDDLE = (0.44, 0.53), 0.11
SPLITS = ("train", "held_out_subjects", "held_out_pairs", "all_subjects")


@dataclass(frozen=True)
class Item:
    """What to put into a scene: `px` is the longer side in pixels, `centre` is (x, y), `colour` a tint."""

    subject: str
    px: int = round(0.78 * SIZE)
    centre: tuple[float, float] = (SIZE / 2, SIZE / 2)
    colour: str | None = None
    size: str | None = None  # the word "small" or "large" of the caption
    by_class: bool = False  # the caption names the class instead of the subject


@dataclass(frozen=True, eq=False)
class SceneObject:
    """What stands in a scene: box = (x0, y0, x1, y1) in pixels; mask in [0, 1], the share of each pixel it covers."""

    subject: str
    class_name: str
    colour: str | None
    size: str | None
    box: tuple[int, int, int, int]
    mask: Float32[np.ndarray, "H W"]


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture (0 to 255) with its words and labels; mask in [0, 1], the share of each pixel under any object."""

    image: UInt8[np.ndarray, "H W 3"]
    caption: str
    mask: Float32[np.ndarray, "H W"]
    objects: tuple[SceneObject, ...]
    background: str
    style: str
    relation: str | None


def is_held_out_pair(subject: str, other: str) -> bool:
    """Return True if (subject, subject) or (subject, tint) is among the tenth that training never shows.

    The order does not matter; CRC-32 gives the same answer on every machine, which Python's hash() would not.
    """
    return zlib.crc32(" + ".join(sorted((subject, other))).encode()) % 10 == 0


# --- captions ---------------------------------------------------------------------------------------------------------


def with_article(words: str) -> str:
    """Add the article: "an apple", "a blue apple". By the first letter, which is right for every word of the captions."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def noun_phrase(item: Item) -> str:
    """Return [a|an] [small|large] [colour] SUBJECT."""
    noun = subjects()[item.subject].class_name if item.by_class else item.subject
    return with_article(" ".join(word for word in (item.size, item.colour, noun) if word))


def caption_of(items: Sequence[Item], relation: str | None, background: str | None, style: str | None, medium: str | None = None) -> str:
    """Write the caption.

    Args:
        items: One or two.
        relation: Between two items.
        background: None if the caption does not name it.
        style: Likewise.
        medium: Likewise.
    """
    words = f" {relation} ".join(noun_phrase(item) for item in items)
    if medium is not None:
        words = f"{with_article(medium)} of {words}"
    if background is not None:
        words += f" on {with_article(background)} background"
    return words if style is None else f"{words} in {style} style"


# --- scenes -----------------------------------------------------------------------------------------------------------


def picture_of(item: Item, style: str) -> tuple[tuple[int, int, int, int], UInt8[np.ndarray, "h w 4"]]:
    """Return the item's box in the scene and its picture of that size, RGBA with premultiplied alpha."""
    known("subject", item.subject, subjects())
    if item.colour is not None:
        known("colour", item.colour, COLOURS)
    width, height = scaled_size(item.subject, style, item.px)
    x, y = round(item.centre[0] - width / 2), round(item.centre[1] - height / 2)
    if min(x, y) < 0 or x + width > SIZE or y + height > SIZE:
        raise ValueError(
            f"{item.subject} of {width} x {height} at centre {item.centre} leaves the {SIZE} x {SIZE} picture; move it or lower px"
        )
    picture = np.asarray(sprite(item.subject, style, item.colour).resize((width, height), Image.Resampling.BICUBIC))
    picture = np.minimum(picture, picture[..., 3:])  # bicubic scaling may overshoot to more colour than alpha
    return (x, y, x + width, y + height), picture


def compose(
    items: Sequence[Item],
    *,
    background: str,
    style: str,
    relation: str | None = None,
    name_background: bool = True,
    name_style: bool = False,
    medium: str | None = None,
    shade: Sequence[float] = (0.0, 0.0, 0.0),
    gradient: float = 0.0,
) -> Scene:
    """Paint one or two items on a background; later items cover earlier ones.

    Args:
        items: One or two.
        background: A name in COLOURS.
        style: A name in STYLES, for all items.
        relation: 'and', 'left of' or 'above' joins two items in the caption and does not move them (see sample_scene); None for one item.
        name_background: Whether the caption names the background.
        name_style: Whether the caption names the style.
        medium: What the caption calls the picture, as "photo"; None leaves it out.
        shade: Added to the background's RGB (0 to 255).
        gradient: 0..1, the share by which the background is darker at the top.

    Raises ValueError for an unknown subject, colour, style or relation, and for an item that leaves the picture.
    """
    known("style", style, STYLES)
    known("background", background, COLOURS)
    if len(items) not in (1, 2):
        raise ValueError(f"{len(items)} items given; a scene has 1 or 2")
    if (relation is None) == (len(items) == 2):
        raise ValueError(f"relation {relation!r} with {len(items)} items; two need {', '.join(RELATIONS)}, one None")
    if relation is not None:
        known("relation", relation, RELATIONS)

    canvas = paint_background(background, shade, gradient)
    objects: list[SceneObject] = []
    for item in items:
        box, picture = picture_of(item, style)
        alpha = picture[..., 3:].astype(np.float32) / 255
        part = np.s_[box[1] : box[3], box[0] : box[2]]
        canvas[part] = canvas[part] * (1 - alpha) + picture[..., :3]
        for covered in objects:
            covered.mask[part] *= 1 - alpha[..., 0]
        mask = np.zeros((SIZE, SIZE), np.float32)
        mask[part] = alpha[..., 0]
        objects.append(SceneObject(item.subject, subjects()[item.subject].class_name, item.colour, item.size, box, mask))

    caption = caption_of(items, relation, background if name_background else None, style if name_style else None, medium)
    image = (np.clip(canvas, 0, 255) + 0.5).astype(np.uint8)
    return Scene(image, caption, np.add.reduce([thing.mask for thing in objects]), tuple(objects), background, style, relation)


def choose(rng: np.random.Generator, values: Sequence):
    """Choose one of `values`, all equally likely; much faster than rng.choice, and keeps the type."""
    return values[int(rng.integers(len(values)))]


@functools.cache
def held_out_pairs() -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """Return the held-out pairs of training subjects: all (subject, subject), and all (subject, tint)."""
    names = subject_names(held_out=False)
    two = tuple(pair for pair in itertools.combinations(names, 2) if is_held_out_pair(*pair))
    return two, tuple(pair for pair in itertools.product(names, COLOURS) if is_held_out_pair(*pair))


def choose_subjects(rng: np.random.Generator, split: str, count: int) -> tuple[list[str], list[str | None]]:
    """Choose subjects and tints (or None) of one scene, as the split allows."""
    if split == "held_out_pairs":
        two, coloured = held_out_pairs()
        if count == 1:
            name, colour = choose(rng, coloured)
            return [name], [colour]
        pair = choose(rng, two)
        return list(pair if rng.random() < 0.5 else pair[::-1]), [None, None]
    names = tuple(subjects()) if split == "all_subjects" else subject_names(held_out=split == "held_out_subjects")
    chosen = [choose(rng, names)]
    while len(chosen) < count:
        name = choose(rng, names)
        if name != chosen[0] and not (split == "train" and is_held_out_pair(name, chosen[0])):
            chosen.append(name)
    colours = []
    for name in chosen:
        allowed = [colour for colour in COLOURS if split != "train" or not is_held_out_pair(name, colour)]
        colours.append(choose(rng, allowed) if rng.random() < 0.12 else None)
    return chosen, colours


def in_pixels(shares: tuple[float, float]) -> tuple[int, int]:
    """Return shares of a scene's side as whole pixels."""
    low, high = shares
    return round(low * SIZE), round(high * SIZE)


def place_one(rng: np.random.Generator, subject: str, style: str) -> tuple[int, str | None, tuple[float, float]]:
    """Choose size in pixels, the word for it, and a centre, for an object that has the scene to itself."""
    size = choose(rng, (None, None, None, "small", "large"))
    low, high = in_pixels(LENGTHS[size])
    px = int(rng.integers(low, high + 1))
    # 0.8 of the room that is left: objects wander, and seldom touch the rim.
    slack = 0.8 * (SIZE - np.array(scaled_size(subject, style, px)))
    x, y = SIZE / 2 + (rng.random(2) - 0.5) * slack
    return px, size, (float(x), float(y))


def place_two(
    rng: np.random.Generator, names: Sequence[str], style: str, relation: str | None
) -> list[tuple[int, str | None, tuple[float, float]]]:
    """Choose what `place_one` does for each of two objects that do not overlap: side by side, or one above the other; no size is named.

    Args:
        rng: The source of randomness.
        names: The two subjects.
        style: In which they are drawn.
        relation: Of RELATIONS. With "and" either comes first, on the left or above.
    """
    upright = relation == "above" or (relation == "and" and rng.random() < 0.5)
    swap = relation == "and" and rng.random() < 0.5
    along, across = (1, 0) if upright else (0, 1)
    low, high = in_pixels(LENGTHS_OF_TWO)
    first = int(rng.integers(low, high + 1))
    px = [first, int(rng.integers(low, min(high, SIZE - first) + 1))]
    sides = [scaled_size(name, style, p) for name, p in zip(names[::-1] if swap else names, px)]
    room = SIZE - sides[0][along] - sides[1][along]
    gap = int(rng.integers(room // 2 + 1))
    start = int(rng.integers(room - gap + 1))
    starts = [start, start + sides[0][along] + gap]
    layout = []
    for p, side, start in zip(px, sides, starts):
        # Whole pixels: the box of an odd side then lies exactly where `start` puts it.
        free = min(round(OFF_MIDDLE * SIZE), (SIZE - side[across]) // 2)
        place = start + side[along] / 2, (SIZE - side[across]) // 2 + int(rng.integers(-free, free + 1)) + side[across] / 2
        layout.append((p, None, place[::-1] if upright else place))
    return layout[::-1] if swap else layout


def sample_scene(rng: np.random.Generator, *, split: str = "train") -> Scene:
    """Draw one random scene with its caption; the same state of `rng` gives the same scene.

    split "train" shows no held-out subject and no held-out pair; "held_out_subjects" shows only held-out subjects;
    "held_out_pairs" shows training subjects in a held-out pair or tint; "all_subjects" shows anything.
    Raises ValueError for an unknown split.
    """
    known("split", split, SPLITS)
    count = 1 if rng.random() < 0.5 else 2
    style = choose(rng, STYLES)
    names, colours = choose_subjects(rng, split, count)
    background = choose(rng, common_backgrounds(zip(names, colours), [style]))
    by_class = int(rng.integers(count)) if rng.random() < 0.1 else None

    relation = None if count == 1 else choose(rng, RELATIONS)
    layout = [place_one(rng, names[0], style)] if count == 1 else place_two(rng, names, style, relation)
    items = [
        Item(name, px, centre, colour, size, i == by_class)
        for i, (name, colour, (px, size, centre)) in enumerate(zip(names, colours, layout))
    ]
    return compose(
        items,
        background=background,
        style=style,
        relation=relation,
        name_background=rng.random() < 0.8,
        name_style=rng.random() < 0.6,
        medium=choose(rng, MEDIA) if rng.random() < 0.2 else None,
        shade=rng.normal(0, 5, 3).tolist(),
        gradient=float(rng.uniform(-0.12, 0.12)) if rng.random() < 0.5 else 0.0,
    )


@functools.cache
def bpe_merges() -> tuple[str, ...]:
    """Read the merges of the byte-pair encoding made for these captions (train_bpe.py), as TokenizerConfig takes them."""
    return tuple((HERE / "bpe.txt").read_text(encoding="utf-8").split("\n")[1:])
