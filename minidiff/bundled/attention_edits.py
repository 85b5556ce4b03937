"""How well the bundled model edits by attention: fixed prompts, fixed seeds, nothing selected; more tables of editing/README.md.

attention   a subject is exchanged by prompt-to-prompt: is the new one there, is the rest kept?
null-text   the same on scenes that were inverted
words       another prompt from step k on: does the picture follow it? for words of subject, colour, place and style
gate        cross-attention kept from step k on: what that saves, and what it costs
overlap     two subjects' heat maps: do they overlap more where the picture lacks one of the two?
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minidiff.bundled.edits import Row, SceneEdit, check_measurable, found, mean_change, measured, number, percent, scene_edits
from minidiff.bundled.evaluate import judge_batch, spread_prompts
from minidiff.bundled.judge import Judge
from minidiff.editing.inversion import invert
from minidiff.editing.null_text import null_text, with_empty_prompts
from minidiff.editing.prompt_steps import Span, with_gate, with_spans
from minidiff.editing.prompt_to_prompt import AttentionEdit, find_word, prompt_to_prompt
from minidiff.editing.start import Sampling, encode
from minidiff.heat_maps import HeatMaps, overlap
from minidiff.markdown import format_fixed, markdown_table
from minidiff.pipeline import Model, StableDiffusion
from minidiff.scenes.art import STYLES, common_backgrounds, subject_names
from minidiff.scenes.prompts import FixedPrompt, fixed_prompts
from minidiff.scenes.scenes import Item, caption_of, choose

PARTS = ("attention", "null-text", "words", "gate", "overlap")
INVERTED = 8  # scenes that are inverted, which takes long
PAIRS = 12  # of prompts for each kind of word
CHANGED_AT = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)  # shares of the steps
GATES = (0.1, 0.25, 0.5, 0.75, 1.0)
SETTINGS = {  # by the row of the table: shares of cross- and self-attention, and whether there is a local blend
    "cross 0.8, self 0.4": (0.8, 0.4, False),
    "cross 0.4, self 0.2": (0.4, 0.2, False),
    "cross 0.8, self 0.4, local blend": (0.8, 0.4, True),
    "cross 0.4, self 0.2, local blend": (0.4, 0.2, True),
}
FROM_SCENES = "cross 0.8, self 0.4, local blend"  # of SETTINGS, for scenes that were inverted


# --- prompt-to-prompt -------------------------------------------------------------------------------------------------


def attention_edit(setting: str, edit: SceneEdit) -> AttentionEdit:
    """Return one of SETTINGS for the exchange of a scene's subject."""
    cross, self_attention, blend = SETTINGS[setting]
    return AttentionEdit(cross, self_attention, local_blend=(edit.old, edit.subject) if blend else None)


