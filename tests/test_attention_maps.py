"""Recorded cross-attention: rows of one, the picture as it was, the prompt's half alone, no hook left behind."""

import threading

import pytest
import torch
from einops import rearrange

from minidiff.attention_maps import Layer, control_attention, record_cross_attention, with_attention_maps, word_map
from minidiff.blocks import SpatialTransformer
from minidiff.samplers import SAMPLERS
from tests.small_models import small_model, xl_config

PROMPT = "a red apple on a blue background"
# Cells of each level at 32 x 32 pixels and at 72 x 56 (width x height), as (H, W); the last level has no attention but the middle's.
SQUARE = ((8, 8), (4, 4), (2, 2))
ODD = ((14, 18), (7, 9), (4, 5))


@pytest.fixture(scope="module")
def sd():
    return small_model()


def hooks_of(unet):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in unet.modules())


def layer_sizes(sizes):
    """The transformers of the small U-Net, one ResBlock a level down and two up, with their maps' sizes."""
    high, low, middle = sizes
    return {
        "down.0.transformers.0": high,
        "down.1.transformers.0": low,
        "middle.transformer": middle,
        "up.1.transformers.0": low,
        "up.1.transformers.1": low,
        "up.2.transformers.0": high,
        "up.2.transformers.1": high,
    }


@pytest.mark.parametrize("size, sizes", [(32, SQUARE), ((72, 56), ODD)])
@pytest.mark.parametrize("guidance_scale", [1, 4.0])
def test_every_transformer_gives_one_map_of_its_size_whose_rows_sum_to_1(sd, size, sizes, guidance_scale):
    step = next(with_attention_maps(sd.denoise([PROMPT, "a cat", "a dog"], size=size, guidance_scale=guidance_scale, steps=2), sd.unet))
    assert {name: tuple(m.shape) for name, m in step.attention_maps.items()} == {
        name: (3, H, W, 32) for name, (H, W) in layer_sizes(sizes).items()
    }
    for name, m in step.attention_maps.items():
        torch.testing.assert_close(m.sum(dim=-1), torch.ones(m.shape[:-1]), rtol=0, atol=1e-5, msg=name)  # fp32
        assert m.min() >= 0 and not m.requires_grad


def test_each_block_of_sdxls_transformers_gives_a_map():
    """The two contexts of SDXL have the same tokens at the same places."""
    sd = small_model(xl_config())
    step = next(with_attention_maps(sd.denoise([PROMPT], size=32, steps=1), sd.unet))
    transformers = {name: module for name, module in sd.unet.named_modules() if isinstance(module, SpatialTransformer)}
    expected = [f"{name}.{i}" if i else name for name, module in transformers.items() for i in range(len(module.blocks))]
    assert list(step.attention_maps) == expected and len(expected) > len(transformers)
    for m in step.attention_maps.values():
        torch.testing.assert_close(m.sum(dim=-1), torch.ones(m.shape[:-1]), rtol=0, atol=1e-5)  # fp32


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_recording_does_not_change_the_picture(sd, sampler):
    plain = list(sd.denoise([PROMPT, "a cat"], steps=4, sampler=sampler))
    recorded = list(with_attention_maps(sd.denoise([PROMPT, "a cat"], steps=4, sampler=sampler), sd.unet))
    for one, other in zip(recorded, plain, strict=True):
        assert torch.equal(one.x_t, other.x_t) and torch.equal(one.x0_hat, other.x0_hat)
        assert one.attention_maps and other.attention_maps is None


def maps_by_hand(sd, x_t, t, prompt):
    """Every cross-attention's softmax(q k^T / sqrt(d)), averaged over heads, from its inputs."""
    captured, handles = {}, []
    for name, module in sd.unet.named_modules():
        if isinstance(module, SpatialTransformer):
            attention = module.blocks[0].cross_attention
            handles.append(attention.register_forward_pre_hook(lambda module, args, name=name: captured.update({name: (module, *args)})))
    with torch.no_grad():
        sd.unet(x_t, torch.tensor([t]), sd.text_encoder(sd.tokenizer([prompt])))
        for handle in handles:
            handle.remove()
        for name, (attention, x, context) in captured.items():
            q, k = (rearrange(y, "B N (h d) -> B h N d", h=attention.heads) for y in (attention.to_q(x), attention.to_k(context)))
            captured[name] = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1).mean(dim=1)
    return captured


