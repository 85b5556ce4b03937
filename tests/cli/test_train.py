"""`minidiff train METHOD`: every method from the flags to the picture that its files make; stopped, killed, and asked for wrongly."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import weights_loader
from minidiff.bundled import make
from minidiff.bundled import run as trainers_run
from minidiff.bundled.recipe import RECIPES, Recipe
from minidiff.cli import train
from minidiff.cli.flags import flag_groups, given
from minidiff.cli.main import commands
from minidiff.cli.train import parse_concept
from minidiff.files import exclusive
from minidiff.kernels.dispatch import active_backend
from minidiff.pictures import fit, list_pictures, load_picture
from minidiff.pipeline import to_images
from minidiff.trainers.engine import memory
from minidiff.trainers.engine.log import read_rows
from minidiff.trainers.engine.settings import Settings
from minidiff.trainers.methods.lora import LoRAOptions
from minidiff.trainers.methods.method import Method
from minidiff.trainers.methods.options import Concept, DataOptions, LowRankOptions, PhaseOptions, Prior
from minidiff.trainers.methods.override import documented, flat_fields, override
from minidiff.trainers.methods.table import METHODS
from tests.checkpoints import with_unknown_tensor
from tests.command import runner
from tests.small_concepts import picture_folder
from tests.small_models import small_model, training_config

ROOT = Path(__file__).parents[2]
QUICK = ("--model", "model.safetensors", "--steps", "3", "--batch", "2", "--save-every", "1", "--num-samples", "1", "--sample-every", "0")
ESTIMATE = memory.estimate_memory


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a command in a folder with a small model and pictures of two things."""
    monkeypatch.setattr(train, "SAMPLE_STEPS", 1)
    monkeypatch.setattr(
        memory, "estimate_memory", lambda *_: memory.Memory(1, 2, 3, 4, 5, 6)
    )  # seconds each time; one test has the real one
    weights_loader.save(small_model(), tmp_path / "model.safetensors")
    picture_folder(tmp_path / "cat", seed=1)
    picture_folder(tmp_path / "dog", seed=2)
    picture_folder(tmp_path / "cat-hints", seed=4)
    picture_folder(tmp_path / "class", count=2, seed=3)
    return runner(monkeypatch, tmp_path, capsys)


