"""Measure what a personalised model draws, with the judge of the scenes.

    of the subject     likeness   mean cosine of its pictures' features with those of the training pictures
                       named      share in which the judge finds the subject likelier than any other
    of new prompts     text       cosine of each picture's features with those of its text, the subject called by its true name
    of the class       kept       share in which the judge finds the class itself, such as the lion, likeliest
    of other prompts   others     share in which the judge finds what was asked for likeliest
                       drift      1 - cosine of the features of this model's picture and the untouched model's, on the same noise

The features of the class's pictures are kept for KID against real scenes, over many runs together. Pictures are generated with DDIM and
the model's own guidance scale. A prompt's seed never changes, so that models are compared on the same noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.bundled.evaluate import spread_prompts
from minidiff.bundled.judge import Judge, JudgeOutput
from minidiff.evaluation.alignment import Encoder, image_alignment, text_alignment
from minidiff.pictures import to_pixels
from minidiff.pipeline import StableDiffusion
from minidiff.scenes.art import common_backgrounds
from minidiff.scenes.prompts import FixedPrompt, fixed_prompts, real_scene
from minidiff.scenes.scenes import with_article

DRAWING_STEPS = 15
BATCH = 16
OF_THE_SUBJECT = 8  # pictures
OF_THE_CLASS = 36  # over 15 runs 540: KID wants 500
OF_OTHERS = 12


@dataclass(frozen=True, eq=False)
class Measurements:
    """Scores of a model, and the features that later comparisons need.

    scores: means over the pictures, by the names above; for two subjects also "both", the share of new prompts in which both are likeliest.
    of_class, of_others: features of these pictures. pictures: a row to look at, pixels in [-1, 1].
    """

    scores: dict[str, float]
    of_class: Float[Tensor, "N D"]
    of_others: Float[Tensor, "M D"]
    pictures: Float[Tensor, "B 3 H W"]


@dataclass(frozen=True)
class TaughtSubject:
    """A subject that the model was taught.

    called: its name in prompts, such as "sks lion"; the class word alone for an untouched model. pictures: its training's, in [-1, 1].
    """

    subject: str
    class_word: str
    called: str
    pictures: Float[Tensor, "N 3 H W"]


@torch.no_grad()
def generate_pixels(sd: StableDiffusion, prompts: Sequence[str], seeds: Sequence[int]) -> Float[Tensor, "B 3 H W"]:
    """Generate one picture per prompt and seed, in bfloat16, which the judge cannot tell from float32."""
    parts = []
    with torch.autocast(sd.device.type, torch.bfloat16):
        for start in range(0, len(prompts), BATCH):
            part = slice(start, start + BATCH)
            *_, last = sd.denoise(list(prompts[part]), seeds=list(seeds[part]), steps=DRAWING_STEPS)
            parts.append(sd.decode(last.x_t).float())
    return torch.cat(parts)


def on_background(words: str, background: str) -> str:
    """Add a background to a phrase."""
    return f"{words} on a {background} background"


def make_new_prompts(called: str, backgrounds: Sequence[str]) -> list[str]:
    """Write prompts for what the training pictures do not show: sizes, a colour, places, company, styles."""
    a = with_article(called)
    phrases = (
        with_article(f"small {called}"),
        with_article(f"large {called}"),
        with_article(f"purple {called}"),
        f"{a} left of a burger",
        f"a car above {a}",
        f"{a} and an apple",
        a,
        a,
    )
    texts = [on_background(phrase, background) for phrase, background in zip(phrases, cycle(backgrounds))]
    return [*texts[:-2], f"{texts[-2]} in noto style", f"{texts[-1]} in twemoji style"]


def make_pair_prompts(first: str, second: str, backgrounds: Sequence[str]) -> list[str]:
    """Write prompts with both subjects in one picture, in each place."""
    a, b = with_article(first), with_article(second)
    phrases = (f"{a} and {b}", f"{a} left of {b}", f"{b} left of {a}", f"{a} above {b}", f"{b} above {a}", f"{b} and {a}") * 2
    return [on_background(phrase, background) for phrase, background in zip(phrases, cycle(backgrounds))]


def make_prompts(names: Sequence[str], backgrounds: Sequence[str]) -> list[str]:
    """Write new prompts for one subject or two."""
    return make_new_prompts(names[0], backgrounds) if len(names) == 1 else make_pair_prompts(names[0], names[1], backgrounds)


def find_likeliest(judge: Judge, output: JudgeOutput, count: int = 1) -> list[list[str]]:
    """Return the `count` subjects that cover most of each picture."""
    return [[judge.config.subjects[i] for i in row] for row in output.shares().topk(count).indices.tolist()]


def make_class_prompts(class_word: str) -> list[FixedPrompt]:
    """Write prompts for the class alone; the seed of each is its place in the list."""
    backgrounds = cycle(common_backgrounds([(class_word, None)]))
    texts = [(on_background(with_article(class_word), background), background) for background in islice(backgrounds, OF_THE_CLASS)]
    return [FixedPrompt(text, "one", (class_word,), background) for text, background in texts]


@torch.no_grad()
def encode_class_scenes(judge: Encoder, class_word: str, seed: int) -> Float[Tensor, "N D"]:
    """Encode real scenes of the class's prompts, for KID; different ones for each seed of the study."""
    scenes = [real_scene(prompt, np.random.default_rng([77, seed, i])) for i, prompt in enumerate(make_class_prompts(class_word))]
    return judge.encode_pictures(to_pixels(np.stack([scene.image for scene in scenes])))


