"""The command line: pictures with their settings, and one clear line for whatever a user gets wrong."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import minidiff.attention
from minidiff import samplers
from minidiff.cli.generate import parse_size
from minidiff.cli.main import commands
from minidiff.cli.model import choose_device
from minidiff.cli.names import slug
from minidiff.kernels import tiles
from minidiff.pictures import save_png
from minidiff.png_settings import parse, picture_settings
from tests.command import runner
from tests.small_files import random_lora
from tests.small_models import small_model


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    return runner(monkeypatch, tmp_path, capsys)


def test_generate_writes_the_picture_that_the_library_makes(run, tmp_path):
    import weights_loader

    code, out, _ = run("generate", "a cat on a red background", "--steps", "3", "--seed", "5", "--out", "cat.png")
    assert (code, out.strip()) == (0, "cat.png")
    expected = weights_loader.load("tiny").generate("a cat on a red background", steps=3, seed=5)[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "cat.png")), np.asarray(expected))


MADE = ("--steps", "2", "--seed", "7", "--sampler", "euler", "--guidance-scale", "3", "--size", "72x56")


def test_a_picture_is_made_again_from_its_settings_and_flags_beside_it_win(run, tmp_path):
    assert run("generate", "a cat", "--negative-prompt=-a dog, red", *MADE, "--out", "a.png")[0] == 0
    code, _, err = run("generate", "--settings", "a.png", "--out", "b.png")
    assert code == 0 and "not taken over" not in err, err
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    run("generate", "a dog", "--settings=a.png", "--seed", "0", "--guidance_scale=4", "--out", "c.png")  # 0 is a default, and was given
    run("generate", "a dog", "--negative-prompt=-a dog, red", *MADE, "--seed", "0", "--guidance-scale", "4", "--out", "d.png")
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "d.png").read_bytes() != (tmp_path / "a.png").read_bytes()


def test_a_grid_of_several_prompts_is_made_again(run, tmp_path):
    run("generate", "a cat | a dog", 'a "red" dog\nSteps: 3, Size: 1x1', "--steps", "1", "--batch", "2", "--out", "a.png")
    assert run("generate", "--settings", "a.png", "--out", "b.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    names = sorted(path.name.removeprefix("b") for path in tmp_path.glob("b-*.png"))
    assert names == sorted(path.name.removeprefix("a") for path in tmp_path.glob("a-*.png")) and len(names) == 4
    for name in names:
        assert (tmp_path / f"a{name}").read_bytes() == (tmp_path / f"b{name}").read_bytes()


def test_small_files_in_the_settings_are_attached_again(run, tmp_path):
    import weights_loader

    sd = small_model()
    weights_loader.save(sd, tmp_path / "a, b.safetensors")
    for name in ("x", "y"):
        weights_loader.write_lora(tmp_path / f"{name}.safetensors", random_lora(sd), sd)
    loras = ("--lora", "x.safetensors:0.5", "--lora", "y.safetensors")
    assert run("generate", "a cat", "--model", "a, b.safetensors", "--steps", "1", *loras, "--out", "a.png")[0] == 0
    values = parse_as_web_interfaces_do(Image.open(tmp_path / "a.png").text["parameters"])
    assert (values["Model"], values["LoRA"], values["LoRA 2"]) == ("a, b.safetensors", "x.safetensors:0.5", "y.safetensors")
    assert run("generate", "--settings", "a.png", "--out", "b.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def parse_as_web_interfaces_do(text):
    """Their grammar, written out: NAME: VALUE, joined by commas; VALUE is a JSON string, or anything without a comma."""
    pair = re.compile(r'\s*(?P<name>\w[\w \-/]+):\s*(?P<value>"(?:[^"\\]|\\.)+"|[^,]*)(?:,|$)')
    values = {}
    for found in pair.finditer(text.split("\n")[-1]):
        value = found["value"]
        values[found["name"]] = json.loads(value) if len(value) > 1 and value[0] == value[-1] == '"' else value
    return values


def test_other_programs_read_every_setting_as_it_was_given():
    awkward = (
        "plain",
        "a, b",
        "C:\\new, folder\\x.safetensors:0.7",
        'say "cat"',
        "two\nlines",
        "größe 大きい",
        '"',
        "Steps: 3",
        " x ",
        "-",
    )
    values = {"Steps": 30, "CFG scale": 4.5, "EMA": True, "VAE": None, "Prediction": False}
    values |= {f"Value {chr(65 + i)}": text for i, text in enumerate(awkward)}
    written = picture_settings(["a cat, a dog: both"], "red, 'blue'", values)
    expected = {name: str(value) for name, value in values.items() if value not in (None, False)}
    assert parse_as_web_interfaces_do(written) == expected
    found = parse(written)
    assert (found.prompts, found.negative_prompt, dict(found.values)) == (("a cat, a dog: both",), "red, 'blue'", expected)


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_samplers_have_the_names_of_web_interfaces_and_are_found_by_them(run, tmp_path, sampler):
    eta = ("--eta", "0.5") if samplers.SAMPLERS[sampler].takes_eta else ()
    assert run("generate", "a cat", "--steps", "2", "--sampler", sampler, *eta, "--out", "a.png")[0] == 0
    values = parse_as_web_interfaces_do(Image.open(tmp_path / "a.png").text["parameters"])
    known = {"euler_ancestral": "Euler a", "dpmpp_2m": "DPM++ 2M", "dpmpp_2m_karras": "DPM++ 2M", "ddim": "DDIM", "plms": "PLMS"}
    known |= {"heun": "Heun", "euler": "Euler", "ddpm": "DDPM"}
    assert values["Sampler"] == known[sampler] and values["RNG"] == "CPU"
    assert values.get("Schedule type") == {"dpmpp_2m": "Uniform", "dpmpp_2m_karras": "Karras"}.get(sampler)
    assert values.get("Eta DDIM") == ("0.5" if eta else None)
    assert run("generate", "--settings", "a.png", "--out", "b.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        ("a cat\nSteps: 1, Sampler: DPM++ 2M Karras, Model: tiny, Clip skip: 2, Version: v1.9", (), "not taken over: Clip skip: 2"),
        ("a cat\nSteps: 1, Sampler: Euler a, Model: tiny", (), "its noise was not drawn on a CPU"),
        (
            "a cat\nSteps: 1, Sampler: DPM++ SDE, Model: tiny",
            (),
            "made with the sampler 'DPM++ SDE', which is not here; give --sampler too",
        ),
        ("a cat\nSteps: 1, Sampler: Euler, Model: dreamy", (), "made with the model 'dreamy', which is no file here; give --model too"),
        ("a cat\nSteps: 1, Sampler: DPM++ SDE, Model: dreamy", ("--model", "tiny", "--sampler", "euler"), None),
        ("a cat", (), "no settings in it; give a PNG as generate or a web interface wrote it"),
    ],
)
def test_pictures_of_web_interfaces_are_taken_as_far_as_they_can_be(run, tmp_path, text, flags, said):
    save_png(Image.new("RGB", (64, 64)), tmp_path / "web.png", text)
    code, _, err = run("generate", "--settings", "web.png", *flags, "--out", "a.png")
    assert "Traceback" not in err and (said is None or said in err), err
    assert code == (2 if said and ("give" in said) else 0) and (tmp_path / "a.png").exists() == (code == 0)
    assert run("generate", "--settings", "nothing.png")[0] == 2


def test_what_has_no_effect_is_said(run):
    err = run("generate", "a cat", "--negative-prompt", "blue", "--guidance-scale", "1", "--steps", "1")[2]
    assert "--negative-prompt has no effect at --guidance-scale 1" in err
    err = run("generate", "a cat", "--sampler", "dpmpp_2m_karras", "--spacing", "leading", "--steps", "1")[2]
    assert "--spacing has no effect on the sampler dpmpp_2m_karras" in err


def test_a_name_that_was_not_given_replaces_nothing(run, tmp_path):
    (tmp_path / "cat-1.png").write_bytes(b"of somebody")
    (tmp_path / "cat.png").write_bytes(b"given by name")
    assert run("generate", "a cat", "--steps", "1", "--batch", "2", "--out", "cat.png")[0] == 0
    assert (tmp_path / "cat-1.png").read_bytes() == b"of somebody"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cat-0.png", "cat-1-2.png", "cat-1.png", "cat.png"]


def test_names_are_measured_in_bytes_before_the_first_step(run, tmp_path):
    long = "大きい赤い猫 " * 20
    code, _, err = run("generate", long, "小さい犬" * 30, "--steps", "1", "--out", f"{'x' * 130}.png")
    assert code == 0, err
    assert len(list(tmp_path.iterdir())) == 3 and all(len(path.name.encode()) < 255 for path in tmp_path.iterdir())
    code, _, err = run("generate", long, "--steps", "1", "--out", f"{'猫' * 90}.png")
    assert code == 2 and "its name has 274 bytes; choose one of at most 241" in err and "step" not in err
    code, _, err = run("generate", "a cat", "--steps", "1", "--batch", "2", "--out", f"{'x' * 238}.png")
    assert code == 2 and "its name has" in err and "step" not in err


def test_a_place_that_cannot_be_written_is_found_before_the_first_step(run, tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    code, _, err = run("generate", "a cat", "--steps", "1", "--out", "a.png")
    assert code == 2 and "minidiff: a.png: cannot be written (Permission denied); choose another place" in err and "step" not in err
    code, _, err = run("convert", "tiny", "a.safetensors")
    assert code == 2 and "a.safetensors: cannot be written (Permission denied)" in err


def test_a_batch_is_a_grid_and_each_picture_beside_it_by_its_seed(run, tmp_path):
    run("generate", "a cat", "--steps", "2", "--seed", "3", "--batch", "3", "--out", "cats.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cats-3.png", "cats-4.png", "cats-5.png", "cats.png"]
    sheet, last = np.asarray(Image.open(tmp_path / "cats.png")), np.asarray(Image.open(tmp_path / "cats-5.png"))
    assert sheet.shape == (256, 256, 3)
    assert np.array_equal(sheet[128:, :128], last)
    run("generate", "a cat", "--steps", "2", "--seed", "5", "--out", "alone.png")
    alone = np.asarray(Image.open(tmp_path / "alone.png")).astype(int)
    assert np.abs(alone - last).max() <= 1  # one seed gives one picture, alone or in a batch, to 1/255


def test_the_samplers_are_listed_from_their_table(run, monkeypatch):
    monkeypatch.setitem(samplers.SAMPLERS, "toy", samplers.Sampler(samplers.euler, "Toy", "for this test"))
    code, out, _ = run("list", "samplers")
    lines = out.splitlines()
    assert code == 0 and [line.split()[0] for line in lines] == list(samplers.SAMPLERS)
    assert lines[-1].split(maxsplit=2) == ["toy", "Toy", "for this test"]


def test_several_prompts_make_a_picture_each(run, tmp_path):
    code, _, _ = run("generate", "a cat", "a dog", "--steps", "2", "--out", "pets.png")
    assert code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pets-0-a-cat-0.png", "pets-1-a-dog-0.png", "pets.png"]
    assert Image.open(tmp_path / "pets-1-a-dog-0.png").text["parameters"].startswith("a dog\nSteps: 2")
    assert run("generate")[0] == 2


def test_without_out_the_picture_is_named_after_its_prompt(run, tmp_path):
    assert run("generate", "A cat, please!", "--steps", "1")[1].strip() == "a-cat-please-0.png"
    assert run("generate", "a cat - please", "--steps", "1")[1].strip() == "a-cat-please-0-2.png"  # nothing is overwritten


# The VAE's is not for our kernels to insist on: its width is 16 here, which they would take on a GPU.
VAES = "pytorch" if tiles.DEVICE == "cpu" else "self"


@pytest.mark.parametrize(("name", "expected"), [("naive", {"naive"}), ("pytorch", {"pytorch"}), ("triton", {"self", "cross", VAES})])
def test_attention_by_name_is_what_makes_the_picture(run, tmp_path, monkeypatch, name, expected):
    import weights_loader

    weights_loader.save(small_model(), tmp_path / "model.safetensors")
    ways, choose = set(), minidiff.kernels.dispatch.select_backend
    run("generate", "a cat", "--model", "model.safetensors", "--steps", "2", "--out", "a.png", "--device", tiles.DEVICE)
    monkeypatch.setattr(minidiff.attention, "select_backend", lambda *args: ways.add(way := choose(*args)) or way)
    code, _, err = run(
        "generate", "a cat", "--model", "model.safetensors", "--steps", "2", "--out", "b.png", "--device", tiles.DEVICE, "--attention", name
    )
    assert code == 0, err
    assert ways == expected
    usual, other = (np.asarray(Image.open(tmp_path / file)).astype(int) for file in ("a.png", "b.png"))
    assert np.abs(usual - other).max() <= 1  # of 255: rounding


def test_our_kernels_asked_for_where_they_do_not_run_end_in_one_line(run, monkeypatch):
    monkeypatch.setattr(tiles, "triton", None)
    code, out, err = run("generate", "a cat", "--steps", "1", "--attention", "triton")
    assert (code, out) == (2, "")
    assert "minidiff: attention 'triton' does not take this: Triton is not installed; choose attention 'auto' or 'pytorch'" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model", "no-such.safetensors"], "no-such.safetensors"),
        (["--sampler", "ddmp"], "sampler 'ddmp' unknown; choose ddpm, ddim,"),
        (["--steps", "0"], "steps 0 is outside 1..1000"),
        (["--steps", "1001"], "steps 1001 is outside 1..1000"),
        (["--size", "63"], "size 63 x 63: width and height must be multiples of 8"),
        (["--size", "64x"], "--size 64x: give pixels as 512"),
        (["--size", "0"], "size 0 x 0"),
        (["--batch", "0"], "--batch 0 make no picture"),
        (["--guidance-scale", "nan"], "guidance_scale nan is not a finite number"),
        (["--spacing", "even"], "spacing 'even' unknown; choose leading, linspace, trailing"),
        (["--eta", "2"], "eta 2.0 is outside 0..1"),
        (["--device", "gpu"], "device 'gpu' unknown; choose auto, cpu"),
        (["--device", "meta"], "device 'meta' unknown"),
        (["--device", "cuda:99"], "device 'cuda:99': this machine has"),
        (["--out", "picture.jpg"], "picture.jpg: pictures are written as PNG"),
        (["--out", "nowhere/picture.png"], "nowhere: no such folder"),
        (["--vae", "no-such-vae.pt"], "no-such-vae.pt"),
        (["--lora", "no-such.safetensors:0.5"], "no-such.safetensors"),
        (["--lora", "style.safetensors:much"], "weight 'much' of style.safetensors is no number"),
        (["--embedding", "no-such.pt"], "no-such.pt"),
        (["--custom-diffusion", "no-such.bin"], "no-such.bin"),
    ],
)
def test_bad_input_gets_one_clear_line_and_exit_code_2(run, tmp_path, args, said):
    code, out, err = run("generate", "a cat", *(args if "--steps" in args else [*args, "--steps", "1"]))
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("minidiff: ")]
    assert len(lines) == 1 and said in lines[0], err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_what_cannot_be_written_is_said_before_the_picture_is_made(run):
    _, _, err = run("generate", "a cat", "--out", "picture.jpg")
    assert "step" not in err  # no progress bar: no work was lost


def test_unknown_commands_and_options_exit_with_2(run):
    for args in (
        ["genrate", "a cat"],
        ["generate", "a cat", "--stps", "3"],
        ["train"],
        ["generate", "a cat", "--steps", "many"],
        ["generate", "a cat", "--prediction", "x0"],
        ["generate", "a cat", "--attention", "flash"],
    ):
        code, _, err = run(*args)
        assert code == 2 and "Traceback" not in err


def test_inspect_convert_and_compare_work_on_the_bundled_model(run, tmp_path):
    assert run("convert", "tiny", "folder")[0] == 0
    assert run("convert", "folder", "again.safetensors")[0] == 0
    code, out, _ = run("inspect", "again.safetensors")
    assert code == 0 and "v" in out
    code, out, _ = run("compare", "tiny", "again.safetensors")
    assert code == 0 and "layers agree" in out
    code, out, _ = run("compare", "tiny", "again.safetensors", "--dtype-b", "bfloat16")
    assert code == 0 and "first layer that differs: text_encoder.token_embedding" in out


def test_a_long_prompt_is_read_in_chunks_and_makes_its_picture(run):
    code, _, err = run("generate", "a cat " * 40, "--steps", "1")
    assert code == 0 and "minidiff: a prompt of 80 tokens is read in 3 chunks; the model reads 30 at once" in err


def test_sizes_are_one_number_or_width_by_height():
    assert parse_size(None) is None
    assert parse_size("512") == 512
    assert parse_size("768x512") == (768, 512)
    with pytest.raises(ValueError, match="--size 1x2x3"):
        parse_size("1x2x3")


def test_auto_takes_a_device_that_is_there():
    import torch

    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    assert choose_device("cpu") == torch.device("cpu")


def test_a_prompt_of_symbols_alone_still_names_a_file():
    assert slug("!!!") == "picture"
    assert len(slug("word " * 100)) <= 60


@pytest.mark.parametrize("command", ["generate", "train lora", "merge concepts"])
def test_help_needs_no_torch(command):
    code = (
        f"import sys; sys.argv = ['minidiff', *{command.split()!r}, '--help']\nfrom minidiff.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[2])


def test_drawing_does_not_import_the_compiler():
    """torch._dynamo takes a second to import: a third of the time from typing a prompt to the bundled model's picture."""
    code = "import sys, minidiff.pipeline, minidiff.guidance, weights_loader; assert 'torch' in sys.modules and 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[2])


