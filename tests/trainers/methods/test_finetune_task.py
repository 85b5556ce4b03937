"""The task of all personalising methods: its loss worked out by hand, what it draws, what it leaves behind."""

import dataclasses

import pytest
import torch

from minidiff.adapters.dropout import SampleDropout
from minidiff.adapters.lora import PATTERNS, create_lora
from minidiff.trainers.data.cache import Cache, Pictures
from minidiff.trainers.data.folder import Example, read_folder
from minidiff.trainers.engine import loop
from minidiff.trainers.engine.gradient_checkpointing import with_checkpointing
from minidiff.trainers.engine.loop import Training, randn_per_sample, rng_for, train
from minidiff.trainers.engine.memory import estimate_memory
from minidiff.trainers.methods import custom_diffusion, lora, pivotal
from minidiff.trainers.methods.custom_diffusion import CustomDiffusionOptions
from minidiff.trainers.methods.finetune_task import FinetuneTask, Group, Subject, averaged, possible_captions
from minidiff.trainers.methods.lora import LoRAOptions
from minidiff.trainers.methods.options import DataOptions, LowRankOptions, Prior
from minidiff.trainers.methods.textual_inversion import TextualInversionOptions
from tests.small_concepts import FOLDER, picture_folder, quick, small_concept, small_methods
from tests.small_models import small_model
from tests.small_task import CPU


def task_of(
    sd,
    folder,
    *,
    captions=("a cat", "a red dog", "an apple"),
    data=DataOptions(),
    prior=False,
    prior_weight=1.0,
    templates=(),
    posterior="sample",
):
    """A LoRA on three pictures."""
    folder.mkdir(exist_ok=True)
    if not (folder / "own").exists():
        picture_folder(folder / "own", seed=1)
        picture_folder(folder / "class", count=2, seed=2)

    def pictures(name, captions):
        examples = [Example(one.path, caption) for one, caption in zip(read_folder(folder / name, size=32, caption="x"), captions)]
        return Pictures(sd, examples, Cache(), size=32, posterior=posterior)

    subject = Subject(pictures("own", captions), templates, pictures("class", ("a dog", "a pig")) if prior else None)
    lora = create_lora(sd, PATTERNS["attention"], rank=2, alpha=2, generator=torch.Generator().manual_seed(0))
    group = Group(tuple(lora.parameters()))
    options = LoRAOptions(settings=quick(), data=data, prior=Prior(weight=prior_weight))
    return FinetuneTask(sd, "lora", [subject], options, modules={"lora": lora}, adapters=[lora], groups=[group])


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_loss_is_the_mean_squared_error_at_a_random_timestep(tmp_path, prediction):
    from tests.small_models import small_config

    sd = small_model(small_config(prediction))
    errors = []
    with task_of(sd, tmp_path, posterior="mean") as task, torch.no_grad():
        for sample in range(4):
            rng = rng_for(0, 5, sample)
            rng.integers(1)  # which subject
            example = task.subjects[0].pictures.examples[rng.integers(3)]
            rng.random(2)  # flipped? caption dropped?
            t = torch.tensor([rng.integers(1000)])
            eps = randn_per_sample([rng], (4, 8, 8))
            pixels = next(iter(task.subjects[0].pictures._picture(path) for path in [example.path]))
            x_0 = sd.vae.encode(as_pixels(pixels)).mean * sd.config.vae.scaling_factor
            alpha_bar = sd.schedule.alpha_bar[t].float().view(-1, 1, 1, 1)
            x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
            target = eps if prediction == "eps" else alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0
            errors.append((sd.unet(x_t, t, sd.encode_prompts([example.caption])) - target).square().mean())
        # float32, a batch of four instead of four of one
        torch.testing.assert_close(task.loss(5, range(4)), torch.stack(errors).mean(), rtol=1e-4, atol=1e-6)


def as_pixels(image):
    import numpy as np

    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def test_the_prior_counts_with_its_weight_and_in_the_same_batch(tmp_path):
    sd, calls = small_model(), []
    handle = sd.unet.register_forward_hook(lambda unet, args, output: calls.append(len(args[0])))
    losses = []
    for weight in (0.5, 1.0, 2.0):
        with task_of(sd, tmp_path, prior=True, prior_weight=weight) as task, torch.no_grad():
            losses.append(float(task.loss(0, range(3))))
            captions = [caption for piece in task._draw([rng_for(0, 0, sample) for sample in range(3)]) for caption in piece.batch.captions]
    handle.remove()
    assert calls == [6, 6, 6]
    assert set(captions[:3]) <= {"a cat", "a red dog", "an apple"} and set(captions[3:]) <= {"a dog", "a pig"}
    assert losses[1] > losses[0]
    assert losses[2] - losses[1] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-4)  # a line in the weight; float32


def test_the_parts_of_a_batch_give_the_mean_of_the_whole(tmp_path):
    with task_of(small_model(), tmp_path, prior=True, data=DataOptions(caption_dropout=0.5, flip=0.5)) as task, torch.no_grad():
        whole, parts = task.loss(3, range(4)), [task.loss(3, range(k, k + 2)) for k in (0, 2)]
    torch.testing.assert_close(whole, (parts[0] + parts[1]) / 2, rtol=1e-5, atol=1e-6)  # float32 sums in another order


