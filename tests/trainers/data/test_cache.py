"""Kept latents and contexts are the fresh ones, are made once, and never outlive what they were made from."""

import errno
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.pictures import fit, load_picture
from minidiff.trainers.data.augment import CODE_SIZES, SizeAugmentation
from minidiff.trainers.data.cache import Cache, Pictures, cached_texts
from minidiff.trainers.data.folder import Example
from tests.small_models import small_model

SIZE = 32


@pytest.fixture
def sd():
    return small_model()


@pytest.fixture
def examples(tmp_path):
    rng = np.random.default_rng(0)
    made = []
    for i in range(3):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (40 + 8 * i, 48, 3), np.uint8)).save(path)
        made.append(Example(path, f"a cat {i}"))
    return made


def rngs(count, seed=0):
    return [np.random.default_rng([seed, i]) for i in range(count)]


def counted(module, name, monkeypatch):
    """The calls of a method from now on."""
    calls, plain = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: calls.append(args) or plain(*args))
    return calls


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_a_kept_latent_is_the_fresh_one(sd, examples):
    pictures = Pictures(sd, examples, Cache(), size=SIZE, posterior="mean")
    for batch in (pictures.batch([2, 0], rngs(2)), pictures.batch([2, 0], rngs(2))):
        with torch.no_grad():
            fresh = [sd.vae.encode(fit(load_picture(examples[i].path), SIZE)[None]).mean[0] for i in (2, 0)]
        assert torch.equal(batch.latents, torch.stack(fresh) * sd.config.vae.scaling_factor)
        assert batch.captions == ("a cat 2", "a cat 0") and batch.size_phrases == ("", "")
        assert batch.mask.shape == (2, 1, 8, 8) and (batch.mask == 1).all()


def test_a_sample_is_mean_plus_std_times_a_unit_normal(sd, examples):
    batch = Pictures(sd, examples, Cache(), size=SIZE).batch([1] * 500, rngs(500))
    with torch.no_grad():
        posterior = sd.vae.encode(fit(load_picture(examples[1].path), SIZE)[None])
    noise = (batch.latents / sd.config.vae.scaling_factor - posterior.mean) / (0.5 * posterior.logvar).exp()
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01  # 128,000 values: standard errors of 0.003 and 0.002
    assert abs((noise[1:] * noise[:-1]).mean()) < 0.01  # samples know nothing of each other


def test_a_sample_depends_on_its_generator_alone(sd, examples):
    pictures = Pictures(sd, examples, Cache(), size=SIZE, flip=0.5)
    together = pictures.batch([0, 1, 2, 1], rngs(4))
    alone = [pictures.batch([i], [rng]) for i, rng in zip([0, 1, 2, 1], rngs(4))]
    assert torch.equal(together.latents, torch.cat([batch.latents for batch in alone]))


def test_every_picture_is_encoded_once_and_flips_twice(sd, examples, monkeypatch):
    for flip, expected in ((0.0, 3), (0.5, 6), (1.0, 3)):
        calls = counted(sd.vae, "encode", monkeypatch)
        pictures = Pictures(sd, examples, Cache(), size=SIZE, flip=flip)
        assert list(pictures.precompute_latents()) == [1, 2, 3] and len(calls) == expected
        for seed in range(4):
            pictures.batch([0, 1, 2], rngs(3, seed))
        assert len(calls) == expected
        monkeypatch.undo()


def test_flips_come_as_often_as_asked(sd, examples):
    pictures = Pictures(sd, examples[:1], Cache(), size=SIZE, flip=0.25, posterior="mean")
    with torch.no_grad():
        mirrored = sd.vae.encode(fit(load_picture(examples[0].path), SIZE, flip=True)[None]).mean * sd.config.vae.scaling_factor
    flipped = (pictures.batch([0] * 1000, rngs(1000)).latents == mirrored).flatten(1).all(1)
    assert abs(flipped.float().mean() - 0.25) < 0.042  # 3 standard errors: 3 sqrt(0.1875 / 1000)


