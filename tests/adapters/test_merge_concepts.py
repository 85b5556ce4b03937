"""The merge of several concepts against its Lagrange system, and what the merged one gives."""

import pytest
import torch
from torch import nn

from minidiff.adapters.custom_diffusion import CustomDiffusion, create_custom_diffusion
from minidiff.adapters.merge_concepts import merge_concepts, merge_directions
from minidiff.adapters.tokens import NewTokens
from tests.small_models import small_model

BEGINNINGS, MIDDLES, ENDS = ("red", "blue", "a", "the"), ("cat", "dog", "on", "and of"), ("beach", "sea", "x y", "!")
CAPTIONS = [f"{a} {b} {c}" for a in BEGINNINGS for b in MIDDLES for c in ENDS]


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


def state(sd):
    return {name: tensor.clone() for part in (sd.text_encoder, sd.unet) for name, tensor in part.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def concept(sd, word, seed):
    return moved(create_custom_diffusion(sd, tokens=NewTokens({word: normal(1, 16, seed=seed)})), seed)


@pytest.mark.parametrize("ridge", [0.0, 2.5])
def test_the_closed_form_solves_the_lagrange_system(ridge):
    s, D, n, out = 5, 12, 40, 7
    C, C_reg, asked = (normal(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate([(s, D), (n, D), (s, out)]))
    directions, condition, condition_reg = merge_directions(C, C_reg, ridge)
    # Stationary: (C_reg^T C_reg + ridge) X + C^T L = 0, and C X = asked, for X = (W - W0)^T and the multipliers L.
    G = C_reg.T @ C_reg + ridge * torch.eye(D, dtype=torch.float64)
    system = torch.cat([torch.cat([G, C.T], 1), torch.cat([C, torch.zeros(s, s, dtype=torch.float64)], 1)])
    X = torch.linalg.solve(system, torch.cat([torch.zeros(D, out, dtype=torch.float64), asked]))[:D]
    torch.testing.assert_close(asked.T @ directions, X.T, rtol=1e-10, atol=1e-10)  # float64, conditions below 1000
    # And the paper's own formula.
    d = C @ torch.linalg.inv(G)
    torch.testing.assert_close(directions, torch.linalg.inv(d @ C.T) @ d, rtol=1e-10, atol=1e-10)
    assert condition == pytest.approx(float(torch.linalg.cond(d @ C.T)), rel=1e-8)
    assert condition_reg == pytest.approx(float(torch.linalg.cond(G)), rel=1e-8)


def test_no_other_change_that_keeps_the_constraints_drifts_less():
    C, C_reg, asked = (normal(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate([(3, 8), (30, 8), (3, 4)]))
    change = asked.T @ merge_directions(C, C_reg)[0]
    free = torch.eye(8, dtype=torch.float64) - torch.linalg.pinv(C) @ C  # free @ C^T is 0
    for seed in range(20):
        other = change + 0.1 * normal(4, 8, seed=seed, dtype=torch.float64) @ free
        torch.testing.assert_close(other @ C.T, asked.T, rtol=1e-12, atol=1e-12)  # float64
        assert (other @ C_reg.T).norm() > (change @ C_reg.T).norm()


def merged(sd, one, two, targets=(["a <new1> cat"], ["a <new2> dog on the"]), regularisation=CAPTIONS, **settings):
    return merge_concepts(sd, [one, two], targets, regularisation, **settings)


def words(sd, caption):
    """The context's rows from the first word to the end token."""
    return sd.encode_prompts([caption])[0, 1 : len(sd.tokenizer.encode(caption)) + 2]


def test_merged_concepts_give_their_own_keys_and_values_and_the_rest_drifts_little(sd):
    one, two = concept(sd, "<new1>", 3), concept(sd, "<new2>", 30)
    before = state(sd)
    both, report = merged(sd, one, two)
    assert same(state(sd), before) and not sd.tokenizer.added
    assert both.tokens.names == ("<new1>", "<new2>") and both.names == one.names
    letters = len(sd.tokenizer.encode("cat")) + len(sd.tokenizer.encode("dog on the"))
    assert report.rows == 4 + letters  # two new words, what stands after them, and two end tokens
    assert report.residual < 1e-9 and report.condition > 1 and report.seconds > 0  # float64, condition 1e4
    tokens = torch.cat([words(sd, caption) for caption in CAPTIONS]).unique(dim=0)
    old, new = ([tokens @ W.detach().T for W in delta.layers.values()] for delta in (create_custom_diffusion(sd), both))
    drift = sum((b - a).square().sum() for a, b in zip(old, new)).sqrt() / sum(a.square().sum() for a in old).sqrt()
    assert report.regularisation_rows == len(tokens) and report.drift == pytest.approx(float(drift), rel=1e-3)  # fp32
    outputs = {}
    for caption, delta in (("a <new1> cat", one), ("a <new1> cat", both), ("a <new2> dog on the", two), ("a <new2> dog on the", both)):
        delta.attach(sd)
        rows = words(sd, caption)[None, 1:]  # from the new word on
        outputs[caption, delta is both] = [layer(rows) for name, layer in sd.unet.named_modules() if f"unet.{name}" in delta.names]
        delta.detach()
    for caption in ("a <new1> cat", "a <new2> dog on the"):
        for ours, expected in zip(outputs[caption, True], outputs[caption, False], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)  # fp32 products of weights that grew in the merge


def test_one_concept_alone_keeps_its_own_keys_and_values(sd):
    one, captions = concept(sd, "<new1>", 3), ["<new1> cat", "a photo of a <new1>"]
    alone, report = merge_concepts(sd, [one], [captions], CAPTIONS)
    assert report.residual < 1e-9  # float64, condition 1e5 at most
    one.tokens.attach(sd)
    rows = torch.cat([words(sd, captions[0]), words(sd, captions[1])[-2:]])
    one.tokens.detach()
    for name, W in one.layers.items():
        torch.testing.assert_close(rows @ alone.layers[name].T, rows @ W.T, rtol=1e-4, atol=1e-4)  # fp32 products
    assert any((alone.layers[name] - W).abs().max() > 0.1 for name, W in one.layers.items())  # other words kept the model's
    with_padding = sd.encode_prompts(["a red cat"])[0, 10:]
    assert (with_padding @ alone.layers[name].T - with_padding @ W.T).abs().max() > 1e-3  # which is asked of no row


def test_nothing_changed_is_nothing_merged(sd):
    one, two = (create_custom_diffusion(sd, tokens=NewTokens({w: normal(1, 16, seed=i)})) for i, w in enumerate(["<new1>", "<new2>"]))
    both, report = merged(sd, one, two)
    assert report.residual == report.drift == 0
    assert all(torch.equal(both.layers[name], W) for name, W in one.layers.items())


def test_a_ridge_keeps_the_constraints_and_helps_too_few_captions(sd):
    one, two = concept(sd, "<new1>", 3), concept(sd, "<new2>", 30)
    few = ["a cat"]
    with pytest.raises(ValueError, match=r"\d+ different tokens of the regularisation captions do not fix a map of 16 channels .*ridge"):
        merged(sd, one, two, regularisation=few)
    _, report = merged(sd, one, two, regularisation=few, ridge=0.01)
    assert report.residual < 1e-8 and report.regularisation_rows < 16


def test_captions_that_coincide_are_named(sd):
    one, two = (moved(create_custom_diffusion(sd), seed) for seed in (1, 20))
    message = r"captions of concepts 1 and 2 coincide: 'the sea' and 'the sea' have tokens of the same features \(\d in all\)"
    with pytest.raises(ValueError, match=message):
        merged(sd, one, two, (["the sea"], ["the sea"]))
    named = concept(sd, "<new1>", 3)
    merged(sd, named, two, (["a <new1>", "A  <new1>"], ["x"]))  # but within a concept equal rows count once


def test_rows_that_depend_on_each_other_name_their_captions():
    C, C_reg = normal(4, 8, dtype=torch.float64), normal(30, 8, seed=1, dtype=torch.float64)
    C = torch.cat([C, C[1:2] + 1e-9])
    with pytest.raises(ValueError, match="coincide or depend on each other .*, most of all in 'b' and 'e'; leave|in 'e' and 'b'; leave"):
        merge_directions(C, C_reg, captions=["a", "b", "c", "d", "e"])


def test_a_merge_that_cannot_be_is_refused_and_leaves_the_model(sd):
    one, two = concept(sd, "<new1>", 3), concept(sd, "<new2>", 30)
    with pytest.raises(ValueError, match="2 concepts and 1 lists of target captions"):
        merged(sd, one, two, (["a <new1>"],))
    with pytest.raises(ValueError, match="two concepts have a word '<new1>'; rename one"):
        merged(sd, one, concept(sd, "<new1>", 5))
    with pytest.raises(ValueError, match="target caption 'a dog' has none of its concept's words <new2>"):
        merged(sd, one, two, (["a <new1>"], ["a dog"]))
    with pytest.raises(ValueError, match="0 regularisation captions, ridge 0.0"):
        merged(sd, one, two, regularisation=[])
    with pytest.raises(ValueError, match=r"concept 1 has .*to_q and \d+ more layers; only keys and values"):
        merged(sd, create_custom_diffusion(sd, "cross_attention"), two)
    with pytest.raises(ValueError, match=r"\d\d different tokens in the target captions, and a map of 16 channels can hold 16; give fewer"):
        merged(sd, one, two, (["a <new1> cat on the red beach , and of the blue sea"], ["a <new2>"]))
    assert not sd.tokenizer.added and not sd.text_encoder.added
    assert not any(isinstance(module, nn.Linear) and module._forward_hooks for module in sd.unet.modules())
