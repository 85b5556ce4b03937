"""The flags of `minidiff train METHOD`: groups of them that several methods share, and how they change a preset.

A flag that is not given leaves the preset's number, which depends on the model and is not known when --help is shown. Importing this
takes no time.
"""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from minidiff.trainers.presets import Concept, LowRankOptions, Options, PivotalOptions, Prior, Samples, TextualInversionOptions, Words, preset
from minidiff.trainers.recipe import RECIPES, Precision, Recipe, Schedule, Settings

UNSET = ""  # shown behind a flag's help, in place of a default
Whole = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint=UNSET)]
Number = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint=UNSET)]
Text = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint=UNSET)]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint=UNSET)]
File = Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint=UNSET)]
Several = tyro.conf.UseAppendAction[tuple[str, ...]]
DTypes = Literal["auto", "float32", "bfloat16", "float16"]
Attentions = Literal["auto", "by_hand", "pytorch", "triton"]
CONCEPT = ("images", "token", "class", "prompt", "captions", "class-images", "class-prompt")
EXAMPLE = 'images=DIR,token="<cat>",class=cat'


def choices(kind: Any) -> Any:
    """One of a Literal's words, or the preset's."""
    return Annotated[kind | None, tyro.conf.arg(metavar="{" + ",".join(kind.__args__) + "}", help_behavior_hint=UNSET)]


@dataclass(frozen=True, kw_only=True)
class What:
    """What is learnt, and how it is called. Several things at once: one --concept for each.

    Args:
        images: folder with the pictures of it, three to five or more
        token: its name in prompts: a new word as "<cat>", or a rare one as sks for dreambooth
        class_word: what kind of thing it is, as cat
        prompt: caption of all its pictures, with {} for token and class word; the method's own by default
        captions: read each picture's caption from the folder: NAME.txt beside it, metadata.jsonl or captions.json
        class_images: folder of pictures that keep the model from forgetting (see --prior); filled if need be, in --out by default
        class_prompt: their caption, with {} for the class word
        concept: one more thing, as images=DIR,token="<cat>",class=cat and further prompt=, captions=yes, class-images=, class-prompt=
    """

    images: Folder = None
    token: str = ""
    class_word: str = ""
    prompt: Text = None
    captions: bool = False
    class_images: Folder = None
    class_prompt: Text = None
    concept: Several = ()

    def concepts(self) -> list[Concept]:
        """Raises ValueError where there is none, or where words contradict each other."""
        alone = {name: value for name, value in asdict(self).items() if name != "concept"}
        if self.images is None and any(alone.values()):
            given = next(name for name, value in alone.items() if value)
            raise ValueError(f"--{given.replace('_', '-')} without --images; give the folder of the pictures, or --concept {EXAMPLE}")
        if self.images is None and not self.concept:
            raise ValueError(f"nothing to learn; give --images DIR, or --concept {EXAMPLE}")
        first = [Concept(**alone)] if self.images is not None else []
        return first + [parse_concept(text) for text in self.concept]


