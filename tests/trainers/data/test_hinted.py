"""Pictures and scenes with their hints: the same pixels, in [0, 1], the same every time."""

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.hints import canny
from minidiff.pictures import fit, load_picture, to_pixels
from minidiff.pipeline import to_images
from minidiff.scenes.hints import SCENE_HINTS
from minidiff.trainers.data.cache import Cache
from minidiff.trainers.data.folder import Example
from minidiff.trainers.data.hinted import HintedPictures, HintedScenes
from minidiff.trainers.engine.loop import randn_per_sample, rng_for
from tests.small_concepts import picture_folder
from tests.small_models import small_model, training_config


@pytest.fixture(scope="module")
def sd():
    return small_model(training_config())


def examples(folder, size=80):
    picture_folder(folder, size=size)
    return [Example(folder / f"{i}.png", caption) for i, caption in enumerate(("a cat", "a dog", "a cow"))]


def rngs(count):
    return [rng_for(0, 0, i) for i in range(count)]


def test_a_hint_is_made_from_the_pixels_that_are_learned(sd, tmp_path):
    source = HintedPictures(sd, examples(tmp_path / "own"), Cache(), size=64, kind="canny")
    assert list(source.prepare()) == [1, 2, 3] and len(source) == 3
    batch = source.batch([2, 0], rngs(2))
    for caption, hint, i in zip(batch.captions, batch.hints, (2, 0), strict=True):
        picture = np.asarray(to_images(fit(load_picture(tmp_path / "own" / f"{i}.png"), 64)[None])[0])
        assert torch.equal(hint, torch.from_numpy(canny(picture)).permute(2, 0, 1) / 255) and hint.any()
        assert caption == ("a cat", "a dog", "a cow")[i]
    assert batch.latents.shape == (2, 4, 8, 8)
    assert [caption for caption, _ in source.fixed(2)] == ["a cat", "a dog"] and torch.equal(source.fixed(1)[0][1], batch.hints[1])


def test_hints_of_a_folder_go_by_their_pictures_names(sd, tmp_path):
    pictures = examples(tmp_path / "own")
    (tmp_path / "hints").mkdir()
    for i in range(3):
        Image.fromarray(np.full((64, 64, 3), 80 * i, np.uint8)).save(tmp_path / "hints" / f"{i}.webp", lossless=True)
    source = HintedPictures(sd, pictures, Cache(), size=64, kind=None, folder=tmp_path / "hints")
    for i in range(3):
        torch.testing.assert_close(source.hint(i), torch.full((3, 64, 64), 80 * i / 255))
    before = b"".join(source.identity())
    Image.fromarray(np.full((64, 64, 3), 7, np.uint8)).save(tmp_path / "hints" / "1.webp")
    assert b"".join(source.identity()) != before
    (tmp_path / "hints" / "1.webp").unlink()
    with pytest.raises(ValueError, match="no hint for 1.png, and 0 more; name each as its picture"):
        HintedPictures(sd, pictures, Cache(), size=64, kind=None, folder=tmp_path / "hints")
    with pytest.raises(ValueError, match="hint 'depth' cannot be made from a picture; choose canny, scribble, tile, or give"):
        HintedPictures(sd, pictures, Cache(), size=64, kind="depth")


@pytest.mark.parametrize("kind", ["outline", "canny"])
def test_scenes_have_their_hints_latents_and_captions(sd, kind):
    source = HintedScenes(sd, 3, Cache(), kind=kind)
    assert list(source.prepare()) == [1, 2, 3] and not list(source.prepare())
    batch, scenes = source.batch([1, 2], rngs(2)), [source._scene(i) for i in (1, 2)]
    assert batch.captions == tuple(scene.caption for scene in scenes)
    for hint, scene in zip(batch.hints, scenes):
        expected = SCENE_HINTS[kind](scene) if kind in SCENE_HINTS else canny(scene.image)
        assert torch.equal(hint, torch.from_numpy(expected).permute(2, 0, 1) / 255) and hint.any()
    posterior = sd.vae.encode(to_pixels(np.stack([scene.image for scene in scenes])))
    expected = posterior.mean + (0.5 * posterior.logvar).exp() * randn_per_sample(rngs(2), (4, 16, 16))
    torch.testing.assert_close(batch.latents, expected * sd.config.vae.scaling_factor, rtol=1e-4, atol=1e-5)
    trained = [source._scene(i).image for i in range(3)]
    assert source.fixed(2)[0][0] == source._scene(3).caption and not any(np.array_equal(source._scene(3).image, image) for image in trained)
    again = HintedScenes(sd, 3, Cache(), kind=kind)
    list(again.prepare())
    assert torch.equal(again.batch([0, 1], rngs(2)).latents, source.batch([0, 1], rngs(2)).latents)
    other = HintedScenes(sd, 3, Cache(), kind=kind, seed=1)
    assert b"".join(other.identity()) != b"".join(source.identity())


def test_scenes_of_another_size_and_unknown_hints_are_refused(sd):
    with pytest.raises(ValueError, match="scenes have 128 pixels, this model 32; give pictures of your own"):
        HintedScenes(small_model(), 3, Cache(), kind="outline")
    with pytest.raises(ValueError, match="hint 'pose' unknown; choose outline, segmentation, depth, canny, scribble, tile"):
        HintedScenes(sd, 3, Cache(), kind="pose")
