"""Class pictures and near captions: folders that are filled once, and the nearest captions in text space."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.pipeline import StableDiffusion
from minidiff.scenes.scenes import sample_scene
from minidiff.trainers.data.folder import Example, read_folder
from minidiff.trainers.data.regularisation import Filled, class_pictures, near_examples, nearest, pooled_text, scene_pictures
from minidiff.two_encoders import text_side
from tests.small_models import small_model


@pytest.fixture(scope="module")
def sd():
    return small_model()


def fill(sd, folder, prompt="a photo of a dog", **choices):
    return list(class_pictures(sd, prompt, folder, **{"count": 5, "batch": 2, "steps": 1, "seed": 7} | choices))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


# --- class pictures ---------------------------------------------------------------------------------------------------


def test_a_folder_is_filled_with_the_pictures_that_generate_makes(sd, tmp_path):
    assert fill(sd, tmp_path) == [Filled(2, 5), Filled(4, 5), Filled(5, 5)]
    examples = read_folder(tmp_path, size=32, caption="a photo of a dog")
    assert [example.path.name for example in examples] == [f"class-{i:05d}.png" for i in range(5)]
    for example, image in zip(examples[:2], sd.generate("a photo of a dog", seed=7, batch=2, steps=1)):
        assert np.array_equal(Image.open(example.path), image)


def test_a_run_that_was_stopped_ends_with_the_same_pictures(sd, tmp_path, monkeypatch):
    fill(sd, tmp_path / "whole")
    next(class_pictures(sd, "a photo of a dog", tmp_path / "part", count=5, batch=2, steps=1, seed=7))
    (tmp_path / "part" / "class-00001.png").unlink()
    fill(sd, tmp_path / "part")
    assert contents(tmp_path / "part") == contents(tmp_path / "whole") and len(contents(tmp_path / "part")) == 5
    monkeypatch.setattr(sd, "generate", lambda *args, **choices: pytest.fail("made twice"))
    assert fill(sd, tmp_path / "whole")[-1] == Filled(5, 5)


def test_pictures_of_ones_own_count_and_are_kept(sd, tmp_path):
    for i in range(3):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / f"mine-{i}.png")
    mine = contents(tmp_path)
    assert fill(sd, tmp_path) == [Filled(5, 5)]
    assert len(contents(tmp_path)) == 5 and mine.items() <= contents(tmp_path).items()
    assert fill(sd, tmp_path, count=2) == []


def test_a_folder_of_another_prompt_or_model_is_refused(sd, tmp_path):
    fill(sd, tmp_path, count=1)
    with pytest.raises(ValueError, match="made in another way \\(prompt 'a photo of a dog', now 'a cat'\\); choose another place"):
        fill(sd, tmp_path, "a cat")
    with pytest.raises(ValueError, match="made in another way \\(text_encoder"):
        fill(small_model(seed=1), tmp_path)
    with pytest.raises(ValueError, match="count 0: ask for at least 1 picture"):
        fill(sd, tmp_path, count=0)
    (tmp_path / "made.json").write_text("{")
    with pytest.raises(ValueError, match=r"made\.json: no JSON"):
        fill(sd, tmp_path)


# --- captions near a target -------------------------------------------------------------------------------------------


def test_pooled_text_is_the_output_at_the_end_token_or_the_mean_of_what_follows_the_start(sd):
    texts = ["a cat", "a small red dog on a blue background", ""]
    ends, means = pooled_text(sd, texts, batch=2), pooled_text(sd, texts, pool="mean", batch=2)
    for text, end, mean in zip(texts, ends, means):
        row = [sd.tokenizer.start_id, *sd.tokenizer.encode(text), sd.tokenizer.end_id]
        with torch.no_grad():
            output = sd.text_encoder(torch.tensor([row]))[0]  # one at a time, without padding
        torch.testing.assert_close(end, output[-1] / output[-1].norm(), rtol=1e-4, atol=1e-5)  # float32 parity
        torch.testing.assert_close(mean, output[1:].mean(0) / output[1:].mean(0).norm(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="pool 'first' unknown; choose end, mean"):
        pooled_text(sd, texts, pool="first")


def test_padding_with_another_token_changes_no_feature(sd):
    zero = replace(sd.config.tokenizer, padding="zero")
    other = StableDiffusion(sd.config, text_side(replace(sd.config, tokenizer=zero), sd.text.encoders), sd.unet, sd.vae)
    assert torch.equal(pooled_text(sd, ["a cat", "a red dog"]), pooled_text(other, ["a cat", "a red dog"]))


def test_nearest_is_a_sort_by_cosine():
    generator = torch.Generator().manual_seed(0)
    target, features = torch.randn(6, generator=generator), torch.randn(50, 6, generator=generator)
    cosines = [float(torch.cosine_similarity(target, feature, dim=0)) for feature in features]
    naive = sorted(range(50), key=lambda i: -cosines[i])
    assert nearest(target, features, max_count=None) == naive
    assert nearest(target, features, max_count=7) == naive[:7]
    assert nearest(target, features, min_similarity=0.5) == [i for i in naive if cosines[i] >= 0.5]
    assert nearest(target, target.expand(4, 6)) == [0, 1, 2, 3]


def test_no_caption_near_enough_is_told_with_the_nearest():
    with pytest.raises(ValueError, match="cosine of at least 0.85 to the target: the nearest of 2 has 0.707; give other captions"):
        nearest(torch.tensor([1.0, 1.0]), torch.eye(2), min_similarity=0.85)


def test_examples_near_a_target_come_nearest_first(sd, tmp_path):
    examples = [Example(tmp_path / f"{i}.png", caption) for i, caption in enumerate(["a dog and a pizza", "a cat", "an apple"])]
    chosen = near_examples(examples, "a cat", partial(pooled_text, sd), max_count=2)
    assert chosen[0] is examples[1] and len(chosen) == 2


def test_the_nearest_scenes_stand_in_a_folder_with_their_captions(sd, tmp_path):
    steps = list(scene_pictures(sd, "a cat", tmp_path, count=4, candidates=40, seed=3))
    assert steps[-1] == Filled(4, 4) and len(steps) == 4
    scenes = [sample_scene(np.random.default_rng([3, i])) for i in range(40)]
    order = nearest(
        pooled_text(sd, ["a cat"], pool="mean")[0], pooled_text(sd, [scene.caption for scene in scenes], pool="mean"), max_count=4
    )
    examples = read_folder(tmp_path, size=64)
    assert [example.caption for example in examples] == [scenes[i].caption for i in order]
    assert all(np.array_equal(Image.open(example.path), scenes[i].image) for example, i in zip(examples, order))
    before = contents(tmp_path)
    examples[1].path.unlink()
    assert list(scene_pictures(sd, "a cat", tmp_path, count=4, candidates=40, seed=3)) == steps and contents(tmp_path) == before
    with pytest.raises(ValueError, match="candidates 3: the nearest 4 need at least as many"):
        next(scene_pictures(sd, "a cat", tmp_path, count=4, candidates=3))
