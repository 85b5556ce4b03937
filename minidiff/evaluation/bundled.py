"""What a model of the scenes can do, in numbers: fixed prompts, fixed seeds, nothing selected, the judge's word for each picture.

    fixed prompts x seeds -> pictures -------------------------------.
                          -> real scenes of the same prompts --------+-> judge -> Figures
                                `-> through the model's own VAE -----'

The judge errs too, so each figure stands beside two ceilings: what it says of real scenes that show what the prompt says, and of
these after the VAE's encoder and decoder, which no U-Net can improve on. A figure is the same in each run on one machine.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.evaluation.alignment import text_alignment
from minidiff.evaluation.clip import Judge
from minidiff.evaluation.figures import Figure, Figures, Measure, Record, Verdict
from minidiff.evaluation.kid import kid
from minidiff.evaluation.prompts import FixedPrompt, fixed_prompts, real_scene
from minidiff.pipeline import StableDiffusion
from minidiff.scenes.scenes import sample_scene
from minidiff.trainers.from_scratch import pixels_of
from minidiff.trainers.state import check_same, checksum, read_state, write_state

JUDGED = ("model", "real", "reconstructed")  # kinds of pictures with a verdict


@dataclass(frozen=True)
class Progress:
    """Pictures done, of how many; with the last one, the record."""

    done: int
    total: int
    record: Record | None = None

    @property
    def figures(self) -> Figures | None:
        return self.record and self.record.figures


def evaluate(
    sd: StableDiffusion,
    judge: Judge,
    *,
    steps: int = 20,
    guidance_scale: float | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    limit: int | None = None,
    batch: int = 16,
    state: Path | None = None,
) -> Iterator[Progress]:
    """Draws each fixed prompt on each seed with ddim, and judges; yields after every batch, the record with the last one.

    limit: so many prompts, spread evenly over the list, for a quick look. state: a file to go on from, if it is there, and to save to after
    every batch. Raises ValueError for a model of another picture size than the judge's, no seeds, a limit below 1, or a state of another
    evaluation.
    """
    if sd.config.image_size != judge.config.image_size:
        raise ValueError(f"the model draws {sd.config.image_size} pixels, the judge reads {judge.config.image_size}; this judge knows the scenes only")
    if not seeds or (limit is not None and limit < 1) or batch < 1:
        raise ValueError(f"seeds {tuple(seeds)}, limit {limit}, batch {batch}: no picture to judge; each needs at least 1")
    guidance_scale = sd.config.guidance_scale if guidance_scale is None else guidance_scale
    pairs = [(prompt, seed) for seed in seeds for prompt in spread(fixed_prompts(), limit)]
    return _evaluate(sd, judge, steps, guidance_scale, pairs, batch, state)


def spread(prompts: Sequence[FixedPrompt], limit: int | None) -> Sequence[FixedPrompt]:
    """`limit` of the prompts at even distances, or all."""
    if limit is None or limit >= len(prompts):
        return prompts
    return [prompts[(2 * i + 1) * len(prompts) // (2 * limit)] for i in range(limit)]


def _evaluate(
    sd: StableDiffusion,
    judge: Judge,
    steps: int,
    guidance_scale: float,
    pairs: list[tuple[FixedPrompt, int]],
    batch: int,
    state: Path | None,
) -> Iterator[Progress]:
    asked = {
        "model": checksum(sd.text_encoder, sd.unet, sd.vae), "judge": checksum(judge), "steps": steps, "guidance_scale": guidance_scale,
        "prompts": len({prompt for prompt, _ in pairs}), "seeds": sorted({seed for _, seed in pairs}),
    }  # fmt: skip
    found = read_state(state) if state is not None and state.exists() else None
    if found is not None:
        check_same(state, found["asked"], asked)
    verdicts = {name: [Verdict(*row) for row in found["verdicts"][name]] if found else [] for name in JUDGED}
    features = {name: [found["features"][name]] if found else [] for name in (*JUDGED, "reference")}
    for start in range(len(verdicts["model"]), len(pairs), batch):
        part = pairs[start : start + batch]
        for name, (said, vectors) in judged_pictures(sd, judge, steps, guidance_scale, part).items():
            features[name].append(vectors.cpu())
            if name in JUDGED:
                verdicts[name] += said
        done = start + len(part)
        if state is not None:
            rows = {name: [list(astuple(verdict)) for verdict in said] for name, said in verdicts.items()}
            write_state(state, {"asked": asked, "verdicts": rows, "features": {name: torch.cat(parts) for name, parts in features.items()}})
        if done < len(pairs):
            yield Progress(done, len(pairs))
    figures = figures_of([prompt for prompt, _ in pairs], verdicts, {name: torch.cat(parts) for name, parts in features.items()})
    by_picture = {(prompt.text, seed): verdict for (prompt, seed), verdict in zip(pairs, verdicts["model"], strict=True)}
    yield Progress(len(pairs), len(pairs), Record(steps, guidance_scale, figures, by_picture))


def judged_pictures(
    sd: StableDiffusion, judge: Judge, steps: int, guidance_scale: float, part: Sequence[tuple[FixedPrompt, int]]
) -> dict[str, tuple[list[Verdict], Float[Tensor, "B D"]]]:
    """The judge's word on the model's pictures, on real scenes, on these after the VAE, and on other scenes of the same prompts, for KID."""
    prompts = [prompt for prompt, _ in part]
    *_, last = sd.denoise([p.text for p in prompts], steps=steps, guidance_scale=guidance_scale, seeds=[seed for _, seed in part])
    real = real_pixels(part, 0).to(sd.device)
    pixels = {"model": sd.decode(last.x_t), "real": real, "reconstructed": reconstructed(sd, real), "reference": real_pixels(part, 1)}
    return {name: judged(judge, pictures, prompts) for name, pictures in pixels.items()}


def real_pixels(pairs: Sequence[tuple[FixedPrompt, int]], draw: int) -> Float[Tensor, "B 3 H W"]:
    """A scene for each prompt and seed; another `draw` gives others. What a scene is depends on nothing else."""
    rows = fixed_prompts()
    return pixels_of(np.stack([real_scene(prompt, np.random.default_rng([rows.index(prompt), seed, draw])).image for prompt, seed in pairs]))


@torch.no_grad()
def reconstructed(sd: StableDiffusion, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Pixels in [-1, 1] through the VAE and back."""
    return sd.decode(sd.vae.encode(pixels.to(sd.dtype)).mean.float() * sd.config.vae.scaling_factor)


