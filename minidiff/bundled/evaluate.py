"""What a model of the scenes can do, in numbers: fixed prompts, fixed seeds, nothing selected, the judge's word for each picture.

    fixed prompts x seeds -> pictures -------------------------------.
                          -> real scenes of the same prompts --------+-> judge -> Figures
                                `-> through the model's own VAE -----'

The judge errs too, so each figure stands next to two ceilings: what it says of real scenes that show what the prompt says, and of these
after the VAE's encoder and decoder, which no U-Net can improve on. Figures are reproducible on one machine.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.bundled.figures import EvaluationRecord, Figure, Figures, Measure, Verdict
from minidiff.bundled.judge import Judge
from minidiff.evaluation.alignment import text_alignment
from minidiff.evaluation.kid import kid
from minidiff.files import check_same, checksum
from minidiff.pictures import to_pixels
from minidiff.pipeline import StableDiffusion
from minidiff.scenes.prompts import FixedPrompt, fixed_prompts, real_scene
from minidiff.scenes.scenes import sample_scene
from minidiff.trainers.engine.state import read_state, write_state

JUDGED = ("model", "real", "reconstructed")  # kinds of pictures with a verdict


@dataclass(frozen=True)
class EvaluationProgress:
    """Pictures done of the total; the last one comes with the record."""

    done: int
    total: int
    record: EvaluationRecord | None = None

    @property
    def figures(self) -> Figures | None:
        """Return the record's figures, None before the last picture."""
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
) -> Iterator[EvaluationProgress]:
    """Draw each fixed prompt on each seed with DDIM, judge the pictures, and yield after every batch; the last one has the record.

    Raises ValueError for a model of another picture size than the judge's, no seeds, a limit below 1, or a state of another evaluation.

    Args:
        sd: The model.
        judge: Of the scenes.
        steps: Of DDIM.
        guidance_scale: None is the model's own.
        seeds: Every prompt is drawn on each.
        limit: Only that many prompts, evenly spread over the list.
        batch: Pictures at once.
        state: A file to resume from, written after every batch.
    """
    if sd.config.image_size != judge.config.image_size:
        raise ValueError(
            f"the model draws {sd.config.image_size} pixels, the judge reads {judge.config.image_size}; this judge knows the scenes only"
        )
    if not seeds or (limit is not None and limit < 1) or batch < 1:
        raise ValueError(f"seeds {tuple(seeds)}, limit {limit}, batch {batch}: no picture to judge; each needs at least 1")
    guidance_scale = sd.config.guidance_scale if guidance_scale is None else guidance_scale
    pairs = [(prompt, seed) for seed in seeds for prompt in spread_prompts(fixed_prompts(), limit)]
    return _evaluate(sd, judge, steps, guidance_scale, pairs, batch, state)


def spread_prompts(prompts: Sequence[FixedPrompt], limit: int | None) -> Sequence[FixedPrompt]:
    """Return `limit` of the prompts at even distances, or all."""
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
) -> Iterator[EvaluationProgress]:
    """Judge the pictures that are left, batch by batch."""
    asked = {
        "model": checksum(sd.text_encoder, sd.unet, sd.vae),
        "judge": checksum(judge),
        "steps": steps,
        "guidance_scale": guidance_scale,
        "prompts": len({prompt for prompt, _ in pairs}),
        "seeds": sorted({seed for _, seed in pairs}),
    }
    verdicts, features = _read_answers(state, asked)
    for start in range(len(verdicts["model"]), len(pairs), batch):
        part = pairs[start : start + batch]
        for name, (judged, seen) in judge_pictures(sd, judge, steps, guidance_scale, part).items():
            features[name] = torch.cat([features[name], seen.cpu()]) if name in features else seen.cpu()
            if name in JUDGED:
                verdicts[name] += judged
        if state is not None:
            rows = {name: [list(astuple(verdict)) for verdict in found] for name, found in verdicts.items()}
            write_state(state, {"asked": asked, "verdicts": rows, "features": features})
        if start + len(part) < len(pairs):
            yield EvaluationProgress(start + len(part), len(pairs))
    figures = summarize_verdicts([prompt for prompt, _ in pairs], verdicts, features)
    by_picture = {(prompt.text, seed): verdict for (prompt, seed), verdict in zip(pairs, verdicts["model"], strict=True)}
    yield EvaluationProgress(len(pairs), len(pairs), EvaluationRecord(steps, guidance_scale, figures, by_picture))


def _read_answers(state: Path | None, asked: dict[str, object]) -> tuple[dict[str, list[Verdict]], dict[str, Tensor]]:
    """Return what the judge has said of an evaluation that was stopped, or nothing yet, by kind of picture.

    Verdicts are on JUDGED, features of these and of "reference". Raises ValueError if the file is of another evaluation.
    """
    if state is None or not state.exists():
        return {name: [] for name in JUDGED}, {}
    found = read_state(state)
    check_same(state, found["asked"], asked)
    return {name: [Verdict(*row) for row in rows] for name, rows in found["verdicts"].items()}, found["features"]