def test_other_weights_or_another_picture_are_not_mistaken_for_the_old(sd, examples, tmp_path, monkeypatch):
    cache = Cache(tmp_path / "cache", memory=0)
    before = Pictures(sd, examples, cache, size=SIZE, posterior="mean").batch([0], rngs(1)).latents
    calls = counted(sd.vae, "encode", monkeypatch)
    again = Pictures(sd, examples, Cache(tmp_path / "cache", memory=0), size=SIZE, posterior="mean").batch([0], rngs(1)).latents
    assert torch.equal(before, again) and not calls
    Image.open(examples[1].path).save(examples[0].path)
    other_picture = Pictures(sd, examples, cache, size=SIZE, posterior="mean").batch([0], rngs(1)).latents
    with torch.no_grad():
        sd.vae.encoder.conv_in.weight[0, 0, 0, 0] += 1
    other_weights = Pictures(sd, examples, cache, size=SIZE, posterior="mean").batch([0], rngs(1)).latents
    other_size = Pictures(sd, examples, cache, size=16, posterior="mean").batch([0], rngs(1)).latents
    assert len(calls) == 3 and not torch.equal(before, other_picture) and not torch.equal(other_picture, other_weights)
    assert other_size.shape == (1, 4, 4, 4)


def test_random_sizes_and_crops_are_encoded_every_time(sd, examples, monkeypatch):
    for choices in ({"crop": "random"}, {"sizes": SizeAugmentation(before="cat", small=("small",))}):
        calls = counted(sd.vae, "encode", monkeypatch)
        pictures = Pictures(sd, examples, Cache(), size=SIZE, **choices)
        assert not pictures.cacheable and list(pictures.precompute_latents()) == []
        first, second = pictures.batch([0, 2], rngs(2)), pictures.batch([0, 2], rngs(2))
        assert len(calls) == 2 and torch.equal(first.latents, second.latents) and first.captions == second.captions
        monkeypatch.undo()


def test_a_random_crop_is_a_square_of_the_picture(sd, examples, monkeypatch):
    calls = counted(sd.vae, "encode", monkeypatch)
    Pictures(sd, examples, Cache(), size=SIZE, crop="random").batch([0] * 20, rngs(20))
    (pixels,) = calls[0]
    image = load_picture(examples[0].path)  # 48 x 40: eight places along x
    places = []
    for seen, rng in zip(pixels, rngs(20)):
        rng.random()  # the flip
        x, y = rng.random(2)
        assert torch.equal(seen, fit(image, SIZE, crop=(x, y)))
        places.append(x)
    assert min(places) < 0.2 and max(places) > 0.8


def test_a_size_is_said_in_the_caption_and_seen_in_the_mask(sd, examples):
    pictures = Pictures(sd, examples, Cache(), size=SIZE, sizes=SizeAugmentation(small=("small",), large=("large",), before="cat"))
    batch = pictures.batch([0] * 40, rngs(40))
    assert set(batch.size_phrases) == {"", "small", "large"}
    for caption, word, mask in zip(batch.captions, batch.size_phrases, batch.mask):
        assert caption == f"a {word} cat 0".replace("  ", " ")
        assert (word == "large") <= bool((mask == 1).all()) and (word == "small") <= bool(mask.mean() < 0.3)


def test_the_trainings_precision_does_not_reach_kept_latents(sd, examples):
    plain = Pictures(sd, examples, Cache(), size=SIZE).batch([0], rngs(1))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = Pictures(sd, examples, Cache(), size=SIZE).batch([0], rngs(1))
        assert torch.equal(mixed.latents, plain.latents)
        assert torch.equal(cached_texts(sd, Cache(), ["a cat"]).context, sd_context(sd, "a cat"))


def sd_context(sd, caption):
    with torch.autocast("cpu", enabled=False):
        return sd.encode_prompts([caption])


