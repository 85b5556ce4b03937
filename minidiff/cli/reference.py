"""What a sheet of training shows beside its result: the pictures that are learned from, and the untouched model on the same seeds.

pictures of each concept
prompt 1   the untouched model
           what is learned so far      <- the phase's own sheet, row by row
prompt 2   the untouched model
           ...
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

    from minidiff.pipeline import StableDiffusion


@dataclass(frozen=True, eq=False)
class Reference:
    """Pictures drawn before the first step. learned_from: a row for each concept. untouched: a row for each prompt."""

    learned_from: "list[Image.Image]"
    untouched: "list[Image.Image]"

    def beside(self, sheet: "Image.Image") -> "Image.Image":
        """Return a sheet of results, a row for each prompt, with these rows beside them; one of another layout as it is."""
        width, height = self.untouched[0].size
        if sheet.size != (width, height * len(self.untouched)):
            return sheet
        results = [sheet.crop((0, i * height, width, (i + 1) * height)) for i in range(len(self.untouched))]
        return stack([*self.learned_from, *(row for pair in zip(self.untouched, results) for row in pair)])


def draw_reference(sd: "StableDiffusion", folders: Sequence[Path], prompts: Sequence[str], *, count: int, steps: int) -> Reference:
    """Draw the prompts with the model as it is, on the seeds that a phase's sheet has, and read the pictures that are learned from.

    Args:
        sd: the model, before the first step
        folders: with the pictures of each concept, of which the first `count` are shown
        prompts: a row each
        count: pictures in a row
        steps: of the sampler
    """
    from minidiff.pictures import fit, grid, list_pictures, load_picture
    from minidiff.pipeline import to_images

    size = sd.config.image_size
    columns = [sd.generate(list(prompts), seed=seed, steps=steps) for seed in range(count)]
    untouched = [grid([column[row] for column in columns], count) for row in range(len(prompts))]
    pictures = [[fit(load_picture(path), size) for path in list_pictures(folder)[:count]] for folder in folders]
    return Reference([stack([grid([to_images(one[None])[0] for one in row], count)], count * size) for row in pictures], untouched)


def stack(rows: "Sequence[Image.Image]", width: int | None = None) -> "Image.Image":
    """Paste rows below each other on white. width: of the whole, in pixels; that of the widest row by default."""
    from PIL import Image

    whole = Image.new("RGB", (width or max(row.width for row in rows), sum(row.height for row in rows)), "white")
    top = 0
    for row in rows:
        whole.paste(row, (0, top))
        top += row.height
    return whole
