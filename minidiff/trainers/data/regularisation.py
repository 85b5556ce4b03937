"""Pictures that keep the model from forgetting: what the subject's class looked like before, or pictures whose captions are close.

    DreamBooth         the base model's own pictures of "a photo of a dog" (Ruiz et al. 2023, section 3.3)
    Custom Diffusion   200 real pictures whose captions are near the target's in text space (Kumari et al. 2023, section 3.2)

Both end as a folder that `read_folder` reads and a person can look at. A folder is filled up to a number: what stands in it is kept,
so that an interrupted run goes on, and pictures of one's own count. Run these before an adapter is on the model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from minidiff.config import check_choice
from minidiff.files import ensure_same_run, fingerprint, write_text
from minidiff.pictures import list_pictures, save_png
from minidiff.pipeline import StableDiffusion
from minidiff.scenes.scenes import sample_scene
from minidiff.trainers.data.folder import Example

TextFeatures = Callable[[Sequence[str]], Float[Tensor, "N D"]]
CLIP_NEAR = 0.85  # the cosine of Custom Diffusion's paper, between CLIP's text features
MADE = "made.json"  # what a folder was filled with


@dataclass(frozen=True)
class Filled:
    """Progress: `done` pictures of `count` are in the folder."""

    done: int
    count: int


# --- the base model's own pictures ------------------------------------------------------------------------------------


def class_pictures(
    sd: StableDiffusion,
    prompt: str,
    folder: Path,
    *,
    count: int,
    seed: int = 0,
    batch: int = 4,
    steps: int = 50,
    sampler: str = "ddim",
    guidance_scale: float | None = None,
    size: int | None = None,
) -> Iterator[Filled]:
    """Fill the folder with pictures of the prompt, a batch per iteration.

    Args:
        sd: draws the pictures
        prompt: of all of them
        folder: pictures that are in it already count
        count: pictures in the folder at the end
        seed: picture i has the seed `seed` + i
        batch: pictures per iteration
        steps, sampler, guidance_scale, size: as in sd.generate

    Raises ValueError for a folder that holds another prompt's pictures or another model's, as soon as it is iterated.
    """
    parts = {name: fingerprint(module) for name, module in sd.parts.items()}
    choices = {"prompt": prompt, "seed": seed, "steps": steps, "sampler": sampler, "guidance_scale": guidance_scale, "size": size}
    claim(folder, count, choices | parts)
    given = len([path for path in list_pictures(folder) if not path.name.startswith("class-")])
    paths = [folder / f"class-{i:05d}.png" for i in range(count - given)]
    for start in range(0, len(paths), batch):
        chunk = paths[start : start + batch]
        if not all(path.exists() for path in chunk):
            # The whole batch even where a part is there: then a picture does not depend on where a run was stopped.
            images = sd.generate(
                prompt, seed=seed + start, batch=len(chunk), steps=steps, sampler=sampler, guidance_scale=guidance_scale, size=size
            )
            for path, image in zip(chunk, images):
                if not path.exists():
                    save_png(image, path)
        yield Filled(given + start + len(chunk), count)


def claim(folder: Path, count: int, choices: dict) -> None:
    """Make the folder, or make sure that what was made in it was made the same way."""
    if count < 1:
        raise ValueError(f"count {count}: ask for at least 1 picture")
    ensure_same_run(folder / MADE, choices, holds="pictures made in another way")


# --- captions near a target -------------------------------------------------------------------------------------------


@torch.no_grad()
def pooled_text(sd: StableDiffusion, texts: Sequence[str], *, pool: str = "end", batch: int = 100) -> Float[Tensor, "N D"]:
    """Return one feature per text from the text encoder's output, at length 1; float32, on the CPU.

    Args:
        sd: its tokenizer and text encoder are used
        texts: the captions
        pool: "end" takes the end token, which has read the whole caption: what CLIP compares with pictures but for the projection, which
            Stable Diffusion's files leave out, so that cosines of the two differ. "mean" averages words and end token, for an encoder that
            was never trained to gather a caption in its end token, as the bundled one
        batch: texts encoded at once

    Raises ValueError for another pool.
    """
    check_choice("pool", pool, ("end", "mean"))
    parts = []
    for start in range(0, len(texts), batch):
        tokens = sd.tokenizer(list(texts[start : start + batch]))
        ends = (tokens == sd.tokenizer.end_id).int().argmax(dim=1)  # the first: padding repeats it
        context = sd.text_encoder(tokens[:, : ends.max() + 1].to(sd.device)).float().cpu()  # causal: what follows the end is not read
        place = torch.arange(context.shape[1])
        read = place == ends[:, None] if pool == "end" else (place > 0) & (place <= ends[:, None])
        parts.append((context * read[..., None]).sum(dim=1))
    return F.normalize(torch.cat(parts), dim=-1)


def nearest(
    target: Float[Tensor, " D"], features: Float[Tensor, "N D"], *, min_similarity: float | None = None, max_count: int | None = 200
) -> list[int]:
    """Return which features have the largest cosine with the target's, nearest first, equal ones in their order.

    Raises ValueError where none is left.

    Args:
        target: what they should be near to
        features: those to choose from
        min_similarity: no cosine below this one
        max_count: no more features than this
    """
    cosines = F.normalize(features, dim=-1) @ F.normalize(target, dim=-1)
    order = cosines.argsort(descending=True, stable=True)[:max_count]
    if min_similarity is not None:
        order = order[cosines[order] >= min_similarity]
    if not len(order):
        best = f"the nearest of {len(cosines)} has {cosines.max():.3f}" if len(cosines) else "there are none"
        raise ValueError(
            f"no caption with a cosine of at least {min_similarity} to the target: {best}; give other captions or a lower limit"
        )
    return order.tolist()


def near_examples(
    examples: Sequence[Example], target: str, features: TextFeatures, *, min_similarity: float | None = None, max_count: int | None = 200
) -> list[Example]:
    """Return the pictures whose captions are near the target.

    Args:
        examples: those to choose from
        target: a caption
        features: such as partial(pooled_text, sd), or CLIP's
        min_similarity, max_count: as in `nearest`

    Raises ValueError where none is left.
    """
    chosen = nearest(
        features([target])[0], features([example.caption for example in examples]), min_similarity=min_similarity, max_count=max_count
    )
    return [examples[i] for i in chosen]


def scene_pictures(
    sd: StableDiffusion, target: str, folder: Path, *, count: int = 200, candidates: int = 2000, seed: int = 0
) -> Iterator[Filled]:
    """Fill the folder with the bundled scenes nearest to the target, and NAME.txt beside each.

    Args:
        sd: its text encoder says what is near, by the mean of `pooled_text`
        target: a caption
        folder: scenes that are in it already are kept
        count: scenes in the folder at the end
        candidates: scenes to choose from, as training shows them
        seed: of the candidates

    Raises ValueError for fewer candidates than `count`, and as `class_pictures` does.
    """
    if candidates < count:
        raise ValueError(f"candidates {candidates}: the nearest {count} need at least as many")
    choices = {"target": target, "candidates": candidates, "seed": seed, "text_encoder": fingerprint(sd.text_encoder)}
    claim(folder, count, choices)
    captions = [sample_scene(np.random.default_rng([seed, i])).caption for i in range(candidates)]
    chosen = nearest(pooled_text(sd, [target], pool="mean")[0], pooled_text(sd, captions, pool="mean"), max_count=count)
    for done, i in enumerate(chosen):
        path = folder / f"scene-{done:05d}.png"
        if not path.exists():
            scene = sample_scene(np.random.default_rng([seed, i]))
            write_text(path.with_suffix(".txt"), scene.caption)
            save_png(Image.fromarray(scene.image), path)
        yield Filled(done + 1, count)
