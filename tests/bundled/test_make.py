"""The whole recipe in small: every file is there, stopped anywhere it ends with the same ones, and the card says what the files say."""

import dataclasses
import itertools
import json
import re

import pytest
import torch
from PIL import Image

import weights_loader
from minidiff.bundled import make, run
from minidiff.bundled.evaluate import evaluate
from minidiff.bundled.figures import format_figures, from_json
from minidiff.bundled.make import estimate_bundled_seconds, record_times, run_bundled
from minidiff.bundled.recipe import Recipe
from minidiff.bundled.run import StageProgress
from minidiff.bundled.train_judge import JUDGE_SETTINGS, judge_config
from minidiff.machine import format_device
from minidiff.scenes.scenes import SIZE
from tests.small_models import training_config

CPU = torch.device("cpu")
CONFIG = training_config()
RECIPE = Recipe(seed=5, vae_steps=3, vae_batch=2, scenes=20, steps=3, batch=2, learning_rate=0.002, compile=False)
JUDGE = dataclasses.replace(
    judge_config(),
    widths=(8, 8, 16, 16),
    heads=2,
    text_encoder=dataclasses.replace(judge_config().text_encoder, width=16, layers=1, heads=2),
)
RESULTS = (
    "model.safetensors",
    "judge.safetensors",
    "figures.json",
    "pictures.png",
    "unet.safetensors",
    "vae.safetensors",
    "text_encoder.safetensors",
)


@pytest.fixture(autouse=True, scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "save_samples", lambda sd, path: None)
        patch.setattr(make, "judge_config", lambda: JUDGE)
        patch.setattr(make, "JUDGE_SETTINGS", dataclasses.replace(JUDGE_SETTINGS, steps=2, batch=4, save_every=1))
        patch.setattr(make, "SAMPLE_STEPS", 1)
        patch.setattr(make, "SEEDS", (0,))
        patch.setattr(make, "evaluate", few)
        yield


def few(sd, judge, **options):
    return evaluate(sd, judge, **{"limit": 6} | options, steps=1, batch=4)


def start(folder, recipe=RECIPE):
    def save(sd):
        weights_loader.save(sd, folder / "model.safetensors")
        weights_loader.save_parts(sd, folder)

    return run_bundled(CONFIG, recipe, folder, CPU, save, lambda judge: weights_loader.save_judge(judge, folder / "judge.safetensors"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, list(start(folder))


def test_every_stage_is_told_and_leaves_its_files(whole):
    folder, progress = whole
    assert [stage for stage, _ in itertools.groupby(p.stage for p in progress)] == [
        "scenes",
        "autoencoder",
        "latents",
        "diffusion",
        "judge",
        "evaluation",
        "card",
    ]
    assert [(p.i, p.steps) for p in progress if p.stage == "evaluation"] == [(4, 6), (6, 6)]
    sd, judge = weights_loader.load(folder / "parts.safetensors.index.json"), weights_loader.load_judge(folder / "judge.safetensors")
    assert sd.config.unet == CONFIG.unet and judge.config == JUDGE
    mean = torch.load(folder / "judge.pt", weights_only=True)["ema"]["judge"]["mean"]
    assert torch.equal(judge.subjects.weight, mean["subjects.weight"].half().float())  # of the averaged weights
    assert Image.open(folder / "pictures.png").size == (8 * SIZE, 5 * SIZE)
    assert {"judge.csv", "judge-loss.png", "times.json", *RESULTS} <= {path.name for path in folder.iterdir()}


def test_the_card_says_what_the_files_say(whole):
    folder, _ = whole
    text = (folder / "README.md").read_text()
    record = from_json((folder / "figures.json").read_text())
    assert format_figures(record.figures) in text and f"says of {len(record.verdicts)} pictures" in text
    times = json.loads((folder / "times.json").read_text())
    assert list(times) == ["scenes", "autoencoder", "latents", "diffusion", "judge", "evaluation", "card"]
    assert all(time["devices"] == [format_device(CPU)] and time["seconds"] > 0 for time in times.values())
    for row in (
        "| scenes | 20 scenes |",
        "| autoencoder | 3 steps of 2 |",
        "| diffusion | 3 steps of 2 |",
        "| judge | 2 steps of 4 |",
        "| evaluation |  |",
    ):
        assert row in text
    assert re.search(r"reach -?[\d.]+ dB PSNR on scenes that it has not seen, and -?[\d.]+ dB", text)
    assert "seed 5, vae_steps 3," in text and "![forty pictures](pictures.png)" in text
    weights = sum(p.numel() for p in weights_loader.load(folder / "model.safetensors").unet.parameters())
    assert f"| U-Net | widths 16, 16, 1 ResBlock a level | {weights / 1e6:.2f} M |" in text


@pytest.mark.parametrize("stop", [("diffusion", 3), ("judge", 1), ("evaluation", 4), ("card", 1)])
def test_stopped_and_started_again_it_makes_the_same_files(whole, tmp_path, stop):
    walk = start(tmp_path)
    for progress in walk:
        if (progress.stage, progress.i) == stop:
            break
    walk.close()
    assert not (tmp_path / "README.md").exists()
    rest = list(start(tmp_path))
    assert len(rest) < len(whole[1])
    for name in RESULTS:
        assert (tmp_path / name).read_bytes() == (whole[0] / name).read_bytes(), name
    assert format_figures(from_json((tmp_path / "figures.json").read_text()).figures) in (tmp_path / "README.md").read_text()


def test_a_finished_folder_is_left_as_it_is(whole):
    folder, _ = whole
    before = {name: (folder / name).read_bytes() for name in (*RESULTS, "README.md", "times.json")}
    assert list(start(folder)) == []
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_the_clock_adds_up_what_each_stage_took_over_several_runs(tmp_path, monkeypatch):
    now = iter((100.0, 101.0, 103.0, 200.0, 204.0, 209.0))  # a start and two looks, twice
    monkeypatch.setattr(make.time, "monotonic", lambda: next(now))
    path = tmp_path / "times.json"
    list(record_times(iter_of(StageProgress("scenes", 1, 2), StageProgress("judge", 1, 9)), path, CPU))
    monkeypatch.setattr(make, "format_device", lambda device: "another")
    walk = record_times(iter_of(StageProgress("judge", 8, 9), StageProgress("judge", 9, 9)), path, CPU)
    next(walk), next(walk), walk.close()
    here = format_device(CPU)
    assert json.loads(path.read_text()) == {
        "scenes": {"seconds": 1.0, "devices": [here]},
        "judge": {"seconds": 11.0, "devices": [here, "another"]},
    }


def iter_of(*progress):
    yield from progress


def test_how_long_it_will_take_is_told_of_every_stage(monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(run.time, "monotonic", lambda: float(next(now)))  # whatever is measured takes a second
    monkeypatch.setattr(make, "SEEDS", (0, 1))
    seconds = estimate_bundled_seconds(CONFIG, dataclasses.replace(RECIPE, scenes=1200, vae_steps=50, steps=70), CPU)
    assert seconds == {"scenes": 12, "autoencoder": 50, "latents": 12, "diffusion": 70, "judge": 2, "evaluation": 2 * 246 / 4}
    assert list(seconds) == ["scenes", "autoencoder", "latents", "diffusion", "judge", "evaluation"]
