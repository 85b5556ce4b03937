"""The commands `minidiff train METHOD`: their flags over a preset; cli_learn.py does what they ask for."""

import sys
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import tyro

from minidiff.cli_flags import (
    Attentions, File, LowRank, Number, Pictures, PriorFlags, RecipeFlags, Run, Several, Text, TextEncoderFlags, Training, What, Whole, WordFlags,
    changed, choices,
)  # fmt: skip
from minidiff.cli_learn import learn
from minidiff.cli_model import load, say, training_on
from minidiff.trainers.presets import Family, FineTuneOptions, LowRankOptions, Options, PivotalOptions, Words, preset
from minidiff.trainers.recipe import RECIPES, Recipe

LoRANames = Literal["diffusers", "kohya"]


def lora(
    what: What,
    run: Run,
    training: Training = Training(),
    low_rank: LowRank = LowRank(),
    text: TextEncoderFlags = TextEncoderFlags(),
    pictures: Pictures = Pictures(),
    prior: PriorFlags = PriorFlags(),
    names: LoRANames = "diffusers",
) -> None:
    """A LoRA: small changes beside chosen layers, from a folder of pictures with one caption for all or one for each.

    Args:
        names: of the layers in the file: diffusers', or kohya's for the web interfaces
    """

    def options(family: Family) -> Options:
        base = preset("lora", family)
        return replace(
            base, settings=training.over(base.settings), samples=pictures.over(base.samples),
            low_rank=low_rank.over(base.low_rank, text), prior=prior.over(base.prior),
        )  # fmt: skip

    learn("lora", what, run, options, names)


def dreambooth(
    what: What,
    run: Run,
    training: Training = Training(),
    low_rank: bool = False,
    lora: LowRank = LowRank(),
    text: TextEncoderFlags = TextEncoderFlags(),
    pictures: Pictures = Pictures(),
    prior: PriorFlags = PriorFlags(),
    names: LoRANames = "diffusers",
) -> None:
    """DreamBooth: a rare word becomes the subject's name; the whole U-Net learns it, or a LoRA with --low-rank.

    Args:
        low_rank: train a LoRA instead of the U-Net: a small file in place of a whole checkpoint
        names: of the layers in the LoRA's file: diffusers', or kohya's for the web interfaces
    """
    if not low_rank and (lora != LowRank() or names != "diffusers"):
        flag = next((name for name, value in asdict(lora).items() if value not in (None, ())), "names")
        raise ValueError(f"--{flag} is of a LoRA; give --low-rank too, or leave it out")

    def options(family: Family) -> Options:
        base = preset("dreambooth-lora" if low_rank else "dreambooth", family)
        base = replace(base, settings=training.over(base.settings), samples=pictures.over(base.samples), prior=prior.over(base.prior))
        if low_rank:
            return replace(base, low_rank=lora.over(base.low_rank or LowRankOptions(), text))
        return changed(base, **text.values())

    learn("dreambooth", what, run, options, names)


def textual_inversion(
    what: What,
    run: Run,
    training: Training = Training(),
    pictures: Pictures = Pictures(),
    words: WordFlags = WordFlags(),
    names: Literal["diffusers", "a1111"] = "diffusers",
) -> None:
    """Textual Inversion: a new word alone; the model stays as it is, and the file has a few kilobytes.

    Args:
        names: of the file's tensors: diffusers', or a1111's for the web interfaces
    """

    def options(family: Family) -> Options:
        base = words.over(preset("textual-inversion", family))
        return replace(base, settings=training.over(base.settings), samples=pictures.over(base.samples))

    learn("textual-inversion", what, run, options, names)


def pivotal_tuning(
    what: What,
    run: Run,
    training: Training = Training(),
    low_rank: LowRank = LowRank(),
    text: TextEncoderFlags = TextEncoderFlags(),
    pictures: Pictures = Pictures(),
    prior: PriorFlags = PriorFlags(),
    token_steps: Whole = None,
    token_learning_rate: Number = None,
    words: WordFlags = WordFlags(),
    names: LoRANames = "diffusers",
) -> None:
    """Pivotal tuning: first a new word, then a LoRA around it; two files, to be used together.

    Args:
        token_steps: steps of the new word; --steps are the LoRA's
        token_learning_rate: of the new word; --learning-rate is the LoRA's
        names: of the LoRA's layers: diffusers', or kohya's for the web interfaces
    """

    def options(family: Family) -> PivotalOptions:
        base = preset("pivotal-tuning", family)
        first = replace(training, steps=token_steps, learning_rate=token_learning_rate, warm_up=None, schedule=None)
        tokens = words.over(base.tokens)
        tokens = replace(tokens, settings=first.over(tokens.settings), samples=pictures.over(tokens.samples))
        around = replace(
            base.lora, settings=training.over(base.lora.settings), samples=pictures.over(base.lora.samples),
            low_rank=low_rank.over(base.lora.low_rank, text), prior=prior.over(base.lora.prior),
        )  # fmt: skip
        return replace(base, tokens=tokens, lora=around)

    learn("pivotal-tuning", what, run, options, names)


