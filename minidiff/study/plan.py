"""Every run of the study: which method, on which subjects, with which seed, and what is changed about the method.

The runs of a part are alike but for what the part asks about:

    methods      all methods, one subject: what each gives and costs
    before       methods that learned badly, by the numbers that they had before these were mended
    pairs        two subjects: learned jointly, merged, one after the other, and by DreamBooth
    custom       Custom Diffusion with one thing changed (Kumari et al. 2023, table 3 and figures 8 to 10)
    lora         LoRA with other ranks, layers, and the text encoder
    pictures     Custom Diffusion from fewer or more pictures
    compression  Custom Diffusion's changes, less and less of them
    style        a style learned from ten pictures

All methods take the same number of steps of the same batch: the budget is equal, the presets give the rest.
"""

from dataclasses import dataclass, replace
from typing import Any

from minidiff.trainers.methods.dreambooth import DreamBoothOptions
from minidiff.trainers.methods.lora import LoRAOptions
from minidiff.trainers.methods.method import MethodOptions
from minidiff.trainers.methods.options import Prior
from minidiff.trainers.methods.override import override
from minidiff.trainers.methods.table import preset

# Held-out subjects, and the subject of training that stands for their class: alike, and drawn well by the bundled model.
SUBJECTS = {"tiger": "lion", "teapot": "mug", "violin": "guitar", "cake": "cupcake", "sofa": "chair"}
PAIRS = tuple(zip(SUBJECTS, (*list(SUBJECTS)[1:], next(iter(SUBJECTS)))))
SEEDS = (0, 1, 2)
STEPS = 200  # of a batch of 4, for every method
PICTURES = 5
FEWER_SUBJECTS, FEWER_SEEDS = tuple(SUBJECTS)[:3], SEEDS[:2]  # of what no finding rests on

UNTOUCHED = "untouched"
SHARES = (0.8, 0.6, 0.4, 0.2, 0.1)
STYLE = "a grey style"


@dataclass(frozen=True)
class Run:
    """One training and its measurements. variant: a key of the part's variants. subjects: one, or two for the pairs; none for the style."""

    part: str
    variant: str
    subjects: tuple[str, ...]
    seed: int

    @property
    def name(self) -> str:
        """As a file name."""
        words = " ".join((self.part, self.variant, *self.subjects, str(self.seed)))
        return "-".join("".join(c if c.isalnum() or c == "." else " " for c in words).split())


@dataclass(frozen=True)
class Variant:
    """A method and its numbers. method: of presets, or one of adapters/parallel.py's. pictures: how many of the subject it is given."""

    method: str
    options: MethodOptions
    pictures: int = PICTURES


def standard(method: str) -> Any:
    """Return the bundled model's preset of a method with the study's budget, in bfloat16; pivotal tuning has half of it for each phase."""
    options = preset(method, "bundled")
    steps = STEPS // len(options.phases())
    return override(options, {"steps": steps, "token_steps": steps, "precision": "bfloat16"})


def methods() -> dict[str, Variant]:
    """The rows of the first table, the untouched model aside."""
    names = ("textual-inversion", "pivotal-tuning", "lora", "dreambooth-lora", "dreambooth", "custom-diffusion")
    small = LoRAOptions(settings=standard("lora").settings)
    # A prefix is numbers of its own, not a change of weights: it needs another rate than LoRA (see before).
    prefix = replace(small, settings=replace(small.settings, learning_rate=2e-2))
    others = {"adapter": small, "parallel": small, "prefix": prefix}
    return {name: Variant(name, standard(name)) for name in names} | {name: Variant(name, options) for name, options in others.items()}


def before() -> dict[str, Variant]:
    """Custom Diffusion shrank its pictures, as it should larger ones, and its weights learned slowly beside its word; the prefix had LoRA's rate."""
    new = standard("custom-diffusion")
    old = replace(new, settings=replace(new.settings, learning_rate=1e-3), token_scale=10.0, sizes="paper")
    return {
        "custom-diffusion": Variant("custom-diffusion", old),
        "prefix": Variant("prefix", LoRAOptions(settings=standard("lora").settings)),
    }


def custom() -> dict[str, Variant]:
    """Custom Diffusion with one thing changed."""
    base = standard("custom-diffusion")
    generated = Prior(kind="generated", count=base.prior.count, steps=20)
    all_weights = DreamBoothOptions(settings=standard("dreambooth").settings, prior=base.prior, prompt=base.prompt)
    return {
        "augmentation": Variant("custom-diffusion", replace(base, sizes="paper")),
        "no regularisation": Variant("custom-diffusion", replace(base, prior=Prior())),
        "generated regularisation": Variant("custom-diffusion", replace(base, prior=generated)),
        "random first token": Variant("custom-diffusion", replace(base, start=())),
        "all of cross-attention": Variant("custom-diffusion", replace(base, all_of_attention=True)),
        "all weights": Variant("dreambooth", all_weights),
    }


def lora() -> dict[str, Variant]:
    """LoRA with other ranks and layers."""
    base = standard("lora")

    def changed(**numbers) -> Variant:
        return Variant("lora", replace(base, low_rank=replace(base.low_rank, **numbers)))

    ranks = {f"rank {rank}": changed(rank=rank) for rank in (1, 4, 32)}
    return ranks | {
        "attention alone": changed(layers=("attention",)),
        "convolutions too": changed(layers=("conv",)),
        "text encoder too": changed(text_encoder=True),
    }


def pictures() -> dict[str, Variant]:
    """Custom Diffusion from fewer or more pictures."""
    counts = {"1 picture": 1, "2 pictures": 2, "10 pictures": 10}
    return {name: Variant("custom-diffusion", standard("custom-diffusion"), count) for name, count in counts.items()}


def variants(part: str) -> dict[str, Variant]:
    """By name, of the parts in which one subject is learned by one method. Raises ValueError for another part."""
    if part not in VARIANTS:
        raise ValueError(f"part {part!r} has no variants; choose {', '.join(VARIANTS)}")
    return VARIANTS[part]()


VARIANTS = {"methods": methods, "before": before, "custom": custom, "lora": lora, "pictures": pictures}


PAIR_VARIANTS = ("joint", "merged", "sequential", "dreambooth")


def runs(part: str) -> list[Run]:
    """The runs of a part, or of "all". Raises ValueError for an unknown part."""
    parts = {
        "methods": [Run("methods", name, (s,), seed) for seed in SEEDS for s in SUBJECTS for name in (UNTOUCHED, *methods())],
        "pairs": [Run("pairs", name, pair, seed) for seed in SEEDS for pair in PAIRS for name in (UNTOUCHED, *PAIR_VARIANTS)],
        "style": [Run("style", name, (), seed) for seed in FEWER_SEEDS for name in (UNTOUCHED, "custom-diffusion", "lora")],
    } | {
        part: [Run(part, name, (s,), seed) for seed in FEWER_SEEDS for s in subjects for name in names]
        for part, names, subjects in (
            ("before", before(), SUBJECTS),
            ("compression", [f"share {share}" for share in SHARES], SUBJECTS),
            ("custom", custom(), SUBJECTS),
            ("lora", lora(), FEWER_SUBJECTS),
            ("pictures", pictures(), FEWER_SUBJECTS),
        )
    }
    if part == "all":  # a seed at a time: stopped early, the study has fewer seeds, and all of its tables
        return sorted((run for one in parts.values() for run in one), key=lambda run: run.seed)
    if part not in parts:
        raise ValueError(f"part {part!r} unknown; choose all, {', '.join(parts)}")
    return parts[part]
