"""Custom Diffusion: what it trains, what it leaves alone, and its compression."""

import pytest
import torch

from minidiff.adapters.custom_diffusion import (
    CustomDiffusion,
    compress,
    create_custom_diffusion,
    from_deltas,
)
from minidiff.adapters.tokens import NewTokens, create_tokens
from minidiff.config import SD1
from minidiff.unet import UNet
from tests.small_models import small_model


@pytest.fixture
def sd():
    model = small_model()
    with torch.no_grad():  # with biases of 0, the context's channels would sum to 0: one of the 16 directions would be empty
        model.text_encoder.norm_out.bias.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return model


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moved(delta, seed=1, size=0.3):
    """The same with other weights."""
    layers = {name: W.detach() + size * normal(*W.shape, seed=seed + i) for i, (name, W) in enumerate(delta.layers.items())}
    biases = {name: b.detach() + size for name, b in delta.biases.items()}
    return CustomDiffusion(layers, delta.tokens, biases)


def denoised(sd, prompt="a cat"):
    x, t = normal(1, 4, 8, 8), torch.tensor([500])
    return sd.unet(x, t, sd.encode_prompts([prompt]))


def state(sd):
    return {name: tensor.clone() for part in (sd.text_encoder, sd.unet) for name, tensor in part.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def concept(sd, word, seed):
    return moved(create_custom_diffusion(sd, tokens=NewTokens({word: normal(1, 16, seed=seed)})), seed)


# -------------------------------------------------------------------------------------------------------------- training


def test_the_number_of_trained_weights_is_the_papers():
    sd = small_model()
    with torch.device("meta"):
        sd.unet = UNet(SD1.unet)
        delta, everything = create_custom_diffusion(sd), create_custom_diffusion(sd, "cross_attention")
    assert sum(p.numel() for p in delta.parameters()) == 19_169_280 and len(delta.layers) == 32
    # Beside them queries, outputs and their bias in each block: 2 blocks down and 3 up at each of 320, 640 and 1280, 1 in the middle.
    others = 5 * sum(2 * width**2 + width for width in (320, 640, 1280)) + 2 * 1280**2 + 1280
    assert sum(p.numel() for p in everything.parameters()) == 19_169_280 + others


def test_before_training_the_prediction_is_the_models(sd):
    before = denoised(sd)
    for layers in ("keys and values", "cross_attention"):
        delta = create_custom_diffusion(sd, layers)
        delta.attach(sd)
        assert torch.equal(denoised(sd), before)
        delta.detach()


@pytest.mark.parametrize("layers", ["keys and values", "cross_attention"])
def test_attached_it_predicts_as_a_model_with_these_weights(layers, sd):
    delta, before = moved(create_custom_diffusion(sd, layers)), state(sd)
    plain = denoised(sd)
    delta.attach(sd)
    attached = denoised(sd)
    delta.detach()
    assert same(state(sd), before) and torch.equal(denoised(sd), plain)
    for name, W in delta.layers.items():
        sd.unet.get_submodule(name.removeprefix("unet.")).weight.data = W.detach()
    for name, bias in delta.biases.items():
        sd.unet.get_submodule(name.removeprefix("unet.")).bias.data = bias.detach()
    torch.testing.assert_close(attached, denoised(sd), rtol=1e-4, atol=1e-5)  # fp32 parity
    assert (attached - plain).abs().max() > 0.01


def test_a_concept_attaches_its_words_too_and_detaches_both(sd):
    one, ids = concept(sd, "<new1>", 3), sd.tokenizer(["a <new1>"])
    one.attach(sd)
    assert sd.tokenizer.encode("<new1>") == [sd.config.text_encoder.vocab_size]
    one.detach()
    one.detach()  # without effect
    assert torch.equal(sd.tokenizer(["a <new1>"]), ids) and not sd.text_encoder.added
    assert not any(module._forward_hooks for module in sd.unet.modules())


def test_one_without_layers_takes_its_words_off_too(sd):
    words_alone = CustomDiffusion({}, NewTokens({"<new1>": normal(1, 16)}))
    words_alone.attach(sd)
    assert words_alone.attached and sd.tokenizer.added
    words_alone.detach()
    assert not words_alone.attached and not sd.tokenizer.added


def test_training_moves_these_weights_and_this_word_alone(sd):
    delta = create_custom_diffusion(sd, tokens=create_tokens(sd, {"<new1>": 1}, {"<new1>": "a"}))
    for part in (sd.text_encoder, sd.unet):
        part.requires_grad_(False)
    before, own = state(sd), [p.detach().clone() for p in delta.parameters()]
    delta.attach(sd)
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        context = sd.text_encoder(sd.tokenizer(["a <new1> cat"]))
        sd.unet(normal(1, 4, 8, 8), torch.tensor([500]), context).square().mean().backward()
        optimizer.step()
    assert same(state(sd), before)
    assert all((new - old).abs().max() > 1e-3 for new, old in zip(delta.parameters(), own, strict=True))


def test_the_start_token_gives_no_gradient_and_its_value_is_the_new_weights(sd):
    delta = moved(create_custom_diffusion(sd, "cross_attention"))
    name = next(name for name in delta.layers if name.endswith("to_v"))
    W, layer = delta.layers[name], sd.unet.get_submodule(name.removeprefix("unet."))
    layer.requires_grad_(False)
    delta.attach(sd)
    context = normal(2, 5, 16).requires_grad_(True)
    y = layer(context)
    torch.testing.assert_close(y, context @ W.T, rtol=1e-5, atol=1e-6)  # fp32: the same product by another kernel
    weights = normal(*y.shape, seed=5)
    (y * weights).sum().backward()
    expected = torch.einsum("blo,bli->oi", weights[:, 1:], context[:, 1:])
    torch.testing.assert_close(W.grad, expected, rtol=1e-5, atol=1e-5)  # fp32: sums of 8 products
    assert not context.grad[:, 0].any() and context.grad[:, 1:].any(dim=-1).all()
    # Queries and outputs know no start token.
    x, query = normal(1, 3, 16), name.replace("to_v", "to_q")
    sd.unet.get_submodule(query.removeprefix("unet."))(x)[:, 0].sum().backward()
    assert delta.layers[query].grad.any()


def test_a_hook_that_adds_to_a_layer_stays_whichever_came_first(sd):
    delta = moved(create_custom_diffusion(sd))
    layer = sd.unet.get_submodule(delta.names[0].removeprefix("unet."))
    context = normal(1, 5, 16)
    layer.register_forward_hook(lambda layer, args, output: output + 100)
    delta.attach(sd)
    torch.testing.assert_close(layer(context), context @ delta.layers[delta.names[0]].T + 100, rtol=1e-5, atol=1e-4)  # 100 in fp32


def test_in_half_precision_it_computes_in_float32_and_gives_the_layers_dtype(sd):
    delta = moved(create_custom_diffusion(sd))
    layer = sd.unet.get_submodule(delta.names[0].removeprefix("unet.")).to(torch.bfloat16)
    delta.attach(sd)
    x = normal(1, 5, 16).to(torch.bfloat16)
    assert torch.equal(layer(x), (x.float() @ delta.layers[delta.names[0]].T).to(torch.bfloat16))


def test_deltas_are_differences_to_the_model(sd):
    delta = create_custom_diffusion(sd)
    with pytest.raises(ValueError, match="no model to take the difference to: attach the Custom Diffusion, or give the model"):
        delta.deltas()
    assert not any(change.any() for change in delta.deltas(sd).values())
    other = moved(delta)
    changes = other.deltas(sd)
    other.attach(sd)
    assert same(other.deltas(), changes)
    other.detach()
    again = from_deltas(sd, changes)
    assert all(torch.allclose(again.layers[name], W, rtol=0, atol=1e-6) for name, W in other.layers.items())  # fp32: W0 + (W - W0)


def test_what_a_compressed_one_stands_for_keeps_its_biases(sd):
    delta = moved(create_custom_diffusion(sd, "cross_attention"))
    again = from_deltas(sd, compress(delta.deltas(sd), share=1.0).deltas(), delta.tokens, delta.biases)
    delta.attach(sd)
    wanted = denoised(sd)
    delta.detach()
    again.attach(sd)
    torch.testing.assert_close(denoised(sd), wanted, rtol=1e-4, atol=1e-5)  # fp32 parity


def test_what_does_not_fit_the_model_is_named_and_changes_nothing(sd):
    W = normal(16, 16)
    with pytest.raises(ValueError, match="no layer unet.nowhere.to_k in the model's cross-attentions"):
        CustomDiffusion({"unet.nowhere.to_k": W}).attach(sd)
    name = create_custom_diffusion(sd).names[0]
    with pytest.raises(ValueError, match=rf"{name} has shape \(8, 16\), the model's \(16, 16\)"):
        CustomDiffusion({name: W[:8]}).attach(sd)
    with pytest.raises(ValueError, match=rf"{name} has a bias of shape \(16,\), the model's layer has none"):
        CustomDiffusion({name: W}, biases={name: W[0]}).attach(sd)
    with pytest.raises(ValueError, match="a bias without a weight for there"):
        CustomDiffusion({name: W}, biases={"there": W[0]})
    with pytest.raises(ValueError, match="layers 'all' unknown; choose keys and values, cross_attention"):
        create_custom_diffusion(sd, "all")
    one = create_custom_diffusion(sd)
    one.attach(sd)
    with pytest.raises(ValueError, match="attached already"):
        one.attach(sd)
    second = create_custom_diffusion(sd, tokens=NewTokens({"<new1>": W}))
    with pytest.raises(ValueError, match=r"another Custom Diffusion is on .* and \d+ more layers; detach it first, or merge"):
        second.attach(sd)
    assert not sd.tokenizer.added


# ----------------------------------------------------------------------------------------------------------- compression


def test_the_fewest_singular_values_with_the_share_are_kept():
    # Singular values 5, 3, 2: sums 5, 8, 10.
    u, v = torch.linalg.qr(normal(6, 3)).Q, torch.linalg.qr(normal(4, 3, seed=1)).Q
    delta = {"layer": u @ torch.diag(torch.tensor([5.0, 3.0, 2.0])) @ v.T}
    for share, rank, error in [(0.4, 1, (13 / 38) ** 0.5), (0.6, 2, (4 / 38) ** 0.5), (0.79, 2, (4 / 38) ** 0.5), (0.85, 3, 0)]:
        small = compress(delta, share)
        left, right = small.layers["layer"]
        assert left.shape == (6, rank) and right.shape == (rank, 4)
        assert small.error == pytest.approx(error, abs=1e-6)  # the singular values of a float32 matrix
        assert (small.size, small.full_size) == (4 * rank * 10, 4 * 24)
        measured = (small.deltas()["layer"] - delta["layer"]).norm() / delta["layer"].norm()
        assert small.error == pytest.approx(float(measured), abs=1e-6)
    assert compress(delta, rank=2).layers["layer"][0].shape == (6, 2)


def test_everything_kept_is_the_change_itself_and_nothing_stays_nothing(sd):
    changes = moved(create_custom_diffusion(sd)).deltas(sd)
    for whole in (compress(changes, 1.0), compress(changes, rank=1000)):
        assert whole.error < 1e-7
        for name, change in whole.deltas().items():
            torch.testing.assert_close(change, changes[name], rtol=1e-5, atol=1e-6)  # factors rounded to float32
    nothing = compress({"layer": torch.zeros(4, 4)})
    assert nothing.error == 0 and not nothing.deltas()["layer"].any()


def test_a_share_or_rank_that_cannot_be_is_refused():
    for share in (0, 1.1, -1, float("nan")):
        with pytest.raises(ValueError, match=f"share {share}: expected more than 0 and at most 1"):
            compress({}, share)
    with pytest.raises(ValueError, match="rank 0: expected at least 1"):
        compress({}, rank=0)
