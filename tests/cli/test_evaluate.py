"""`minidiff evaluate ...`: pictures, weights, pairs, the study."""

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import weights_loader
from minidiff.cli.evaluate import kid_of
from minidiff.cli.names import slug
from minidiff.evaluation.weights import kind_of
from minidiff.scenes.scenes import Item, compose
from tests.checkpoints import with_unknown_tensor
from tests.command import runner
from weights_loader.contents import BUNDLED


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    return runner(monkeypatch, tmp_path, capsys)


def scenes(folder, subjects, captions=True):
    folder.mkdir()
    for i, subject in enumerate(subjects):
        scene = compose([Item(subject, px=50)], background="green", style="fluent")
        Image.fromarray(scene.image).save(folder / f"{i}.png")
        if captions:
            (folder / f"{i}.txt").write_text(scene.caption)
    return folder


def test_real_scenes_follow_their_captions_better_than_others(run, tmp_path):
    subjects = ("cat", "pizza", "car")
    right, wrong = scenes(tmp_path / "right", subjects), scenes(tmp_path / "wrong", subjects)
    for i in range(3):
        (wrong / f"{i}.txt").write_text((right / f"{(i + 1) % 3}.txt").read_text())
    cat = scenes(tmp_path / "cat", ("cat",), captions=False)
    scores = {}
    for folder in (right, wrong):
        code, out, err = run("evaluate", "pictures", folder, "--references", cat, "--out", tmp_path / "out.json")
        assert code == 0 and "text alignment" in out, err
        scores[folder.name] = json.loads((tmp_path / "out.json").read_text())
    assert scores["right"]["text alignment"]["mean"] > scores["wrong"]["text alignment"]["mean"] + 0.2
    likeness = list(scores["right"]["image alignment"]["each"].values())
    assert likeness[0] == pytest.approx(1, abs=1e-5) and max(likeness[1:]) < 0.9  # the cat itself; float32


def test_kid_needs_pictures_and_says_when_they_are_few(run, tmp_path):
    names = ["cat", "dog", "car", "pizza"] * 6
    one, other = scenes(tmp_path / "one", names, captions=False), scenes(tmp_path / "other", names, captions=False)
    code, out, err = run("evaluate", "pictures", one, "--real", other)
    assert code == 0 and "KID" in out and "fewer than 500" in err


def test_pictures_that_generate_drew_say_their_prompts_and_drift_from_what_was_before(run, tmp_path):
    prompts = ["a cat on a green background", "a pizza on a blue background"]
    for folder, seed in (("a", 0), ("again", 0), ("b", 1)):
        (tmp_path / folder).mkdir()
        assert run("generate", *prompts, "--steps", "4", "--seed", str(seed), "--out", tmp_path / folder / "x.png")[0] == 0
    code, out, err = run("evaluate", "pictures", "a", "--before", "again", "--out", "out.json")
    assert code == 0 and "grids of several pictures are left out: x.png" in err
    scores = json.loads((tmp_path / "out.json").read_text())
    same = scores["drift"]["each"]
    assert list(same) == ["x-0-a-cat-on-a-green-background-0.png", "x-1-a-pizza-on-a-blue-background-0.png"]
    assert list(same.values()) == pytest.approx([0, 0], abs=1e-6)  # the same pictures; float32
    (tmp_path / "a" / "captions.json").write_text(json.dumps({f"x-{i}-{slug(text)}-0.png": text for i, text in enumerate(prompts)}))
    assert run("evaluate", "pictures", "a", "--out", "out.json")[0] == 0
    assert json.loads((tmp_path / "out.json").read_text())["text alignment"] == scores["text alignment"]
    code, out, err = run("evaluate", "pictures", "a", "--before", "b")
    assert code == 2 and "b: no x-0-a-cat-on-a-green-background-0.png in it; draw the same prompts" in err
    for path in (tmp_path / "b").glob("x-*.png"):
        path.rename(path.with_name(path.name.replace("-1.png", "-0.png")))
    assert run("evaluate", "pictures", "a", "--before", "b", "--out", "out.json")[0] == 0
    assert min(json.loads((tmp_path / "out.json").read_text())["drift"]["each"].values()) > 0.001