def judge_pictures(
    sd: StableDiffusion, judge: Judge, steps: int, guidance_scale: float, part: Sequence[tuple[FixedPrompt, int]]
) -> dict[str, tuple[list[Verdict], Float[Tensor, "B D"]]]:
    """Judge the model's pictures, real scenes, these after the VAE, and other scenes of the same prompts as KID's reference.

    Args:
        sd: The model.
        judge: Of the scenes.
        steps: Of DDIM.
        guidance_scale: For the model's pictures.
        part: Prompts with their seeds.
    """
    prompts = [prompt for prompt, _ in part]
    *_, last = sd.denoise([p.text for p in prompts], steps=steps, guidance_scale=guidance_scale, seeds=[seed for _, seed in part])
    real = compose_real_pixels(part, 0).to(sd.device)
    pixels = {"model": sd.decode(last.x_t), "real": real, "reconstructed": reconstruct(sd, real), "reference": compose_real_pixels(part, 1)}
    return {name: judge_batch(judge, pictures, prompts) for name, pictures in pixels.items()}


def compose_real_pixels(pairs: Sequence[tuple[FixedPrompt, int]], draw: int) -> Float[Tensor, "B 3 H W"]:
    """Compose a scene for each prompt and seed; another `draw` gives other scenes. They depend on nothing else."""
    rows = fixed_prompts()
    return to_pixels(
        np.stack([real_scene(prompt, np.random.default_rng([rows.index(prompt), seed, draw])).image for prompt, seed in pairs])
    )


@torch.no_grad()
def reconstruct(sd: StableDiffusion, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
    """Send pixels in [-1, 1] through the VAE and back."""
    return sd.decode(sd.vae.encode(pixels.to(sd.dtype)).mean.float() * sd.config.vae.scaling_factor)


def held_out_psnr(sd: StableDiffusion, count: int = 48) -> tuple[float, float]:
    """Return the mean PSNR of reconstructions in dB: of fresh scenes, and of scenes with held-out subjects.

    PSNR = 10 log10(range^2 / mse) of each picture. The mean squared error is that of the objects' pixels, each weighted by the share
    of it that the objects cover: flat backgrounds would hide it.
    """
    means = []
    for split in ("train", "held_out_subjects"):
        rng = np.random.default_rng(5)
        scenes = [sample_scene(rng, split=split) for _ in range(count)]
        pixels = to_pixels(np.stack([scene.image for scene in scenes])).to(sd.device)
        mask = torch.from_numpy(np.stack([scene.mask for scene in scenes]))[:, None].to(sd.device)
        error = (reconstruct(sd, pixels) - pixels).square().mean(dim=1, keepdim=True)
        error = (mask * error).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))
        means.append((10 * (4 / error).log10()).mean().item())  # pixels are in [-1, 1]
    return means[0], means[1]


@torch.no_grad()
def judge_batch(
    judge: Judge, pixels: Float[Tensor, "B 3 H W"], prompts: Sequence[FixedPrompt]
) -> tuple[list[Verdict], Float[Tensor, "B D"]]:
    """Return the judge's verdict on each picture of a prompt, and the pictures' features."""
    config = judge.config
    output = judge.read(pixels.to(judge.log_scale.device))
    wanted = [[config.subjects.index(name) for name in prompt.subjects] for prompt in prompts]
    likeliest = output.shares().topk(2).indices.tolist()
    background, style = output.backgrounds.argmax(dim=1).tolist(), output.styles.argmax(dim=1).tolist()
    first, second = (torch.tensor([row[k] for row in wanted], device=output.features.device) for k in (0, -1))
    tint = output.tint_of().tolist()  # prompts that name one have one subject, and are to be asked even if that is not recognised
    apart = (output.centroids(second) - output.centroids(first)).tolist()
    alignment = text_alignment(output.features, judge.encode_texts([prompt.text for prompt in prompts])).tolist()
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
    return verdicts, output.features


def summarize_verdicts(
    prompts: Sequence[FixedPrompt], verdicts: dict[str, list[Verdict]], features: dict[str, Float[Tensor, "N D"]]
) -> Figures:
    """Average the verdicts on the pictures that each question is about.

    verdicts and features: of "model", "real" and "reconstructed"; features also of "reference".
    """

    def ask(question) -> Figure | None:
        answers = {name: [question(p, v) for p, v in zip(prompts, found, strict=True)] for name, found in verdicts.items()}
        answers = {name: [float(a) for a in found if a is not None] for name, found in answers.items()}
        return Figure(**{name: mean_with_error(found) for name, found in answers.items()}) if answers["real"] else None

    different = list(dict.fromkeys(prompts))
    group = torch.tensor([different.index(prompt) for prompt in prompts], device=features["reference"].device)
    blocks = min(20, len(different) // 2)
    distances = None
    if blocks >= 2:
        found = {name: kid(features[name], features["reference"], groups=(group, group), blocks=blocks) for name in verdicts}
        distances = Figure(**{name: Measure(d.value, d.error, len(prompts)) for name, d in found.items()})
    return dict(
        one_subject=ask(lambda p, v: v.subjects if p.group == "one" else None),
        two_subjects=ask(lambda p, v: v.subjects if p.group == "two" else None),
        two_subjects_held_out_pairs=ask(lambda p, v: v.subjects if p.group == "two" and p.held_out else None),
        background=ask(lambda p, v: v.background),
        place=ask(lambda p, v: v.place),
        style=ask(lambda p, v: v.style),
        colour=ask(lambda p, v: v.tint),
        colour_and_subject=ask(lambda p, v: v.tint and v.subjects if p.tint else None),
        text_alignment=ask(lambda p, v: v.alignment),
        kid=distances,
    )


def mean_with_error(values: Sequence[float]) -> Measure:
    """Return mean and standard error, nan without values: the place is only judged if both subjects are right."""
    count = len(values)
    if count == 0:
        return Measure(math.nan, math.nan, 0)
    mean = sum(values) / count
    return Measure(mean, math.sqrt(sum((value - mean) ** 2 for value in values)) / count, count)
