"""A training run in a folder: stopped anywhere it ends with the same file; what does not belong to it is refused."""

import copy
import dataclasses
import itertools
import json
import os
import shutil
import signal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from minidiff.bundled import run
from minidiff.bundled.recipe import Recipe
from minidiff.bundled.run import run_from_scratch
from minidiff.scenes.scenes import SIZE
from minidiff.trainers.engine.log import read_rows
from tests.small_models import small_config, small_model, training_config
from tests.small_task import forked, together

CPU = torch.device("cpu")
CONFIG = training_config()
RECIPE = Recipe(seed=5, vae_steps=5, vae_batch=2, scenes=110, steps=7, batch=2, learning_rate=0.002, compile=False)


@pytest.fixture(autouse=True)
def short_intervals(monkeypatch):
    """No samples: the run of `whole` makes them, and the others must end with the same file, so samples change nothing."""
    monkeypatch.setattr(run, "save_samples", lambda sd, path: None)
    save_every(monkeypatch, 2)


def save_every(patch, steps):
    plain = Recipe._settings
    patch.setattr(Recipe, "_settings", lambda *args, **named: dataclasses.replace(plain(*args, **named), save_every=steps))


def start(folder, recipe=RECIPE, init=None, config=CONFIG, vae=None):
    """The run's progress; the model it makes is written to model.safetensors and put into the list."""
    made = []

    def save(sd):
        made.append(sd)
        parts = {"text_encoder": sd.text_encoder, "unet": sd.unet, "vae": sd.vae}
        tensors = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")

    return run_from_scratch(config, recipe, folder, CPU, save, init, vae), made


