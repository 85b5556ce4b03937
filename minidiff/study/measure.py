"""What a personalised model draws, in numbers; the judge of the scenes looks at all pictures.

    of the subject     likeness   mean cosine of its pictures' features with those of the training pictures
                       named      share in which the judge finds the subject likelier than any other
    of new prompts     text       cosine of each picture's features with those of its text, the subject called by its true name
    of the class       kept       share in which the judge finds the class itself, such as the lion, likeliest
    of other prompts   others     share in which the judge finds what was asked for likeliest
                       drift      1 - cosine of the features of this model's picture and the untouched model's, on the same noise

The features of the class's pictures are kept, for KID against real scenes over many runs together. Pictures are drawn with ddim and the
model's own guidance. A prompt's seed never changes, so that models are compared on the same noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.bundled.evaluate import spread
from minidiff.bundled.judge import Judge, JudgeOutput
from minidiff.evaluation.alignment import Encoder, image_alignment, text_alignment
from minidiff.pictures import to_pixels
from minidiff.pipeline import StableDiffusion
from minidiff.scenes.art import STYLES, visible_backgrounds
from minidiff.scenes.prompts import FixedPrompt, fixed_prompts, real_scene
from minidiff.scenes.scenes import with_article

DRAWING_STEPS = 15
BATCH = 16
OF_THE_SUBJECT = 8  # pictures
OF_THE_CLASS = 36  # over 15 runs 540: KID wants 500
OF_OTHERS = 12


@dataclass(frozen=True, eq=False)
class Measured:
    """scores: means over the pictures, by the names above; of two subjects also "both", the share of the new prompts in which both are likeliest.

    of_class, of_others: the features of these pictures. pictures: a row to look at, pixels in [-1, 1].
    """

    scores: dict[str, float]
    of_class: Float[Tensor, "N D"]
    of_others: Float[Tensor, "M D"]
    pictures: Float[Tensor, "B 3 H W"]


@dataclass(frozen=True)
class Thing:
    """A subject of the study. called: what the model is to be told, such as "sks lion"; class_word alone for a model that does not know it.
    pictures: its training pictures, pixels in [-1, 1]."""

    subject: str
    class_word: str
    called: str
    pictures: Float[Tensor, "N 3 H W"]


@torch.no_grad()
def drawn(sd: StableDiffusion, prompts: Sequence[str], seeds: Sequence[int]) -> Float[Tensor, "B 3 H W"]:
    """A picture of each prompt on its seed, in bfloat16, which the judge cannot tell from float32."""
    parts = []
    with torch.autocast(sd.device.type, torch.bfloat16):
        for start in range(0, len(prompts), BATCH):
            part = slice(start, start + BATCH)
            *_, last = sd.denoise(list(prompts[part]), seeds=list(seeds[part]), steps=DRAWING_STEPS)
            parts.append(sd.decode(last.x_t).float())
    return torch.cat(parts)


def on(words: str, background: str) -> str:
    return f"{words} on a {background} background"


def backgrounds_of(*subjects: str) -> list[str]:
    """Those from which all of the subjects stand out in every style."""
    seen = [set(visible_backgrounds(name, style, None)) for name in subjects for style in STYLES]
    return [colour for colour in visible_backgrounds(subjects[0], STYLES[0], None) if all(colour in one for one in seen)]


def cycled(values: Sequence[str], count: int) -> list[str]:
    return [values[i % len(values)] for i in range(count)]


def new_prompts(called: str, backgrounds: Sequence[str]) -> list[str]:
    """What the training pictures do not show: sizes, a colour, places, company, styles."""
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
    texts = [on(phrase, background) for phrase, background in zip(phrases, cycled(backgrounds, len(phrases)))]
    return [*texts[:-2], f"{texts[-2]} in noto style", f"{texts[-1]} in twemoji style"]


def pair_prompts(first: str, second: str, backgrounds: Sequence[str]) -> list[str]:
    """Both subjects in one picture, in each place."""
    a, b = with_article(first), with_article(second)
    phrases = (f"{a} and {b}", f"{a} left of {b}", f"{b} left of {a}", f"{a} above {b}", f"{b} above {a}", f"{b} and {a}") * 2
    return [on(phrase, background) for phrase, background in zip(phrases, cycled(backgrounds, len(phrases)))]


def likeliest(judge: Judge, reading: JudgeOutput, count: int = 1) -> list[list[str]]:
    """The subjects that cover most of each picture."""
    return [[judge.config.subjects[i] for i in row] for row in reading.shares().topk(count).indices.tolist()]


def share(truths: Sequence[bool]) -> float:
    return sum(truths) / len(truths)


def class_prompts(class_word: str) -> list[tuple[str, int]]:
    """Prompts of the class alone, each with its seed."""
    backgrounds = backgrounds_of(class_word)
    return [(on(with_article(class_word), background), i) for i, background in enumerate(cycled(backgrounds, OF_THE_CLASS))]


def class_features(judge: Encoder, class_word: str, seed: int) -> Float[Tensor, "N D"]:
    """Features of real scenes of the class's prompts, for KID; others for each seed of the study."""
    scenes = []
    for text, i in class_prompts(class_word):
        background = text.removesuffix(" background").rsplit(" ", 1)[1]
        scenes.append(real_scene(FixedPrompt(text, "one", (class_word,), background), np.random.default_rng([77, seed, i])))
    return judge.encode_pictures(to_pixels(np.stack([scene.image for scene in scenes])))


