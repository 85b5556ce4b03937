"""The training of a ControlNet: its loss by hand, what moves and what is locked, what the sheets say, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from minidiff.controlnet import create_controlnet
from minidiff.scenes.art import SIZE
from minidiff.trainers.engine.loop import randn_per_sample, rng_for
from minidiff.trainers.engine.memory import estimate_memory
from minidiff.trainers.methods.controlnet import ControlNetOptions, build
from minidiff.trainers.methods.controlnet_task import edges_of
from minidiff.trainers.methods.options import Concept, DataOptions, Prior
from tests.small_concepts import picture_folder, quick
from tests.small_models import small_config, small_model, training_config, xl_config
from tests.small_task import CPU

OPTIONS = ControlNetOptions(settings=quick(), hint="outline", scenes=3)


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(module, before):
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("config", [training_config(), replace(xl_config(), image_size=SIZE)], ids=["one encoder", "two encoders"])
def test_the_loss_is_the_diffusion_loss_with_residuals(config):
    sd = small_model(config)
    run = build(sd, [], OPTIONS)
    (task,), net = run.phases, run.controlnet.net
    with torch.no_grad():
        for conv in net.zero_convs:
            conv.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        errors, dropped = [], []
        with task:
            for sample in range(4):
                rng = rng_for(0, 5, sample)
                i = int(rng.integers(3))
                batch = task.source.batch([i], [rng])
                dropped.append(rng.random() < 0.5)
                t, eps = torch.tensor([int(rng.integers(1000))]), randn_per_sample([rng], batch.latents.shape[1:])
                told = sd.text(["" if dropped[-1] else batch.captions[0]], (SIZE, SIZE))
                assert told.size is None or told.size.tolist() == [[SIZE, SIZE, 0, 0, SIZE, SIZE]]
                alpha_bar = sd.schedule.alpha_bar[t].float().view(-1, 1, 1, 1)
                x_t = alpha_bar.sqrt() * batch.latents + (1 - alpha_bar).sqrt() * eps
                v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * batch.latents
                target = {"v": v, "eps": eps}[config.schedule.prediction]
                told = replace(told, residuals=net(x_t, t, told, net.hint_block(batch.hints)))
                errors.append((sd.unet(x_t, t, told) - target).square().mean())
            assert len(set(dropped)) == 2
            # float32, a batch of four instead of four of one
            torch.testing.assert_close(task.loss(5, range(4)), torch.stack(errors).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("middle_only", [False, True])
@pytest.mark.parametrize("config", [training_config(), replace(xl_config(), image_size=SIZE)], ids=["one encoder", "two encoders"])
def test_the_unet_is_locked_and_the_first_step_moves_the_zero_convolutions_alone(config, middle_only):
    sd = small_model(config)
    run = build(sd, [], replace(OPTIONS, middle_only=middle_only))
    unet, text, net = state(sd.unet), state(sd.text_encoder), state(run.controlnet.net)
    untrained = create_controlnet(sd.config, sd.unet, torch.Generator().manual_seed(0))
    assert not moved(untrained, net)
    steps = run.run(CPU)
    next(steps)
    last = len(run.controlnet.net.zero_convs) - 1
    zero = {name for name in net if name.startswith("zero_convs.")}
    expected = {name for name in zero if not middle_only or name.startswith(f"zero_convs.{last}.")}
    decayed = {name: tensor * (1 - 1e-2 * 1e-2) for name, tensor in net.items()}  # AdamW's weight decay moves all
    first = {name for name, x in run.controlnet.net.state_dict().items() if not torch.allclose(x, decayed[name], rtol=1e-6, atol=0)}
    assert first == expected
    list(steps)
    assert len(moved(run.controlnet.net, net)) > len(first) and moved(run.controlnet.net, net) & zero == expected
    assert not moved(sd.unet, unet) and not moved(sd.text_encoder, text)
    assert not any(p.requires_grad for module in (sd.unet, run.controlnet.net) for p in module.parameters())


def test_with_the_decoder_the_way_up_is_trained_too_and_nothing_else():
    sd = small_model(training_config())
    run = build(sd, [], replace(OPTIONS, decoder=True))
    before = state(sd.unet)
    list(run.run(CPU))
    changed = moved(sd.unet, before)
    assert changed == {name for name in before if name.startswith(("up.", "norm_out.", "conv_out."))} and run.trains_model
    half = small_model(training_config())
    half.unet.bfloat16()
    with pytest.raises(ValueError, match="the U-Net is torch.bfloat16.*load it in float32 to train its decoder"):
        build(half, [], replace(OPTIONS, decoder=True))


def test_a_frozen_model_in_half_precision_is_steered_by_a_controlnet_in_float32():
    sd = small_model(training_config())
    for part in sd.parts.values():
        part.bfloat16()
    run = build(sd, [], OPTIONS)
    losses = [float(step.loss) for _, step in run.run(CPU)]
    assert np.isfinite(losses).all() and all(p.dtype == torch.float32 for p in run.controlnet.net.parameters())


def test_a_run_stopped_and_resumed_ends_with_the_same_weights(tmp_path):
    results = []
    for stops in (False, True):
        sd = small_model(training_config())
        run = build(sd, [], replace(OPTIONS, settings=quick(ema_decay=0.5)))
        if stops:
            steps = build(sd, [], replace(OPTIONS, settings=quick(ema_decay=0.5))).run(CPU, tmp_path)
            next(steps)
            steps.close()
        list(run.run(CPU, tmp_path if stops else None))
        results.append(state(run.controlnet.net))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_training_goes_on_from_a_controlnet():
    sd = small_model(training_config())
    before = create_controlnet(sd.config, sd.unet, torch.Generator().manual_seed(5))
    assert build(sd, [], OPTIONS, start_from=before).controlnet.net is before


def test_the_sheet_shows_the_hint_beside_its_pictures_and_measures_edges():
    sd = small_model(training_config())
    run = build(sd, [], OPTIONS)
    (task,) = run.phases
    assert len(task.prompts) == 4 and task.picture_count == 3
    sheet = task.sheet(task.prompts[:2], count=2, steps=1)
    assert sheet.image.size == (3 * SIZE, 2 * SIZE)
    hint = np.asarray(sheet.image)[:SIZE, :SIZE]
    assert np.array_equal(hint, (run.controlnet.hint[0] * 255).round().byte().permute(1, 2, 0).numpy())
    assert sheet.numbers.keys() == {"edge F1", "with another hint"} and all(0 <= value <= 1 for value in sheet.numbers.values())
    assert task.sheet(task.prompts[:1], count=1, steps=1).numbers.keys() == {"edge F1"}


def test_pictures_that_follow_their_hint_agree_with_it(monkeypatch):
    """A model that drew the scenes of the hints themselves would have a high number, and a low one with another hint."""
    sd = small_model(training_config())
    (task,) = build(sd, [], OPTIONS).phases
    scenes = [task.source._scene(task.source.count + i).image for i in range(4)]
    from PIL import Image

    monkeypatch.setattr(task, "_draw", lambda prompts, hints, seed, steps: [Image.fromarray(image) for image in scenes])
    numbers = task.sheet(task.prompts, count=1, steps=1).numbers
    # Not 1: the pictures have edges inside the objects too, which an outline leaves out.
    assert numbers["edge F1"] > 0.6 and numbers["with another hint"] < 0.3


def test_edges_of_lines_are_the_lines_and_of_areas_where_they_meet():
    hint = torch.zeros(3, 32, 32)
    hint[:, 8:24, 8:24] = 1
    assert np.array_equal(edges_of(hint, "outline")[..., 0] > 0, hint[0].numpy() > 0)
    assert 40 < (edges_of(hint, "depth")[..., 0] > 0).sum() < 80


def test_the_memory_of_a_run_is_estimated_without_running_it():
    run = build(small_model(training_config()), [], OPTIONS)
    (task,) = run.phases
    with task:
        memory = estimate_memory(task, OPTIONS.settings, CPU)
    assert memory.trained == sum(p.numel() * 4 for p in run.controlnet.net.parameters()) and memory.activations > 0
    assert memory.frozen == sum(p.numel() * 4 for part in task.sd.parts.values() for p in part.parameters())  # also of the idle VAE


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scenes": 0}, "scenes 0: at least 1 is needed"),
        ({"decoder_scale": 0.0}, "decoder_scale 0.0: it must be above 0"),
        ({"data": DataOptions(flip=0.5)}, "would no longer lie on their hints"),
        ({"data": DataOptions(crop="random")}, "would no longer lie on their hints"),
        ({"prior": Prior(kind="folder")}, "a ControlNet has no class pictures"),
    ],
)
def test_options_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(OPTIONS, **changes)


def test_what_does_not_go_together_is_refused(tmp_path):
    sd = small_model(training_config())
    folder = picture_folder(tmp_path / "own", size=64)
    concept = Concept(images=folder, prompt="a cat")
    for concepts, options, message in (
        ([], replace(OPTIONS, hints=folder), "without pictures; give the folder of the pictures"),
        ([], replace(OPTIONS, data=DataOptions(size=32)), "size 32: the bundled scenes have the model's own"),
        ([concept, concept], OPTIONS, "2 folders of pictures; a ControlNet learns from one"),
        ([replace(concept, class_images=folder)], OPTIONS, "a ControlNet has no class pictures"),
        ([replace(concept, prompt=None)], replace(OPTIONS, hint="canny"), "nothing for the hole"),
    ):
        with pytest.raises(ValueError, match=message):
            build(sd, concepts, options)
    with pytest.raises(ValueError, match="this U-Net has 9 input channels"):
        build(small_model(small_config(in_channels=9)), [], OPTIONS)