def test_a_frozen_text_encoder_runs_before_the_first_step_only(tmp_path, monkeypatch):
    sd = small_model()
    with task_of(sd, tmp_path) as task, torch.no_grad():
        kept = task.loss(0, range(4))
        task.contexts = None  # now it runs
        assert torch.equal(kept, task.loss(0, range(4)))
    with task_of(sd, tmp_path) as task:
        monkeypatch.setattr(sd.text_encoder, "forward", None)
        task.loss(1, range(2))
        assert task.networks == (sd.unet,)


def test_dropped_captions_are_empty_ones(tmp_path):
    sd = small_model()
    with task_of(sd, tmp_path, data=DataOptions(caption_dropout=1.0)) as task, torch.no_grad():
        dropped = task.loss(0, range(4))
    with task_of(sd, tmp_path, captions=("a cat",) * 3, data=DataOptions(caption_dropout=0.0)) as task, torch.no_grad():
        named = task.loss(0, range(4))
        task.contexts = {"a cat": task.contexts[""]}
        empty = task.loss(0, range(4))
    assert torch.equal(dropped, empty) and not torch.equal(dropped, named)


def test_templates_take_the_place_of_captions(tmp_path):
    with task_of(small_model(), tmp_path, templates=("one", "two", "three")) as task:
        captions = {caption for step in range(20) for piece in task._draw([rng_for(0, step, 0)]) for caption in piece.batch.captions}
    assert captions == {"one", "two", "three"} == set(possible_captions(task.subjects[0]))


def test_every_caption_that_augmentation_says_is_known_ahead(tmp_path):
    options = CustomDiffusionOptions(settings=quick(), prior=FOLDER, start=("ktn",))
    with custom_diffusion.build(small_model(), [small_concept(tmp_path)], options).phases[0] as task:
        captions = {caption for step in range(60) for piece in task._draw([rng_for(0, step, 0)]) for caption in piece.batch.captions}
        assert captions == set(possible_captions(task.subjects[0]))
        assert "zoomed in photo of a <cat> cat" in captions and "photo of a cat" in captions


@pytest.mark.parametrize("method", small_methods())
def test_within_the_block_alone_something_is_on_the_model_and_can_learn(tmp_path, method):
    function, options, token = small_methods()[method]
    sd = small_model()
    before, tokenizer = (
        {part: {k: v.clone() for k, v in getattr(sd, part).state_dict().items()} for part in ("unet", "text_encoder", "vae")},
        sd.tokenizer,
    )
    for phase in function(sd, [small_concept(tmp_path, token=token)], options).phases:
        with phase:
            learning = {id(p) for module in phase.modules.values() for p in module.parameters() if p.requires_grad}
            assert learning == {id(p) for group in phase.groups for p in group.params}
        assert not any(p.requires_grad for part in (sd.unet, sd.text_encoder) for p in part.parameters())
    assert sd.tokenizer.added == tokenizer.added == {} == sd.text_encoder.added
    for part, tensors in before.items():
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in getattr(sd, part).modules())
        for name, tensor in getattr(sd, part).state_dict().items():
            assert torch.equal(tensor, tensors[name])


def test_a_run_that_is_stopped_ends_as_one_that_is_not(tmp_path):
    options = CustomDiffusionOptions(
        settings=quick(steps=5, ema_decay=0.9), prior=FOLDER, start=("ktn",), data=DataOptions(flip=0.5, caption_dropout=0.2)
    )
    concept = small_concept(tmp_path)
    results = []
    for stops in ((), (2,)):
        sd, state = small_model(), tmp_path / f"{len(stops)}.state"
        for _ in range(1 + len(stops)):
            phase = custom_diffusion.build(sd, [concept], options).phases[0]
            with phase:
                for step in train(phase, phase.settings, CPU, state):
                    if step.done in stops:
                        break
                if step.done == 5:
                    results.append([p.detach().clone() for p in phase.modules["custom_diffusion"].parameters()])
    assert len(results) == 2 and all(torch.equal(a, b) for a, b in zip(*results))


def test_a_run_does_not_go_on_with_other_captions(tmp_path):
    sd, state = small_model(), tmp_path / "state"
    with task_of(sd, tmp_path / "pictures") as task:
        list(train(task, task.settings, CPU, state))
    with task_of(sd, tmp_path / "pictures", captions=("a cat", "a dog", "an apple")) as task:
        with pytest.raises(ValueError, match="holds another run .data "):
            Training(task, task.settings, CPU, state)


def test_memory_is_estimated_without_a_step(tmp_path):
    options = CustomDiffusionOptions(settings=quick(), prior=FOLDER, start=("ktn",))
    with custom_diffusion.build(small_model(), [small_concept(tmp_path)], options).phases[0] as task:
        before = task.loss(0, range(2))
        memory = estimate_memory(task, task.settings, CPU)
        assert memory.trained == memory.gradients == sum(4 * p.numel() for p in task.modules["custom_diffusion"].parameters())
        assert memory.activations > 0
        assert torch.equal(before, task.loss(0, range(2)))  # nothing without contents is left in a cache


