"""The commands `minidiff evaluate ...`: pictures, weights and people's preference in numbers; the study of all methods.

Imports that take long are inside the commands that need them.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from minidiff.cli.flags import File, Folder, Text, Whole, check_least
from minidiff.cli.model import load, print_notes
from minidiff.cli.names import check_folder, check_writable

if TYPE_CHECKING:
    from minidiff.evaluation.alignment import Encoder

Parts = Literal["all", "methods", "before", "pairs", "compression", "custom", "lora", "pictures", "style"]


def pictures(
    folder: tyro.conf.Positional[Path],
    /,
    references: Folder = None,
    before: Folder = None,
    real: Folder = None,
    clip: File = None,
    clip_model: Text = None,
    out: File = None,
    device: str = "auto",
) -> None:
    """Measure how well pictures follow their prompts, resemble a subject and match real ones (KID).

        minidiff evaluate pictures my-pictures --references cat-pictures --before pictures-before-training

    Prompts are read from NAME.txt beside each picture, metadata.jsonl or captions.json; without these from the pictures, where `generate`
    wrote them. A new word means nothing to a CLIP: write captions that call the subject by its class.

    Args:
        folder: the pictures
        references: a folder with pictures of the subject: the mean cosine of each picture with all of them
        before: what the model drew before training, under the same names: 1 - cosine of each picture with its counterpart
        real: a folder with real pictures, for KID; 500 or more of either are advised
        clip: weights of a CLIP as open_clip reads them; without, the judge of the bundled scenes, which knows nothing else
        clip_model: what open_clip calls the CLIP's network, such as ViT-L-14; ViT-B-32 by default
        out: a .json file for the numbers, of each picture too
        device: auto, cpu, cuda, cuda:1, mps
    """
    from minidiff.cli.model import choose_device
    from minidiff.evaluation.alignment import drift, image_alignment, text_alignment
    from minidiff.evaluation.folder import find_drawn_pictures, read_prompts

    if out is not None:
        check_writable(out)
    paths = find_drawn_pictures(folder)
    prompts = read_prompts(folder, paths)
    counterparts = [] if before is None else same_names(paths, find_drawn_pictures(before), before)
    subject, others = ([] if other is None else find_drawn_pictures(other) for other in (references, real))
    if not (prompts or counterparts or subject or others):
        raise ValueError(f"{folder}: nothing to compare with; write captions beside the pictures, or give --references, --before or --real")
    if others and min(len(paths), len(others)) < 4:
        raise ValueError(f"{folder} and {real} have {len(paths)} and {len(others)} pictures; KID needs 4 of either, and 500 to say much")
    encoder = choose_encoder(clip, clip_model, choose_device(device))
    features = features_of(encoder, paths)
    found = {}
    if prompts:
        found["text alignment"] = text_alignment(features, encoder.encode_texts(prompts).cpu())
    if subject:
        found["image alignment"] = image_alignment(features, features_of(encoder, subject))
    if counterparts:
        found["drift"] = drift(features, features_of(encoder, counterparts))
    numbers: dict[str, object] = {}
    for name, values in found.items():
        error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
        each = {path.name: value for path, value in zip(paths, values.tolist())}
        numbers[name] = {"mean": float(values.mean()), "error": error, "pictures": len(values), "each": each}
        print(f"{name:16} {float(values.mean()):.4f}{'' if error is None else f' ± {error:.4f}'}  {len(values)} pictures")
    if others:
        distance = kid_of(features, features_of(encoder, others), prompts)
        numbers["KID"] = {"value": distance.value, "error": distance.error, "pictures": len(features), "real": len(others)}
        print(f"{'KID':16} {distance.value:.4f} ± {distance.error:.4f}  {len(features)} pictures, {len(others)} real ones")
        if min(len(features), len(others)) < 500:
            print_notes([f"KID of {len(features)} and {len(others)} pictures: fewer than 500, so its error is large"])
    if out is not None:
        from minidiff.files import write_text

        write_text(out, json.dumps(numbers, indent=1))


def kid_of(features, others, prompts: list[str]):
    """Return the KID. Its error is of other prompts where there are 20 or more, or else of other noise for the same ones."""
    import torch

    from minidiff.evaluation.kid import kid, scale_features

    names = list(dict.fromkeys(prompts))
    group = torch.tensor([names.index(prompt) for prompt in prompts]) if len(names) >= 20 else torch.arange(len(features))
    groups = (group, len(features) + torch.arange(len(others)))
    return kid(scale_features(features), scale_features(others), groups=groups, blocks=min(10, len(group.unique()) // 2, len(others) // 2))


def same_names(paths: list[Path], others: list[Path], folder: Path) -> list[Path]:
    """Return the counterpart of each picture."""
    named = {path.name: path for path in others}
    if missing := [path.name for path in paths if path.name not in named]:
        raise ValueError(f"{folder}: no {missing[0]} in it; draw the same prompts on the same seeds, under the same names")
    return [named[path.name] for path in paths]


def choose_encoder(clip: Path | None, name: str | None, device) -> "Encoder":
    """Load the bundled judge, or the CLIP model whose weights are given. Raises ValueError for a CLIP model without its weights."""
    import weights_loader
    from minidiff.evaluation.open_clip import OpenClip

    if clip is None and name is not None:
        raise ValueError(f"--clip-model {name} without its weights; give them as --clip FILE")
    return weights_loader.load_judge(device=device) if clip is None else OpenClip(name or "ViT-B-32", clip, device)


def features_of(encoder: "Encoder", paths: list[Path]):
    """Return one row of features per picture, float32, on the CPU."""
    import torch

    from minidiff.pictures import fit, load_picture

    batches = (paths[start : start + 32] for start in range(0, len(paths), 32))
    pixels = (torch.stack([fit(load_picture(path), encoder.image_size) for path in batch]) for batch in batches)
    with torch.no_grad():
        return torch.cat([encoder.encode_pictures(batch).float().cpu() for batch in pixels])


def weights(base: tyro.conf.Positional[str], tuned: tyro.conf.Positional[str], /, top: int = 10, ignore: Text = None) -> None:
    """Measure how far training moved a U-Net's weights, by kind of layer: |W' - W| / |W|.

        minidiff evaluate weights tiny runs/tuned/model.safetensors

    Args:
        base: the model before
        tuned: the model after
        top: how many of the layers that moved most are listed
        ignore: a regular expression of unknown tensors in either file to leave out
    """
    from minidiff.evaluation.weights import kind_of, layer_changes, relative_changes

    check_least(0, top=top)
    before, after = (dict(load(model, "float32", "cpu", ignore=ignore).unet.named_parameters()) for model in (base, tuned))
    for kind, change in relative_changes(before, after).items():
        print(f"{kind:16} {100 * change:.3f} %")
    each = layer_changes(before, after)
    for name in sorted(each, key=lambda name: -each[name])[:top]:
        print(f"  {100 * each[name]:8.3f} %  {kind_of(name):16} {name}")


def pairs(first: tyro.conf.Positional[Path], second: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path], /, seed: int = 0) -> None:
    """Make a sheet of pairs, in random order, for people to choose from, and a form to fill in.

        minidiff evaluate pairs my-pictures other-pictures runs/pairs

    Args:
        first: a folder of pictures, each with a counterpart of the same name in the other one
        second: another one's, of the same names
        out: a new folder for sheet.png, form.csv and key.json, which says which side is whose
        seed: of the order
    """
    from minidiff.evaluation.pairs import make_sheet

    print(
        f"{make_sheet(first, second, out, seed)} pairs in {out / 'sheet.png'}; write left, right or equal into copies of {out / 'form.csv'}"
    )


def tally(key: tyro.conf.Positional[Path], forms: tyro.conf.Positional[tuple[Path, ...]], /) -> None:
    """Count the filled forms of a sheet of pairs.

        minidiff evaluate tally runs/pairs/key.json filled-form.csv

    Args:
        key: key.json of the sheet
        forms: the filled forms, one a person
    """
    from minidiff.evaluation.pairs import read_key
    from minidiff.evaluation.pairs import tally as count

    if not forms:
        raise ValueError("no forms given; give the filled copies of form.csv")
    found, names = count(key, forms), read_key(key)
    print(f"{names['first']} was preferred in {found.first}, {names['second']} in {found.second}, neither in {found.equal}")
    print(f"share of the first: {100 * found.preferred:.1f} %, 95 % interval {100 * found.low:.1f} to {100 * found.high:.1f} %")


def bundled(
    model: tyro.conf.Positional[str] = "tiny",
    /,
    steps: int = 20,
    guidance_scale: float | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    limit: Whole = None,
    ignore: Text = None,
    device: str = "auto",
    threads: Whole = None,
) -> None:
    """Measure how well a model of the bundled scenes follows the fixed prompts.

        minidiff evaluate bundled tiny --limit 40

    Args:
        model: the bundled one, or another that was trained on the scenes
        steps: of the sampler
        guidance_scale: how strongly pictures follow the prompt; the model's own by default
        seeds: every prompt is drawn on each
        limit: this many of the 246 prompts, evenly spread
        ignore: a regular expression of unknown tensors in the model's file to leave out
        device: auto, cpu, cuda, cuda:1, mps
        threads: CPU threads to use; all cores by default
    """
    from tqdm import tqdm

    import weights_loader
    from minidiff.bundled.evaluate import evaluate
    from minidiff.bundled.figures import format_figures
    from minidiff.cli.model import training_on

    check_least(1, limit=limit, steps=steps)
    figures = None
    with training_on(device, threads) as chosen:
        sd, judge = load(model, "float32", chosen, ignore=ignore), weights_loader.load_judge(device=chosen)
        with tqdm(unit="picture", file=sys.stderr) as bar:
            for progress in evaluate(sd, judge, steps=steps, guidance_scale=guidance_scale, seeds=seeds, limit=limit):
                bar.total = progress.total
                bar.update(progress.done - bar.n)
                figures = progress.figures
        assert figures is not None, "the last step of an evaluation has them"
        print(format_figures(figures))


def edits(
    model: tyro.conf.Positional[str] = "tiny",
    /,
    part: Literal["all", "blends", "edits", "inversion", "attention", "null-text", "words", "gate", "overlap"] = "all",
    count: int = 40,
    blends: int = 24,
    seeds: tuple[int, ...] = (0, 1, 2),
    steps: int = 20,
    readme: File = None,
    ignore: Text = None,
    device: str = "auto",
    threads: Whole = None,
) -> None:
    """Measure how well a model of the bundled scenes edits: from a picture, by attention, by prompts that change over the steps.

        minidiff evaluate edits tiny --part blends --blends 4

    Args:
        model: the bundled one, or another that was trained on the scenes
        part: one table, or all
        count: scenes to edit, each on every seed; or prompts
        blends: scenes to try the ways to blend on, each on the first seed
        seeds: of the noise
        steps: of the sampler
        readme: a Markdown file whose tables are made anew, between marks as <!-- edits --> and <!-- end of edits -->
        ignore: a regular expression of unknown tensors in the model's file to leave out
        device: auto, cpu, cuda, cuda:1, mps
        threads: CPU threads to use; all cores by default
    """
    import torch

    import weights_loader
    from minidiff.bundled import attention_edits, edits
    from minidiff.bundled.edits import renew_tables
    from minidiff.cli.model import training_on
    from minidiff.files import read_text, write_text

    parts = (*edits.PARTS, *attention_edits.PARTS) if part == "all" else (part,)
    check_least(1, count=count, blends=blends, steps=steps)
    text = None if readme is None else read_text(readme)
    if text is not None:
        renew_tables(text, dict.fromkeys(parts, ""))  # only to learn whether it has the marks
    with training_on(device, threads) as chosen, torch.no_grad():
        sd, judge = load(model, "float32", chosen, ignore=ignore), weights_loader.load_judge(device=chosen)
        for name in parts:
            measure = edits.measure if name in edits.PARTS else attention_edits.measure
            table = measure(name, sd, judge, count=blends if name == "blends" else count, seeds=seeds, steps=steps)
            print(f"{table}\n", flush=True)
            if readme is not None and text is not None:
                text = renew_tables(text, {name: table})
                write_text(readme, text)  # after each part, so that a run that is stopped keeps what it has


def study(
    out: tyro.conf.Positional[Path],
    /,
    part: Parts = "all",
    jobs: int = 1,
    threads: Whole = None,
    device: str = "auto",
    limit: Whole = None,
) -> None:
    """Train every method on subjects new to the bundled model, and measure each; hours on a CPU.

        minidiff evaluate study runs/study --jobs 2

    Stopped at any time, it goes on with the runs that are not there yet. `minidiff evaluate report OUT` makes the tables.

    Args:
        out: folder of the study
        part: which runs: all, methods, before, pairs, compression, custom, lora, pictures or style
        jobs: runs at once, each in a process of its own
        threads: CPU threads of each; the cores are shared out by default
        device: auto, cpu, cuda, cuda:1, mps
        limit: stop after this many runs
    """
    import torch
    from tqdm import tqdm

    import weights_loader
    from minidiff.cli.model import choose_device
    from minidiff.study.plan import list_runs
    from minidiff.study.run import run_study

    check_least(1, jobs=jobs, threads=threads, limit=limit)
    check_folder(out)
    where = choose_device(device)
    chosen = [run for run in list_runs(part) if not (out / "results" / f"{run.name}.json").exists()][:limit]
    load_tiny = partial(weights_loader.load, "tiny", dtype=torch.float32, device=where)
    with tqdm(total=len(chosen), unit="run", file=sys.stderr) as bar:
        for progress in run_study(out, chosen, load_tiny, partial(weights_loader.load_judge, device=where), jobs=jobs, threads=threads):
            bar.set_postfix_str(f"{progress.name}, {progress.left / 3600:.1f} h left", refresh=False)
            bar.update()


def report(out: tyro.conf.Positional[Path], /, readme: File = None) -> None:
    """Write tables, findings and sheets of a study's runs: OUT/study.md, study.json, PART-SUBJECTS.png.

        minidiff evaluate report runs/study

    Args:
        out: folder of the study
        readme: a Markdown file whose tables are made anew, between marks as <!-- methods --> and <!-- end of methods -->
    """
    import weights_loader
    from minidiff.study.report import read_results, write_report

    print(write_report(read_results(out), weights_loader.load_judge(), readme))


COMMANDS = {
    "pictures": pictures,
    "weights": weights,
    "pairs": pairs,
    "tally": tally,
    "bundled": bundled,
    "edits": edits,
    "study": study,
    "report": report,
}