def test_waiting_threads_of_a_command_do_not_hold_a_core_that_others_want():
    code = "import minidiff.cli.main, torch; print(torch.__config__.parallel_info())"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | {"OMP_DISPLAY_ENV": "verbose"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    if "GOMP" not in ran.stderr:
        pytest.skip("this PyTorch is not built with GNU OpenMP")
    assert "GOMP_SPINCOUNT = '10000'" in ran.stderr


@pytest.mark.parametrize("group", ["train", "merge", "bench"])
def test_the_commands_of_a_group_are_listed(run, group):
    code, out, _ = run(group, "--help")
    assert code == 0 and all(name.split()[1] in out for name in commands() if name.startswith(f"{group} "))
    assert run(group) == (2, "", out)
    code, _, err = run(group, "nothing")
    assert code == 2 and f"command '{group} nothing' unknown; choose {group} " in err


def test_a_learned_word_is_said_renamed_and_missed(run, tmp_path):
    import torch

    import weights_loader
    from minidiff.adapters.tokens import NewTokens

    width = weights_loader.load("tiny").config.text_encoder.width
    weights_loader.write_embedding(tmp_path / "x.safetensors", NewTokens({"*": torch.ones(2, width)}))
    code, _, err = run("generate", "a cat", "--steps", "1", "--embedding", "x.safetensors", "--out", "a.png")
    assert code == 2 and "--embedding FILE:WORD" in err and not (tmp_path / "a.png").exists()
    code, _, err = run("generate", "a cat", "--steps", "1", "--embedding", "x.safetensors:<cat>", "--out", "a.png")
    assert code == 0 and "x.safetensors adds the word <cat> (2 vectors)" in err and "no prompt uses the learned word <cat>" in err
    code, _, err = run("generate", "a <cat>", "--steps", "1", "--embedding", "x.safetensors:<cat>", "--out", "b.png")
    assert code == 0 and "no prompt uses" not in err
