"""What a person says to a method of personalising, and numbers that work, for each family of models.

    Concept     the pictures, and the words for them
    *Options    one a method (methods.py); preset("dreambooth", "sd1") gives those that the papers and the public programs use

Importing this costs nothing, so that the command line can show it at once. Where the numbers of Stable Diffusion come from stands beside
each; the bundled model's come from short trials, as is said there.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from minidiff.config import ModelConfig
from minidiff.trainers.engine.settings import Settings

Family = Literal["sd1", "sd2", "bundled"]
Words = Literal["photo", "scenes"]


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One thing to learn, and how it is called.

    images: the folder of its pictures. token: its name in prompts, a new word as <cat>, or a rare one of the vocabulary as sks.
    class_word: what kind of thing it is, as cat; it stands behind the token: "a photo of a <cat> cat".
    prompt: the caption of all its pictures, with {} for token and class word; None takes the method's own.
    captions: read each picture's caption from the folder instead (see data.read_folder), where {} stands for the same.
    class_images: the folder of pictures that keep the model from forgetting, filled if need be (see Prior). class_prompt: their
    caption, with {} for the class word; None takes the method's own.
    Raises ValueError for words that contradict each other.
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
    def words(self) -> str:
        """Token and class word, as far as there are: "<cat> cat"."""
        return " ".join(word for word in (self.token, self.class_word) if word)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a training sample is, and how its loss counts; the same for all methods.

    size: pixels; None is the model's own. crop, flip: as in cache.Pictures. caption_dropout: share of samples whose caption is left empty,
    which keeps classifier-free guidance in shape (Ho and Salimans 2022). offset_noise: 0.1 as in its blog post. min_snr: gamma, 5 in
    Hang et al. 2023. Both as in diffusion_loss.py.
    """

    size: int | None = None
    crop: Literal["centre", "random"] = "centre"
    flip: float = 0.0
    caption_dropout: float = 0.0
    offset_noise: float = 0.0
    min_snr: float | None = None

    def __post_init__(self):
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout {self.caption_dropout} is outside 0..1")
        if not self.offset_noise >= 0:
            raise ValueError(f"offset_noise {self.offset_noise}: it cannot be below 0")
        if self.min_snr is not None and not self.min_snr > 0:
            raise ValueError(f"min_snr {self.min_snr}: gamma must be above 0, such as 5; None leaves it out")


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Pictures that the model shall go on drawing as before; each sample's loss is its own + weight * that of one of these.

    kind: "none"; "folder", the class pictures as they are, with the class prompt or their own captions; "generated", filled up to `count`
    by the model itself (DreamBooth); "scenes", filled with the bundled scenes of the nearest captions; "near", those `count` captioned
    pictures of the folder whose captions are nearest, none below the cosine `least` (Custom Diffusion).
    steps, guidance_scale: of the pictures that are generated.
    """

    kind: Literal["none", "folder", "generated", "scenes", "near"] = "none"
    weight: float = 1.0
    count: int = 200
    steps: int = 50
    guidance_scale: float | None = None
    least: float | None = None

    def __post_init__(self):
        if self.kind not in ("none", "folder", "generated", "scenes", "near"):
            raise ValueError(f"prior {self.kind!r} unknown; choose none, folder, generated, scenes, near")
        if not self.weight > 0:
            raise ValueError(f"prior weight {self.weight}: it must be above 0; kind none leaves the prior out")
        if self.count < 1:
            raise ValueError(f"prior count {self.count}: at least 1 picture is needed")


@dataclass(frozen=True, kw_only=True)
class LowRankOptions:
    """Which layers a LoRA changes and how (adapters/lora.py).

    layers: names of adapters.lora.PATTERNS, or regular expressions over layer names. alpha: None is the rank, as in diffusers; kohya's
    default is 1. text_encoder: its attention too, at text_scale times the learning rate.
    """

    rank: int = 4
    alpha: float | None = None
    layers: tuple[str, ...] = ("attention",)
    init: Literal["gaussian", "kaiming"] = "gaussian"
    dropout: float = 0.0
    text_encoder: bool = False
    text_scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LoRAOptions:
    """A LoRA on a folder with captions. prompt: of concepts that bring no captions, with {} for the concept's words."""

    settings: Settings
    samples: Samples = Samples()
    low_rank: LowRankOptions = LowRankOptions()
    prior: Prior = Prior()
    prompt: str = "a photo of a {}"


@dataclass(frozen=True, kw_only=True)
class DreamBoothOptions:
    """DreamBooth: the whole U-Net, or with low_rank a LoRA instead.

    text_encoder: train all of it too, at text_scale times the learning rate; with low_rank, say it there.
    """

    settings: Settings
    samples: Samples = Samples()
    prior: Prior = Prior(kind="generated")
    low_rank: LowRankOptions | None = None
    text_encoder: bool = False
    text_scale: float = 1.0
    prompt: str = "a photo of a {}"

    def __post_init__(self):
        if self.low_rank is not None and self.text_encoder:
            raise ValueError("text_encoder with low_rank: say it in low_rank, whose LoRA then changes the text encoder too")


@dataclass(frozen=True, kw_only=True)
class TextualInversionOptions:
    """Textual Inversion: new words alone.

    kind: which templates (templates.py), for an object or a style; words: those of photographs, or the bundled scenes'. vectors: how many
    a word. start: the word that they start from; None takes the concept's class word, and random vectors where it has none.
    """

    settings: Settings
    samples: Samples = Samples()
    kind: Literal["object", "style"] = "object"
    words: Words = "photo"
    vectors: int = 1
    start: str | None = None