CASES = {
    "lora": (
        ("lora", "--token", "sks", "--class-word", "cat", "--rank", "2", "--prior", "folder", "--class-images", "class"),
        ["lora.safetensors"],
    ),
    "lora for diffusers": (("lora", "--prompt", "a cat", "--names", "diffusers", "--text-encoder", "yes"), ["lora.safetensors"]),
    "dreambooth": (
        ("dreambooth", "--token", "sks", "--class-word", "cat", "--prior-count", "2", "--prior-steps", "2", "--ema-decay", "0.5"),
        ["model.safetensors"],
    ),
    "dreambooth with LoRA": (("dreambooth", "--low-rank", "--token", "sks", "--prior", "none"), ["lora.safetensors"]),
    "textual inversion": (("textual-inversion", "--token", "<it>", "--class-word", "cat"), ["embedding.safetensors"]),
    "textual inversion, two words": (
        ("textual-inversion", "--token", "<it>", "--concept", "images=dog,token=<that>", "--vectors", "2", "--names", "a1111"),
        ["it.safetensors", "that.safetensors"],
    ),
    "pivotal": (
        ("pivotal-tuning", "--token", "<it>", "--class-word", "cat", "--token-steps", "2"),
        ["it.safetensors", "lora.safetensors"],
    ),
    "custom diffusion": (
        (
            "custom-diffusion",
            "--token",
            "<it>",
            "--class-word",
            "cat",
            "--concept",
            'images=dog,token="<that>",class=dog',
            "--prior-count",
            "2",
        ),
        ["custom-diffusion.safetensors"],
    ),
    "custom diffusion, the original's file": (
        ("custom-diffusion", "--token", "<it>", "--class-word", "cat", "--prior", "none", "--names", "original"),
        ["delta.bin"],
    ),
    "fine-tune": (("fine-tune", "--class-word", "cat", "--weights", r"^unet\.up"), ["model.safetensors"]),
    "controlnet": (("controlnet", "--class-word", "cat", "--hint", "canny"), ["controlnet.safetensors", "hint.png"]),
    "controlnet with the decoder, for diffusers": (
        ("controlnet", "--prompt", "a cat", "--hints", "cat-hints", "--decoder", "--names", "diffusers"),
        ["controlnet", "model.safetensors"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_command_that_is_printed_draws_what_was_learnt(run, tmp_path, case):
    args, files = CASES[case]
    base = (tmp_path / "model.safetensors").read_bytes()
    code, out, err = run("train", *args, "--images", "cat", "--out", "run", *QUICK)
    assert code == 0, err
    assert (tmp_path / "model.safetensors").read_bytes() == base  # training wrote nothing into the mapped file
    assert "numbers are trained on" in err and "of memory" in err
    command = shlex.split(out)
    assert command[:2] == ["minidiff", "generate"] and all(f"run/{name}" in command for name in files)
    code, _, err = run(*command[1:], "--steps", "1", "--out", "picture.png")
    assert code == 0, err
    run("generate", command[2], "--model", "model.safetensors", "--steps", "1", "--out", "plain.png")
    assert (tmp_path / "picture.png").read_bytes() != (tmp_path / "plain.png").read_bytes()
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["method"] == args[0] and settings["model"] == "model.safetensors" and settings["concepts"][0]["images"] == "cat"
    for name in files:
        if name.endswith(".safetensors") and name != "model.safetensors":
            with safe_open(tmp_path / "run" / name, "pt") as file:
                assert json.loads(file.metadata()["minidiff.settings"]) == settings


@pytest.mark.parametrize("case", CASES)
def test_the_last_sheet_shows_what_is_written_of_every_method(run, tmp_path, case):
    """At a rate and a decay at which the averages that are written are far from the last weights."""
    args, _ = CASES[case]
    rate = "1" if args[0] == "textual-inversion" else "0.03"  # its words have vectors of length 1 or so, and nothing else learns
    code, out, err = run("train", *args, "--images", "cat", "--out", "run", *QUICK, "--ema-decay", "0.9", "--learning-rate", rate)
    assert code == 0, err
    assert run(*shlex.split(out)[1:], "--steps", "1", "--out", "picture.png")[0] == 0
    (sheet,) = (tmp_path / "run").glob("*-000003.png")
    shown, drawn = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (sheet, tmp_path / "picture.png"))
    tiles = (shown[y : y + 32, x : x + 32] for y in range(0, shown.shape[0], 32) for x in range(0, shown.shape[1], 32))
    assert min(np.abs(tile - drawn).max() for tile in tiles) <= 1  # of 255: rounding


def test_a_run_leaves_its_losses_a_curve_and_sheets_of_pictures(run, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(memory, "estimate_memory", ESTIMATE)
    args = ("train", "lora", "--images", "cat", "--prompt", "a cat", "--out", "run", *QUICK, "--sample-every", "2", "--num-samples", "3")
    code, _, err = run(*args, "--sample-prompt", "a red cat", "--sample-prompt", "a dog")
    assert code == 0 and re.search(
        r"minidiff: about [\d.]+ MB of memory: weights [\d.]+ MB, optimizer [\d.]+ [kM]B, activations [\d.]+ MB; .* in use now$",
        err,
        re.MULTILINE,
    ), err
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"lora.csv", "lora-loss.png", "lora-000002.png", "lora-000003.png", "lora.state", "run.json"} <= names
    # A row of the pictures, then for each prompt one of the untouched model and one of what was learned; a column for each seed.
    sheet = Image.open(tmp_path / "run" / "lora-000003.png")
    assert sheet.size == (96, 5 * 32)
    row = np.concatenate([np.asarray(image) for image in weights_loader.load("model.safetensors").generate("a dog", batch=3, steps=1)], 1)
    assert np.abs(np.asarray(sheet)[96:128].astype(int) - row).max() <= 1  # of 255: rounding, in a batch of another size
    assert not np.array_equal(np.asarray(sheet)[128:], np.asarray(sheet)[96:128])
    shown = [to_images(fit(load_picture(path), 32)[None])[0] for path in list_pictures(tmp_path / "cat")[:3]]
    assert np.array_equal(np.asarray(sheet)[:32, : 32 * len(shown)], np.concatenate([np.asarray(one) for one in shown], 1))
    assert "run/lora.safetensors: " in err and "; read by: minidiff alone, whose own the bundled model is" in err
    assert "run/lora-000003.png: your pictures, then for each prompt the untouched model" in err
    assert [line.split(",")[0] for line in (tmp_path / "run" / "lora.csv").read_text().splitlines()] == ["1", "2", "3"]


def learned(folder):
    return load_file(folder / "lora.safetensors")


def test_stopped_by_ctrl_c_and_started_again_it_ends_the_same(run, tmp_path, monkeypatch):
    args = ("train", "lora", "--images", "cat", "--prompt", "a cat", *QUICK[:-4], "--num-samples", "1", "--save-every", "100")
    assert run(*args, "--out", "whole")[0] == 0

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_sheet", interrupted)
        code, out, err = run(*args, "--out", "parts", "--sample-every", "2")
    assert (code, out) == (130, "") and "stopped; the same command resumes from what is saved in parts" in err and "Traceback" not in err
    code, _, err = run(*args, "--out", "parts", "--sample-every", "2")
    assert code == 0
    whole, parts = learned(tmp_path / "whole"), learned(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    before = (tmp_path / "parts" / "lora.safetensors").read_bytes()
    code, out, err = run(*args, "--out", "parts", "--sample-every", "2")
    assert code == 0 and "all steps were taken before" in err
    assert (tmp_path / "parts" / "lora.safetensors").read_bytes() == before


def test_killed_and_started_again_it_ends_the_same(run, tmp_path):
    args = ("train", "lora", "--images", "cat", "--prompt", "a cat", "--model", "model.safetensors", "--steps", "40", "--batch", "1")
    args += ("--save-every", "1", "--num-samples", "1", "--sample-every", "0", "--threads", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "minidiff", *args, "--out", "killed"], cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL
    )
    state = tmp_path / "killed" / "lora.state"
    for _ in range(1200):
        if state.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -9 and state.exists() and not (tmp_path / "killed" / "lora.safetensors").exists()
    assert run(*args, "--out", "killed")[0] == 0
    assert run(*args, "--out", "whole")[0] == 0
    killed, whole = learned(tmp_path / "killed"), learned(tmp_path / "whole")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_two_processes_learn_what_one_does_with_the_doubled_batch(run, tmp_path):
    args = ["train", "lora", "--images", "cat", "--prompt", "a cat", "--prior", "generated", "--class-word", "cat", "--prior-count", "2"]
    args += [
        "--prior-steps",
        "2",
        "--model",
        "model.safetensors",
        "--steps",
        "3",
        "--num-samples",
        "1",
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "minidiff"]
    done = subprocess.run(
        [*torchrun, *args, "--batch", "2", "--out", "two"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "find_unused_parameters" not in done.stderr  # DDP's warning, once a process
    assert done.stdout.count("minidiff generate") == 1 and done.stderr.count("numbers are trained on") == 1  # one process talks
    assert run(*args, "--batch", "4", "--out", "one")[0] == 0
    one, two = learned(tmp_path / "one"), learned(tmp_path / "two")
    for name in one:
        # AdamW's first steps have the size of the learning rate, 2e-3, whichever way a gradient near 0 is rounded
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=2e-4)


@pytest.mark.slow
def test_a_dead_process_ends_all_and_one_process_goes_on(run, tmp_path):
    """Slow: three interpreters import PyTorch. That the one left says so in one line is tested with the engine: here torchrun may be faster."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os\n"
        "from minidiff.cli.main import main\n"
        "from minidiff.trainers.methods.finetune_task import FinetuneTask\n"
        "loss = FinetuneTask.loss\n"
        "def dying(task, step, sample_ids):\n"
        "    if step == 4 and os.environ['RANK'] == '1':\n"
        "        os._exit(7)\n"
        "    return loss(task, step, sample_ids)\n"
        "FinetuneTask.loss = dying\n"
        "main()\n"
    )
    args = ["train", "lora", "--images", "cat", "--prompt", "a cat", "--model", "model.safetensors", "--steps", "6", "--save-every", "2"]
    args += ["--num-samples", "1", "--sample-every", "0", "--threads", "1", "--device", "cpu", "--out", "run"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", script]
    died = subprocess.run(
        [*torchrun, *args, "--batch", "2"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert died.returncode == 1 and "exitcode  : 7" in died.stderr, died.stderr
    own, torchruns = died.stderr[: died.stderr.index("Traceback")], died.stderr.count("Traceback (most recent call last)")
    assert torchruns == 1 and own.count("has lost another one, which has ended") <= 1 and "[rank" not in own
    assert torch.load(tmp_path / "run" / "lora.state", weights_only=True)["i"] == 4
    code, _, err = run(*args, "--batch", "4")
    assert code == 0 and "| 4/6 [" in err, err  # where its bar begins


def test_a_full_disk_ends_in_one_line(run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    code, out, err = run("train", "lora", "--images", "cat", "--prompt", "a cat", "--out", "run", *QUICK)
    assert (code, out) == (2, "") and "Traceback" not in err
    assert "run/lora.state could not be written ([Errno 28] No space left on device)" in err


LORA = ("lora", "--prompt", "a cat")
BAD = {
    ("lora",): "nothing to learn; give --images DIR, or --concept images=DIR,",
    ("lora", "--token", "sks"): "--token without --images",
    (*LORA, "--images", "nowhere"): "nowhere: no such folder",
    (*LORA, "--images", "empty"): "empty: no picture in it",
    (*LORA, "--images", "broken"): "broken/0.png: not a picture that can be read",
    (*LORA, "--images", "tiny"): "tiny/0.png: 8 x 8 pixels are too few",
    (*LORA, "--images", "cat", "--learning-rate", "0"): "learning_rate 0.0: nothing is learned at it",
    (*LORA, "--images", "cat", "--steps", "0"): "steps 0: training needs at least 1",
    (*LORA, "--images", "cat", "--rank", "0"): "rank 0",
    (*LORA, "--images", "cat", "--layers", "atention"): "atention",
    (*LORA, "--images", "cat", "--num-samples", "0"): "--num-samples 0: at least 1",
    (*LORA, "--images", "cat", "--device", "gpu"): "device 'gpu' unknown",
    (*LORA, "--images", "cat", "--captions"): "give one of the two",
    (*LORA, "--images", "cat", "--concept", "images=cat"): "cat: given twice",
    (*LORA, "--images", "cat", "--concept", "dog"): "--concept dog: expected images=DIR",
    (*LORA, "--images", "cat", "--prior", "folder"): "needs class pictures",
    ("lora", "--images", "cat", "--captions"): "cat: no captions",
    ("lora", "--images", "cat"): "give a token or a class word",
    ("dreambooth", "--images", "cat", "--class-word", "cat"): "DreamBooth needs a token",
    ("dreambooth", "--images", "cat", "--token", "sks"): "class pictures need a class word",
    ("dreambooth", "--images", "cat", "--token", "sks", "--rank", "4"): "--rank is of a LoRA; give --low-rank too",
    ("textual-inversion", "--images", "cat"): "no token; give the new word",
    ("textual-inversion", "--images", "cat", "--token", "cat"): "'cat'",
    ("textual-inversion", "--images", "cat", "--token", "<it>", "--start", "a red cat"): "is not a single token",
    ("custom-diffusion", "--images", "cat", "--token", "<it>", "--class-word", "cat", "--start-from", "no-such.bin"): "no-such.bin",
    ("fine-tune", "--images", "cat", "--class-word", "cat", "--weights", "nothing"): "nothing",
    (*LORA, "--images", "cat", "--names", "diffusers", "--alpha", "1"): "take the names 'kohya', or an alpha that is the rank",
    ("lora", "--images", "cat", "--token", "sks", "--prompt", "many tasks"): "does not name sks",
    ("controlnet",): "scenes have 128 pixels, this model 32; give pictures of your own, --images",
    ("controlnet", "--images", "cat", "--prompt", "a cat"): "hint 'outline' cannot be made from a picture; choose canny, scribble, tile",
    ("controlnet", "--images", "cat", "--prompt", "a cat", "--hints", "class"): "class: no hint for 2.png",
    ("controlnet", "--hints", "cat-hints"): "cat-hints without pictures; give the folder of the pictures, --images",
    ("controlnet", "--images", "cat", "--class-word", "cat", "--class-images", "class"): "a ControlNet has no class pictures",
    ("controlnet", "--images", "cat", "--start-from", "model.safetensors"): "given as a ControlNet, but it is a whole model",
}


@pytest.mark.parametrize("args", BAD, ids=" ".join)
def test_bad_input_gets_one_clear_line_before_anything_is_made(run, tmp_path, args):
    for folder, content in (("empty", None), ("broken", b"no picture"), ("tiny", None)):
        (tmp_path / folder).mkdir()
        if content:
            (tmp_path / folder / "0.png").write_bytes(content)
    (tmp_path / "tiny").rmdir()
    picture_folder(tmp_path / "tiny", size=8)
    options = [option for i in range(0, len(QUICK), 2) if QUICK[i] not in args for option in QUICK[i : i + 2]]
    code, out, err = run("train", *args, "--out", "run", *options)
    lines = [line for line in err.splitlines() if line.startswith("minidiff: ")]
    assert (code, out) == (2, "") and len(lines) == 1 and BAD[args] in lines[0] and "Traceback" not in err, err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("args", [("lora", "--images", "large", "--prompt", "a cat", "--out", "run"), ("from-scratch", "run")])
def test_attention_by_name_holds_for_the_whole_run(run, tmp_path, monkeypatch, args):
    def begun(*_):
        raise ValueError(f"begun with attention {active_backend()}")

    picture_folder(tmp_path / "large", size=64)  # half of what the bundled model draws
    monkeypatch.setattr(memory, "estimate_memory", begun)
    monkeypatch.setattr("minidiff.bundled.run.estimate_seconds", lambda *_: {})
    monkeypatch.setattr("minidiff.bundled.run.run_from_scratch", begun)
    assert "begun with attention naive" in run("train", *args, "--attention", "naive")[2]
    assert active_backend() == "auto"


def test_what_is_learned_so_far_is_kept_beside_each_sheet_and_is_what_the_sheet_shows(run, tmp_path):
    args = ("train", "lora", "--images", "cat", "--prompt", "a cat", *QUICK, "--sample-every", "2", "--ema-decay", "0.9", "--rank", "2")
    assert run(*args, "--out", "run", "--sample-prompt", "a cat", "--learning-rate", "0.1")[0] == 0
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"lora-000002.png", "lora-000002.safetensors", "lora-000003.png", "lora.safetensors"} <= names
    assert "lora-000003.safetensors" not in names and not [name for name in names if name.startswith(".")]
    for sheet, file in (("lora-000002", "lora-000002"), ("lora-000003", "lora")):
        made = ("--model", "model.safetensors", "--lora", f"run/{file}.safetensors", "--steps", "1", "--out", f"{file}.png")
        assert run("generate", "a cat", *made)[0] == 0
        shown, drawn = (np.asarray(Image.open(tmp_path / path)).astype(int) for path in (f"run/{sheet}.png", f"{file}.png"))
        assert np.abs(shown[-32:] - drawn).max() <= 1  # of 255: rounding; above it are the pictures and the untouched model
    assert (tmp_path / "lora.png").read_bytes() != (tmp_path / "lora-000002.png").read_bytes()


def test_a_finished_run_goes_on_with_more_steps(run, tmp_path):
    args = ("train", "lora", "--images", "cat", "--prompt", "a cat", *QUICK[:2], *QUICK[4:])
    assert run(*args, "--batch", "2", "--steps", "2", "--out", "parts")[0] == 0
    assert run(*args, "--batch", "2", "--steps", "4", "--out", "parts")[0] == 0
    assert run(*args, "--batch", "2", "--steps", "4", "--out", "whole")[0] == 0
    parts, whole = learned(tmp_path / "parts"), learned(tmp_path / "whole")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [row[0] for row in read_rows(tmp_path / "parts" / "lora.csv")] == [1, 2, 3, 4]


def test_a_loss_that_is_not_finite_ends_in_one_line(run, tmp_path):
    args = ("train", "lora", "--images", "cat", "--prompt", "a cat", "--out", "run", *QUICK, "--max-grad-norm", "inf")
    code, out, err = run(*args, "--learning-rate", "1e30")
    lines = [line for line in err.splitlines() if line.startswith("minidiff: the loss is")]
    assert (code, out) == (2, "") and len(lines) == 1 and "lower the learning rate (1e+30)" in lines[0] and "Traceback" not in err, err


def test_flags_without_effect_are_said_before_the_first_step(run):
    out = ("--out", "run", "--images", "cat", *QUICK)
    err = run("train", *LORA, "--prior-count", "3", "--text-scale", "2", *out)[2]
    assert "minidiff: --prior-count has no effect: there are no class pictures; --prior says which" in err
    assert "minidiff: --text-scale has no effect: the text encoder is not trained" in err
    folder = ("--class-word", "cat", "--prior", "folder", "--class-images", "class", "--prior-count", "3", "--prior-steps", "9")
    err = run("train", *LORA, *folder, "--out", "second", *out[2:])[2]
    assert "--prior-count has no effect: --prior folder takes all pictures of --class-images" in err
    assert "--prior-steps has no effect: class pictures are not generated" in err
    assert "has no effect" not in run("train", *LORA, "--text-encoder", "yes", "--text-scale", "2", "--out", "third", *out[2:])[2]


def test_a_class_word_beside_the_word_to_start_from_has_no_effect_and_that_is_said(run):
    quick = ("--token", "<it>", "--class-word", "cat", "--images", "cat", *QUICK)
    said = "minidiff: --class-word has no effect: --start says which word the new one starts from"
    assert said in run("train", "textual-inversion", *quick, "--start", "dog", "--out", "run")[2]
    assert said in run("train", "pivotal-tuning", *quick, "--token-steps", "1", "--start", "dog", "--out", "second")[2]
    assert "has no effect" not in run("train", "textual-inversion", *quick, "--out", "third")[2]


def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_read(run, tmp_path, monkeypatch):
    monkeypatch.setattr("minidiff.cli.train.load", lambda *_, **__: pytest.fail("the model was read"))
    code, out, err = run("train", *LORA, "--images", "cat", "--out", "model.safetensors/run", *QUICK)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert "--out model.safetensors/run: no folder to write to" in err and "model.safetensors is a file" in err

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    before = set(tmp_path.iterdir())
    monkeypatch.setattr(Path, "touch", refuse)
    for args in (("train", *LORA, "--images", "cat", "--out", "new/run", *QUICK), ("train", "from-scratch", "new/run")):
        code, out, err = run(*args)
        assert (code, out, err) == (2, "", "minidiff: --out new/run: no folder to write to (Permission denied); choose another place\n")
    assert set(tmp_path.iterdir()) == before


def test_unknown_tensors_of_the_model_are_left_out_on_request_and_the_printed_command_says_so(run, tmp_path):
    with_unknown_tensor(tmp_path / "model.safetensors")
    quick = ("--images", "cat", "--out", "run", *QUICK, "--model", "strange.safetensors")
    code, _, err = run("train", *LORA, *quick)
    assert code == 2 and "zorp.weight" in err
    code, out, err = run("train", *LORA, *quick, "--ignore", "^zorp")
    assert code == 0 and "--model strange.safetensors --ignore '^zorp'" in out, err


def test_a_folder_with_files_that_are_no_runs_is_left_as_it_is(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "lora.safetensors").write_bytes(b"of somebody")
    code, _, err = run("train", *LORA, "--images", "cat", "--out", "mine", *QUICK)
    assert code == 2 and "--out mine: holds lora.safetensors, and no run; choose a new folder, or an empty one" in err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["lora.safetensors"]


def test_two_runs_do_not_share_a_folder(run, tmp_path):
    (tmp_path / "run").mkdir()
    with exclusive(tmp_path / "run"):
        code, _, err = run("train", *LORA, "--images", "cat", "--out", "run", *QUICK)
    assert code == 2 and "run: another run is at work there" in err
    (tmp_path / "run" / "run.json").write_text("[]")
    code, _, err = run("train", *LORA, "--images", "cat", "--out", "run", *QUICK)
    assert code == 2 and "run.json: no settings of a run" in err


def test_names_made_of_words_are_checked_before_the_first_step(run):
    args = ("train", "textual-inversion", "--names", "a1111", "--images", "cat", "--out", "run", *QUICK)
    code, _, err = run(*args, "--token", "<it>", "--concept", "images=dog,token=[it]")
    assert code == 2 and "the words <it>, [it] would have one file name" in err and "step" not in err
    assert run(*args, "--token", f"<{'猫' * 90}>")[0] == 0  # 270 bytes: its file's name is shorter


def test_a_folder_of_another_run_is_left_as_it_is(run, tmp_path):
    assert run("train", *LORA, "--images", "cat", "--out", "run", *QUICK)[0] == 0
    state = (tmp_path / "run" / "lora.state").read_bytes()
    code, _, err = run("train", *LORA, "--images", "dog", "--out", "run", *QUICK)
    assert code == 2 and "run/lora.state holds another run (data " in err
    code, _, err = run("train", "fine-tune", "--images", "cat", "--class-word", "cat", "--out", "run", *QUICK)
    assert code == 2 and "run holds another run (method 'lora', now 'fine-tune'; names 'kohya', now 'diffusers')" in err
    code, _, err = run("train", *LORA, "--images", "cat", "--out", "model.safetensors", *QUICK)
    assert code == 2 and "--out model.safetensors: no folder to write to" in err
    assert (tmp_path / "run" / "lora.state").read_bytes() == state


def test_a_name_that_splits_is_warned_of(run):
    code, _, err = run(
        "train", "dreambooth", "--low-rank", "--images", "cat", "--token", "xyzzyq", "--prior", "none", "--out", "run", *QUICK
    )
    assert code == 0 and err.count("token 'xyzzyq' splits into") == 1


def test_concepts_are_added_to_those_learnt_before(run, tmp_path):
    args = ("train", "custom-diffusion", "--prior", "none", *QUICK)
    assert run(*args, "--images", "cat", "--token", "<it>", "--out", "first")[0] == 0
    code, out, err = run(
        *args, "--images", "dog", "--token", "<that>", "--start-from", "first/custom-diffusion.safetensors", "--out", "second"
    )
    assert code == 0, err
    first, second = (load_file(tmp_path / name / "custom-diffusion.safetensors") for name in ("first", "second"))
    assert torch.equal(first["modifier_token.<it>"], second["modifier_token.<it>"]) and "modifier_token.<that>" in second


FROM_SCRATCH = ("train", "from-scratch", "run", "--scenes", "4", "--steps", "2", "--batch", "2", "--threads", "1", "--compile", "no")


def test_from_scratch_trains_on_and_goes_on(run, tmp_path):
    weights_loader.save(small_model(training_config()), tmp_path / "base.safetensors")
    args = (*FROM_SCRATCH, "--init", "base.safetensors")
    code, out, err = run(*args)
    assert (code, out.strip()) == (0, "run/model.safetensors"), err
    assert re.search(r"minidiff: on CPU, 1 thread, about: scenes \d+ s, latents \d+ s, diffusion \d+ s; \d+ s in all", err)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"text_encoder.safetensors", "unet.safetensors", "vae.safetensors", "parts.safetensors.index.json"} <= names
    assert "judge.safetensors" not in names
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    code, _, err = run(*args)
    assert code == 0 and (tmp_path / "run" / "model.safetensors").read_bytes() == before
    assert "in all" not in err  # nothing is left to be told of
    code, _, err = run(*args, "--seed", "1")
    assert code == 2 and "holds another run (seed 0, now 1)" in err
    code, _, err = run(*args, "--vae", "base.safetensors")
    assert code == 2 and "give one of the two" in err


def test_the_recipes_are_told_apart(run, tmp_path, monkeypatch):
    """What they do is tested where it is done."""
    asked = {}

    def spy(name):
        def started(config, recipe, folder, device, *rest):
            asked[name] = (config, recipe, rest)
            yield from ()

        return started

    monkeypatch.setattr(trainers_run, "run_from_scratch", spy("alone"))
    monkeypatch.setattr(make, "run_bundled", spy("whole"))
    monkeypatch.setattr(trainers_run, "estimate_seconds", lambda *_: {"scenes": 1.0})
    monkeypatch.setattr(make, "estimate_bundled_seconds", lambda *_: {"judge": 3000.0, "evaluation": 1000.0})
    code, _, err = run("train", "from-scratch", "a", "--recipe", "bundled", "--steps", "7")
    assert code == 0 and "judge 50 min, evaluation 17 min; 1 h 7 min in all" in err, err
    code, _, err = run("train", "from-scratch", "b", "--recipe", "half", "--vae", "tiny", "--compile", "no")
    assert code == 0 and "scenes 1 s; 1 s in all" in err, err
    assert asked["whole"][1] == dataclasses.replace(RECIPES["bundled"], steps=7) and asked["whole"][2][2:] == (None, None)
    config, recipe, (_, init, vae) = asked["alone"]
    tiny = weights_loader.load("tiny")
    assert recipe == dataclasses.replace(RECIPES["half"], compile=False) and init is None
    assert (
        config.unet.widths == (32, 64, 96)
        and config.vae == tiny.config.vae
        and torch.equal(vae.encoder.conv_in.weight, tiny.vae.encoder.conv_in.weight)
    )
    assert run("train", "from-scratch", "c", "--widths", "32", "64", "64")[0] == 0 and asked["alone"][0].unet.widths == (32, 64, 64)


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, "from-scratch"])
def test_help_shows_every_flag_once_and_says_what_it_is(run, method):
    code, out, _ = run("train", method, "--help-all")
    assert code == 0
    flags = re.findall(r"^  (--[a-z][\w-]*)", out, flags=re.MULTILINE)
    assert len(flags) == len(set(flags)) > 5 and not any("." in flag for flag in flags)
    entries = re.split(r"^  (?=--[a-z])", out, flags=re.MULTILINE)[1:]
    assert all(re.search(r"[a-z]{3,}", entry.split(maxsplit=1)[1].lower()) for entry in entries)


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_help_shows_the_presets_number_beside_each_flag(run, method, low_rank):
    presets = METHODS[method].low_rank_presets if low_rank else METHODS[method].presets
    if not presets:
        return
    out = " ".join(run("train", method, *["--low-rank"] * low_rank, "--help-all")[1].split())
    for family, options in presets.items():
        for name in ("steps", "learning_rate"):
            value = getattr(options.phases()[-1].settings, name)
            shown = re.search(rf"--{name.replace('_', '-')} [A-Z].*?\[(.*?)\]", out)[1]
            ours = next(part for part in shown.split("; ") if ", " not in shown and "; " not in shown or family in part)
            assert ours.split()[-1] == f"{value:g}", (family, shown)


def test_every_number_of_a_run_has_a_flag_and_its_help():
    def names(cls):
        return {field.name for field in dataclasses.fields(cls)}

    def flags_of(cls, group):
        return names(flag_groups(cls)[group])

    assert flags_of(LoRAOptions, "settings") == names(Settings)
    assert flags_of(LoRAOptions, "data") == names(DataOptions)
    assert flags_of(LoRAOptions, "low_rank") == names(LowRankOptions)
    assert len(flags_of(LoRAOptions, "prior")) == len(names(Prior)) == len(Prior.FLAT_NAMES)
    assert flags_of(Concept, "method") == names(Concept)
    assert flags_of(Recipe, "method") == names(Recipe)
    for options in (Concept, Recipe, *(method.options for method in METHODS.values())):
        for flat in flat_fields(options):
            assert flat.help or flat.name in documented(Concept), f"{options.__name__}: {flat.name}"


def settings_flags(**values):
    return given([flag_groups(LoRAOptions)["settings"](**values)], LoRAOptions)


def test_a_flag_changes_its_number_and_nothing_else():
    settings = Settings(steps=10, batch=4, learning_rate=1e-3, warmup_steps=5, seed=3)
    base = LoRAOptions(settings=settings, low_rank=LowRankOptions(text_encoder=True))
    assert override(base, settings_flags()) == base
    changed = override(base, settings_flags(warmup_steps=0, seed=0, checkpointing=True))
    assert changed == dataclasses.replace(base, settings=dataclasses.replace(settings, warmup_steps=0, seed=0, checkpointing=True))
    flags = flag_groups(LoRAOptions)["low_rank"]
    assert override(base, given([flags()], LoRAOptions)) == base
    changed = override(base, given([flags(rank=2, layers=("conv",), text_encoder="no")], LoRAOptions))
    assert changed == dataclasses.replace(base, low_rank=LowRankOptions(rank=2, layers=("conv",)))


def test_a_concept_is_read_from_one_argument():
    concept = parse_concept('images=my cat,token="<cat>",class=cat,prompt=a photo of a {}, sitting,class-images=cats')
    assert concept == Concept(
        images=Path("my cat"), token="<cat>", class_word="cat", prompt="a photo of a {}, sitting", class_images=Path("cats")
    )
    assert parse_concept("images=a,captions=yes").captions
    for text, said in (
        ("cat", "expected images=DIR"),
        ("token=<cat>", "no images=DIR"),
        ("images=a,images=b", "given twice"),
        ("images=a,captions=1", "yes or no"),
    ):
        with pytest.raises(ValueError, match=said):
            parse_concept(text)


# --- a method of one's own --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyOptions(PhaseOptions):
    """A method of this test's own.

    Args:
        glow: how much it glows
    """

    glow: float = 1.0


def build_toy(sd, concepts, options, cache=None):
    """A LoRA on one layer, larger the more it glows."""
    from minidiff.trainers.methods.common import make_lora, make_subjects
    from minidiff.trainers.methods.finetune_task import FinetuneTask, TrainingRun

    adapter, groups = make_lora(sd, LowRankOptions(rank=1, alpha=options.glow, layers=("unet.middle.*to_q",)), options.settings.seed)
    subjects = make_subjects(sd, concepts, options, cache)
    phase = FinetuneTask(sd, "toy", subjects, options, modules={"toy": adapter}, adapters=[adapter], groups=groups, cache=cache)
    return TrainingRun((phase,), lora=adapter)


def test_a_method_is_a_file_and_a_line_in_the_table(run, tmp_path, monkeypatch):
    presets = dict.fromkeys(("sd1", "sd2", "bundled"), ToyOptions(settings=Settings(steps=5, batch=1, learning_rate=1e-2)))
    toy = Method(summary="Train a toy.", presets=presets, build=build_toy, formats={"kohya": "theirs", "diffusers": "the others'"})
    monkeypatch.setitem(METHODS, "toy", toy)
    assert "train toy" in commands()
    code, out, _ = run("train", "toy", "--help-all")
    assert code == 0 and "Train a toy." in out and out.startswith("  minidiff train toy --images")
    assert re.search(r"--glow FLOAT +how much it glows \[1\]", out) and "--prior-count INT" in out and "--names {kohya,diffusers}" in out
    code, out, err = run("train", "toy", "--images", "cat", "--class-word", "cat", "--glow", "3", "--out", "run", *QUICK)
    assert code == 0, err
    assert shlex.split(out)[-2:] == ["--lora", "run/lora.safetensors"]
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["glow"] == 3
    assert run(*shlex.split(out)[1:], "--steps", "1", "--out", "picture.png")[0] == 0
    code, _, err = run("train", "toy", "--images", "cat", "--class-word", "cat", "--out", "other", "--learning-rate", "0")
    assert code == 2 and "learning_rate 0.0: nothing is learned at it" in err
