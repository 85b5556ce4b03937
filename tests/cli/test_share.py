"""`minidiff share RUN DIR`: a folder as the hub and other programs expect it."""

import json
import shlex

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

import weights_loader
from minidiff.cli import train
from minidiff.cli.share import Shared, card, phrase_of, prompts_of
from minidiff.config import SD1, SD2, SDXL
from minidiff.trainers.engine import memory
from tests.checkpoints import with_unknown_tensor
from tests.command import runner
from tests.small_concepts import picture_folder
from tests.small_models import small_config, small_model, xl_config

QUICK = ("--model", "model.safetensors", "--steps", "1", "--batch", "1", "--num-samples", "1", "--sample-every", "0", "--images", "cat")
RUNS = {
    "lora": (("lora", "--token", "sks", "--class-word", "cat"), ["pytorch_lora_weights.safetensors", "run.safetensors"], "lora"),
    "words": (("textual-inversion", "--token", "<it>", "--class-word", "cat"), ["learned_embeds.safetensors"], "textual_inversion"),
    "pivotal": (
        ("pivotal-tuning", "--token", "<it>", "--class-word", "cat", "--token-steps", "1"),
        ["it.safetensors", "pytorch_lora_weights.safetensors", "run.safetensors"],
        "lora",
    ),
    "custom": (
        ("custom-diffusion", "--token", "<it>", "--class-word", "cat", "--prior", "none"),
        ["<it>.safetensors", "pytorch_custom_diffusion_weights.safetensors"],
        "custom-diffusion",
    ),
    "model": (("fine-tune", "--prompt", "a cat", "--weights", r"^unet\.up"), ["model_index.json", "unet", "vae"], "dreambooth"),
    "controlnet": (
        ("controlnet", "--prompt", "a cat", "--hint", "canny"),
        ["config.json", "diffusion_pytorch_model.safetensors", "hint.png"],
        "controlnet",
    ),
}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "SAMPLE_STEPS", 1)
    monkeypatch.setattr(memory, "estimate_memory", lambda *_: memory.Memory(1, 2, 3, 4, 5, 6))
    weights_loader.save(small_model(), tmp_path / "model.safetensors")
    picture_folder(tmp_path / "cat", seed=1)
    return runner(monkeypatch, tmp_path, capsys)


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_becomes_a_folder_to_upload(run, tmp_path, kind):
    args, files, tag = RUNS[kind]
    code, out, err = run("train", *args, "--out", "run", *QUICK)
    assert code == 0, err
    trained = shlex.split(out)
    code, out, err = run("share", "run", "mine", "--pictures", "1", "--steps", "1", "--base-model", "somebody/model")
    assert (code, out) == (0, "mine\n"), err
    mine = tmp_path / "mine"
    assert all((mine / name).exists() for name in files) and (mine / "images" / "0.png").is_file()
    assert not any(path.name in ("folder", "settings.json", "run.json") for path in mine.rglob("*"))
    card = ModelCard.load(mine / "README.md")
    prompt = trained[2]
    assert card.data.base_model == "somebody/model" and card.data.library_name == "diffusers" and tag in card.data.tags
    widget = card.data.widget if isinstance(card.data.widget, list) else card.data.to_dict()["widget"]
    shown = widget[0].to_dict() if hasattr(widget[0], "to_dict") else widget[0]
    assert shown["text"] == card.data.instance_prompt and shown["output"]["url"] == "images/0.png"
    assert "<Gallery />" in card.text and all(f"`{name}`" in card.text for name in files if "." in name)
    if "--token" in args:
        assert f"`{args[2]} cat`" in card.text and args[2] in prompt
    (use,) = [line.partition("next: ")[2] for line in err.splitlines() if "next: " in line]
    code, _, err = run(*shlex.split(use)[1:], "--steps", "1", "--out", "shared.png")
    assert code == 0, err
    run("generate", *trained[2:], "--steps", "1", "--out", "own.png")
    shared, own = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("shared.png", "own.png"))
    if shlex.split(use)[2] == prompt:
        assert np.abs(shared - own).max() <= 1  # of 255: rounding


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        ((), "run: no such folder; give the one that `minidiff train` was given as --out"),
        (("run/",), "run: no run.json in it, so no training ended there"),
        (("run/", "run/run.json={}", "run/settings.json=[]"), "settings.json and run.json are not as `minidiff train` writes them"),
        (("run/", "run/run.json={}", 'run/settings.json={"concepts": []}'), "run: no result in it yet"),
        (
            ("run/", "run/run.json={}", 'run/settings.json={"concepts": []}', "mine/"),
            "mine is there already; give the name of a new folder",
        ),
    ],
)
def test_what_cannot_be_shared_is_told_and_nothing_is_made(run, tmp_path, prepare, said):
    for entry in prepare:
        name, is_file, text = entry.partition("=")
        (tmp_path / name).write_text(text) if is_file else (tmp_path / name).mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = run("share", "run", "mine")
    assert (code, out) == (2, "") and said in err and "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert run("share", "run", "mine", "--pictures", "0")[0] == 2


