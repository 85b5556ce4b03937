"""Buckets: the shapes of the paper, the nearest of them, and what a model is shown and told of a picture that is no square."""

from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.pictures import fit
from minidiff.trainers.data.augment import PAPER_SIZES, size_numbers
from minidiff.trainers.data.buckets import buckets, nearest_bucket
from minidiff.trainers.data.cache import Cache, Pictures
from minidiff.trainers.data.folder import read_folder
from minidiff.trainers.methods.options import Concept, DataOptions, Prior
from tests.small_concepts import small_methods
from tests.small_models import small_model, xl_config

# Of the appendix, up to the square; the other half mirrors it.
OF_THE_PAPER = {
    512: (2048, 1984, 1920, 1856),
    576: (1792, 1728, 1664),
    640: (1600, 1536),
    704: (1472, 1408, 1344),
    768: (1344, 1280),
    832: (1216, 1152),
    896: (1152, 1088),
    960: (1088, 1024),
    1024: (1024,),
}


def test_the_shapes_are_those_of_the_paper():
    expected = {(w, h) for w, heights in OF_THE_PAPER.items() for h in heights}
    found = buckets(1024, 64)
    assert set(found) == expected | {(h, w) for w, h in expected} and len(found) == len(set(found))
    assert list(found) == sorted(found, key=lambda shape: shape[0] / shape[1])


def test_the_nearest_is_the_one_whose_ratio_is():
    assert nearest_bucket(3000, 3000, 1024, 64) == (1024, 1024) and nearest_bucket(3000, 2000, 1024, 64) == (1216, 832)
    for width, height in ((3000, 2000), (640, 1000), (5000, 100), (123, 457)):
        w, h = nearest_bucket(width, height, 1024, 64)
        off = abs(log(w / h) - log(width / height))
        assert all(off <= abs(log(a / b) - log(width / height)) + 1e-9 for a, b in buckets(1024, 64))


@pytest.mark.parametrize("step", [0, -64, 100, 1024])
def test_steps_that_do_not_divide_the_size_are_refused(step):
    with pytest.raises(ValueError, match=f"buckets in steps of {step} pixels: give a number that divides the size 1024"):
        buckets(1024, step)


def test_a_picture_of_the_buckets_shape_is_shown_whole_and_others_lose_the_least():
    values = np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8)
    whole = fit(Image.fromarray(values), (60, 40))
    assert torch.equal(whole, torch.from_numpy(values).permute(2, 0, 1).float() / 127.5 - 1)
    assert torch.equal(fit(Image.fromarray(values), (40, 40)), fit(Image.fromarray(values), 40))
    assert torch.equal(fit(Image.fromarray(values), (20, 40), crop=(1, 0)), whole[:, :, 40:])  # as high as it is, from its right end
    assert torch.equal(fit(Image.fromarray(values), (60, 20), crop=(0, 1), flip=True), whole[:, 20:].flip(-1))


def test_size_numbers_of_another_shape_are_its_own_and_what_is_cut_off():
    assert size_numbers((3000, 2000), (1216, 832)) == [2000, 3000, 0, 16, 832, 1216]  # scaled to 1248 x 832, of which 16 go left and right
    assert size_numbers((3000, 2000), (1216, 832), crop=(0, 0)) == [2000, 3000, 0, 0, 832, 1216]
    assert size_numbers((1216, 1000), (1216, 832)) == [1000, 1216, 84, 0, 832, 1216]


@pytest.fixture
def folder(tmp_path):
    for name, size, level in (("a.png", (96, 40), 30), ("b.png", (40, 96), 90), ("c.png", (64, 64), 150), ("d.png", (65, 62), 210)):
        values = np.random.default_rng(level).integers(level, level + 40, size=(*size[::-1], 3), dtype=np.uint8)
        (tmp_path / "cat").mkdir(exist_ok=True)
        Image.fromarray(values).save(tmp_path / "cat" / name)
    return tmp_path / "cat"


@pytest.fixture
def sd():
    return small_model(xl_config())


@pytest.mark.parametrize("crop", ["centre", "random"])
def test_each_picture_has_latents_of_its_shape(crop, sd, folder):
    pictures = Pictures(sd, read_folder(folder, size=32, caption="a cat"), Cache(), size=32, crop=crop, buckets=8)
    assert pictures.shapes == [(40, 24), (24, 40), (32, 32), (32, 32)]
    for i, (width, height) in enumerate(pictures.shapes):
        batch = pictures.batch([i], [np.random.default_rng(0)])
        assert batch.latents.shape[2:] == batch.mask.shape[2:] == (height // 4, width // 4)
        assert batch.sizes[0, 4:].tolist() == [height, width]


@pytest.mark.parametrize("count", [2, 4])
def test_the_loss_of_a_batch_of_several_shapes_is_the_mean_of_its_samples(count, sd, folder):
    """Whatever else is in the batch: each sample alone, with its class picture, gives the same."""
    build, options, token = small_methods()["dreambooth with LoRA"]
    options = replace(options, data=DataOptions(size=32, buckets=8), prior=Prior(kind="folder"), prompt="a photo of {}")
    concept = Concept(images=folder, class_images=_class_folder(folder), token="sks", class_word="cat", class_prompt="a cat")
    task = build(sd, [concept], options).phases[0]
    with task, torch.no_grad():
        pieces = task._draw([np.random.default_rng([7, i]) for i in range(8)])
        assert len({piece.shape for piece in pieces}) > 1
        together = task.loss(3, range(count))
        alone = torch.stack([task.loss(3, range(i, i + 1)) for i in range(count)]).mean()
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)  # float32, in batches of another size


def _class_folder(folder):
    others = folder.parent / "class"
    others.mkdir()
    for i, size in enumerate(((32, 32), (96, 40))):
        Image.effect_noise(size, 50).convert("RGB").save(others / f"{i}.png")
    return others


def test_what_does_not_go_together_is_refused(sd, folder):
    examples = read_folder(folder, size=32, caption="a cat")
    with pytest.raises(ValueError, match="buckets in steps of 8 pixels: the augmentation of sizes shows squares"):
        Pictures(sd, examples, Cache(), size=32, sizes=PAPER_SIZES, buckets=8)
    with pytest.raises(ValueError, match="buckets in steps of 2 pixels: not a multiple of the VAE's 4 pixels"):
        Pictures(sd, examples, Cache(), size=32, buckets=2)