def test_losses_in_half_precision_are_close(tmp_path):
    sd = small_model()
    with task_of(sd, tmp_path, prior=True) as task, torch.no_grad():
        full = task.loss(0, range(4))
        half = loop.compute_loss(task, 0, range(4), dataclasses.replace(task.settings, precision="bfloat16"), CPU)
    torch.testing.assert_close(half, full, rtol=0.05, atol=0)  # bfloat16 has 8 bits: 0.4 % a rounding
    for part in (sd.unet, sd.text_encoder):
        part.bfloat16()
    with task_of(sd, tmp_path, prior=True) as task:
        loss = task.loss(0, range(4))
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in task.modules["lora"].parameters())
    torch.testing.assert_close(loss.detach(), full, rtol=0.05, atol=0)


def test_pictures_between_steps_are_drawn_without_dropout(tmp_path):
    sd = small_model()
    with task_of(sd, tmp_path) as task:
        for low in task.modules["lora"].layers.values():
            torch.nn.init.ones_(low.up.weight)
            low.dropout.p = 0.9
        first, second = (task.pictures(["a cat"], steps=2)[0] for _ in range(2))
        assert first.tobytes() == second.tobytes()
        assert task.modules["lora"].training


def test_class_pictures_are_given_for_all_subjects_or_none(tmp_path):
    sd = small_model()
    with_prior, without = (task_of(sd, tmp_path, prior=prior).subjects[0] for prior in (True, False))
    with pytest.raises(ValueError, match="class pictures for some of the concepts"):
        FinetuneTask(sd, "x", [with_prior, without], LoRAOptions(settings=quick()), modules={}, adapters=[], groups=[])


@pytest.mark.parametrize("prior", [False, True])
def test_dropout_is_drawn_for_each_sample_so_that_parts_of_a_batch_give_its_mean(tmp_path, prior):
    def losses(*parts, checkpointing=False):
        task = task_of(small_model(), tmp_path, prior=prior)
        for low in task.modules["lora"].layers.values():
            low.dropout = SampleDropout(0.5)
            torch.nn.init.constant_(low.up.weight, 0.1)
        with task, with_checkpointing(task.networks, checkpointing):
            loss = torch.stack([task.loss(3, part) for part in parts]).mean()
            loss.backward()
            gradient = torch.cat([p.grad.flatten() for p in task.modules["lora"].parameters()])
        return loss.detach(), gradient

    whole, parts, twice = losses(range(4)), losses(range(2), range(2, 4)), losses(range(4), checkpointing=True)
    for (loss, gradient), other in ((whole, parts), (whole, twice)):
        # float32 sums in another order
        torch.testing.assert_close(other[0], loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(other[1], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
    plain = task_of(small_model(), tmp_path, prior=prior)
    with plain:
        assert not torch.isclose(plain.loss(3, range(4)), whole[0], rtol=1e-5)


def test_what_is_shown_is_the_average_that_will_be_written(tmp_path):
    sd = small_model()
    options = LoRAOptions(settings=quick(steps=3, ema_decay=0.9, learning_rate=0.3), low_rank=LowRankOptions(rank=2))
    training = lora.build(sd, [small_concept(tmp_path)], options)
    for phase, step in training.run(CPU):
        raw = phase.pictures(["a cat"], steps=2)[0]
        with averaged(phase):
            shown = phase.pictures(["a cat"], steps=2)[0]
            mean = {name: p.detach().clone() for name, p in training.lora.named_parameters()}
        if step.done > 1:
            assert shown.tobytes() != raw.tobytes()
    assert all(torch.equal(mean[name], p) for name, p in training.lora.named_parameters())
    training.lora.attach(sd)
    assert sd.generate(["a cat"], seed=0, steps=2)[0].tobytes() == shown.tobytes()


def test_a_first_phase_is_not_lengthened_under_a_second_one(tmp_path):
    words = TextualInversionOptions(settings=quick(steps=2))
    second = LoRAOptions(settings=quick(steps=2), low_rank=LowRankOptions(rank=2))
    concepts = [small_concept(tmp_path)]

    def run(options):
        return list(pivotal.build(small_model(), concepts, options).run(CPU, tmp_path / "run"))

    (tmp_path / "run").mkdir()
    run(pivotal.PivotalOptions(tokens=words, lora=second))
    longer = dataclasses.replace(words, settings=quick(steps=3))
    with pytest.raises(ValueError, match="lora was trained on tokens as it was with fewer steps; choose another folder"):
        run(pivotal.PivotalOptions(tokens=longer, lora=second))
    steps = run(pivotal.PivotalOptions(tokens=words, lora=dataclasses.replace(second, settings=quick(steps=4))))
    assert [step.done for _, step in steps] == [3, 4]