def parse_concept(text: str) -> Concept:
    """'images=cat,token=<cat>,class=cat' as a Concept; a comma within a value is one unless a known name and = follow."""
    parts = re.split(rf",?\b({'|'.join(sorted(CONCEPT, key=len, reverse=True))})=", text)
    if parts[0] or len(parts) < 3:
        raise ValueError(f"--concept {text}: expected {EXAMPLE}; it knows {', '.join(CONCEPT)}")
    names, values = parts[1::2], [value.strip('"') for value in parts[2::2]]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--concept {text}: {twice[0]} is given twice")
    found = dict(zip(names, values))
    if not found.get("images"):
        raise ValueError(f"--concept {text}: no images=DIR")
    if found.get("captions", "no") not in ("yes", "no"):
        raise ValueError(f"--concept {text}: captions={found['captions']}; write yes or no")
    class_images = found.get("class-images")
    return Concept(
        images=Path(found["images"]),
        token=found.get("token", ""),
        class_word=found.get("class", ""),
        prompt=found.get("prompt"),
        captions=found.get("captions") == "yes",
        class_images=Path(class_images) if class_images else None,
        class_prompt=found.get("class-prompt"),
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where it is learnt, and what is shown meanwhile. Stopped at any time, the same command goes on from the last save in --out.

    Args:
        out: folder of the run; what is learnt ends there
        model: "tiny" (ships with minidiff), a .safetensors or .ckpt file, or a diffusers folder
        prediction: what the model predicts, eps or v, where its file is wrong about it
        dtype: of the weights that stand still; float32 by default, float16 or bfloat16 halve them on a GPU
        device: auto, cpu, cuda, cuda:1, mps
        attention: how it is worked out: auto takes what is fastest; triton is this package's kernels, on a GPU
        threads: CPU threads to use; all cores by default
        sample_every: steps between two sheets of validation pictures, always on the same seeds; 0 for none but at the end
        sample_prompt: what they show; the first caption of each concept by default
        samples: how many pictures of each prompt
    """

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    model: str = "tiny"
    prediction: choices(Literal["eps", "v"]) = None
    dtype: DTypes = "auto"
    device: str = "auto"
    attention: Attentions = "auto"
    threads: Whole = None
    sample_every: int = 100
    sample_prompt: Several = ()
    samples: int = 4

    def check(self) -> None:
        """Raises ValueError for a number out of range."""
        for name, least in (("sample_every", 0), ("samples", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')} {value}: at least {least}")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long and how fast; what is left out is the preset's, which is printed before the run.

    Args:
        steps: how many steps
        batch: samples at once, in each process
        learning_rate: of the optimizer AdamW
        accumulate: batches whose gradients are added up for a step
        warm_up: steps over which the learning rate rises from 0
        schedule: of the learning rate after that
        clip: the largest norm of the whole gradient; inf leaves it as it is
        average: decay of a running mean of the weights, which is then the result, as 0.99; none by default
        precision: of products and convolutions; auto is bfloat16 on a GPU, float32 elsewhere; what is trained stays in float32
        checkpointing: compute what is inside a block twice: less memory, a third slower
        compile: run the networks through torch.compile
        seed: of everything that is drawn by chance
        save_every: steps between two saves
    """

    steps: Whole = None
    batch: Whole = None
    learning_rate: Number = None
    accumulate: Whole = None
    warm_up: Whole = None
    schedule: choices(Schedule) = None
    clip: Number = None
    average: Number = None
    precision: choices(Precision) = None
    checkpointing: bool = False
    compile: bool = False
    seed: Whole = None
    save_every: Whole = None

    def over(self, settings: Settings) -> Settings:
        return changed(settings, **asdict(self) | {"checkpointing": self.checkpointing or None, "compile": self.compile or None})


@dataclass(frozen=True, kw_only=True)
class RecipeFlags:
    """How long, and how; what is left out is the recipe's.

    Args:
        seed: of everything that is drawn by chance
        widths: of the U-Net's three levels, multiples of 32; 64 128 160 by default
        vae_steps: steps of the VAE
        vae_batch: pictures at once
        vae_learning_rate: of the VAE
        kl_weight: what the latents' distance from unit normals counts in the VAE's loss
        train_vae: train the VAE of --vae or --init on, instead of taking it as it is
        scenes: how many are composed ahead
        steps: of the text encoder and the U-Net
        batch: latents at once
        learning_rate: of the text encoder and the U-Net
        schedule: of that rate, after it has risen
        object_weight: what a latent cell of an object counts, beyond the 0.4 of the background
        caption_dropout: share of captions that are left empty, for guidance
        min_snr: gamma of the min-SNR weights, as 5
        average: decay of the running mean of the weights, which is the result
        slow_average: decay of a second, slower mean of the text encoder's and the U-Net's
        compile: run the networks through torch.compile; by default where it gains, on CUDA devices and CPUs with AMX
    """

    seed: Whole = None
    widths: Annotated[tuple[int, int, int] | None, tyro.conf.arg(metavar="INT INT INT", help_behavior_hint=UNSET)] = None
    vae_steps: Whole = None
    vae_batch: Whole = None
    vae_learning_rate: Number = None
    kl_weight: Number = None
    train_vae: bool = False
    scenes: Whole = None
    steps: Whole = None
    batch: Whole = None
    learning_rate: Number = None
    schedule: choices(Schedule) = None
    object_weight: Number = None
    caption_dropout: Number = None
    min_snr: Number = None
    average: Number = None
    slow_average: Number = None
    compile: choices(Literal["yes", "no"]) = None

    def over(self, recipe: Recipe) -> Recipe:
        return changed(recipe, **asdict(self) | {
            "compile": None if self.compile is None else self.compile == "yes", "train_vae": self.train_vae or None,
        })  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """How the pictures are shown, and how a sample's loss counts.

    Args:
        size: pixels a side; the model's own by default
        crop: which square of a picture: its centre, or a random one at each step
        flip: share of samples that are mirrored
        caption_dropout: share of samples with an empty caption
        offset_noise: how much noise is added to whole channels, as 0.1
        min_snr: gamma of the min-SNR weights, as 5
    """

    size: Whole = None
    crop: choices(Literal["centre", "random"]) = None
    flip: Number = None
    caption_dropout: Number = None
    offset_noise: Number = None
    min_snr: Number = None

    def over(self, samples: Samples) -> Samples:
        return changed(samples, **asdict(self))


Kind = Literal["none", "folder", "generated", "scenes", "near"]


@dataclass(frozen=True, kw_only=True)
class PriorFlags:
    """Class pictures, which keep the model from forgetting what else there is.

    Args:
        prior: none; folder: those of --class-images; generated: made by the model itself; scenes: the bundled scenes with the nearest
            captions; near: those of --class-images with the nearest captions
        prior_weight: what their loss counts beside the subject's
        prior_count: how many
        prior_steps: sampler steps, of generated ones
        prior_guidance: guidance, of generated ones
        prior_least: smallest cosine of a near caption
    """

    prior: choices(Kind) = None
    prior_weight: Number = None
    prior_count: Whole = None
    prior_steps: Whole = None
    prior_guidance: Number = None
    prior_least: Number = None

    def over(self, prior: Prior) -> Prior:
        return changed(
            prior, kind=self.prior, weight=self.prior_weight, count=self.prior_count, steps=self.prior_steps,
            guidance_scale=self.prior_guidance, least=self.prior_least,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TextEncoderFlags:
    """Whether the text encoder learns too.

    Args:
        text_encoder: train it too
        text_scale: its share of the learning rate
    """

    text_encoder: choices(Literal["yes", "no"]) = None
    text_scale: Number = None

    def values(self) -> dict[str, object]:
        return {"text_encoder": None if self.text_encoder is None else self.text_encoder == "yes", "text_scale": self.text_scale}


@dataclass(frozen=True, kw_only=True)
class WordFlags:
    """The new word, and how it is shown.

    Args:
        vectors: how many vectors a word
        start: the word that it starts from; the class word by default, random without one
        kind: templates around the word for an object, or for a style
        words: templates of photographs, or of the bundled model's scenes
    """

    vectors: Whole = None
    start: Text = None
    kind: choices(Literal["object", "style"]) = None
    words: choices(Words) = None

    def over(self, options: TextualInversionOptions) -> TextualInversionOptions:
        return changed(options, **asdict(self))


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Which layers the LoRA changes, and how.

    Args:
        rank: columns of its factors
        alpha: the change is scaled by alpha / rank; the rank by default
        layers: attention, transformer, conv, or regular expressions over layer names
        init: of the factors: gaussian as diffusers, kaiming as the original
        dropout: share of its inputs that are left out at each step
    """

    rank: Whole = None
    alpha: Number = None
    layers: Several = ()
    init: choices(Literal["gaussian", "kaiming"]) = None
    dropout: Number = None

    def over(self, low_rank: LowRankOptions, text: TextEncoderFlags) -> LowRankOptions:
        return changed(low_rank, **asdict(self) | {"layers": self.layers or None}, **text.values())


def changed(base: Any, **values: object) -> Any:
    """The dataclass with the values that were given; None is not given."""
    return replace(base, **{name: value for name, value in values.items() if value is not None})


def numbers_of(method: str) -> str:
    """The presets of a method in a line each, for its --help."""
    if method == "from-scratch":
        bundled, half = (asdict(RECIPES[name]) for name in ("bundled", "half"))
        other = {number: value for number, value in half.items() if value != bundled[number]}
        said = [", ".join(f"{name} {value}" for name, value in one.items() if value is not None) for one in (bundled, other)]
        return f"Numbers of bundled: {said[0]}.\n\nNumbers of half, where they are others: {said[1]}."
    lines = []
    for name, family in (("the bundled model", "bundled"), ("Stable Diffusion", "sd1")):
        options = preset(method, family)
        phases = (options.tokens, options.lora) if isinstance(options, PivotalOptions) else (options,)
        lines.append(f"Presets of {name}: {', then '.join(main_numbers(phase) for phase in phases)}.")
    return "\n\n".join(lines)


def main_numbers(options: Options) -> str:
    """As "300 steps of 4 samples, learning rate 0.002, rank 8, prior scenes"."""
    settings = options.settings
    said = [f"{settings.steps} steps of {settings.batch} sample{'s' * (settings.batch > 1)}", f"learning rate {settings.learning_rate:g}"]
    if getattr(options, "low_rank", None) is not None:
        said.append(f"rank {options.low_rank.rank} on {' and '.join(options.low_rank.layers)}")
    if getattr(options, "vectors", None) is not None:
        said.append(f"{options.vectors} vector{'s' * (options.vectors > 1)} a word")
    if getattr(options, "prior", Prior()).kind != "none":
        said.append(f"{options.prior.count} class pictures ({options.prior.kind})")
    return ", ".join(said)
