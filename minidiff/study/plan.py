"""The plan of the study: every run's method, subjects and seed, and what is changed about the method.

The runs of a part differ only in what the part asks about:

    methods      all methods, one subject: what each gives and costs
    before       methods that learned badly, by the numbers that they had before these were mended
    pairs        two subjects: learned jointly, merged, one after the other, and by DreamBooth
    custom       Custom Diffusion with one thing changed (Kumari et al. 2023, table 3 and figures 8 to 10)
    lora         LoRA with other ranks, layers, and the text encoder
    pictures     Custom Diffusion from fewer or more pictures
    compression  Custom Diffusion's changes, less and less of them
    style        a style learned from ten pictures

All methods take the same number of steps of the same batch size; the presets give everything else.
"""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from minidiff.trainers.methods.dreambooth import DreamBoothOptions
from minidiff.trainers.methods.lora import LoRAOptions
from minidiff.trainers.methods.method import MethodOptions
from minidiff.trainers.methods.options import Prior
from minidiff.trainers.methods.override import override
from minidiff.trainers.methods.table import preset

# Held-out subjects, each with the training subject that stands for its class: similar, and drawn well by the bundled model.
SUBJECTS = {"tiger": "lion", "teapot": "mug", "violin": "guitar", "cake": "cupcake", "sofa": "chair"}
PAIRS = tuple(zip(SUBJECTS, (*list(SUBJECTS)[1:], next(iter(SUBJECTS)))))
SEEDS = (0, 1, 2)
STEPS = 200  # of a batch of 4, for every method
PICTURES = 5
FEWER_SUBJECTS, FEWER_SEEDS = tuple(SUBJECTS)[:3], SEEDS[:2]  # for parts that no finding rests on

UNTOUCHED = "untouched"
SHARES = (0.8, 0.6, 0.4, 0.2, 0.1)
STYLE = "a grey style"


@dataclass(frozen=True)
class StudyRun:
    """One training and its measurements.

    variant: a key of the part's variants. subjects: one, two for the pairs, none for the style.
    """

    part: str
    variant: str
    subjects: tuple[str, ...]
    seed: int

    @property
    def name(self) -> str:
        """Return the run's name as a file name."""
        words = " ".join((self.part, self.variant, *self.subjects, str(self.seed)))
        return "-".join("".join(c if c.isalnum() or c == "." else " " for c in words).split())


@dataclass(frozen=True)
class Variant:
    """A method and its options. method: a preset, or a method of adapters/parallel.py. pictures: how many of the subject it is given."""

    method: str
    options: MethodOptions
    pictures: int = PICTURES


def standard_options(method: str) -> Any:
    """Return the bundled model's preset of a method with the study's budget, in bfloat16; pivotal tuning has half of it for each phase."""
    options = preset(method, "bundled")
    steps = STEPS // len(options.phases())
    return override(options, {"steps": steps, "token_steps": steps, "precision": "bfloat16"})


def method_variants() -> dict[str, Variant]:
    """List the methods of the first table, without the untouched model."""
    names = ("textual-inversion", "pivotal-tuning", "lora", "dreambooth-lora", "dreambooth", "custom-diffusion")
    small = LoRAOptions(settings=standard_options("lora").settings)
    # A prefix adds parameters instead of changing weights, so it needs another learning rate than LoRA (see unmended_variants).
    prefix = replace(small, settings=replace(small.settings, learning_rate=2e-2))
    others = {"adapter": small, "parallel": small, "prefix": prefix}
    return {name: Variant(name, standard_options(name)) for name in names} | {
        name: Variant(name, options) for name, options in others.items()
    }


def unmended_variants() -> dict[str, Variant]:
    """List two methods as they were before they were mended.

    Custom Diffusion shrank its pictures, which suits larger ones, and its weights learned slowly next to its word. The prefix had LoRA's
    learning rate.
    """
    new = standard_options("custom-diffusion")
    old = replace(new, settings=replace(new.settings, learning_rate=1e-3), token_scale=10.0, sizes="paper")
    return {
        "custom-diffusion": Variant("custom-diffusion", old),
        "prefix": Variant("prefix", LoRAOptions(settings=standard_options("lora").settings)),
    }


