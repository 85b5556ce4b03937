"""Prompts with a hole: what Textual Inversion says around its new word, so that the word means the subject and nothing else.

Gal et al. 2023, "An image is worth one word", section 4.1 and appendix D; the object templates are a choice from those that CLIP was
tried with on ImageNet (Radford et al. 2021). The bundled model knows few of these words: it has prompts of its own.
"""

import re

from minidiff.scenes.art import COLOURS, known
from minidiff.scenes.scenes import MEDIA, with_article

OBJECT = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)

STYLE = (  # two stand twice in the original's list, and are so drawn twice as often
    "a painting in the style of {}",
    "a rendering in the style of {}",
    "a cropped painting in the style of {}",
    "the painting in the style of {}",
    "a clean painting in the style of {}",
    "a dirty painting in the style of {}",
    "a dark painting in the style of {}",
    "a picture in the style of {}",
    "a cool painting in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a cropped painting in the style of {}",
    "a good painting in the style of {}",
    "a close-up painting in the style of {}",
    "a rendition in the style of {}",
    "a nice painting in the style of {}",
    "a small painting in the style of {}",
    "a weird painting in the style of {}",
    "a large painting in the style of {}",
)

SCENE_STYLE = tuple(f"{with_article(medium)} in {{}} style" for medium in MEDIA)


def scene_templates(*, background: str | None = None, size: str | None = None) -> tuple[str, ...]:
    """Templates in the words of the bundled model: "a {}", "a photo of a small {} on a red background", ...

    These words do act on its pictures, so say what is true of the picture at hand. Raises ValueError for an unknown colour or size.
    """
    noun = "a {}" if size is None else f"a {known('size', size, ('small', 'large'))} {{}}"
    if background is not None:
        noun += f" on {with_article(known('background', background, COLOURS))} background"
    return (noun, *(f"{with_article(medium)} of {noun}" for medium in MEDIA))


def fill_in(template: str, phrase: str) -> str:
    """Put a phrase into the template's holes: "a {}" and "apple" give "an apple". A {} within the phrase is no hole."""
    return re.sub(r"(\ba )?\{\}", lambda hole: with_article(phrase) if hole[1] else phrase, template)
