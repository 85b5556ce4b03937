"""What several training methods are told: what to learn, what a training sample is, and which pictures keep the model from forgetting.

    Concept           the pictures, and the words for them
    DataOptions       what a sample is, and how its loss counts
    Prior             class pictures
    LowRankOptions    which layers a LoRA changes
    PhaseOptions      all of one phase; the options of a method are a subclass

The options of a method, and its presets for each family of models, are in the method's own file. Each field is a flag of
`minidiff train METHOD`, and its line under `Args:` is the flag's help. Importing this costs nothing, so that --help appears at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from minidiff.config import ModelConfig, check_choice
from minidiff.trainers.engine.settings import Settings

Family = Literal["sd1", "sd2", "sdxl", "bundled"]
TemplateSet = Literal["photo", "scenes"]
YesNo = Annotated[bool, "a flag with yes or no, for presets may have either"]


def family_of(config: ModelConfig) -> Family:
    """Return the family whose presets fit a model, by the width of its context."""
    families: dict[int, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}
    return families.get(config.unet.context_width, "bundled")


@dataclass(frozen=True, kw_only=True)
class Concept:
    """What is learned, and how it is called.

    Raises ValueError for words that contradict each other.

    Args:
        images: folder with the pictures of it, three to five or more
        token: its name in prompts: a new word as "<cat>", or a rare one as sks for dreambooth
        class_word: what kind of thing it is, as cat; it follows the token: "a photo of a <cat> cat"
        prompt: caption of all its pictures, with {} for token and class word; the method's own by default
        captions: read each picture's caption from the folder: NAME.txt beside it, metadata.jsonl or captions.json; {} as in --prompt
        class_images: folder of pictures that keep the model from forgetting (see --prior); filled if need be, in --out by default
        class_prompt: their caption, with {} for the class word; the method's own by default
    """

    images: Path
    token: str = ""
    class_word: str = ""
    prompt: str | None = None
    captions: bool = False
    class_images: Path | None = None
    class_prompt: str | None = None

    def __post_init__(self):
        if self.captions and self.prompt is not None:
            raise ValueError(f"prompt {self.prompt!r} and captions from {self.images}: give one of the two")
        for name in ("token", "class_word"):
            if getattr(self, name) != getattr(self, name).strip():
                raise ValueError(f"{name} {getattr(self, name)!r} has spaces around it; leave them out")

    @property
    def subject_phrase(self) -> str:
        """Return token and class word, as far as there are: "<cat> cat"."""
        return " ".join(word for word in (self.token, self.class_word) if word)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How the pictures are shown, and how a sample's loss counts.

    Empty captions keep classifier-free guidance in shape (Ho and Salimans 2022). offset_noise and min_snr: see diffusion_loss.py.

    Args:
        size: pixels a side; the model's own by default
        crop: which square of a picture: its centre, or a random one at each step
        buckets: learn from whole pictures of any shape: pixels between the shapes, as 64; squares by default
        flip: share of samples that are mirrored
        caption_dropout: share of samples with an empty caption
        offset_noise: how much noise is added to whole channels, as 0.1 (Guttenberg 2023)
        min_snr: gamma of the min-SNR weights, as 5 (Hang et al. 2023)
    """

    size: int | None = None
    crop: Literal["centre", "random"] = "centre"
    buckets: int | None = None
    flip: float = 0.0
    caption_dropout: float = 0.0
    offset_noise: float = 0.0
    min_snr: float | None = None

    def __post_init__(self):
        for name in ("size", "buckets"):
            if (pixels := getattr(self, name)) is not None and pixels < 1:
                raise ValueError(f"{name} {pixels}: expected pixels, at least 1")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout {self.caption_dropout} is outside 0..1")
        if not self.offset_noise >= 0:
            raise ValueError(f"offset_noise {self.offset_noise}: it cannot be below 0")
        if self.min_snr is not None and not self.min_snr > 0:
            raise ValueError(f"min_snr {self.min_snr}: gamma must be above 0, such as 5; None leaves it out")


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Class pictures, which keep the model from forgetting what else there is: prior preservation.

    Each sample's loss is its own plus `weight` times the loss of one class picture (Ruiz et al. 2023, eq. 2).

    Args:
        kind: none; folder: those of --class-images; generated: made by the model itself; scenes: the bundled scenes with the nearest
            captions; near: those of --class-images with the nearest captions
        weight: what their loss counts beside the subject's
        count: how many
        steps: sampler steps, of generated ones
        guidance_scale: guidance, of generated ones; the model's own by default
        min_similarity: smallest cosine of a near caption
    """

    FLAT_NAMES: ClassVar[Mapping[str, str]] = {
        "kind": "prior",
        "weight": "prior_weight",
        "count": "prior_count",
        "steps": "prior_steps",
        "guidance_scale": "prior_guidance_scale",
        "min_similarity": "prior_min_similarity",
    }

    kind: Literal["none", "folder", "generated", "scenes", "near"] = "none"
    weight: float = 1.0
    count: int = 200
    steps: int = 50
    guidance_scale: float | None = None
    min_similarity: float | None = None

    def __post_init__(self):
        check_choice("prior", self.kind, ("none", "folder", "generated", "scenes", "near"))
        if not self.weight > 0:
            raise ValueError(f"prior weight {self.weight}: it must be above 0; kind none leaves the prior out")
        if self.count < 1:
            raise ValueError(f"prior count {self.count}: at least 1 picture is needed")

    @property
    def is_made(self) -> bool:
        """Say whether its folder is filled before training."""
        return self.kind in ("generated", "scenes")


@dataclass(frozen=True, kw_only=True)
class LowRankOptions:
    """Which layers a LoRA changes, and how (adapters/lora.py).

    Args:
        rank: columns of its factors
        alpha: the change is scaled by alpha / rank; the rank by default, as in diffusers; kohya's default is 1
        layers: attention, transformer, conv, or regular expressions over layer names
        init: of the factors: gaussian as diffusers, kaiming as the original
        dropout: share of its inputs that are left out at each step
        text_encoder: train the text encoder too
        text_scale: the text encoder's share of the learning rate
    """

    rank: int = 4
    alpha: float | None = None
    layers: tuple[str, ...] = ("attention",)
    init: Literal["gaussian", "kaiming"] = "gaussian"
    dropout: float = 0.0
    text_encoder: YesNo = False
    text_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PhaseOptions:
    """The options of one phase of training, and of a method that has only one: what FinetuneTask reads of them.

    prompt: the caption of concepts that bring none, and of class pictures, with {} for the words.
    """

    settings: Settings
    data: DataOptions = DataOptions()
    prior: Prior = Prior()
    prompt: str = "a photo of a {}"

    def phases(self) -> "tuple[PhaseOptions, ...]":
        """Return the phases of the method: this one."""
        return (self,)
