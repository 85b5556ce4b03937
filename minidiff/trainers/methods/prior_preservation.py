"""Prior preservation: pictures of the class, beside the subject's, keep the model from forgetting what else there is.

    loss = mean loss of the subject's pictures + weight * mean loss of the class pictures

Ruiz et al. 2023, "DreamBooth", eq. 2, whose class pictures the model makes itself; Custom Diffusion (Kumari et al. 2023, section 3.2) takes
real ones with captions near the subject's.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from minidiff.captions import find_caption_sources
from minidiff.pipeline import StableDiffusion
from minidiff.trainers.data.folder import Example, read_folder
from minidiff.trainers.data.regularisation import Filled, class_pictures, near_examples, pooled_text, scene_pictures
from minidiff.trainers.data.templates import fill_in
from minidiff.trainers.methods.options import Concept, PhaseOptions


def prior_preservation_loss(losses: Float[Tensor, " N"], count: int, weight: float) -> Float[Tensor, ""]:
    """Return the mean loss of the first `count` samples, the subject's, plus `weight` times the mean of the class pictures behind them.

    losses: one per sample; as many class pictures as the subject's, or none.
    """
    return losses[:count].mean() + weight * losses[count:].sum() / count


def class_caption(concept: Concept, prompt: str) -> str:
    """Return the caption of class pictures, as "a photo of a dog". Raises ValueError without a class word where one is needed."""
    template = concept.class_prompt or prompt
    if "{}" in template and not concept.class_word:
        raise ValueError(f"{concept.images}: class pictures need a class word, such as dog, for {template!r}; give one, or a class prompt")
    return fill_in(template, concept.class_word)


def class_folder(concept: Concept, missing: str) -> Path:
    """Return the folder of the concept's class pictures. Raises ValueError, which says what is missing, if there is none."""
    if concept.class_images is None:
        raise ValueError(f"{concept.images}: {missing}")
    return concept.class_images


def fill_class_images(sd: StableDiffusion, concept: Concept, options: PhaseOptions, seed: int = 0) -> Iterator[Filled]:
    """Fill the concept's folder of class pictures, some pictures an iteration, if the options' prior is one that is made.

    Args:
        sd: the model before training
        concept: its class_images is the folder
        options: prior, prompt and size are read
        seed: of the first picture, or of the candidate scenes

    Raises ValueError for a concept without a folder.
    """
    prior = options.prior
    if not prior.is_made:
        return
    folder = class_folder(concept, "no folder for its class pictures; give class_images")
    caption = class_caption(concept, options.prompt)
    if prior.kind == "scenes":
        yield from scene_pictures(sd, caption, folder, count=prior.count, seed=seed)
    else:
        yield from class_pictures(
            sd,
            caption,
            folder,
            count=prior.count,
            seed=seed,
            steps=prior.steps,
            guidance_scale=prior.guidance_scale,
            size=options.data.size,
        )


def prior_examples(sd: StableDiffusion, concept: Concept, options: PhaseOptions, size: int) -> list[Example]:
    """Read the concept's class pictures as the prior asks for them; none of kind "none". Folders must be filled before.

    Args:
        sd: its text encoder finds near captions, for the kind "near"
        concept: its class_images is the folder
        options: prior and prompt are read
        size: of the model, in pixels

    Raises ValueError for a concept without a folder.
    """
    prior = options.prior
    if prior.kind == "none":
        return []
    folder = class_folder(concept, f"the prior {prior.kind!r} needs class pictures; give their folder, class_images, or the prior none")
    caption = class_caption(concept, options.prompt)
    if prior.kind == "near":
        features = partial(pooled_text, sd)
        return near_examples(read_folder(folder, size=size), caption, features, min_similarity=prior.min_similarity, max_count=prior.count)
    has_captions = prior.kind == "scenes" or (concept.class_prompt is None and bool(find_caption_sources(folder)))
    return read_folder(folder, size=size, caption=None if has_captions else caption)
