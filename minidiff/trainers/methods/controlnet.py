"""ControlNet: a copy of the U-Net's way down learns to steer the locked model by hints (Zhang et al. 2023).

training = build(sd, [], PRESETS["bundled"])            # outlines of the bundled scenes
for phase, step in training.run(device, folder): ...
training.controlnet.net

The ControlNet for outlines of the bundled model takes about an hour on one thread of a quiet CPU:

    minidiff train controlnet --out runs/outlines --sample-every 250 --num-samples 2

and becomes a file of half the size by

    net = weights_loader.read_controlnet("runs/outlines/controlnet.safetensors", sd, torch.float16)
    weights_loader.write_controlnet("outlines.safetensors", net, sd)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from minidiff.trainers.engine.settings import Settings
from minidiff.trainers.methods.method import Method
from minidiff.trainers.methods.options import Concept, DataOptions, Family, PhaseOptions, Prior

if TYPE_CHECKING:
    from minidiff.controlnet import ControlNet
    from minidiff.pipeline import StableDiffusion
    from minidiff.trainers.data.cache import Cache
    from minidiff.trainers.data.hinted import HintedSource
    from minidiff.trainers.methods.finetune_task import TrainingRun


@dataclass(frozen=True, kw_only=True)
class ControlNetOptions(PhaseOptions):
    """What steers, and what is trained beside the ControlNet.

    Half of the captions are left empty, so that the ControlNet learns to see in the hint itself what it shows (the paper, section 3.3).

    Args:
        hint: what is made of each picture: canny, scribble, tile; of the bundled scenes also outline, segmentation, depth
        hints: folder of hints that are there already, each with its picture's name; --hint is then not looked at
        scenes: how many of the bundled scenes to learn from, where no --images are given
        middle_only: only the middle's residual steers; the skips' zero convolutions stay 0
        decoder: train the U-Net's way up too; the result is then a whole model beside the ControlNet
        decoder_scale: its share of the learning rate, as 0.2
    """

    # A hint goes with its picture pixel by pixel, and the locked model forgets nothing that class pictures could keep.
    FLAT_NAMES: ClassVar[Mapping[str, str | None]] = dict.fromkeys(
        ("data.crop", "data.flip", *(f"prior.{name}" for name in Prior.FLAT_NAMES))
    )

    hint: Literal["canny", "scribble", "tile", "outline", "segmentation", "depth"] = "canny"
    hints: Path | None = None
    scenes: int = 20_000
    middle_only: bool = False
    decoder: bool = False
    decoder_scale: float = 0.2
    data: DataOptions = DataOptions(caption_dropout=0.5)

    def __post_init__(self):
        if self.scenes < 1:
            raise ValueError(f"scenes {self.scenes}: at least 1 is needed")
        if not self.decoder_scale > 0:
            raise ValueError(f"decoder_scale {self.decoder_scale}: it must be above 0; leave decoder out to lock the U-Net")
        if self.data.crop != "centre" or self.data.flip:
            raise ValueError("pictures cropped at random or mirrored would no longer lie on their hints; leave crop and flip as they are")
        if self.prior.kind != "none":
            raise ValueError(f"prior {self.prior.kind!r}: a ControlNet has no class pictures, the model itself is locked")


# the authors' batch and learning rate; they saw the sudden convergence at 3,000 to 7,000 steps
STABLE_DIFFUSION = ControlNetOptions(settings=Settings(steps=10_000, batch=4, learning_rate=1e-5))
PRESETS: dict[Family, ControlNetOptions] = {
    "sd1": STABLE_DIFFUSION,
    "sd2": STABLE_DIFFUSION,
    # diffusers' examples/controlnet/README_sdxl.md: batches of 1, gathered four times
    "sdxl": ControlNetOptions(settings=Settings(steps=15_000, batch=4, learning_rate=1e-5)),
    "bundled": ControlNetOptions(
        # at twice this rate, in batches of 8, pictures followed their outlines after 200 steps
        settings=Settings(steps=4000, batch=16, learning_rate=1e-3, warmup_steps=50, schedule="linear_after_hold", ema_decay=0.99),
        hint="outline",
    ),
}


def build(
    sd: "StableDiffusion",
    concepts: Sequence[Concept],
    options: ControlNetOptions,
    cache: "Cache | None" = None,
    start_from: "ControlNet | None" = None,
) -> "TrainingRun":
    """Put together the training of a ControlNet; the result is .controlnet, with a hint to try it on.

    Args:
        sd: the model; its own weights stay as they are, unless options.decoder
        concepts: one folder of pictures, or none: then the bundled scenes
        options: numbers of the method
        cache: of latents and hints; None keeps them in memory
        start_from: a ControlNet to train further; None copies the U-Net's way down
    """
    import torch

    from minidiff.controlnet import Control, create_controlnet
    from minidiff.trainers.data.cache import Cache
    from minidiff.trainers.methods.controlnet_task import ControlNetTask
    from minidiff.trainers.methods.finetune_task import TrainingRun

    sd.check_channels()
    source = make_source(sd, concepts, options, cache or Cache())
    generator = torch.Generator().manual_seed(options.settings.seed)
    net = (create_controlnet(sd.config, sd.unet, generator) if start_from is None else start_from).float()
    control = Control(net, source.fixed(1)[0][1][None])
    return TrainingRun((ControlNetTask(sd, net, source, options),), controlnet=control, trains_model=options.decoder)


def make_source(sd: "StableDiffusion", concepts: Sequence[Concept], options: ControlNetOptions, cache: "Cache") -> "HintedSource":
    """Return pictures with hints: those of the folder, or the bundled scenes.

    Args:
        sd, concepts, options, cache: as in `build`

    Raises ValueError for what does not go together.
    """
    from minidiff.trainers.data.hinted import HintedPictures, HintedScenes
    from minidiff.trainers.methods.common import captioned_examples

    size = options.data.size or sd.config.image_size
    if not concepts:
        if options.hints is not None:
            raise ValueError(f"hints {options.hints} without pictures; give the folder of the pictures, --images")
        if size != sd.config.image_size:
            raise ValueError(f"size {size}: the bundled scenes have the model's own; leave --size out")
        return HintedScenes(sd, options.scenes, cache, kind=options.hint, seed=options.settings.seed)
    if len(concepts) > 1:
        raise ValueError(f"{len(concepts)} folders of pictures; a ControlNet learns from one, with a hint for each picture")
    (concept,) = concepts
    if concept.class_images is not None or concept.class_prompt is not None:
        raise ValueError("a ControlNet has no class pictures: the model itself is locked; leave them out")
    examples = captioned_examples(concept, concept.prompt or options.prompt, concept.subject_phrase, size)
    return HintedPictures(sd, examples, cache, size=size, kind=options.hint, folder=options.hints)


METHOD = Method(
    summary="Train a ControlNet: hints, such as outlines, steer the locked model. Without --images it learns from the bundled scenes.",
    presets=PRESETS,
    build=build,
    formats={"original": "the authors', one file", "diffusers": "a folder of diffusers"},
    start_from="controlnet",
    needs_images=False,
    example="--hint outline",
)
