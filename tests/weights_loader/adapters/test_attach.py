import warnings

import pytest
import torch

import weights_loader
from minidiff.adapters.custom_diffusion import CustomDiffusion
from minidiff.adapters.tokens import NewTokens
from tests.checkpoints import assert_same_model
from tests.parity.check import TOLERANCE
from tests.small_files import random_delta, random_lora, weight_of
from tests.small_models import small_model
from weights_loader.adapters.attach import attach, pairs
from weights_loader.adapters.custom_diffusion import write_custom_diffusion
from weights_loader.adapters.embedding import write_embedding
from weights_loader.adapters.lora import write_lora

LAYERS = r"cross_attention|blocks\.0\.conv_1|blocks\.1\.linear_2"
PROMPT = "a <new1> apple"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a file of each kind for it."""
    path, sd = tmp_path_factory.mktemp("files"), small_model()
    weights_loader.save(sd, path / "model.safetensors")
    write_lora(path / "a.safetensors", random_lora(sd, LAYERS), sd)
    write_lora(path / "b.safetensors", random_lora(sd, LAYERS, (3,), (2.0,)), sd, "kohya")
    write_embedding(path / "word.safetensors", NewTokens({"<new1>": torch.ones(2, 16)}))
    delta = CustomDiffusion(random_delta(sd).layers, NewTokens({"<new2>": -torch.ones(1, 16)}))
    write_custom_diffusion(path / "delta.safetensors", delta, sd)
    return path


@torch.no_grad()
def answer(sd, prompt=PROMPT):
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return sd.unet(x, torch.tensor([500]), sd.encode_prompts([prompt]))


def test_a_model_with_files_of_every_kind_computes_with_the_changed_weights(folder):
    sd = weights_loader.load(
        folder / "model.safetensors",
        lora=(folder / "a.safetensors", (folder / "b.safetensors", 0.5)),
        embeddings=folder / "word.safetensors",
        custom_diffusion=[folder / "delta.safetensors"],
    )
    changed = small_model()
    with torch.no_grad():
        for name, weight in random_delta(changed).layers.items():
            weight_of(changed, name).copy_(weight)
        for lora, multiplier in ((random_lora(changed, LAYERS), 1.0), (random_lora(changed, LAYERS, (3,), (2.0,)), 0.5)):
            for name, one in lora.layers.items():
                delta = torch.einsum("or, r... -> o...", one.up.weight.flatten(1), one.down.weight)
                weight_of(changed, name).add_(multiplier * one.alpha / one.rank * delta)
    NewTokens({"<new1>": torch.ones(2, 16), "<new2>": -torch.ones(1, 16)}).attach(changed)
    for prompt in (PROMPT, "a <new2> pizza"):
        torch.testing.assert_close(answer(sd, prompt), answer(changed, prompt), **TOLERANCE[torch.float32])
    with_word = weights_loader.load(folder / "model.safetensors", embeddings=folder / "word.safetensors")
    assert (answer(sd) - answer(with_word)).abs().max() > 0.3
    assert [one.title.split(" /")[0] for one in sd.attached] == ["embedding", "<new2>", "Custom Diffusion", "LoRA", "LoRA at 0.5"]


def test_what_is_attached_is_taken_off_bit_for_bit(folder):
    sd = small_model()
    before = answer(sd, "a cat")
    files = {"lora": [(folder / "a.safetensors", -2.0)], "embeddings": [(folder / "word.safetensors", "<cat>")]}
    attach(sd, **files, custom_diffusion=folder / "delta.safetensors")
    assert not torch.equal(answer(sd, "a cat"), before)
    for one in reversed(sd.attached):
        one.detach()
    assert torch.equal(answer(sd, "a cat"), before)
    assert_same_model(sd, small_model())


def test_a_model_is_saved_without_what_is_attached_and_that_is_said(folder, tmp_path):
    sd = weights_loader.load(folder / "model.safetensors", lora=[(folder / "a.safetensors", 0.5)])
    with pytest.warns(UserWarning, match="the model without what is attached to it .LoRA at 0.5 .*a.safetensors.; merge that"):
        weights_loader.save(sd, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    sd.attached[0].detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is attached any more
        weights_loader.save(sd, tmp_path / "model.safetensors")


def test_if_one_file_does_not_fit_none_is_attached(folder, tmp_path):
    sd = small_model()
    write_embedding(tmp_path / "again.safetensors", NewTokens({"<new1>": torch.zeros(1, 16)}))
    before = answer(sd, "a cat")
    for files in ({"lora": folder / "word.safetensors"}, {"embeddings": [folder / "word.safetensors", tmp_path / "again.safetensors"]}):
        with pytest.raises(ValueError, match=r"(word|again).safetensors: "):
            attach(sd, **({"embeddings": folder / "word.safetensors"} | files))
        assert sd.attached == [] and torch.equal(answer(sd, "a cat"), before)
        assert torch.equal(sd.tokenizer(["a <new1>"]), small_model().tokenizer(["a <new1>"]))


@pytest.mark.parametrize("files", [("a.safetensors", 0.7), [("a.safetensors", 0.7, 1)], [3]])
def test_a_list_of_files_that_is_none_is_an_error(files):
    with pytest.raises(ValueError, match="expected a file, or a list of files and .file, value. pairs"):
        pairs(files, 1.0)