def test_what_pictures_cannot_be_is_refused(sd, examples):
    for choices, message in (
        ({"size": 30}, "size 30: must be a multiple of 4 pixels"),
        ({"size": SIZE, "crop": "center"}, "crop 'center' unknown; choose centre, random"),
        ({"size": SIZE, "posterior": "mode"}, "posterior 'mode' unknown; choose sample, mean"),
        ({"size": SIZE, "flip": 1.5}, r"flip 1.5: a share of the samples, 0\.\.1"),
        ({"size": SIZE, "sizes": CODE_SIZES}, "less than 3 latent cells"),
    ):
        with pytest.raises(ValueError, match=message):
            Pictures(sd, examples, Cache(), **choices)
    with pytest.raises(ValueError, match="no pictures to learn from"):
        Pictures(sd, [], Cache(), size=SIZE)


def test_a_latent_that_is_not_finite_is_refused(sd, examples):
    with torch.no_grad():
        sd.vae.quant_conv.bias[0] = float("inf")
    with pytest.raises(ValueError, match=r"0\.png: its latent is not finite in torch.float32; load the VAE in float32 or bfloat16"):
        Pictures(sd, examples, Cache(), size=SIZE).batch([0], rngs(1))


# --- text -------------------------------------------------------------------------------------------------------------


def test_a_kept_context_is_the_fresh_one_and_is_made_once(sd, monkeypatch):
    contexts = partial(cached_texts, sd, Cache())
    calls = counted(sd.text_encoder, "forward", monkeypatch)
    rows = contexts(["a cat", "a dog", "a cat"]).context
    assert len(calls) == 2 and torch.equal(contexts(["a dog"]).context[0], rows[1]) and len(calls) == 2
    # float32 in another batch: a few roundings
    torch.testing.assert_close(rows, sd.encode_prompts(["a cat", "a dog", "a cat"]), rtol=1e-4, atol=1e-5)


def test_contexts_that_change_are_refused(sd, monkeypatch):
    contexts = partial(cached_texts, sd, Cache())
    contexts(["a cat"])
    hook = sd.text_encoder.blocks[0].attention.to_q.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(ValueError, match="the text encoder has an adapter on it"):
        contexts(["a cat"])
    hook.remove()
    contexts(["a cat"])
    monkeypatch.setitem(sd.text.tokenizers, "text_encoder", sd.tokenizer.with_added({"<cat>": (sd.text_encoder.config.vocab_size,)}))
    with pytest.raises(ValueError, match="caption 'a <cat>' holds a new token, whose vector changes"):
        contexts(["a <cat>"])


# --- the cache --------------------------------------------------------------------------------------------------------


def test_memory_is_filled_first_and_files_hold_the_rest(tmp_path):
    cache = Cache(tmp_path, memory=100)
    values = {name: torch.full((10,), float(i)) for i, name in enumerate("abcd")}  # 40 bytes each
    for name, value in values.items():
        assert torch.equal(cache.get(name, lambda: value), value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.npy", "d.npy"]
    for name, value in values.items():
        assert torch.equal(cache.get(name, lambda: pytest.fail("made twice")), value)


def test_without_a_folder_everything_stays_in_memory():
    cache = Cache(None, memory=0)
    first = cache.get("a", lambda: torch.ones(3))
    assert cache.get("a", lambda: pytest.fail("made twice")) is first


@pytest.mark.parametrize("left", [0, 5, 150])
def test_a_broken_file_is_made_anew(tmp_path, left):
    Cache(tmp_path, memory=0).get("a", lambda: torch.arange(10.0))
    path = tmp_path / "a.npy"
    path.write_bytes(path.read_bytes()[:left])
    assert torch.equal(Cache(tmp_path, memory=0).get("a", lambda: torch.arange(10.0)), torch.arange(10.0))
    assert torch.equal(Cache(tmp_path, memory=0).get("a", lambda: pytest.fail("made twice")), torch.arange(10.0))


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(file, array):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError, match=r"a\.npy: cannot be written \(No space left on device\)"):
        Cache(tmp_path, memory=0).get("a", lambda: torch.ones(3))
    assert list(tmp_path.iterdir()) == []
