"""Which pictures `generate` is asked for: seeds, prompts from a file, folders, zoom; and what it says of words, sizes and syntax in vain."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import weights_loader
from minidiff.cli.advice import learned_words, nearest, size_notes, syntax_notes, word_notes
from minidiff.cli.picture_files import choose_seeds, enlarge, picture_files
from minidiff.png_settings import is_grid
from minidiff.scenes.prompts import fixed_prompts
from minidiff.scenes.scenes import sample_scene
from tests.command import runner
from tests.small_models import small_model

QUICK = ("--model", "model.safetensors", "--steps", "1")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    weights_loader.save(small_model(), tmp_path / "model.safetensors")
    return runner(monkeypatch, tmp_path, capsys)


def made(tmp_path: Path, folder: str = ".") -> list[str]:
    return sorted(path.name for path in (tmp_path / folder).glob("*.png"))


def test_a_sheet_of_seeds_is_made_again_from_its_settings(run, tmp_path):
    assert run("generate", "a cat", "--seeds", "3-5,9", *QUICK, "--out", "a.png")[0] == 0
    assert made(tmp_path) == ["a-3.png", "a-4.png", "a-5.png", "a-9.png", "a.png"] and Image.open(tmp_path / "a.png").size == (64, 64)
    assert run("generate", "--settings", "a.png", "--out", "b.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert run("generate", "--settings", "a-9.png", "--out", "c.png")[0] == 0
    alone, in_sheet = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("c.png", "a-9.png"))
    assert np.abs(alone - in_sheet).max() <= 1  # one seed gives one picture, to 1/255


def test_prompts_of_a_file_make_a_row_each(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("# animals\na cat\n\n  a dog \n")
    assert run("generate", "--prompts-file", "prompts.txt", "--seeds", "0-2", *QUICK, "--out", "a.png")[0] == 0
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (64, 96, 3) and np.array_equal(sheet[32:, 64:], np.asarray(Image.open(tmp_path / "a-5-a-dog-2.png")))
    assert run("generate", "a fox", "--prompts-file", "prompts.txt", *QUICK, "--out", "b.png")[0] == 0
    assert made(tmp_path)[-4:] == ["b-0-a-fox-0.png", "b-1-a-cat-0.png", "b-2-a-dog-0.png", "b.png"]


def test_a_folder_is_made_and_nothing_in_it_replaced(run, tmp_path):
    for expected in (["a-cat-0.png"], ["a-cat-0-2.png", "a-cat-0.png"]):
        code, out, _ = run("generate", "a cat", *QUICK, "--out", "pictures")
        assert code == 0 and made(tmp_path, "pictures") == expected and (tmp_path / out.strip()).is_file()
    code, _, err = run("generate", "a cat", "--sampler", "ddmp", *QUICK, "--out", "others")
    assert code == 2 and not (tmp_path / "others").exists(), err
    assert "nowhere: no such folder" in run("generate", "a cat", *QUICK, "--out", "nowhere/pictures")[2]


@pytest.mark.parametrize("how", ["nearest", "lanczos"])
def test_zoom_enlarges_the_file_and_nothing_else(run, tmp_path, how):
    run("generate", "a cat", *QUICK, "--out", "a.png")
    assert run("generate", "a cat", *QUICK, "--zoom", "3", "--zoom-filter", how, "--out", "b.png")[0] == 0
    small, large = Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png")
    assert large.size == (96, 96) and np.array_equal(np.asarray(enlarge(small, 3, how)), np.asarray(large))
    if how == "nearest":
        assert np.array_equal(np.asarray(large), np.asarray(small).repeat(3, 0).repeat(3, 1))
    assert run("generate", "--settings", "b.png", "--out", "c.png")[0] == 0
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "c.png").read_bytes()
    run("generate", "a cat", *QUICK, "--batch", "2", "--zoom", "3", "--out", "d.png")
    assert [is_grid(tmp_path / f"{name}.png") for name in ("a", "b", "d", "d-0")] == [False, False, True, False]


def test_it_ends_with_what_was_made_and_the_command_for_it(run, tmp_path):
    code, out, err = run("generate", "a cat", *QUICK, "--seed", "4", "--out", "a.png")
    assert (code, out) == (0, "a.png\n")
    assert "32 x 32 pixels, seed 4" in err and "minidiff: next: minidiff generate --settings a.png" in err
    assert "a sheet of 2 pictures, each in a file alongside" in run("generate", "a cat", *QUICK, "--batch", "2", "--out", "b.png")[2]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--seeds", "8-0"), "--seeds 8-0: 8-0 is empty"),
        (("--seeds", "0-99999999999"), "0-99999999999 is too many; at most 4096"),
        (("--seeds", "0-4095,5000"), "--seeds 0-4095,5000: too many; at most 4096"),
        (("--batch", "1000000000000"), "--batch 1000000000000: at most 4096 pictures of a prompt"),
        (("--seeds", "a-b"), "--seeds a-b: 'a-b' is no seed; write 0-8, or 3,7,9"),
        (("--seeds", "1,,2"), "--seeds 1,,2: '' is no seed"),
        (("--seeds", "0-8", "--batch", "3"), "--seeds 0-8 with --batch: give one of the two"),
        (("--seeds", "0-8", "--seed", "3"), "--seeds 0-8 with --seed"),
        (("--prompts-file", "none.txt"), "--prompts-file none.txt: no such file"),
        (("--prompts-file", "empty.txt"), "--prompts-file empty.txt: no prompts in it"),
        (("--zoom", "0"), "--zoom 0 is outside 1..64"),
    ],
)
def test_bad_input_ends_in_one_line(run, tmp_path, args, said):
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    code, out, err = run("generate", "a cat", *QUICK, *args)
    assert (code, out) == (2, "") and said in err and len(err.splitlines()) == 1 and not made(tmp_path)


def test_seeds_are_counted_in_order():
    assert choose_seeds(7, 3, None) == [7, 8, 9]
    assert choose_seeds(0, 1, "3, 0-2,9") == [3, 0, 1, 2, 9]


def test_a_seed_that_is_given_twice_has_two_files():
    files = picture_files(Path("a.png"), ["a cat"], [("a cat", 3), ("a cat", 3), ("a cat", 4)])
    assert len(set(files)) == 4


# --- what is asked for in vain ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a cat <lora:tiger:0.7>", "give --lora tiger.safetensors:0.7"),
        ("a cat <lora:tiger>", "give --lora tiger.safetensors:1"),
        ("a [cat:dog:0.5]", "[cat:dog:0.5] is text here"),
        ("a [cat|dog]", "[cat|dog] is text here; give two prompts"),
        ("a cat AND a dog", "AND is the word 'and' here"),
        ("a cat BREAK a dog", "BREAK is a word here"),
        ("a ((small)) cat", "((small)): brackets without a number are text here; write a weight as (word:1.2)"),
        ("a [small] cat", "[small]: square brackets are text here; write a weight as (word:0.9)"),
        ("embedding:cat on a table", "give --embedding cat.safetensors"),
    ],
)
def test_syntax_without_effect_is_told_with_the_nearest_right_thing(prompt, said):
    (line,) = syntax_notes([prompt, "a dog"])
    assert said in line


def test_plain_prompts_and_weights_are_passed_over():
    assert list(syntax_notes(["a (small:1.4) cat and a dog, at 12:30 (in Sandy's house)", "a <cat>", ""])) == []


def test_every_word_of_the_captions_is_known():
    captions = [prompt.text for prompt in fixed_prompts()] + [sample_scene(np.random.default_rng(i)).caption for i in range(200)]
    assert list(word_notes(captions, ())) == []


def test_a_word_that_was_never_shown_is_told_with_the_nearest_one():
    (line,) = word_notes(["A foxx, a tiger and a <tigre> on an xylophone (small:1.3)"], ["<tigre>"])
    assert "the words foxx (fox?), tiger (cat?), xylophone;" in line and "minidiff list subjects" in line
    assert nearest("teapot", learned_words()) == "cup" and nearest("qqqq", learned_words()) is None
    assert list(word_notes(["a cat <lora:style:1>"], ())) == []  # has a line of its own


def test_sizes_far_from_the_models_own_are_told():
    assert list(size_notes((64, 64), 64)) == list(size_notes((768, 512), 512)) == list(size_notes((96, 48), 64)) == []
    assert next(size_notes((512, 256), 64)).endswith("at 512 x 256 things tend to repeat; --zoom 8 enlarges a picture of its own size")
    assert "pictures are cruder" in next(size_notes((256, 256), 512))


def test_generate_says_so(run):
    err = run("generate", "a unicorn", "--steps", "1", "--out", "a.png")[2]
    assert err.count("was never shown the words unicorn;") == 1
    assert "never shown" not in run("generate", "a unicorn", *QUICK, "--out", "b.png")[2]  # another model may know it
    assert "things tend to repeat" in run("generate", "a cat", *QUICK, "--size", "64", "--out", "c.png")[2]