@pytest.mark.parametrize("sampler", ["ddim", "heun", "plms"])
def test_maps_are_of_the_steps_first_call_and_of_the_prompt_not_of_the_negative_one(sd, sampler):
    x = torch.randn(1, 4, 14, 18, generator=torch.Generator().manual_seed(6))
    for step in with_attention_maps(
        sd.denoise(PROMPT, seeds=[6], size=(72, 56), sampler=sampler, steps=3, negative_prompt="a blue car"), sd.unet
    ):
        expected = maps_by_hand(sd, x, step.t, PROMPT)
        for name, m in step.attention_maps.items():
            # fp32 parity; alone and as a batch of two
            torch.testing.assert_close(rearrange(m, "B H W L -> B (H W) L"), expected[name], rtol=1e-4, atol=1e-5)
        x = step.x_t
    swapped = maps_by_hand(sd, x, step.t, "a blue car")  # the comparison above would notice
    assert any((rearrange(m, "B H W L -> B (H W) L") - swapped[name]).abs().max() > 1e-3 for name, m in step.attention_maps.items())


def test_each_step_has_maps_of_its_own_whatever_runs_between_steps(sd):
    expected = [step.attention_maps for step in with_attention_maps(sd.denoise(PROMPT, steps=3), sd.unet)]
    mixed = zip(
        with_attention_maps(sd.denoise(PROMPT, steps=3), sd.unet),
        with_attention_maps(sd.denoise(["a cat", "a dog"], steps=3, sampler="heun"), sd.unet),
        expected,
        strict=True,
    )
    for step, other, maps in mixed:
        sd.generate("a car", steps=1)
        assert all(torch.equal(step.attention_maps[name], m) for name, m in maps.items())
        assert all(len(m) == 2 for m in other.attention_maps.values())
    assert not torch.equal(expected[0]["middle.transformer"], expected[1]["middle.transformer"])


def test_no_hook_is_left_behind(sd, monkeypatch):
    before = hooks_of(sd.unet)
    walk = with_attention_maps(sd.denoise(PROMPT, steps=3), sd.unet)
    next(walk)
    assert hooks_of(sd.unet) == before  # the walk may never be taken up again
    list(walk)
    assert hooks_of(sd.unet) == before

    with record_cross_attention(sd.unet):
        assert hooks_of(sd.unet) == before + 3 * 7
    with pytest.raises(RuntimeError), record_cross_attention(sd.unet):
        raise RuntimeError
    assert hooks_of(sd.unet) == before

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(sd.unet.middle.block_2, "forward", fail)
    with pytest.raises(MemoryError):
        list(with_attention_maps(sd.denoise(PROMPT), sd.unet))
    assert hooks_of(sd.unet) == before


def test_a_layers_map_is_kept_until_the_dict_is_cleared(sd):
    x_t, t = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    context = sd.encode_prompts([PROMPT])
    with torch.no_grad(), record_cross_attention(sd.unet) as maps:
        sd.unet(x_t[0], t, context)
        first = dict(maps)
        sd.unet(x_t[1], t, context)
        assert all(maps[name] is m for name, m in first.items())
        maps.clear()
        sd.unet(x_t[1], t, context)
    assert maps.keys() == first.keys() and not torch.equal(maps["middle.transformer"], first["middle.transformer"])


# --- other weights ----------------------------------------------------------------------------------------------------


def test_layers_are_told_by_name_kind_size_and_rows_in_the_order_in_which_they_run(sd):
    seen = []
    with torch.no_grad(), control_attention(sd.unet, lambda layer, weights: seen.append(layer)):
        sd.unet(torch.zeros(1, 4, 14, 18), torch.tensor([5]), sd.encode_prompts(["", PROMPT]))
    expected = [Layer(name, kind, size, 2) for name, size in layer_sizes(ODD).items() for kind in ("self", "cross")]
    expected[0] = Layer("down.0.transformers.0", "self", ODD[0], 1)  # guidance's two halves are still one
    assert seen == expected


def test_weights_replace_those_of_the_last_rows_and_the_others_keep_their_bits(sd):
    """The reference: the layer's own projections around weights that look at the first token alone."""
    block = sd.unet.middle.transformer.blocks[0].cross_attention
    inputs, outputs = [], []
    handles = [
        block.register_forward_pre_hook(lambda module, args: inputs.append(args)),
        block.register_forward_hook(lambda module, args, output: outputs.append(output)),
    ]
    context = sd.encode_prompts(["a cat", "a dog", PROMPT])
    x, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((3,), 5)

    def first_token(layer, weights):
        if layer.name == "middle.transformer":
            w = torch.zeros_like(weights(slice(-2, None)))
            w[..., 0] = 1
            return w
        return None

    with torch.no_grad():
        sd.unet(x, t, context)
        with control_attention(sd.unet, first_token, ("cross",)):
            sd.unet(x, t, context)
        v = block.to_v(inputs[1][1])[:, :1].expand_as(inputs[1][0])
        expected = block.to_out(v)
    for handle in handles:
        handle.remove()
    assert torch.equal(outputs[1][:1], outputs[0][:1])
    torch.testing.assert_close(outputs[1][1:], expected[1:], rtol=1e-4, atol=1e-5)  # fp32