def held_out_psnr(sd: StableDiffusion, count: int = 48) -> tuple[float, float]:
    """Mean PSNR of reconstructions in dB, 10 log10(range^2 / mse) a picture: of fresh scenes, and of scenes with held-out subjects.

    The mean squared error is that of the objects' pixels, each by the share that the objects cover: flat backgrounds would hide it.
    """
    means = []
    for split in ("train", "held_out_subjects"):
        rng = np.random.default_rng(5)
        scenes = [sample_scene(rng, split=split) for _ in range(count)]
        pixels = pixels_of(np.stack([scene.image for scene in scenes])).to(sd.device)
        mask = torch.from_numpy(np.stack([scene.mask for scene in scenes]))[:, None].to(sd.device)
        error = (reconstructed(sd, pixels) - pixels).square().mean(dim=1, keepdim=True)
        error = (mask * error).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))
        means.append((10 * (4 / error).log10()).mean().item())  # pixels are in [-1, 1]
    return means[0], means[1]


@torch.no_grad()
def judged(judge: Judge, pixels: Float[Tensor, "B 3 H W"], prompts: Sequence[FixedPrompt]) -> tuple[list[Verdict], Float[Tensor, "B D"]]:
    """The judge's verdict on each picture of a prompt, and the pictures' features."""
    config = judge.config
    reading = judge.read(pixels.to(judge.log_scale.device))
    wanted = [[config.subjects.index(name) for name in prompt.subjects] for prompt in prompts]
    likeliest = reading.shares().topk(2).indices.tolist()
    background, style = reading.backgrounds.argmax(dim=1).tolist(), reading.styles.argmax(dim=1).tolist()
    first, second = (torch.tensor([row[k] for row in wanted], device=reading.features.device) for k in (0, -1))
    tint = reading.tint_of().tolist()  # prompts that name one have one subject, and are to be asked even if that is not recognised
    apart = (reading.centroids(second) - reading.centroids(first)).tolist()
    alignment = text_alignment(reading.features, judge.encode_texts([prompt.text for prompt in prompts])).tolist()
    verdicts = []
    for i, prompt in enumerate(prompts):
        right = sorted(likeliest[i][: len(wanted[i])]) == sorted(wanted[i])
        x, y = apart[i]
        verdicts.append(
            Verdict(
                subjects=right,
                background=config.colours[background[i]] == prompt.background,
                place={"left of": x > abs(y), "above": y > abs(x)}.get(prompt.relation or "") if right else None,
                style=config.styles[style[i]] == prompt.style if prompt.style else None,
                tint=tint[i] == config.colours.index(prompt.tint) if prompt.tint else None,
                alignment=alignment[i],
            )
        )
    return verdicts, reading.features


def figures_of(prompts: Sequence[FixedPrompt], verdicts: dict[str, list[Verdict]], features: dict[str, Float[Tensor, "N D"]]) -> Figures:
    """Means over the pictures that each question is about. verdicts and features: by "model", "real", "reconstructed"; features of "reference" too."""

    def ask(question) -> Figure | None:
        answers = {name: [question(p, v) for p, v in zip(prompts, found, strict=True)] for name, found in verdicts.items()}
        answers = {name: [float(a) for a in found if a is not None] for name, found in answers.items()}
        return Figure(**{name: mean_of(found) for name, found in answers.items()}) if answers["real"] else None

    different = list(dict.fromkeys(prompts))
    group = torch.tensor([different.index(prompt) for prompt in prompts], device=features["reference"].device)
    blocks = min(20, len(different) // 2)
    distances = None
    if blocks >= 2:
        distances = {name: kid(features[name], features["reference"], groups=(group, group), blocks=blocks) for name in verdicts}
    return Figures(
        one_subject=ask(lambda p, v: v.subjects if p.group == "one" else None),
        two_subjects=ask(lambda p, v: v.subjects if p.group == "two" else None),
        two_subjects_held_out_pairs=ask(lambda p, v: v.subjects if p.group == "two" and p.held_out else None),
        background=ask(lambda p, v: v.background),
        place=ask(lambda p, v: v.place),
        style=ask(lambda p, v: v.style),
        colour=ask(lambda p, v: v.tint),
        colour_and_subject=ask(lambda p, v: v.tint and v.subjects if p.tint else None),
        text_alignment=ask(lambda p, v: v.alignment),
        kid=distances and Figure(**{name: Measure(d.value, d.error, len(prompts)) for name, d in distances.items()}),
    )


def mean_of(values: Sequence[float]) -> Measure:
    """Mean and standard error; both are nan where there is no value (no picture with both subjects right has a place)."""
    count = len(values)
    if count == 0:
        return Measure(math.nan, math.nan, 0)
    mean = sum(values) / count
    return Measure(mean, math.sqrt(sum((value - mean) ** 2 for value in values)) / count, count)