def test_the_model_is_read_as_it_was_for_the_training(run, tmp_path):
    with_unknown_tensor(tmp_path / "model.safetensors")
    args = (
        "lora",
        "--prompt",
        "a cat",
        "--out",
        "run",
        *QUICK,
        "--model",
        "strange.safetensors",
        "--ignore",
        "^zorp",
        "--prediction",
        "eps",
    )
    code, _, err = run("train", *args)
    assert code == 0, err
    code, _, err = run("share", "run", "mine", "--pictures", "1", "--steps", "1")
    assert code == 0 and "--model strange.safetensors --prediction eps --ignore '^zorp' --lora" in err, err
    sd = weights_loader.load(tmp_path / "strange.safetensors", ignore="^zorp", prediction="eps", lora=tmp_path / "mine" / "run.safetensors")
    drawn = np.asarray(Image.open(tmp_path / "mine" / "images" / "0.png")).astype(int)
    assert np.abs(drawn - np.asarray(sd.generate("a cat", steps=1)[0])).max() <= 1  # of 255: rounding
    code, _, err = run("train", *args[:-1], "v", "--steps", "2")
    assert code == 2 and "prediction" in err


def test_prompts_and_triggers_are_those_of_training():
    concepts = [{"token": "<it>", "class_word": "cat", "prompt": None}, {"token": "", "class_word": "dog", "prompt": "my {} here"}]
    assert [phrase_of(concept) for concept in concepts] == ["<it> cat", "dog"]
    assert prompts_of({"concepts": concepts, "prompt": "photo of a {}"}) == ["photo of a <it> cat", "my dog here"]
    assert prompts_of({"concepts": concepts[:1], "lora": {"prompt": "a {}"}}) == ["a <it> cat"]
    assert json.loads(json.dumps(prompts_of({"concepts": []}))) == ["a photo"]


@pytest.mark.parametrize(
    ("config", "kind"),
    [(SD1, ""), (SD2, ""), (SDXL, "XL"), (small_config(), ""), (xl_config(), "XL")],
    ids=["SD 1", "SD 2", "SDXL", "bundled", "small SDXL"],
)
def test_the_card_loads_its_files_into_diffusers_pipeline_of_the_family(config, kind):
    import diffusers

    for line, name in (("pipe.load_lora_weights(folder)", kind), ("pipe.controlnet = ControlNetModel", f"{kind}ControlNet")):
        shared = Shared(files={"x": "a file"}, code=[line])
        text = card({}, shared, [], "a cat", None, config, ["sks cat"], "a sks cat")
        assert f"StableDiffusion{name}Pipeline" in text and hasattr(diffusers, f"StableDiffusion{name}Pipeline")
        assert f"pipe = StableDiffusion{name}Pipeline.from_pretrained(" in text