def custom_diffusion(
    what: What,
    run: Run,
    training: Training = Training(),
    pictures: Pictures = Pictures(),
    prior: PriorFlags = PriorFlags(),
    start_from: File = None,
    start: Several = (),
    token_scale: Number = None,
    all_of_attention: bool = False,
    sizes: choices(Literal["none", "paper", "code"]) = None,
    words: choices(Words) = None,
    names: Literal["minidiff", "diffusers", "original"] = "minidiff",
) -> None:
    """Custom Diffusion: keys and values of cross-attention and a new word; several concepts jointly, or one after the other.

    Args:
        start_from: a Custom Diffusion to which these concepts are added, learnt before on the same model
        start: rare words that the new ones start from, in order
        token_scale: the words' share of the learning rate
        all_of_attention: queries and outputs of cross-attention too, as the authors do for faces
        sizes: show the subject at several sizes: as in the paper, as in its program, or not
        words: for these sizes, of photographs or of the bundled model's scenes
        names: minidiff, one safe file; diffusers, a folder; original, the authors' delta.bin
    """

    def options(family: Family) -> Options:
        base = preset("custom-diffusion", family)
        base = changed(base, start=start or None, token_scale=token_scale, sizes=sizes, words=words)
        base = replace(base, all_of_attention=all_of_attention)
        return replace(base, settings=training.over(base.settings), samples=pictures.over(base.samples), prior=prior.over(base.prior))

    learn("custom-diffusion", what, run, options, names, start_from)


def fine_tune(
    what: What,
    run: Run,
    training: Training = Training(),
    pictures: Pictures = Pictures(),
    prior: PriorFlags = PriorFlags(),
    weights: Several = (),
    text_scale: Number = None,
) -> None:
    """Fine-tuning: the model's own weights, all of the U-Net or those of chosen names.

    Args:
        weights: regular expressions over names of weights, as "^unet\\.up" or cross_attention
        text_scale: the text encoder's share of the learning rate, where its weights are among them
    """

    def options(family: Family) -> FineTuneOptions:
        base = changed(preset("fine-tune", family), weights=weights or None, text_scale=text_scale)
        return replace(base, settings=training.over(base.settings), samples=pictures.over(base.samples), prior=prior.over(base.prior))

    learn("fine-tune", what, run, options)


def from_scratch(
    out: tyro.conf.Positional[Path],
    /,
    recipe: choices(Literal["bundled", "half"]) = None,
    numbers: RecipeFlags = RecipeFlags(),
    init: Text = None,
    vae: Text = None,
    device: str = "auto",
    attention: Attentions = "auto",
    threads: Whole = None,
) -> None:
    """Train a small Stable Diffusion from nothing on composed scenes: the VAE, then text encoder and U-Net together.

    Stopped at any time and started again with the same arguments, it goes on from its last state.

    Args:
        out: folder of the run; the model ends there as model.safetensors, and its parts, in half precision, beside it; model-slow.safetensors
            has the weights of the slower average
        recipe: bundled makes a judge, its figures and a card as well; half is a smaller, half-trained model; without it the model alone
        init: a checkpoint of the bundled model's kind to train on from; its VAE is kept, unless --train-vae
        vae: a checkpoint whose VAE is taken as it is, unless --train-vae; text encoder and U-Net begin from nothing
        device: auto, cpu, cuda, cuda:1, mps
        attention: how it is worked out: auto takes what is fastest; triton is this package's kernels, on a GPU
        threads: CPU threads to use; all cores by default
    """
    from tqdm import tqdm

    import weights_loader
    from minidiff.trainers.bundled import foretold_bundled, run_bundled
    from minidiff.trainers.from_scratch import bundled_config
    from minidiff.trainers.run import claim, foretold, run_from_scratch

    def save(sd, name: str) -> None:
        weights_loader.save(sd, out / f"{name}.safetensors")
        if name == "model":
            weights_loader.save_parts(sd, out)

    def save_judge(judge) -> None:
        weights_loader.save_judge(judge, out / "judge.safetensors")

    with training_on(device, threads, attention) as device, ExitStack() as outer, ExitStack() as bars:
        asked = numbers.over(RECIPES[recipe or "bundled"])
        base, other = (load(file, "float32", device) if file else None for file in (init, vae))
        config = base.config if base else bundled_config(asked.widths)
        if other:
            config = replace(config, vae=other.config.vae)
        given = base, other and other.vae
        claim(out, config, asked, *given)
        if recipe == "bundled":
            say_how_long(foretold_bundled, config, asked, device, given, out)
            run = run_bundled(config, asked, out, device, save, save_judge, *given)
        else:
            say_how_long(foretold, config, asked, device, given, out)
            run = run_from_scratch(config, asked, out, device, save, *given)
        stage = None
        for step in outer.enter_context(closing(run)):
            if step.stage != stage:
                bars.close()
                stage, bar = step.stage, bars.enter_context(tqdm(desc=step.stage, total=step.steps, initial=step.i - 1, file=sys.stderr))
            bar.update(step.i - bar.n)
            if step.text:
                bar.set_postfix_str(step.text, refresh=False)
        bars.close()
        print(out / "model.safetensors")


def say_how_long(foretell, config, recipe: Recipe, device, given: tuple, out: Path) -> None:
    """Says how long each stage that has left no result yet will take, before the first one."""
    from minidiff.trainers.bundled import device_name
    from minidiff.trainers.log import duration

    results = {"diffusion": "model.safetensors", "judge": "judge.safetensors", "evaluation": "figures.json"}
    if all((out / name).exists() for name in results.values()):
        return
    seconds = {stage: s for stage, s in foretell(config, recipe, device, *given).items() if not (out / results.get(stage, "latents.pt")).exists()}
    if seconds:
        stages = ", ".join(f"{stage} {duration(s)}" for stage, s in seconds.items())
        say([f"on {device_name(device)}, about: {stages}; {duration(sum(seconds.values()))} in all"])


COMMANDS = {
    "lora": lora,
    "dreambooth": dreambooth,
    "textual-inversion": textual_inversion,
    "pivotal-tuning": pivotal_tuning,
    "custom-diffusion": custom_diffusion,
    "fine-tune": fine_tune,
    "from-scratch": from_scratch,
}
