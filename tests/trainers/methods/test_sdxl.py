"""Stable Diffusion XL learns by the same methods: what its U-Net is told of each sample, and what comes out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import weights_loader
from minidiff.adapters.custom_diffusion import cross_attention_layers
from minidiff.adapters.layers import modules_of
from minidiff.adapters.merge_concepts import merge_concepts
from minidiff.attention import Attention
from minidiff.cli.outputs import write_results
from minidiff.config import SDXL
from minidiff.trainers.data.augment import PAPER_SIZES, size_numbers
from minidiff.trainers.data.cache import Cache, Pictures, cached_texts
from minidiff.trainers.data.folder import read_folder
from minidiff.trainers.engine.memory import estimate_memory
from minidiff.trainers.methods.options import family_of
from minidiff.trainers.methods.table import METHODS
from tests.parity.check import largest_error
from tests.parity.models import SDXL as SHAPE
from tests.parity.models import pipelines
from tests.small_concepts import small_concept, small_methods
from tests.small_models import small_model, xl_config
from tests.small_task import CPU
from weights_loader.empty_parts import empty_parts


@pytest.fixture
def sd():
    return small_model(xl_config())


def state(sd):
    return {f"{part}.{name}": p.detach().clone() for part, module in sd.parts.items() for name, p in module.named_parameters()}


# ----------------------------------------------------------------------------------------------------- what it is told


def as_diffusers_trainer(width, height, size):
    """Of train_text_to_image_lora_sdxl.py: resize the shorter side, cut from the centre, remember where."""
    scaled = Image.new("RGB", (int(size * width / min(width, height)), int(size * height / min(width, height))))  # torchvision's Resize
    top, left = max(0, int(round((scaled.height - size) / 2.0))), max(0, int(round((scaled.width - size) / 2.0)))
    return [height, width, top, left, size, size]


@pytest.mark.parametrize("width, height", [(640, 480), (480, 640), (512, 512), (2000, 1000)])
def test_size_numbers_are_those_of_diffusers_trainer(width, height):
    assert size_numbers((width, height), 256) == as_diffusers_trainer(width, height, 256)


def test_size_numbers_of_a_crop_follow_its_place_and_its_mirror():
    assert size_numbers((400, 200), 100, crop=(0, 0)) == [200, 400, 0, 0, 100, 100]
    assert size_numbers((400, 200), 100, crop=(1, 0)) == [200, 400, 0, 100, 100, 100]
    assert size_numbers((400, 200), 100, crop=(0, 0), flip=True) == [200, 400, 0, 100, 100, 100]
    assert size_numbers((200, 400), 100, crop=(0, 1)) == [400, 200, 100, 0, 100, 100]


@pytest.mark.parametrize("crop", ["centre", "random"])
def test_each_sample_is_told_its_own_size(crop, sd, tmp_path):
    sizes = {"a.png": (64, 48), "b.png": (40, 100)}
    for name, size in sizes.items():
        Image.fromarray(np.full((*size[::-1], 3), 90, dtype=np.uint8)).save(tmp_path / name)
    pictures = Pictures(sd, read_folder(tmp_path, size=32, caption="a cat"), Cache(), size=32, crop=crop)
    batch = pictures.batch([0, 1], [np.random.default_rng(i) for i in (0, 1)])
    assert batch.sizes[:, :2].tolist() == [[48, 64], [100, 40]] and batch.sizes[:, 4:].eq(32).all()
    top, left = batch.sizes[:, 2], batch.sizes[:, 3]
    assert top[0] == 0 and left[1] == 0 and 0 <= left[0] <= 10 and 0 <= top[1] <= 48
    if crop == "centre":
        assert left[0] == (42 - 32) / 2 and top[1] == (80 - 32) / 2


def test_sizes_of_custom_diffusions_augmentation_are_told_too(sd, tmp_path):
    Image.fromarray(np.full((100, 60, 3), 90, dtype=np.uint8)).save(tmp_path / "a.png")
    pictures = Pictures(sd, read_folder(tmp_path, size=32, caption="a cat"), Cache(), size=32, sizes=PAPER_SIZES)
    batch = pictures.batch([0] * 20, [np.random.default_rng(i) for i in range(20)])
    assert batch.sizes[:, :2].eq(torch.tensor([100, 60])).all()
    assert len(batch.sizes[:, 3].unique()) > 1, "a part of a larger picture lies somewhere else each time"


def test_the_unet_is_told_what_diffusers_trainer_tells_it(tmp_path, monkeypatch):
    """On the same noisy latents, from the caption and the size of the picture."""
    ours, theirs = pipelines(SHAPE, torch.float32)
    ours.config = replace(ours.config, image_size=64)
    concept = small_concept(tmp_path, token="sks", prompt="a photo of {}", class_prompt="a photo of {}")
    build, options, _ = small_methods()["dreambooth with LoRA"]
    seen = []
    task = build(ours, [concept], options).phases[0]
    with task, torch.no_grad():
        handle = ours.unet.register_forward_hook(lambda unet, args, output: seen.append((*args, output)))
        task.loss(0, range(2))
        handle.remove()
        ((x_t, t, told, output),) = seen
        assert task.contexts is not None and len(x_t) == 4, "two samples and their class pictures"
        captions = ["a photo of sks cat"] * 2 + ["a photo of cat"] * 2
        context, _, pooled, _ = theirs.encode_prompt(captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        time_ids = torch.tensor([as_diffusers_trainer(32, 32, 64)] * 4).float()
        reference = theirs.unet(x_t, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}).sample
        largest_error(output, reference)


def test_kept_contexts_have_a_pooled_vector_and_are_made_once(sd, tmp_path):
    kept, fresh = cached_texts(sd, Cache(tmp_path, memory=0), ["a cat", "a dog"]), sd.text(["a cat", "a dog"], (32, 32))
    torch.testing.assert_close(kept.context, fresh.context, rtol=1e-4, atol=1e-5)  # float32 in another batch: a few roundings
    torch.testing.assert_close(kept.pooled, fresh.pooled, rtol=1e-4, atol=1e-5)
    assert kept.size is None and len(list(tmp_path.iterdir())) == 4
    with torch.no_grad():
        sd.text.encoders["text_encoder_2"].blocks[0].linear_1.weight.mul_(3)
    again = cached_texts(sd, Cache(tmp_path, memory=0), ["a cat"])
    assert not torch.allclose(again.pooled, kept.pooled[:1]), "an old value for a new encoder"


@pytest.mark.parametrize("name", ["text_encoder", "text_encoder_2"])
def test_an_encoder_that_overflows_in_half_precision_ends_in_one_line_before_training(name, sd, tmp_path):
    for part in sd.parts.values():
        part.half()
    with torch.no_grad():  # 65,504 is the largest number of float16
        sd.text.encoders[name].blocks[0].linear_2.bias.fill_(60_000)
        sd.text.encoders[name].blocks[1].linear_2.bias.fill_(60_000)
    with pytest.raises(
        ValueError, match=r"caption 'a cat': its context is not finite in torch.float16; load the text encoders in float32 or"
    ):
        cached_texts(sd, Cache(), ["a cat"])


# -------------------------------------------------------------------------------------------------------- the methods


@pytest.mark.parametrize("name", ["lora", "dreambooth with LoRA", "textual inversion", "pivotal", "custom diffusion"])
def test_a_method_learns_and_its_files_fit_the_model(name, sd, tmp_path):
    build, options, token = small_methods()[name]
    before = state(sd)
    run = build(sd, [small_concept(tmp_path, token=token)], options)
    losses = [float(step.loss) for _, step in run.run(CPU)]
    assert len(losses) == 3 * len(run.phases) and all(np.isfinite(losses))
    assert all(torch.equal(p, before[key]) for key, p in state(sd).items()), "the model's own weights have changed"
    plain = sd.generate("a photo of a cat", steps=2, size=32)[0].tobytes()
    (tmp_path / "out").mkdir()
    names = "minidiff" if name == "custom diffusion" else "diffusers"
    files = dict(write_results(run, sd, tmp_path / "out", names, {}))
    flags = {"--lora": "lora", "--embedding": "embeddings", "--custom-diffusion": "custom_diffusion"}
    weights_loader.attach(sd, **{flags[flag]: path for flag, path in files.items()})
    prompt = f"a photo of a {token} cat"
    learned = sd.generate(prompt, steps=2, size=32)[0].tobytes()
    for one in reversed(list(sd.attached)):
        one.detach()
    assert learned != plain and sd.generate("a photo of a cat", steps=2, size=32)[0].tobytes() == plain


def test_a_word_learns_a_vector_for_each_encoder(sd, tmp_path):
    build, options, token = small_methods()["textual inversion"]
    run = build(sd, [small_concept(tmp_path, token=token)], options)
    start = run.tokens.rows[token].detach().clone()
    list(run.run(CPU))
    moved = (run.tokens.rows[token].detach() - start).abs()
    assert (moved[:, :16].amax(dim=1) > 1e-3).all() and (moved[:, 16:].amax(dim=1) > 1e-3).all()
    files = list(write_results(run, sd, tmp_path, "diffusers", {}))
    assert [path.name for _, path in files] == ["cat.safetensors"]


def test_concepts_are_merged_in_all_cross_attention_layers(sd, tmp_path):
    build, options, _ = small_methods()["custom diffusion"]
    concepts = []
    for word in ("<a>", "<b>"):
        run = build(sd, [small_concept(tmp_path, name=word[1], token=word)], options)
        list(run.run(CPU))
        concepts.append(run.custom_diffusion)
    merged, report = merge_concepts(
        sd, concepts, [["photo of a <a> cat"], ["photo of a <b> cat"]], ["a dog", "a red apple", "a house on a hill"], ridge=1e-3
    )
    assert len(merged.layers) == 2 * len([name for name in cross_attention_layers(sd) if name.endswith("to_k")])
    assert report.residual < 1e-3 and merged.tokens is not None and set(merged.tokens.names) == {"<a>", "<b>"}


def test_the_full_size_has_seventy_cross_attentions():
    unet = empty_parts(SDXL).unet
    layers = [m for name, m in unet.named_modules() if isinstance(m, Attention) and name.endswith("cross_attention")]
    assert len(layers) == 70
    assert sum(m.to_k.weight.numel() + m.to_v.weight.numel() for m in layers) == 340_787_200


def test_every_method_has_numbers_for_it():
    assert family_of(SDXL) == "sdxl"
    for name, method in METHODS.items():
        assert "sdxl" in method.presets, name
        assert not method.low_rank_presets or "sdxl" in method.low_rank_presets, name


@pytest.mark.parametrize(
    "name, read", [("dreambooth with LoRA", ["unet"]), ("textual inversion", ["unet", "text_encoder", "text_encoder_2"])]
)
def test_the_memory_of_a_run_counts_both_encoders_and_the_vae_whether_its_steps_run_them_or_not(name, read, sd, tmp_path):
    build, options, token = small_methods()[name]
    run = build(sd, [small_concept(tmp_path, token=token)], options)
    (task,) = run.phases
    with task:
        memory = estimate_memory(task, task.settings, CPU)
        assert memory.trained == sum(4 * p.numel() for group in task.groups for p in group.params)
        assert list(task.networks) == [sd.parts[part] for part in read]
    assert memory.frozen == sum(4 * p.numel() for part in sd.parts.values() for p in part.parameters()) and memory.activations > 0


def test_layers_of_both_encoders_can_be_chosen(sd):
    parts = {name.split(".")[0] for name in modules_of(sd, (torch.nn.Linear,))}
    assert parts == {"unet", "text_encoder", "text_encoder_2"}