@torch.no_grad()
def outside(judge: Judge, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 H W"]:
    """Return 1 where the judge sees no object, nor in a cell next to one, else 0."""
    empty = judge.read(pixels.to(judge.log_scale.device)).subjects[:, -1:].exp().cpu()  # the last class is no subject
    near = F.max_pool2d((empty < 0.5).float(), 3, stride=1, padding=1)
    return 1 - F.interpolate(near, pixels.shape[2:], mode="nearest")


def measure_attention(
    sd: StableDiffusion, judge: Judge, edits: Sequence[SceneEdit], seeds: Sequence[int], sampling: Sampling
) -> Iterator[Row]:
    """Measure how often the new subject is found, and how much changes outside the old one, without control and with it.

    Args:
        sd: the model.
        judge: of the scenes.
        edits: scenes, of which the captions alone are taken.
        seeds: each edit is made on each.
        sampling: steps and sampler.
    """
    ways: dict[str, Callable[[SceneEdit], tuple[Tensor, Tensor]]] = {
        setting: lambda edit, setting=setting: _pair(sd, edit, attention_edit(setting, edit), seeds, sampling) for setting in SETTINGS
    }
    free = AttentionEdit(0.0, 0.0)  # looks at nothing: the two prompts on the same seeds
    for title, way in ({"none": lambda edit: _pair(sd, edit, free, seeds, sampling)} | ways).items():
        right, changed = [], []
        for edit in edits:
            original, edited = way(edit)
            right += found(judge, edited, edit.subject)
            where = outside(judge, original)
            changed += [mean_change(a[None], b[None], w[None])[0] for a, b, w in zip(edited, original, where) if w.any()]
        yield {"way": title, "found": measured(right), "changed": measured(changed)}


def _pair(sd: StableDiffusion, edit: SceneEdit, control: AttentionEdit, seeds: Sequence[int], sampling: Sampling) -> tuple[Tensor, Tensor]:
    *_, last = prompt_to_prompt(sd, edit.caption, edit.prompt, control, seeds=seeds, sampling=sampling)
    original, edited = sd.decode(last.x_t).cpu().chunk(2)
    return original, edited


def attention_table(rows: Sequence[Row]) -> str:
    """Format the rows of `measure_attention`; each change also as a share of that without control."""
    (anew,) = [row["changed"]["value"] for row in rows if row["way"] == "none"]
    return markdown_table(
        ("control", "pictures", "subject found", "changed outside the object, of 255", "of without control"),
        [
            (row["way"], row["found"]["count"], percent(row["found"]), number(row["changed"], 1))
            + (f"{100 * row['changed']['value'] / anew:.0f} %",)
            for row in rows
        ],
    )


# --- null-text inversion ----------------------------------------------------------------------------------------------


def measure_null_text(sd: StableDiffusion, judge: Judge, edits: Sequence[SceneEdit], sampling: Sampling) -> Iterator[Row]:
    """Measure the way back from inverted scenes, as PSNR against the VAE's own reconstruction, and the same exchange of subjects on them.

    Args:
        sd: the model, in float32.
        judge: of the scenes.
        edits: scenes.
        sampling: steps of DDIM.
    """
    inverted = []
    for edit in edits:
        x_0 = encode(sd, edit.pixels)
        up = list(invert(sd, [edit.caption], x_0, steps=sampling.steps))
        inverted.append((edit, x_0, up[-1].x_t, with_empty_prompts(sd.predict, list(null_text(sd, [edit.caption], x_0, up)))))
    ways: dict[str, tuple[float, bool]] = {
        "inversion, guidance scale 1": (1.0, False),
        f"inversion, guidance scale {sd.config.guidance_scale:g}": (sd.config.guidance_scale, False),
        f"null-text inversion, guidance scale {sd.config.guidance_scale:g}": (sd.config.guidance_scale, True),
    }
    for title, (scale, learned) in ways.items():
        psnr, right, changed = [], [], []
        for edit, x_0, noise, model in inverted:
            rows = prompt_to_prompt(
                sd,
                edit.caption,
                edit.prompt,
                attention_edit(FROM_SCENES, edit),
                sampling=replace(sampling, guidance_scale=scale),
                x=noise,
                model=model if learned else None,
            )
            *_, last = rows
            original, edited = sd.decode(last.x_t).cpu().chunk(2)
            kept = sd.decode(x_0).cpu()
            psnr.append((10 * (4 / (original - kept).square().mean()).log10()).item())  # pixels are in [-1, 1]
            right += found(judge, edited, edit.subject)
            changed += mean_change(edited, kept, 1 - edit.mask)
        yield {"way": title, "psnr": measured(psnr), "found": measured(right), "changed": measured(changed)}


def null_text_table(rows: Sequence[Row]) -> str:
    """Format the rows of `measure_null_text`."""
    return markdown_table(
        ("from a scene", "scenes", "PSNR of the original, dB", "edit: subject found", "edit: changed outside, of 255"),
        [(row["way"], row["psnr"]["count"], number(row["psnr"], 1), percent(row["found"]), number(row["changed"], 1)) for row in rows],
    )


# --- when the words matter --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """Two prompts that differ in words of one kind."""

    before: FixedPrompt
    after: FixedPrompt


def exchanges(kind: str, count: int) -> list[Exchange]:
    """Draw pairs of prompts that differ in "subject", "colour" (the background's), "place" or "style"; always the same ones."""
    return [_exchange(kind, np.random.default_rng([17, ("subject", "colour", "place", "style").index(kind), i])) for i in range(count)]


def _exchange(kind: str, rng: np.random.Generator) -> Exchange:
    names = [str(name) for name in subject_names(held_out=False)]
    while True:
        first, second = choose(rng, names), choose(rng, names)
        fitting = common_backgrounds([(first, None), (second, None)])
        if first != second and len(fitting) > 1:
            break
    background, other = (str(fitting[i]) for i in rng.permutation(len(fitting))[:2])
    style, other_style = (STYLES[i] for i in rng.permutation(len(STYLES))[:2])
    if kind == "place":
        return Exchange(_prompt([first, second], background, "left of"), _prompt([second, first], background, "left of"))
    if kind == "style":
        return Exchange(_prompt([first], background, style=style), _prompt([first], background, style=other_style))
    after = _prompt([second], background) if kind == "subject" else _prompt([first], other)
    return Exchange(_prompt([first], background), after)


def _prompt(subjects: Sequence[str], background: str, relation: str | None = None, style: str | None = None) -> FixedPrompt:
    text = caption_of([Item(name) for name in subjects], relation, background, style)
    return FixedPrompt(text, "", tuple(subjects), background, relation, style)


# By the kind of word: whether the judge sees what the prompt says.
SHOWS: dict[str, Callable[..., bool]] = {
    "subject": lambda verdict: verdict.subjects,
    "colour": lambda verdict: verdict.background,
    "place": lambda verdict: bool(verdict.place),
    "style": lambda verdict: bool(verdict.style),
}


def measure_words(sd: StableDiffusion, judge: Judge, count: int, seed: int, sampling: Sampling) -> Iterator[Row]:
    """Measure how many pictures show what the second prompt says, by the step from which it is given; and the first without a second.

    Args:
        sd: the model.
        judge: of the scenes.
        count: pairs of prompts for each kind of word.
        seed: of the first pair; the others follow.
        sampling: steps and sampler.
    """
    for kind, shows in SHOWS.items():
        pairs = exchanges(kind, count)
        after = [pair.after for pair in pairs]
        yield {"way": kind, "shares": _by_step(sd, judge, pairs, [prompt.text for prompt in after], after, shows, seed, sampling)}
    pairs = exchanges("subject", count)
    before = [pair.before for pair in pairs]
    yield {"way": "no prompt: the subject stays", "shares": _by_step(sd, judge, pairs, None, before, SHOWS["subject"], seed, sampling)}


def _by_step(
    sd: StableDiffusion,
    judge: Judge,
    pairs: Sequence[Exchange],
    prompts: Sequence[str] | None,
    wanted: Sequence[FixedPrompt],
    shows: Callable[..., bool],
    seed: int,
    sampling: Sampling,
) -> list[dict[str, float]]:
    shares, visited = [], sampling.levels(sd.schedule)
    for at in CHANGED_AT:
        spans = [Span(prompts, round(at * sampling.steps), sampling.steps)] if at < 1 else []
        seeds = [seed + i for i in range(len(pairs))]
        model = with_spans(sd, spans, visited)
        *_, last = sd.denoise(
            [pair.before.text for pair in pairs], seeds=seeds, steps=sampling.steps, sampler=sampling.sampler, model=model
        )
        verdicts, _ = judge_batch(judge, sd.decode(last.x_t), wanted)
        shares.append(measured([float(shows(verdict)) for verdict in verdicts]))
    return shares


def words_table(rows: Sequence[Row]) -> str:
    """Format the rows of `measure_words`."""
    head = ("changed word", "pictures", *(f"from {100 * at:.0f} %" if at < 1 else "never" for at in CHANGED_AT))
    return markdown_table(
        head, [(row["way"], row["shares"][0]["count"], *(f"{100 * one['value']:.0f} %" for one in row["shares"])) for row in rows]
    )


# --- cross-attention that is kept -------------------------------------------------------------------------------------


def measure_gates(sd: StableDiffusion, judge: Judge, prompts: Sequence[FixedPrompt], seed: int, sampling: Sampling) -> Iterator[Row]:
    """Measure how often the subject and the background are right with cross-attention kept from a gate on, and the operations.

    Args:
        sd: the model.
        judge: of the scenes.
        prompts: of one subject.
        seed: of the first prompt; the others follow.
        sampling: steps and sampler.
    """
    visited = sampling.levels(sd.schedule)

    def draw(prompts: Sequence[FixedPrompt], model: Model) -> Tensor:
        seeds = [seed + i for i in range(len(prompts))]
        texts = [prompt.text for prompt in prompts]
        *_, last = sd.denoise(texts, seeds=seeds, steps=sampling.steps, sampler=sampling.sampler, model=model)
        return last.x_t

    for share in GATES:
        gate = max(1, round(share * sampling.steps))
        for keep in (True, False) if share < 1 else (True,):
            verdicts, _ = judge_batch(judge, sd.decode(draw(prompts, with_gate(sd, gate, visited, keep=keep))), prompts)
            with FlopCounterMode(display=False) as counter:
                draw(prompts[:1], with_gate(sd, gate, visited, keep=keep))
            yield {
                "way": "all steps" if share == 1 else f"from {100 * gate / sampling.steps:.0f} %",
                "kept": "" if share == 1 else "kept" if keep else "by the prompt",
                "subject": measured([float(verdict.subjects) for verdict in verdicts]),
                "background": measured([float(verdict.background) for verdict in verdicts]),
                "operations": counter.get_total_flops(),
            }


def gates_table(rows: Sequence[Row]) -> str:
    """Format the rows of `measure_gates`; operations as a share of those of all steps."""
    (full,) = [row["operations"] for row in rows if not row["kept"]]
    return markdown_table(
        ("without guidance", "cross-attention", "pictures", "subject found", "background right", "operations"),
        [
            (row["way"] if row["kept"] else "never", row["kept"] or "by the prompt", row["subject"]["count"])
            + (percent(row["subject"]), percent(row["background"]), f"{100 * row['operations'] / full:.0f} %")
            for row in rows
        ],
    )


# --- overlap of two subjects ------------------------------------------------------------------------------------------


def measure_overlap(
    sd: StableDiffusion, judge: Judge, prompts: Sequence[FixedPrompt], seeds: Sequence[int], sampling: Sampling
) -> Iterator[Row]:
    """Measure how far the heat maps of two subjects overlap, in pictures that show both and in others.

    Args:
        sd: the model.
        judge: of the scenes.
        prompts: of two subjects each.
        seeds: each prompt is drawn on each.
        sampling: steps and sampler.
    """
    values: dict[bool, list[float]] = {True: [], False: []}
    for prompt in prompts:
        first, second = (find_word(sd.tokenizer, prompt.text, name) for name in prompt.subjects)
        heat = HeatMaps(len(seeds), [*first, *second])
        drawn = sd.denoise([prompt.text] * len(seeds), seeds=seeds, steps=sampling.steps, sampler=sampling.sampler)
        *_, last = heat.watch(drawn, sd.unet)
        verdicts, _ = judge_batch(judge, sd.decode(last.x_t), [prompt] * len(seeds))
        for verdict, value in zip(verdicts, overlap(heat.word(first), heat.word(second)).tolist()):
            values[verdict.subjects].append(value)
    for both, title in ((True, "both subjects"), (False, "not both")):
        yield {"way": title, "count": len(values[both]), "overlap": measured(values[both])}


def overlap_table(rows: Sequence[Row]) -> str:
    """Format the rows of `measure_overlap`, and their difference."""
    (a, b) = (row["overlap"] for row in rows)
    error = (a["error"] ** 2 + b["error"] ** 2) ** 0.5
    difference = f"{format_fixed(b['value'] - a['value'], 3)} ± {format_fixed(error, 3)}"
    body = [(row["way"], row["count"], number(row["overlap"], 3)) for row in rows]
    return markdown_table(("the judge finds", "pictures", "overlap"), [*body, ("difference", "", difference)])


# --- tables -----------------------------------------------------------------------------------------------------------


def measure(part: str, sd: StableDiffusion, judge: Judge, *, count: int, seeds: Sequence[int], steps: int) -> str:
    """Measure one of PARTS and format its table.

    Args:
        part: of PARTS.
        sd: the model, in float32.
        judge: of the scenes.
        count: edits, or prompts; null-text takes INVERTED of them, and words PAIRS.
        seeds: each edit and each pair of subjects is drawn on each, others on consecutive ones from the first.
        steps: of DDIM.

    Raises ValueError as `check_measurable` does.
    """
    check_measurable(sd, judge, count, seeds)
    scenes, sampling = scene_edits(count, sd.config.image_size), Sampling(steps)
    one, two = ([prompt for prompt in fixed_prompts() if prompt.group == group] for group in ("one", "two"))
    if part == "attention":
        return attention_table(list(measure_attention(sd, judge, scenes, seeds, sampling)))
    if part == "null-text":
        return null_text_table(list(measure_null_text(sd, judge, scenes[:INVERTED], sampling)))
    if part == "words":
        return words_table(list(measure_words(sd, judge, min(count, PAIRS), seeds[0], sampling)))
    if part == "gate":
        return gates_table(list(measure_gates(sd, judge, spread_prompts(one, count), seeds[0], sampling)))
    return overlap_table(list(measure_overlap(sd, judge, spread_prompts(two, count), seeds, sampling)))
