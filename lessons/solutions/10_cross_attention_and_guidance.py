"""Answers of lesson 10."""

import torch

from lessons.exercises import Exercise, difference


def guided_answer(model, x_t, t, cond, uncond, guidance_scale):
    answers = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([uncond, cond]))
    without, with_prompt = answers.chunk(2)
    return without + guidance_scale * (with_prompt - without)


def check_guided_answer(function) -> str | None:
    """On two pictures with different timesteps and contexts, by a model whose answer depends on all three."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 4, 3, 3, generator=generator)
    cond, uncond = (torch.randn(2, 5, 6, generator=generator) for _ in range(2))
    t = torch.tensor([100, 700])

    def model(x_t, t, context):
        factor = context.mean(dim=(1, 2)) + t / 1000
        return x_t * factor[:, None, None, None]

    arguments = (model, x_t, t, cond, uncond, 3.0)
    mistakes = {
        "swaps the two halves: what is cut off first belongs to the context that was put first": swapped(*arguments),
        "guides three of the four channels and leaves the last as it was: index no channels at all": three_channels(*arguments),
        "adds scale times the difference to the answer with the prompt, so that 1 guides already: start from the answer without it": from_cond(
            *arguments
        ),
        "gives the answer with the prompt alone, without guidance": with_prompt_only(*arguments),
    }
    return difference(function(*arguments), guided_answer(*arguments), mistakes)


def swapped(model, x_t, t, cond, uncond, guidance_scale):
    with_prompt, without = model(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([uncond, cond])).chunk(2)
    return without + guidance_scale * (with_prompt - without)


def three_channels(model, x_t, t, cond, uncond, guidance_scale):
    without, with_prompt = model(x_t, t, uncond), model(x_t, t, cond)
    guided = without + guidance_scale * (with_prompt - without)
    return torch.cat([guided[:, :3], without[:, 3:]], dim=1)


def from_cond(model, x_t, t, cond, uncond, guidance_scale):
    without, with_prompt = model(x_t, t, uncond), model(x_t, t, cond)
    return with_prompt + guidance_scale * (with_prompt - without)


def with_prompt_only(model, x_t, t, cond, uncond, guidance_scale):
    return model(x_t, t, cond)


EXERCISES = (
    Exercise(
        guided_answer,
        check_guided_answer,
        wrong=(
            (swapped, "swaps the two halves"),
            (three_channels, "three of the four channels"),
            (from_cond, "so that 1 guides already"),
            (with_prompt_only, "without guidance"),
        ),
    ),
)