@dataclass(frozen=True, kw_only=True)
class PivotalOptions:
    """Pivotal tuning: first the new words, then a LoRA around them, while they stay."""

    tokens: TextualInversionOptions
    lora: LoRAOptions


@dataclass(frozen=True, kw_only=True)
class CustomDiffusionOptions:
    """Custom Diffusion: keys and values of cross-attention, and a new word for each concept, at token_scale times the learning rate.

    all_of_attention: queries and outputs of cross-attention too, which the authors' program offers for faces.
    start: the words or token numbers that the new words start from, in order; None takes rare tokens (adapters/tokens.py), () random rows.
    sizes: the augmentation (augment.py), with the words of photographs or scenes for them.
    """

    settings: Settings
    samples: Samples = Samples()
    prior: Prior = Prior(kind="near", least=0.85)
    all_of_attention: bool = False
    token_scale: float = 1.0
    start: tuple[str | int, ...] | None = None
    sizes: Literal["none", "paper", "code"] = "paper"
    words: Words = "photo"
    prompt: str = "photo of a {}"


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions:
    """The model's own weights on a folder with captions. weights: regular expressions searched in parameter names, as "unet.up.0....weight"."""

    settings: Settings
    weights: tuple[str, ...] = (r"^unet\.",)
    samples: Samples = Samples()
    prior: Prior = Prior()
    text_scale: float = 1.0
    prompt: str = "a photo of a {}"


Options = LoRAOptions | DreamBoothOptions | TextualInversionOptions | PivotalOptions | CustomDiffusionOptions | FineTuneOptions

# --- numbers ----------------------------------------------------------------------------------------------------------


def family_of(config: ModelConfig) -> Family:
    """Which presets belong to a model, by the width of its context."""
    return {768: "sd1", 1024: "sd2"}.get(config.unet.context_width, "bundled")


def preset(method: str, family: str) -> Options:
    """The numbers of a method for a family of models. Raises ValueError for an unknown one of either."""
    presets = {"sd1": STABLE_DIFFUSION, "sd2": STABLE_DIFFUSION, "bundled": BUNDLED}
    if family not in presets:
        raise ValueError(f"family {family!r} unknown; choose {', '.join(presets)}")
    if method not in presets[family]:
        raise ValueError(f"method {method!r} unknown; choose {', '.join(presets[family])}")
    return presets[family][method]


def _settings(steps: int, learning_rate: float, batch: int = 4, warmup_steps: int = 0) -> Settings:
    return Settings(steps=steps, batch=batch, learning_rate=learning_rate, warmup_steps=warmup_steps)


STABLE_DIFFUSION: dict[str, Options] = {
    # diffusers' text-to-image LoRA
    "lora": LoRAOptions(settings=replace(_settings(1500, 1e-4), schedule="cosine")),
    # diffusers: 5e-6 and 200 to 400 steps for a dog; with the text encoder 2e-6
    "dreambooth": DreamBoothOptions(settings=_settings(400, 5e-6, batch=1)),
    # diffusers: rank 4, 500 steps
    "dreambooth-lora": DreamBoothOptions(settings=_settings(500, 5e-4, batch=1), low_rank=LowRankOptions()),
    # the authors' program, for batches of 4 to 8
    "textual-inversion": TextualInversionOptions(settings=_settings(5000, 5e-3)),
    # cloneofsimo's LoRA program
    "pivotal-tuning": PivotalOptions(
        tokens=TextualInversionOptions(settings=_settings(1000, 5e-4)),
        lora=LoRAOptions(
            settings=replace(_settings(1000, 1e-4), schedule="linear"), low_rank=LowRankOptions(text_encoder=True, text_scale=0.1)
        ),
    ),
    # the paper: 8e-5 at batch 8, 250 steps a concept, words as fast as weights
    "custom-diffusion": CustomDiffusionOptions(settings=_settings(250, 8e-5, batch=8)),
    # diffusers' text-to-image
    "fine-tune": FineTuneOptions(settings=_settings(2000, 1e-5)),
}

# Tried on five held-out subjects in five pictures each, with 200 steps (minidiff evaluate study), but for fine-tune, which is not tried yet.
# Custom Diffusion shows its pictures in one size: subjects of 64 pixels lose what they are known by when they shrink.
BUNDLED: dict[str, Options] = {
    "lora": LoRAOptions(settings=_settings(300, 2e-3), low_rank=LowRankOptions(rank=8, layers=("transformer",))),
    "dreambooth": DreamBoothOptions(settings=_settings(300, 5e-4), prior=Prior(kind="generated", count=48, steps=20)),
    "dreambooth-lora": DreamBoothOptions(
        settings=_settings(300, 2e-3), low_rank=LowRankOptions(rank=8, layers=("conv",)), prior=Prior(kind="generated", count=48, steps=20)
    ),
    "textual-inversion": TextualInversionOptions(settings=_settings(400, 2e-2), words="scenes", vectors=4),
    "pivotal-tuning": PivotalOptions(
        tokens=TextualInversionOptions(settings=_settings(150, 2e-2), words="scenes", vectors=2),
        lora=LoRAOptions(settings=_settings(200, 2e-3), low_rank=LowRankOptions(rank=8, layers=("transformer",))),
    ),
    "custom-diffusion": CustomDiffusionOptions(
        settings=_settings(300, 2e-3),
        token_scale=5.0,
        prior=Prior(kind="scenes", count=100),
        start=("ktn", "pll", "ucd"),
        sizes="none",
        words="scenes",
        prompt="a photo of a {}",
    ),
    "fine-tune": FineTuneOptions(settings=_settings(200, 5e-4)),
}