def custom_variants() -> dict[str, Variant]:
    """List Custom Diffusion with one thing changed each."""
    base = standard_options("custom-diffusion")
    generated = Prior(kind="generated", count=base.prior.count, steps=20)
    all_weights = DreamBoothOptions(settings=standard_options("dreambooth").settings, prior=base.prior, prompt=base.prompt)
    return {
        "augmentation": Variant("custom-diffusion", replace(base, sizes="paper")),
        "no regularisation": Variant("custom-diffusion", replace(base, prior=Prior())),
        "generated regularisation": Variant("custom-diffusion", replace(base, prior=generated)),
        "random first token": Variant("custom-diffusion", replace(base, start=())),
        "all of cross-attention": Variant("custom-diffusion", replace(base, all_of_attention=True)),
        "all weights": Variant("dreambooth", all_weights),
    }


def lora_variants() -> dict[str, Variant]:
    """List LoRA with other ranks and layers."""
    base = standard_options("lora")

    changed = {f"rank {rank}": replace(base.low_rank, rank=rank) for rank in (1, 4, 32)} | {
        "attention alone": replace(base.low_rank, layers=("attention",)),
        "convolutions too": replace(base.low_rank, layers=("conv",)),
        "text encoder too": replace(base.low_rank, text_encoder=True),
    }
    return {name: Variant("lora", replace(base, low_rank=low_rank)) for name, low_rank in changed.items()}


def picture_variants() -> dict[str, Variant]:
    """List Custom Diffusion from fewer or more pictures."""
    counts = {"1 picture": 1, "2 pictures": 2, "10 pictures": 10}
    return {name: Variant("custom-diffusion", standard_options("custom-diffusion"), count) for name, count in counts.items()}


def variants(part: str) -> dict[str, Variant]:
    """Return a part's variants by name. Raises ValueError for a part in which no single method learns a single subject."""
    if part not in VARIANTS:
        raise ValueError(f"part {part!r} has no variants; choose {', '.join(VARIANTS)}")
    return VARIANTS[part]()


VARIANTS = {
    "methods": method_variants,
    "before": unmended_variants,
    "custom": custom_variants,
    "lora": lora_variants,
    "pictures": picture_variants,
}


PAIR_VARIANTS = ("joint", "merged", "sequential", "dreambooth")


def make_grids() -> dict[str, tuple[tuple[int, ...], tuple[tuple[str, ...], ...], tuple[str, ...]]]:
    """Return the seeds, the subjects (a tuple for each run) and the variants of every part, whose runs are their product."""
    one_each = tuple((subject,) for subject in SUBJECTS)
    fewer = tuple((subject,) for subject in FEWER_SUBJECTS)
    return {
        "methods": (SEEDS, one_each, (UNTOUCHED, *method_variants())),
        "pairs": (SEEDS, PAIRS, (UNTOUCHED, *PAIR_VARIANTS)),
        "style": (FEWER_SEEDS, ((),), (UNTOUCHED, "custom-diffusion", "lora")),
        "before": (FEWER_SEEDS, one_each, tuple(unmended_variants())),
        "compression": (FEWER_SEEDS, one_each, tuple(f"share {share}" for share in SHARES)),
        "custom": (FEWER_SEEDS, one_each, tuple(custom_variants())),
        "lora": (FEWER_SEEDS, fewer, tuple(lora_variants())),
        "pictures": (FEWER_SEEDS, fewer, tuple(picture_variants())),
    }


def list_runs(part: str) -> list[StudyRun]:
    """Return the runs of a part, or of "all". Raises ValueError for an unknown part."""
    grids = make_grids()
    if part != "all" and part not in grids:
        raise ValueError(f"part {part!r} unknown; choose all, {', '.join(grids)}")
    runs = [
        StudyRun(name, variant, subjects, seed)
        for name, grid in grids.items()
        if part in ("all", name)
        for seed, subjects, variant in product(*grid)
    ]
    return sorted(
        runs, key=lambda run: run.seed
    )  # one seed after the other: stopped early, the study has fewer seeds but all of its tables