def test_another_kind_of_attention_is_refused(sd):
    with pytest.raises(ValueError, match="kind of attention 'causal' unknown; choose cross, self"):
        with control_attention(sd.unet, lambda layer, weights: None, ("causal",)):
            pass
    assert hooks_of(sd.unet) == 0


# --- one word's map ---------------------------------------------------------------------------------------------------


def test_word_map_sums_the_words_tokens_and_averages_the_enlarged_layers():
    generator = torch.Generator().manual_seed(0)
    maps = {"fine": torch.rand(2, 4, 6, 5, generator=generator), "coarse": torch.rand(2, 2, 3, 5, generator=generator)}
    kept = {name: m.clone() for name, m in maps.items()}
    fine, coarse = (m[..., 1] + m[..., 3] for m in maps.values())
    # A pixel of twice the size lies a quarter of a cell from the centre of its own cell: 3/4 of it, 1/4 of the next.
    near, far = 0.75, 0.25
    down = torch.tensor([[1, 0], [near, far], [far, near], [0, 1]])
    along = torch.tensor([[1, 0, 0], [near, far, 0], [far, near, 0], [0, near, far], [0, far, near], [0, 0, 1]])
    expected = (fine + down @ coarse @ along.T) / 2
    torch.testing.assert_close(word_map(maps, [1, 3], (4, 6)), expected, rtol=0, atol=1e-6)  # fp32
    assert all(torch.equal(maps[name], m) for name, m in kept.items())


def test_the_maps_of_all_positions_sum_to_1(sd):
    step = next(with_attention_maps(sd.denoise(PROMPT, size=(72, 56)), sd.unet))
    total = sum(word_map(step.attention_maps, [position], (56, 72)) for position in range(32))
    torch.testing.assert_close(total, torch.ones(1, 56, 72), rtol=0, atol=1e-5)  # fp32


def test_the_tokenizer_says_where_a_words_tokens_are(sd):
    prompt = "a red zeppelin on a lawn"
    words = dict(sd.tokenizer.words(prompt))
    tokens = sd.tokenizer([prompt])[0]
    assert len(words["zeppelin"]) > 1 and words["red"] == [2]
    assert {word: sd.tokenizer.decode(tokens[positions].tolist()) for word, positions in words.items()} == {word: word for word in words}
    maps = next(with_attention_maps(sd.denoise(prompt), sd.unet)).attention_maps
    total = sum(word_map(maps, [position], (8, 8)) for position in words["zeppelin"])
    torch.testing.assert_close(word_map(maps, words["zeppelin"], (8, 8)), total, rtol=0, atol=1e-6)  # fp32


@pytest.mark.parametrize("positions", [[], [32], [-1], [3, 99]])
def test_positions_that_are_not_there_are_refused(sd, positions):
    maps = next(with_attention_maps(sd.denoise(PROMPT), sd.unet)).attention_maps
    with pytest.raises(ValueError, match=r"expected at least one of 0\.\.31"):
        word_map(maps, positions, (8, 8))


def test_no_maps_are_refused():
    with pytest.raises(ValueError, match="with_attention_maps"):
        word_map({}, [1], (8, 8))


def test_threads_record_their_own_calls_alone(sd):
    """Both hold their recorder open while the other runs the U-Net."""
    inputs = {"a": torch.zeros(1, 4, 8, 8), "b": torch.ones(2, 4, 8, 8)}
    context = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
    both, found = threading.Barrier(2, timeout=60), {}

    def run(name):
        x = inputs[name]
        with torch.no_grad(), record_cross_attention(sd.unet) as maps:
            both.wait()
            sd.unet(x, torch.tensor([500] * len(x)), context[: len(x)])
            both.wait()
            found[name] = dict(maps)

    threads = [threading.Thread(target=run, args=(name,)) for name in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, x in inputs.items():
        with torch.no_grad(), record_cross_attention(sd.unet) as alone:
            sd.unet(x, torch.tensor([500] * len(x)), context[: len(x)])
        assert found[name].keys() == alone.keys() and all(torch.equal(found[name][layer], alone[layer]) for layer in alone)
    assert hooks_of(sd.unet) == 0
