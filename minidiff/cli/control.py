"""ControlNets on the command line: `--control hint.png --controlnet FILE[:scale[:start[:end]]]`, as often as there are ControlNets.

flags -> requests -> hints of the pictures' size, ControlNets of the model -> a change of the model that the denoising loop asks
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from minidiff.cli.model import print_notes

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from minidiff.controlnet import Control
    from minidiff.editing.start import Steer
    from minidiff.pipeline import StableDiffusion

EXAMPLE = "FILE[:scale[:start[:end]]]"


@dataclass(frozen=True)
class ControlRequest:
    """One ControlNet as it was asked for: its file, the hint or the folder of hints, and the numbers of Control."""

    file: str
    hint: Path
    numbers: tuple[float, ...]


@dataclass(frozen=True)
class Frame:
    """How the picture of an edit came to what is worked on: from its size, (width, height), by `follow`.

    A hint of the same size goes the same way, cropped and resized as the picture is; a hint of another size is taken to fit the result.
    """

    size: tuple[int, int]
    follow: "Callable[[Tensor], Tensor]"

    def follow_hint(self, hint: "Float[Tensor, '3 H W']") -> "Float[Tensor, '3 h w']":
        """Bring a hint with what may be a hole in it, -1, to the size that is worked on."""
        import torch

        hole = self.follow((hint[None, :1] < 0).float()) >= 0.5
        return torch.where(hole, -1.0, self.follow(hint[None].clamp(min=0)).clamp(0, 1))[0]


def parse_controls(control: Sequence[str], controlnet: Sequence[str]) -> list[ControlRequest]:
    """Pair the flags. Raises ValueError for other numbers of the two, FileNotFoundError for a hint that is not there."""
    if len(control) != len(controlnet):
        raise ValueError(f"{len(control)} --control for {len(controlnet)} --controlnet; give each ControlNet its hint, in the same order")
    files = [_split(text) for text in controlnet]
    requests = [ControlRequest(file, Path(hint), numbers) for hint, (file, numbers) in zip(control, files)]
    for request in requests:
        if not request.hint.exists():
            raise FileNotFoundError(f"--control {request.hint}: no such file; make one by `minidiff hint`, or give any picture of lines")
    return requests


def _split(text: str) -> tuple[str, tuple[float, ...]]:
    """Split "net.safetensors:0.8:0:0.5" into the file and up to three numbers."""
    parts, numbers = text.split(":"), []
    while len(parts) > 1 and len(numbers) < 3 and (number := _number(parts[-1])) is not None:
        numbers.insert(0, number)
        parts.pop()
    return ":".join(parts), tuple(numbers)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def steer(
    sd: "StableDiffusion",
    requests: Sequence[ControlRequest],
    *,
    count: int,
    size: tuple[int, int],
    timesteps: Sequence[float],
    guess_mode: bool,
    frame: Frame | None = None,
) -> "Steer | None":
    """Return what adds the ControlNets that were asked for to a model; None without any.

    Args:
        sd: the model.
        requests: what was asked for.
        count: pictures.
        size: of the pictures, (width, height) in pixels.
        timesteps: at which the steps begin.
        guess_mode: as in `controlled`.
        frame: of the picture that is edited.

    Raises ValueError for hints and ControlNets that do not fit the pictures or the model.
    """
    from minidiff.controlnet import controlled

    if not requests:
        return None
    controls = [load_control(sd, request, count, size, frame) for request in requests]
    for one in controls:
        one.interval(timesteps)  # raises for an empty one
    return partial(controlled, controls=controls, timesteps=timesteps, guess_mode=guess_mode)


def load_control(
    sd: "StableDiffusion", request: ControlRequest, count: int, size: tuple[int, int], frame: Frame | None = None
) -> "Control":
    """Read the hints, then the ControlNet.

    Args:
        sd, count, size, frame: as in `steer`.
        request: what was asked for.
    """
    import weights_loader
    from minidiff.controlnet import Control

    hint = load_hints(request.hint, count, size, frame)
    net = weights_loader.read_controlnet(request.file, sd)
    try:
        return Control(net, hint, *request.numbers)
    except ValueError as error:
        raise ValueError(f"--controlnet {request.file}: {error}") from error


def load_hints(path: Path, count: int, size: tuple[int, int], frame: Frame | None = None) -> "Float[Tensor, 'B 3 H W']":
    """Read a hint for all pictures, or a folder with one for each in the order of their names; say what looks wrong.

    Args:
        path: of the picture or the folder.
        count: of the pictures that are made.
        size: theirs, (width, height).
        frame: of the picture that is edited.
    """
    import torch
    from PIL import Image

    from minidiff.hints import doubts, to_hint
    from minidiff.pictures import UNREADABLE, list_pictures

    files = list_pictures(path) if path.is_dir() else [path]
    if len(files) not in (1, count):
        raise ValueError(f"--control {path}: {len(files)} hints for {count} pictures; give one for each, or one for all")
    hints = []
    for file in files:
        try:
            with Image.open(file) as image:
                image.load()
                if wrong := doubts(image):
                    print_notes([f"{file}: {wrong}"])
                if frame is not None and image.size == frame.size:
                    hints.append(frame.follow_hint(to_hint(image)))
                    continue
                if image.size != size:
                    print_notes([f"{file}: {_resized(image.size, size)}"])
                hints.append(to_hint(image, size))
        except UNREADABLE as error:
            raise ValueError(f"{file}: not a picture that can be read ({error})") from error
    return torch.stack(hints)


def _resized(found: tuple[int, int], size: tuple[int, int]) -> str:
    (w, h), (W, H) = found, size
    text = f"a hint of {w} x {h} pixels, resized to {W} x {H}"
    return text if w * H == h * W else f"{text}, which stretches it; a --size of the same shape would not"