def finished(folder, **options):
    walk, made = start(folder, **options)
    return list(walk), made[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        save_every(patch, 2)
        patch.setattr(run, "SAMPLES_EVERY", 4)
        folder = tmp_path_factory.mktemp("whole")
        progress, sd = finished(folder)
    return folder, progress, sd


def test_a_run_tells_each_step_and_leaves_its_files(whole):
    folder, progress, sd = whole
    assert [(p.stage, p.i, p.steps) for p in progress] == [
        *(("scenes", i, 110) for i in (100, 110)),
        *(("autoencoder", i, 5) for i in range(1, 6)),
        *(("latents", i, 110) for i in (100, 110)),
        *(("diffusion", i, 7) for i in range(1, 8)),
    ]
    assert all((p.loss is None) == (p.stage in ("scenes", "latents")) for p in progress)
    assert "loss " in progress[-1].text and " GB" in progress[-1].text
    assert sorted(path.name for path in folder.iterdir()) == [
        "autoencoder-loss.png",
        "autoencoder.csv",
        "diffusion-loss.png",
        "diffusion.csv",
        "diffusion.pt",
        "latents.pt",
        "model.safetensors",
        "recipe.json",
        "samples-000004.png",
        "samples-000007.png",
        "vae.pt",
    ]
    with Image.open(folder / "samples-000004.png") as picture:
        assert picture.size == (4 * SIZE, 2 * SIZE)
    latents = run.Latents(**torch.load(folder / "latents.pt", weights_only=True))
    assert sd.config.vae.scaling_factor == latents.scaling_factor()
    # float64 of float32 values
    torch.testing.assert_close((latents.mean.double() * sd.config.vae.scaling_factor).std().item(), 1.0, rtol=1e-6, atol=0)


@pytest.mark.parametrize("stop", [("autoencoder", 3), ("latents", 100), ("diffusion", 5), ("diffusion", 7)])
def test_a_run_that_is_stopped_and_started_again_makes_the_same_file(whole, tmp_path, stop):
    walk, made = start(tmp_path)
    for progress in walk:
        if (progress.stage, progress.i) == stop:
            break
    walk.close()
    assert not made
    progress, _ = finished(tmp_path)
    assert len(progress) < len(whole[1])  # it went on, it did not begin again
    assert (tmp_path / "model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("given", ["nothing", "init", "vae"])
def test_how_long_it_will_take_is_told_from_the_first_steps(monkeypatch, given):
    now = itertools.count()
    monkeypatch.setattr(run.time, "monotonic", lambda: float(next(now)))  # whatever is measured takes a second
    recipe = dataclasses.replace(RECIPE, scenes=1200, vae_steps=50, steps=70)
    seconds = run.estimate_seconds(
        CONFIG, recipe, CPU, small_model(CONFIG) if given == "init" else None, small_model(CONFIG).vae if given == "vae" else None
    )
    assert seconds == {"scenes": 12, "latents": 12, "diffusion": 70} | ({"autoencoder": 50} if given == "nothing" else {})
    assert list(seconds)[-2:] == ["latents", "diffusion"]


@pytest.mark.forks
def test_a_run_that_is_killed_goes_on_from_its_last_states(whole, tmp_path):
    def run_to_death():
        for progress in start(tmp_path)[0]:
            if (progress.stage, progress.i) == ("diffusion", 5):
                os.kill(os.getpid(), signal.SIGKILL)

    assert forked(run_to_death) == -signal.SIGKILL
    progress, _ = finished(tmp_path)
    assert [(p.stage, p.i) for p in progress] == [("diffusion", i) for i in (5, 6, 7)]
    assert (tmp_path / "model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()


@pytest.mark.forks
def test_two_processes_make_one_model_with_half_the_batch_each(tmp_path):
    """One trains alone on twice the batch: both end with the same model within rounding."""
    init = small_model(CONFIG)
    recipe = dataclasses.replace(RECIPE, steps=3, scenes=20, learning_rate=0.01)

    def trained(folder, recipe, count):
        def member():
            for _ in start(folder, recipe, init)[0]:
                pass

        assert together(count, member) == [0] * count
        return load_file(folder / "model.safetensors")

    doubled = dataclasses.replace(recipe, batch=2 * recipe.batch)
    two, one = trained(tmp_path / "two", recipe, 2), trained(tmp_path / "one", doubled, 1)
    before = {f"unet.{name}": p for name, p in init.unet.state_dict().items()}

    def distance(a, b):
        return sum((a[name] - b[name]).square().sum() for name in before).sqrt().item()

    # bfloat16 products round otherwise in batches of another size, and Muon makes much of small gradients
    assert distance(two, one) < 0.1 * distance(one, before)


def test_a_finished_run_started_again_takes_no_step_and_saves_the_same(whole, tmp_path):
    folder, _, _ = whole
    before = (folder / "model.safetensors").read_bytes()
    progress, _ = finished(folder)
    assert progress == [] and (folder / "model.safetensors").read_bytes() == before


def test_another_recipe_in_the_same_folder_is_refused_and_the_field_named(whole):
    folder = whole[0]
    before = (folder / "recipe.json").read_text()
    walk, _ = start(folder, dataclasses.replace(RECIPE, batch=3, learning_rate=0.5))
    with pytest.raises(ValueError, match=r"batch 2, now 3; learning_rate 0.002, now 0.5.*choose another place"):
        next(walk)
    walk, _ = start(folder, init=small_model(CONFIG))
    with pytest.raises(ValueError, match="init False, now "):
        next(walk)
    assert (folder / "recipe.json").read_text() == before
    assert json.loads(before) == dataclasses.asdict(RECIPE) | {"init": False, "vae": False}


def test_a_run_that_does_not_name_a_newer_number_had_its_default_and_compiling_may_change_on_the_way(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    said = json.loads((tmp_path / "run" / "recipe.json").read_text())
    del said["widths"], said["schedule"], said["vae"]
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(said | {"compile": True}))
    assert finished(tmp_path / "run")[0] == []
    walk, _ = start(tmp_path / "run", dataclasses.replace(RECIPE, schedule="constant"))
    with pytest.raises(ValueError, match="schedule 'linear_after_hold', now 'constant'"):
        next(walk)


def test_the_recipe_in_small_learns_and_two_runs_are_equal_to_the_bit(tmp_path):
    recipe = dataclasses.replace(
        RECIPE, vae_steps=24, vae_batch=4, vae_learning_rate=2e-2, scenes=60, steps=24, batch=8, learning_rate=2e-2
    )
    for name in ("a", "b"):
        torch.manual_seed(ord(name))  # what the global generator holds is nobody's business
        finished(tmp_path / name, recipe=recipe)
    for stage in ("autoencoder", "diffusion"):
        losses = [loss for _, loss, _ in read_rows(tmp_path / "a" / f"{stage}.csv")]
        # The last third's mean is about 0.7 of the first's for the VAE and 0.5 for v; weights that do not move keep it at 1, to a tenth.
        assert sum(losses[-8:]) < 0.8 * sum(losses[:8]), stage
    for file in ("model.safetensors", "autoencoder.csv", "diffusion.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_vae_that_is_given_is_kept_and_the_rest_begins_from_nothing(tmp_path):
    base = small_model(CONFIG)
    progress, sd = finished(tmp_path, vae=base.vae, recipe=dataclasses.replace(RECIPE, steps=1, learning_rate=1e-9))
    assert {p.stage for p in progress} == {"scenes", "latents", "diffusion"}
    assert sd.config == CONFIG and all(torch.equal(p, base.vae.state_dict()[name]) for name, p in sd.vae.state_dict().items())
    assert not torch.equal(sd.unet.conv_in.weight, base.unet.conv_in.weight)
    walk, _ = start(tmp_path, vae=small_model(CONFIG, seed=1).vae)
    with pytest.raises(ValueError, match="holds another run .*vae "):
        next(walk)
    walk, _ = start(tmp_path, vae=base.vae, init=base)
    with pytest.raises(ValueError, match="give one of the two"):
        next(walk)


def test_a_vae_that_is_given_can_be_trained_on(tmp_path):
    base = small_model(CONFIG)
    recipe = dataclasses.replace(RECIPE, train_vae=True, vae_steps=1, vae_learning_rate=1e-6, steps=1)
    progress, sd = finished(tmp_path, vae=base.vae, recipe=recipe)
    assert [p.stage for p in progress if p.loss is not None] == ["autoencoder", "diffusion"]
    moved = max((p - base.vae.state_dict()[name]).abs().max().item() for name, p in sd.vae.state_dict().items())
    assert 0 < moved < 1e-4  # one step at a learning rate of 1e-6: from the weights given
    assert sd.config.vae.scaling_factor != CONFIG.vae.scaling_factor


def test_widths_that_are_not_the_models_are_refused(tmp_path):
    walk, _ = start(tmp_path / "new", dataclasses.replace(RECIPE, widths=(32, 64, 96)))
    with pytest.raises(ValueError, match=r"widths \(32, 64, 96\) asked for a U-Net of \(16, 16\)"):
        next(walk)
    assert not (tmp_path / "new").exists()


def test_gpus_and_cpus_with_amx_compile_unless_the_recipe_says(monkeypatch):
    cuda, recipe = torch.device("cuda"), dataclasses.replace(RECIPE, compile=None)
    for amx in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        assert [run.resolve_compile(device, recipe).compile for device in (CPU, cuda)] == [amx, True]
    # the VAE gains nothing on a CPU
    assert [run.autoencoder_settings(dataclasses.replace(recipe, compile=True), device).compile for device in (CPU, cuda)] == [False, True]
    assert [run.resolve_compile(cuda, dataclasses.replace(RECIPE, compile=say)).compile for say in (True, False)] == [True, False]


def test_init_trains_on_and_leaves_the_model_given_as_it_was(tmp_path):
    base = small_model(CONFIG)
    before = copy.deepcopy([module.state_dict() for module in (base.text_encoder, base.unet, base.vae)])
    progress, sd = finished(tmp_path, init=base, recipe=dataclasses.replace(RECIPE, steps=2, learning_rate=1e-6))
    assert {p.stage for p in progress} == {"scenes", "latents", "diffusion"}
    assert sd.config == CONFIG
    for name, p in sd.vae.state_dict().items():
        assert torch.equal(p, base.vae.state_dict()[name]), name
    moved = [(p - before[1][name]).abs().max().item() for name, p in sd.unet.state_dict().items()]
    assert 0 < max(moved) < 1e-4  # two steps at a learning rate of 1e-6: from the weights given, not from others
    for module, state in zip((base.text_encoder, base.unet, base.vae), before):
        for name, p in module.state_dict().items():
            assert torch.equal(p, state[name]), name
    assert load_file(tmp_path / "model.safetensors").keys() >= {"unet.conv_in.weight", "vae.encoder.conv_in.weight"}


def test_a_run_begun_from_one_model_is_not_continued_from_another(tmp_path):
    for _ in range(2):  # the second time it goes on
        walk, _ = start(tmp_path, init=small_model(CONFIG))
        next(walk)
    walk, _ = start(tmp_path, init=small_model(CONFIG, seed=1))
    with pytest.raises(ValueError, match="holds another run .init"):
        next(walk)


def test_init_of_another_configuration_is_refused_before_the_folder_is_made(tmp_path):
    walk, _ = start(tmp_path / "new", init=small_model(small_config("eps", image_size=SIZE)))
    with pytest.raises(ValueError, match="another configuration"):
        next(walk)
    assert not (tmp_path / "new").exists()


@pytest.mark.gpu
def test_a_gpu_trains_compiled_on_draws_made_ahead_and_its_losses_are_the_cpus(tmp_path):
    recipe = dataclasses.replace(RECIPE, vae_steps=8, steps=8)
    losses = {}
    for device in ("cpu", "cuda"):
        walk = run_from_scratch(CONFIG, recipe, tmp_path / device, torch.device(device), lambda sd: None)
        losses[device] = [p.loss.item() for p in walk if p.loss is not None]
    # bfloat16 has three digits, and its rounding grows from step to step.
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.1)
