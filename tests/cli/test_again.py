"""What a picture tells of its flags: every one of `generate`, read by the grammar of the web interfaces, and made again from it."""

import numpy as np
import pytest
import torch
from PIL import Image

import weights_loader
from minidiff.adapters.tokens import NewTokens
from minidiff.cli.again import flags_of
from minidiff.cli.generate import generate
from minidiff.controlnet import create_controlnet
from minidiff.pictures import save_png
from tests.checkpoints import ldm_tensors
from tests.cli.test_main import parse_as_web_interfaces_do
from tests.command import runner
from tests.small_files import random_delta, random_lora
from tests.small_models import small_model, xl_config
from weights_loader.metadata import KEY, config_to_json
from weights_loader.name_table import ema_name
from weights_loader.write import write_safetensors

# Names with all that the grammar gives a meaning to.
MODEL, VAE, LORA, WORD, DELTA = 'a, b: "c".safetensors', "v: 1.safetensors", "l, 1.safetensors", "w, 2.safetensors", "d: 3.safetensors"
NET, HINT, PHOTO, MASK = "n, 4.safetensors", 'h: "5".png', "p, 6.png", "m: 7.png"

# The flags of a command, and what its picture tells of them under which names.
COMMANDS = {
    "all kinds of files": (
        {
            "model": MODEL,
            "negative-prompt": "blue, (red:1.2)",
            "steps": "2",
            "sampler": "ddim",
            "guidance-scale": "3.5",
            "seed": "7",
            "batch": "2",
            "size": "40x32",
            "spacing": "leading",
            "eta": "0.5",
            "vae": VAE,
            "ema": None,
            "prediction": "v",
            "ignore": r'^zorp\., "x"',
            "dtype": "float32",
            "lora": f"{LORA}:0.5",
            "embedding": f"{WORD}:<it,too>",
            "custom-diffusion": DELTA,
            "control": HINT,
            "controlnet": f"{NET}:0.8:0:0.5",
            "guess-mode": None,
            "zoom": "2",
            "zoom-filter": "nearest",
        },
        {
            "Model": MODEL,
            "Steps": "2",
            "Sampler": "DDIM",
            "CFG scale": "3.5",
            "Seed": "7",
            "Batch size": "2",
            "Size": "40x32",
            "Spacing": "leading",
            "Eta DDIM": "0.5",
            "VAE": VAE,
            "EMA": "True",
            "Prediction": "v",
            "Ignore": r'^zorp\., "x"',
            "dtype": "float32",
            "LoRA": f"{LORA}:0.5",
            "Embedding": f"{WORD}:<it,too>",
            "Custom Diffusion": DELTA,
            "Control": HINT,
            "ControlNet": f"{NET}:0.8:0:0.5",
            "Guess mode": "True",
            "Zoom": "2",
            "Zoom filter": "nearest",
        },
    ),
    "two text encoders": (
        {
            "model": "xl.safetensors",
            "steps": "1",
            "seeds": "3,7-8",
            "size": "32",
            "prompt-2": 'a dog, "blue"',
            "empty-negative": "zeros",
            "original-size": "64x48",
            "crop": "3x5",
            "target-size": "32x40",
        },
        {
            "Seeds": "3,7-8",
            "Prompt 2": 'a dog, "blue"',
            "Empty negative": "zeros",
            "Original size": "64x48",
            "Crop": "3x5",
            "Target size": "32x40",
        },
    ),
    "a border": (
        {
            "model": MODEL,
            "ignore": "^zorp",
            "steps": "2",
            "image": PHOTO,
            "strength": "0.75",
            "fit": "pad",
            "mask": MASK,
            "outpaint": "left=8,top=4",
            "feather": "1",
        },
        {
            "Image": PHOTO,
            "Denoising strength": "0.75",
            "Fit": "pad",
            "Mask": MASK,
            "Outpaint": "left=8,top=4",
            "Feather": "1",
        },
    ),
    "a part": (
        {"model": MODEL, "ignore": "^zorp", "steps": "1", "image": PHOTO, "mask": MASK, "only-masked": None, "size": "24x32"},
        {"Only masked": "True", "Work size": "24x32"},
    ),
}
# Flags that no picture tells of: where it was computed, with the same result but for rounding, and which files are read and written.
UNTOLD = {"device", "offload", "attention", "heat-maps", "settings", "prompts-file", "out"}


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    sd = small_model()
    averages = {ema_name(name): tensor + 0.01 for name, tensor in ldm_tensors(sd).items() if name.startswith("model.diffusion_model.")}
    tensors = ldm_tensors(sd) | averages | {'zorp., "x".weight': torch.zeros(1)}
    write_safetensors(tmp_path / MODEL, tensors, {KEY: config_to_json(sd.config)})
    weights_loader.save(small_model(seed=1), tmp_path / VAE)
    weights_loader.save(small_model(xl_config()), tmp_path / "xl.safetensors")
    weights_loader.write_lora(tmp_path / LORA, random_lora(sd, r"attention\.to_q"), sd)
    weights_loader.write_embedding(tmp_path / WORD, NewTokens({"*": torch.ones(2, 16)}))
    weights_loader.write_custom_diffusion(tmp_path / DELTA, random_delta(sd, words=0), sd)
    net = create_controlnet(sd.config, sd.unet, torch.Generator().manual_seed(0))
    weights_loader.write_controlnet(tmp_path / NET, net, sd)
    values = np.random.default_rng(0).integers(256, size=(32, 40, 3), dtype=np.uint8)
    save_png(Image.fromarray(values), tmp_path / HINT, hint="canny")
    save_png(Image.fromarray(values), tmp_path / PHOTO)
    mask = np.zeros((32, 40, 3), np.uint8)
    mask[8:20, 8:20] = 255
    save_png(Image.fromarray(mask), tmp_path / MASK)
    return runner(monkeypatch, tmp_path, capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_flag_is_read_as_it_was_given_and_the_picture_is_made_again(run, tmp_path, name):
    flags, told = COMMANDS[name]
    given = [f"--{flag}" if value is None else f"--{flag}={value}" for flag, value in flags.items()]
    code, _, err = run("generate", "a cat, <it,too>: red", *given, "--out", "a.png")
    assert code == 0, err
    found = parse_as_web_interfaces_do(Image.open(tmp_path / "a.png").text["parameters"])
    assert {key: found.get(key) for key in told} == told
    code, _, err = run("generate", "--settings", "a.png", "--out", "b.png")
    assert code == 0 and "not taken over" not in err, err
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_no_flag_is_forgotten():
    tried = {flag for flags, _ in COMMANDS.values() for flag in flags}
    assert tried | UNTOLD == set(flags_of(generate)) - {"prompts"} and not tried & UNTOLD
