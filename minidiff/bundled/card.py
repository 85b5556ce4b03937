"""The card of a model that the recipe made: its shape, how it was made, what the judge says of it. All of it comes from the run itself."""

import dataclasses

from minidiff.bundled.figures import EvaluationRecord, format_figures
from minidiff.bundled.recipe import Recipe
from minidiff.markdown import format_duration, markdown_table
from minidiff.pipeline import StableDiffusion
from minidiff.trainers.engine.settings import Settings


def format_card(
    sd: StableDiffusion, recipe: Recipe, judge: Settings, times: dict[str, dict], psnr: tuple[float, float], record: EvaluationRecord
) -> str:
    """Format the card as Markdown.

    Args:
        sd: The model.
        recipe: That made it.
        judge: Settings of the judge's training.
        times: Seconds and devices by stage.
        psnr: Of the VAE on fresh scenes and on held-out subjects, in dB.
        record: Of the evaluation.
    """
    seeds = sorted({seed for _, seed in record.verdicts})
    return f"""# A model of the scenes

A latent diffusion model of Stable Diffusion's shape in small, {sd.config.image_size} x {sd.config.image_size} pixels, made by
`minidiff train from-scratch`. This page was written by the run that made it.

![forty pictures](pictures.png)

Forty fixed prompts, prompt i on seed i, ddim, guidance {sd.config.guidance_scale:g}, nothing selected.

{format_shapes(sd)}

## Made by

{format_stages(recipe, judge, times)}

{", ".join(f"{name} {value}" for name, value in dataclasses.asdict(recipe).items() if value is not None)}

## What it can do

Inside the objects the VAE's reconstructions reach {psnr[0]:.1f} dB PSNR on scenes that it has not seen, and {psnr[1]:.1f} dB where the subject is one that no training showed.

The judge, a small CLIP trained on scenes, says of {len(record.verdicts)} pictures of fixed prompts (seeds {", ".join(map(str, seeds))}; {record.steps} steps of
ddim, guidance {record.guidance_scale:g}, nothing selected), beside what it says of real scenes of the same prompts and of these after the VAE:

{format_figures(record.figures)}

The verdict on each picture stands in `figures.json`. The judge is kinder than people, who also see what is crude.
"""  # noqa: E501  (lines of Markdown)


def format_shapes(sd: StableDiffusion) -> str:
    """Format the table of the model's parts."""
    config = sd.config
    text = f"width {config.text_encoder.width}, {config.text_encoder.layers} layers, {config.text_encoder.vocab_size:,} words and pieces"
    levels = "widths {}, {} ResBlock a level".format
    rows = [
        ("text encoder", text, sd.text_encoder),
        ("U-Net", levels(", ".join(map(str, config.unet.widths)), config.unet.blocks_per_level), sd.unet),
        ("VAE", levels(", ".join(map(str, config.vae.widths)), config.vae.blocks_per_level) + f", factor {config.vae.factor}", sd.vae),
    ]
    parameters = [f"{sum(p.numel() for p in part.parameters()) / 1e6:.2f} M" for _, _, part in rows]
    return markdown_table(("part", "shape", "parameters"), [(*row[:2], count) for row, count in zip(rows, parameters)])


def format_stages(recipe: Recipe, judge: Settings, times: dict[str, dict]) -> str:
    """Format the table of what was done, and how long it took."""
    of_batch = "{:,} steps of {:,}".format
    done = {
        "scenes": f"{recipe.scenes:,} scenes",
        "autoencoder": of_batch(recipe.vae_steps, recipe.vae_batch),
        "diffusion": of_batch(recipe.steps, recipe.batch),
        "judge": of_batch(judge.steps, judge.batch),
    }
    rows = [(name, done.get(name, ""), format_duration(time["seconds"]), "; ".join(time["devices"])) for name, time in times.items()]
    return markdown_table(("stage", "what", "time", "device"), rows)