def choose_other_prompts(class_words: Sequence[str]) -> list[FixedPrompt]:
    """Choose fixed prompts of other subjects."""
    return list(spread_prompts([p for p in fixed_prompts() if p.group == "one" and p.subjects[0] not in class_words], OF_OTHERS))


@torch.no_grad()
def measure_others(sd: StableDiffusion, judge: Judge, class_words: Sequence[str]) -> tuple[Float[Tensor, "N D"], float]:
    """Return the features of the other prompts' pictures, and the share of them in which the subject is likeliest."""
    prompts = choose_other_prompts(class_words)
    output = judge.read(generate_pixels(sd, [p.text for p in prompts], range(len(prompts))))
    return output.features.cpu(), float(np.mean([names[0] == p.subjects[0] for names, p in zip(find_likeliest(judge, output), prompts)]))


@torch.no_grad()
def measure_subjects(sd: StableDiffusion, judge: Judge, things: Sequence[TaughtSubject]) -> Measurements:
    """Measure a model of one subject, or of two that were learned together."""
    likeness: list[float] = []
    named: list[bool] = []
    kept: list[bool] = []
    class_features, row = [], []
    for thing in things:
        backgrounds = cycle(common_backgrounds([(thing.subject, None)]))
        texts = [on_background(with_article(thing.called), background) for background in islice(backgrounds, OF_THE_SUBJECT)]
        pictures = generate_pixels(sd, texts, range(OF_THE_SUBJECT))
        output = judge.read(pictures)
        likeness += image_alignment(output.features, judge.encode_pictures(thing.pictures)).tolist()
        named += [names[0] == thing.subject for names in find_likeliest(judge, output)]
        row.append(pictures[:2])

        texts = [prompt.text for prompt in make_class_prompts(thing.class_word)[: OF_THE_CLASS // len(things)]]
        pictures = generate_pixels(sd, texts, range(len(texts)))
        output = judge.read(pictures)
        kept += [names[0] == thing.class_word for names in find_likeliest(judge, output)]
        class_features.append(output.features)
        row.append(pictures[:1])

    called, true = [thing.called for thing in things], [thing.subject for thing in things]
    backgrounds = common_backgrounds([(name, None) for name in true])
    texts = make_prompts(called, backgrounds)
    pictures = generate_pixels(sd, texts, range(len(texts)))
    output = judge.read(pictures)
    text = text_alignment(output.features, judge.encode_texts(make_prompts(true, backgrounds)))
    row.append(pictures[:4])
    other_features, others = measure_others(sd, judge, [thing.class_word for thing in things])
    scores = {"likeness": float(np.mean(likeness)), "named": float(np.mean(named)), "text": float(text.mean())}
    scores |= {"kept": float(np.mean(kept)), "others": others}
    if len(things) == 2:
        scores["both"] = float(np.mean([sorted(names) == sorted(true) for names in find_likeliest(judge, output, 2)]))
    return Measurements(scores, torch.cat(class_features).cpu(), other_features, torch.cat(row).cpu())


def chroma(pixels: Float[Tensor, "B 3 H W"]) -> float:
    """Measure how colourful pictures are: the mean distance between a pixel's largest and smallest channel, 0 (greys) to 1."""
    return float((pixels.amax(dim=1) - pixels.amin(dim=1)).mean() / 2)


@torch.no_grad()
def measure_style(sd: StableDiffusion, judge: Judge, style: str, shown: Sequence[str]) -> Measurements:
    """Draw subjects that the style's pictures do not show in that style: their chroma, and the share that are still recognised.

    Args:
        sd: The trained model.
        judge: Recognises the subjects.
        style: Its name in prompts.
        shown: The subjects of the training pictures.
    """
    prompts = [p for p in fixed_prompts() if p.group == "one" and p.subjects[0] not in shown]
    prompts = list(spread_prompts(prompts, 2 * OF_OTHERS))
    pictures = generate_pixels(sd, [f"{with_article(p.subjects[0])} in {style} style" for p in prompts], range(len(prompts)))
    output = judge.read(pictures)
    named = float(np.mean([names[0] == p.subjects[0] for names, p in zip(find_likeliest(judge, output), prompts)]))
    now, right = measure_others(sd, judge, [])
    return Measurements({"chroma": chroma(pictures), "named": named, "others": right}, output.features.cpu(), now, pictures[:8].cpu())
