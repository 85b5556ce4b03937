"""`minidiff generate --heat-maps`: a sheet of where each word of the prompt was looked at, beside the pictures (heat_maps.py)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minidiff.cli.model import print_notes
from minidiff.cli.names import free_path

if TYPE_CHECKING:
    from torch import Tensor

    from minidiff.heat_maps import HeatMaps
    from minidiff.pipeline import StableDiffusion


def heat_file(out: Path) -> Path:
    """Return a free name for the sheet beside the pictures' file."""
    return free_path(out.with_name(f"{out.stem}-heat.png"))


def prompt_words(sd: "StableDiffusion", prompt: str) -> list[tuple[str, list[int]]]:
    """Return the words of a prompt, without its weights, with the positions of their tokens.

    Raises ValueError for a prompt without words, and for one that is read in several chunks.
    """
    from minidiff.editing.prompt_weights import parse_weights

    text = "".join(part.text for part in parse_weights(prompt))
    words, count, room = sd.tokenizer.words(text), len(sd.tokenizer.encode(text)), sd.config.tokenizer.context_length - 2
    if not words or count > room:
        what = "has no words" if not words else f"has {count} tokens, and heat maps are of the {room} that are read at once"
        raise ValueError(f"--heat-maps: the prompt {prompt!r} {what}; leave --heat-maps out, or write another prompt")
    return words


def new_heat_maps(sd: "StableDiffusion", prompts: Sequence[str]) -> "HeatMaps":
    """Return heat maps that record all words of these prompts, one a picture. Raises as `prompt_words` does."""
    from minidiff.heat_maps import HeatMaps

    return HeatMaps(len(prompts), {place for prompt in prompts for _, places in prompt_words(sd, prompt) for place in places})


def write_heat_maps(file: Path, heat: "HeatMaps", sd: "StableDiffusion", prompts: Sequence[str], pixels: "Tensor") -> None:
    """Write a row for each picture: the picture, then each of its words laid over it; say which word is where.

    Args:
        file: of the sheet
        heat: what was recorded
        sd: the model
        prompts: one per picture
        pixels: the pictures, in [-1, 1]
    """
    import torch

    from minidiff.heat_maps import lay_over
    from minidiff.pictures import grid, save_png
    from minidiff.pipeline import to_images

    words = [prompt_words(sd, prompt) for prompt in prompts]
    columns = 1 + max(map(len, words))
    cells = []
    for i, row in enumerate(words):
        picture = pixels[i : i + 1].cpu()
        maps = [lay_over(picture, heat.word(places)[i : i + 1].cpu()) for _, places in row]
        cells += [picture, *maps, *[torch.ones_like(picture)] * (columns - 1 - len(maps))]
    save_png(grid(to_images(torch.cat(cells)), columns), file)
    print_notes(dict.fromkeys(f"{file}: the picture, {', '.join(word for word, _ in row)}" for row in words))