def others(class_words: Sequence[str]) -> list[FixedPrompt]:
    """Fixed prompts of other subjects."""
    return list(spread([p for p in fixed_prompts() if p.group == "one" and p.subjects[0] not in class_words], OF_OTHERS))


@torch.no_grad()
def other_features(sd: StableDiffusion, judge: Judge, class_words: Sequence[str]) -> tuple[Float[Tensor, "N D"], float]:
    """Features of the other prompts' pictures, and the share of them in which the subject is likeliest."""
    prompts = others(class_words)
    reading = judge.read(drawn(sd, [p.text for p in prompts], range(len(prompts))))
    return reading.features.cpu(), share([names[0] == p.subjects[0] for names, p in zip(likeliest(judge, reading), prompts)])


@torch.no_grad()
def measured(sd: StableDiffusion, judge: Judge, things: Sequence[Thing]) -> Measured:
    """The model as it is now, of one subject, or of two that were learned together."""
    likeness, named, kept, features, shown = [], [], [], [], []
    for thing in things:
        texts = [on(with_article(thing.called), background) for background in cycled(backgrounds_of(thing.subject), OF_THE_SUBJECT)]
        pictures = drawn(sd, texts, range(OF_THE_SUBJECT))
        reading = judge.read(pictures)
        likeness += image_alignment(reading.features, judge.encode_pictures(thing.pictures)).tolist()
        named += [names[0] == thing.subject for names in likeliest(judge, reading)]
        shown.append(pictures[:2])
        prompts = class_prompts(thing.class_word)[: OF_THE_CLASS // len(things)]
        pictures = drawn(sd, *zip(*prompts))
        reading = judge.read(pictures)
        kept += [names[0] == thing.class_word for names in likeliest(judge, reading)]
        features.append(reading.features)
        shown.append(pictures[:1])

    called, true = [thing.called for thing in things], [thing.subject for thing in things]
    prompts = new_prompts if len(things) == 1 else pair_prompts
    backgrounds = backgrounds_of(*true)
    texts = prompts(*called, backgrounds)
    pictures = drawn(sd, texts, range(len(texts)))
    reading = judge.read(pictures)
    text = text_alignment(reading.features, judge.encode_texts(prompts(*true, backgrounds)))
    shown.append(pictures[:4])
    now, right = other_features(sd, judge, [thing.class_word for thing in things])
    scores = {"likeness": float(np.mean(likeness)), "named": share(named), "text": float(text.mean()), "kept": share(kept), "others": right}
    if len(things) == 2:
        scores["both"] = share([sorted(names) == sorted(true) for names in likeliest(judge, reading, 2)])
    return Measured(scores, torch.cat(features).cpu(), now, torch.cat(shown).cpu())


def chroma(pixels: Float[Tensor, "B 3 H W"]) -> float:
    """How colourful pictures are: the mean distance between a pixel's largest and smallest channel, 0 (greys) to 1."""
    return float((pixels.amax(dim=1) - pixels.amin(dim=1)).mean() / 2)


@torch.no_grad()
def style_measured(sd: StableDiffusion, judge: Judge, style: str, shown: Sequence[str]) -> Measured:
    """Of subjects that the style's pictures do not show, drawn in it: their chroma, and the share that are still named."""
    prompts = [p for p in fixed_prompts() if p.group == "one" and p.subjects[0] not in shown]
    prompts = list(spread(prompts, 2 * OF_OTHERS))
    pictures = drawn(sd, [f"{with_article(p.subjects[0])} in {style} style" for p in prompts], range(len(prompts)))
    reading = judge.read(pictures)
    named = share([names[0] == p.subjects[0] for names, p in zip(likeliest(judge, reading), prompts)])
    now, right = other_features(sd, judge, [])
    return Measured({"chroma": chroma(pictures), "named": named, "others": right}, reading.features.cpu(), now, pictures[:8].cpu())