def test_a_clip_of_ones_own_is_given_pictures_of_its_own_size(run, tmp_path, monkeypatch):
    asked = []

    class Clip:
        def __init__(self, name, weights, device):
            self.image_size = 96

        def encode_pictures(self, pixels):
            asked.append(tuple(pixels.shape))
            return pixels.mean(dim=(2, 3)) + 2

    monkeypatch.setattr("minidiff.evaluation.open_clip.OpenClip", Clip)
    folder = scenes(tmp_path / "cats", ("cat", "cat"), captions=False)
    assert run("evaluate", "pictures", folder, "--before", folder, "--clip", "weights.pt")[0] == 0
    assert asked == [(2, 3, 96, 96)] * 2


def test_nothing_to_compare_with_is_said(run, tmp_path):
    folder = scenes(tmp_path / "bare", ("cat",), captions=False)
    code, out, err = run("evaluate", "pictures", folder)
    assert code == 2 and "nothing to compare with; write captions beside the pictures" in err


def test_the_error_of_kid_is_over_prompts_where_there_are_many():
    # 30 prompts, each with 10 pictures around a place of its own: what differs from set to set are the prompts.
    def normals(*shape, seed):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    real, prompts = normals(300, 16, seed=999), [f"prompt {i // 10}" for i in range(300)]
    drawn = [(normals(30, 16, seed=2 * i)[torch.arange(300) // 10] + 0.2 * normals(300, 16, seed=2 * i + 1)) for i in range(30)]
    spread = torch.tensor([kid_of(features, real, prompts).value for features in drawn]).std()
    by_prompt, alone = (torch.tensor([kid_of(features, real, texts).error for features in drawn]).mean() for texts in (prompts, []))
    # the spread of 30 draws is known to 13 %, and the jackknife's error is at most 1.41 times too large (test_kid)
    assert 0.7 < by_prompt / spread < 1.7 and alone < 0.6 * spread


def test_features_of_any_length_have_the_same_kid():
    x, y = (torch.randn(40, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert kid_of(5 * x, 0.1 * y, []).value == pytest.approx(kid_of(x, y, []).value, rel=1e-5)  # features are float32
    assert kid_of(x, y, []).value != pytest.approx(kid_of(x, y + 1, []).value, rel=0.1)


@pytest.mark.parametrize(
    "words, message",
    [
        (("--real", "few"), "cats and few have 2 and 3 pictures; KID needs 4 of either"),
        (("--references", "few", "--out", "nowhere/out.json"), "nowhere: no such folder; make it, or choose another place"),
        (("--references", "few", "--clip-model", "ViT-L-14"), "--clip-model ViT-L-14 without its weights; give them as --clip FILE"),
        (("--references", "empty"), "empty: no picture in it"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is(run, tmp_path, words, message):
    scenes(tmp_path / "cats", ("cat", "cat"), captions=False)
    scenes(tmp_path / "few", ("cat", "dog", "car"), captions=False)
    (tmp_path / "empty").mkdir()
    code, out, err = run("evaluate", "pictures", "cats", *words)
    assert code == 2 and message in err and not out


def test_one_picture_has_no_error(run, tmp_path):
    scenes(tmp_path / "cat", ("cat",))
    assert run("evaluate", "pictures", "cat", "--out", "out.json")[1].startswith("text alignment   0.")
    assert json.loads((tmp_path / "out.json").read_text())["text alignment"]["error"] is None


def test_weights_that_did_not_move_are_told_from_those_that_did(run, tmp_path):
    code, out, err = run("evaluate", "weights", "tiny", "tiny", "--top", "1")
    assert code == 0 and out.splitlines()[0].split() == ["cross-attention", "0.000", "%"]
    sd = weights_loader.load("tiny")
    name = next(name for name, _ in sd.unet.named_parameters() if kind_of(name) == "cross-attention")
    with torch.no_grad():
        sd.unet.get_parameter(name).mul_(3)
    weights_loader.save(sd, tmp_path / "moved.safetensors")
    lines = run("evaluate", "weights", "tiny", "moved.safetensors", "--top", "1")[1].splitlines()
    moved = {line.split()[0]: float(line.split()[1]) for line in lines[:3]}
    assert moved["cross-attention"] > 0 == moved["self-attention"] == moved["other"]
    assert lines[3].split() == ["200.000", "%", "cross-attention", name]  # |3 W - W| / |W|


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("evaluate", "weights", "tiny", "tiny", "--top", "-1"), "--top -1: at least 0"),
        (("evaluate", "bundled", "--limit", "0"), "--limit 0: at least 1"),
        (("evaluate", "bundled", "--threads", "0"), "--threads 0: at least 1"),
        (("evaluate", "edits", "--count", "-2"), "--count -2: at least 1"),
        (("evaluate", "study", "out", "--jobs", "0"), "--jobs 0: at least 1"),
        (("evaluate", "study", "file"), "--out file: no folder to write to (file is a file)"),
        (("compare", "tiny", "tiny", "--tolerance", "nan"), "--tolerance nan: at least 0"),
        (("compare", "tiny", "tiny", "--tolerance", "inf"), "--tolerance inf: at least 0"),
    ],
)
def test_numbers_that_cannot_be_are_one_line_before_anything_is_read(run, tmp_path, monkeypatch, args, said):
    monkeypatch.setattr(weights_loader, "load", lambda *_, **__: pytest.fail("a model was read"))
    (tmp_path / "file").touch()
    code, out, err = run(*args)
    assert (code, out) == (2, "") and said in err and len(err.splitlines()) == 1


def test_unknown_tensors_of_a_model_of_the_scenes_are_left_out_on_request(run, tmp_path):
    (tmp_path / "tiny.safetensors").write_bytes(BUNDLED["tiny"].read_bytes())
    file = with_unknown_tensor(tmp_path / "tiny.safetensors").name
    for args in (
        ("bundled", file, "--limit", "4", "--steps", "1"),
        ("edits", file, "--part", "blends", "--blends", "1", "--steps", "2", "--seeds", "0"),
    ):
        code, out, err = run("evaluate", *args)
        assert (code, out) == (2, "") and "zorp.weight" in err and "ignore=REGEX (--ignore)" in err
        code, out, err = run("evaluate", *args, "--ignore", "^zorp")
        assert code == 0 and out.startswith("|"), err


def test_a_sheet_is_made_and_counted(run, tmp_path):
    for name, colour in (("a", 0), ("b", 255)):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(np.full((8, 8, 3), colour, np.uint8)).save(tmp_path / name / f"{i}.png")
    sheet = tmp_path / "sheet"
    assert "3 pairs" in run("evaluate", "pairs", "a", "b", sheet)[1]
    code, _, err = run("evaluate", "tally", sheet / "key.json", sheet / "form.csv")
    assert code == 2 and "row 1" in err
    (sheet / "form.csv").write_text("row,better\n1,left\n2,left\n3,equal\n")
    assert "neither in 1" in run("evaluate", "tally", sheet / "key.json", sheet / "form.csv")[1]


def test_a_report_of_nothing_says_what_to_run(run, tmp_path):
    code, out, err = run("evaluate", "report", tmp_path)
    assert code == 2 and "run minidiff evaluate study" in err


def test_the_command_of_the_model_card_prints_the_table_of_what_the_model_obeys(run):
    card = (BUNDLED["tiny"].parent / "README.md").read_text(encoding="utf-8")
    command = shlex.split(next(line for line in card.splitlines() if line.strip().startswith("minidiff evaluate bundled")))
    command[command.index("--limit") + 1] = "4"
    code, out, err = run(*command[1:], "--steps", "2")
    assert code == 0, err
    head, _, *rows = out.splitlines()
    assert head == "| figure | model | real scenes | after the VAE | pictures |"
    assert {"background", "text alignment", "KID"} <= {row.split(" | ")[0].removeprefix("| ") for row in rows}
    assert all(row.endswith(" 4 |") for row in rows if row.startswith(("| background", "| text alignment")))
