"""Prompt-to-prompt: the weights of every layer by the paper's formulas in float64, alignments by hand, no bit changed where nothing is."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from minidiff.adapters.custom_diffusion import from_deltas
from minidiff.adapters.parallel import create_adapters
from minidiff.attention import Attention
from minidiff.attention_maps import control_attention
from minidiff.editing.inversion import invert
from minidiff.editing.prompt_to_prompt import (
    AttentionEdit,
    align_refine,
    align_replace,
    common_words,
    find_word,
    local_blend,
    make_plan,
    prompt_to_prompt,
    split_prompt,
)
from minidiff.editing.start import Sampling, encode
from minidiff.samplers import SAMPLERS
from tests.adapters.learned_lora import random_lora
from tests.editing.small import last, picture
from tests.small_models import small_config, small_model, xl_config

LION, CROCODILE = "a lion on a blue background", "a crocodile on a blue background"
BIRD = "a small red lion on a blue background"
L = 32


@pytest.fixture(scope="module")
def sd():
    return small_model()


def plan_of(sd, original, edited, edit, steps=10, guided=True, pictures=2):
    return make_plan(sd.tokenizer, original, edited, edit, pictures=pictures, steps=steps, guided=guided)


# --- alignment --------------------------------------------------------------------------------------------------------


def test_a_word_of_other_tokens_gets_all_of_its_attention_and_what_follows_moves_along(sd):
    """The word "lion" is one token, "crocodile" five."""
    here, there = split_prompt(sd.tokenizer, LION), split_prompt(sd.tokenizer, CROCODILE)
    assert here.words[1] == ("lion", [2]) and there.words[1] == ("crocodile", [2, 3, 4, 5, 6])
    mapper = align_replace(here, there)
    expected = torch.zeros(L, L).double()
    expected[0, 0] = expected[1, 1] = 1
    expected[2, 2:7] = 1 / 5
    for i in range(3, L):
        expected[i, min(i + 4, L - 1)] = 1  # on a blue background, end, padding
    assert torch.equal(mapper, expected)
    back = align_replace(there, here)
    assert torch.equal(back[2:7, 2], torch.ones(5).double()) and torch.equal(back[here.end + 4, :].nonzero()[0], torch.tensor([here.end]))
    for one in (mapper, back):
        torch.testing.assert_close(one.sum(dim=1), torch.ones(L).double(), rtol=0, atol=1e-12)  # float64


def test_equal_prompts_map_to_themselves(sd):
    tokens = split_prompt(sd.tokenizer, CROCODILE)
    mapper, mapped = align_refine(tokens, tokens)
    assert torch.equal(align_replace(tokens, tokens), torch.eye(L).double()) and torch.equal(mapper, torch.eye(L).double()) and mapped.all()


def test_refinement_finds_each_old_word_and_marks_new_ones(sd):
    mapper, mapped = align_refine(split_prompt(sd.tokenizer, LION), split_prompt(sd.tokenizer, BIRD))
    # start a small red lion on a blue background end padding
    sources = [0, 1, None, None, 2, *range(3, L - 2)]
    assert [None if not mapped[j] else int(mapper[:, j].argmax()) for j in range(L)] == sources
    assert torch.equal(mapper.sum(dim=0), mapped.double())
    shorter, mapped = align_refine(split_prompt(sd.tokenizer, BIRD), split_prompt(sd.tokenizer, LION))
    assert [int(shorter[:, j].argmax()) for j in range(L) if mapped[j]] == [0, 1, *range(4, L)] and mapped[: L - 2].all()


def needleman_wunsch(x, y):
    """The best score with gaps of 0, matches of 1 and mismatches of -1, as the authors set them."""
    score = torch.zeros(len(x) + 1, len(y) + 1)
    for i in range(1, len(x) + 1):
        for j in range(1, len(y) + 1):
            diagonal = score[i - 1, j - 1] + (1 if x[i - 1] == y[j - 1] else -1)
            score[i, j] = max(score[i - 1, j], score[i, j - 1], diagonal)
    return int(score[-1, -1])


def test_the_alignment_is_as_good_as_needleman_and_wunschs():
    generator = torch.Generator().manual_seed(0)
    for n, m in ((0, 3), (4, 4), (7, 5), (6, 9)):
        x, y = (["abc"[i] for i in torch.randint(3, (k,), generator=generator)] for k in (n, m))
        pairs = common_words(x, y)
        assert all(x[i] == y[j] for i, j in pairs) and len(pairs) == needleman_wunsch(x, y)
        assert all(a < c and b < d for (a, b), (c, d) in zip(pairs, pairs[1:]))


def test_words_are_found_with_all_their_tokens_beside_commas_and_twice(sd):
    assert find_word(sd.tokenizer, "a crocodile, a lion and a lion", "lion") == [9, 12]
    assert find_word(sd.tokenizer, CROCODILE, "crocodile") == [2, 3, 4, 5, 6]
    assert find_word(sd.tokenizer, "A Lion, on a blue background", "lion") == [2]
    assert find_word(sd.tokenizer, LION, "blue background") == [5, 6]


# --- against the formulas ---------------------------------------------------------------------------------------------


def by_the_formulas(unet, x_t, t, context, S, guided, edit_cross, self_acts):
    """The U-Net with every attention written out, the edits' weights computed from the originals' in each layer."""
    kinds = {module: name.rpartition(".")[2] for name, module in unet.named_modules() if isinstance(module, Attention)}

    def explicit(module, x, given=None):
        given = x if given is None else given
        d = x.shape[-1] // module.heads
        q, k, v = module.to_q(x), module.to_k(given), module.to_v(given)
        out = torch.empty_like(x)
        R, weights = len(x), {}
        for r in range(R):
            for h in range(module.heads):
                part = slice(h * d, (h + 1) * d)
                scores = q[r, :, part] @ k[r, :, part].T / math.sqrt(d)
                weights[r, h] = scores.exp() / scores.exp().sum(dim=1, keepdim=True)
        if (4 if guided else 2) * S == R:
            for h in range(module.heads):
                for s in range(S):
                    source, target = (R - 2 * S + s, h), (R - S + s, h)
                    if kinds[module] == "cross_attention":
                        weights[target] = edit_cross(weights[source], weights[target])
                    elif self_acts:
                        weights[target] = weights[source]
        for r in range(R):
            for h in range(module.heads):
                part = slice(h * d, (h + 1) * d)
                out[r, :, part] = weights[r, h] @ v[r, :, part]
        return module.to_out(out)

    for module in kinds:
        module.forward = partial(explicit, module)
    try:
        with torch.no_grad():
            return unet(x_t, t, context)
    finally:
        for module in kinds:
            del module.forward


def replaced(source, own):
    """lion -> crocodile."""
    columns = [source[:, 0], source[:, 1], *[source[:, 2] / 5] * 5, *(source[:, j] for j in range(3, L - 4))]
    columns[L - 1] = source[:, L - 5 :].sum(dim=1)
    return torch.stack(columns, dim=1)


def refined(source, own):
    """lion -> small red lion."""
    order = [0, 1, None, None, 2, *range(3, L - 2)]
    return torch.stack([own[:, j] if i is None else source[:, i] for j, i in enumerate(order)], dim=1)


def weighted(source, own):
    changed = refined(source, own)
    changed[:, 3] *= 3
    return changed


CASES = {
    "replace": (CROCODILE, AttentionEdit(0.8, 0.4), 0, replaced, True),
    "replace, later": (CROCODILE, AttentionEdit(0.8, 0.4), 5, replaced, False),
    "replace, over": (CROCODILE, AttentionEdit(0.8, 0.4), 8, lambda source, own: own, False),
    "refine": (BIRD, AttentionEdit(0.8, 0.4), 3, refined, True),
    "reweight": (BIRD, AttentionEdit(0.8, 0.4, reweight={"red": 3.0}), 3, weighted, True),
    "reweight alone": (LION, AttentionEdit(0.0, 0.0, reweight={"blue": -1.0}), 9, None, False),
    "a word of its own": (CROCODILE, AttentionEdit(1.0, 0.0, words={"crocodile": 0.2}), 2, None, False),
}


def negative_blue(source, own):
    changed = own.clone()
    changed[:, 5] *= -1
    return changed


def all_but_the_word(source, own):
    changed = replaced(source, own)
    changed[:, 2:7] = own[:, 2:7]
    return changed


ATTACHED = [(case, kind) for case in ("replace", "reweight") for kind in ("lora", "custom diffusion", "multi_head_parallel")]


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("case, attached", [*((case, "") for case in CASES), *ATTACHED])
def test_every_layers_weights_are_those_of_the_paper(case, guided, attached):
    edited, edit, i, formula, self_acts = CASES[case]
    formula = formula or {"reweight alone": negative_blue, "a word of its own": all_but_the_word}[case]
    sd = small_model()
    attach(sd, attached)
    sd.unet.double()
    for adapter in sd.attached:
        adapter.double()
    generator = torch.Generator().manual_seed(1)
    S, rows = 2, 8 if guided else 4
    x_t = torch.randn(2 * S, 4, 8, 8, generator=generator).double()
    t, context = torch.full((2 * S,), 500), torch.randn(rows, L, 16, generator=generator).double()
    plan = plan_of(sd, LION, edited, edit, guided=guided)
    with torch.no_grad():
        plain = sd.unet(x_t, t, context)
        with control_attention(sd.unet, partial(plan.change, i, {})):
            actual = sd.unet(x_t, t, context)
    expected = by_the_formulas(sd.unet, x_t, t, context, S, guided, formula, self_acts)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)  # float64, some 50 layers of rounding
    assert torch.equal(actual[:-S], plain[:-S])  # originals, and what guidance goes away from, to the bit
    assert torch.equal(actual[-S:], plain[-S:]) == (case == "replace, over")


def attach(sd, kind):
    generator = torch.Generator().manual_seed(5)
    if kind == "lora":
        random_lora(sd).attach(sd)
    elif kind == "custom diffusion":
        layers = {
            name: module for name, module in sd.unet.named_modules() if name.endswith(("cross_attention.to_k", "cross_attention.to_v"))
        }
        deltas = {f"unet.{name}": 0.3 * torch.randn(module.weight.shape, generator=generator) for name, module in layers.items()}
        from_deltas(sd, deltas).attach(sd)
    elif kind:
        adapters = create_adapters(sd, (r"cross_attention$",), method=kind, rank=2, generator=generator)
        with torch.no_grad():
            for p in adapters.parameters():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
        adapters.attach(sd)


def test_a_prefix_keeps_the_edits_own_attention():
    sd = small_model()
    attach(sd, "prefix")
    context = sd.encode_prompts([LION, LION, CROCODILE, CROCODILE])
    plan, seen = plan_of(sd, LION, CROCODILE, AttentionEdit(1.0, 0.0), guided=False), []

    def watch(layer, weights):
        own, changed = weights(slice(None)), plan.change(0, {}, layer, weights)
        seen.append((own, changed))
        return changed

    with torch.no_grad(), control_attention(sd.unet, watch, ("cross",)):
        sd.unet(torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((4,), 500), context)
    for own, changed in seen:
        assert own.shape[-1] > L and torch.equal(changed[..., L:], own[2:, ..., L:])
        torch.testing.assert_close(changed[..., :L].sum(-1), own[:2, ..., :L].sum(-1), rtol=0, atol=1e-5)  # fp32: no attention is lost


# --- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_originals_are_those_of_the_plain_batch_and_edits_share_their_noise(sd, sampler):
    sampling = Sampling(5, sampler)
    edit = AttentionEdit(0.8, 0.4, local_blend=("lion", "crocodile"))
    steps = list(prompt_to_prompt(sd, LION, CROCODILE, edit, seeds=[3, 4], sampling=sampling))
    plain = list(sd.denoise([LION] * 2 + [CROCODILE] * 2, seeds=[3, 4, 3, 4], steps=5, sampler=sampler))
    for step, other in zip(steps, plain, strict=True):
        assert torch.equal(step.x_t[:2], other.x_t[:2])
    assert not torch.allclose(steps[-1].x_t[2:], plain[-1].x_t[2:], atol=1e-3)
    # From one noise: less apart than two prompts on their own.
    assert (steps[-1].x_t[2:] - steps[-1].x_t[:2]).abs().mean() < (plain[-1].x_t[2:] - plain[-1].x_t[:2]).abs().mean()


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "heun"])
def test_the_same_prompt_and_factors_of_1_change_no_bit(sd, sampler, guidance_scale):
    edit = AttentionEdit(1.0, 1.0, reweight={"blue": 1.0}, local_blend=("lion", "lion"))
    sampling = Sampling(4, sampler, guidance_scale)
    edited = last(prompt_to_prompt(sd, CROCODILE.replace("crocodile", "lion"), LION, edit, seeds=[3, 4], sampling=sampling))
    plain = last(sd.denoise([LION] * 4, seeds=[3, 4, 3, 4], steps=4, sampler=sampler, guidance_scale=guidance_scale))
    assert torch.equal(edited, plain)


def test_a_factor_of_1_changes_no_bit_of_another_edit(sd):
    plain, factor = (
        last(prompt_to_prompt(sd, LION, BIRD, AttentionEdit(reweight=reweight), sampling=Sampling(4))) for reweight in ({}, {"red": 1.0})
    )
    assert torch.equal(plain, factor)


def test_the_same_prompt_sent_the_slow_way_differs_by_rounding_alone(sd):
    """So that the test above is about the formulas too: the maps are taken over, and are the same."""
    plan = plan_of(sd, LION, LION, AttentionEdit(1.0, 1.0), guided=False)
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    t, context = torch.full((4,), 500), sd.encode_prompts([LION] * 4)
    calls = []

    def change(layer, weights):
        calls.append(plan.change(0, {}, layer, weights))
        return calls[-1]

    with torch.no_grad():
        plain = sd.unet(x_t, t, context)
        with control_attention(sd.unet, change):
            actual = sd.unet(x_t, t, context)
    assert len(calls) == 14 and all(call is not None for call in calls)
    torch.testing.assert_close(actual, plain, rtol=1e-4, atol=1e-5)  # fp32


def test_each_picture_is_the_same_in_any_batch(sd):
    edit = AttentionEdit(local_blend=("lion", "crocodile"))
    both = last(prompt_to_prompt(sd, LION, CROCODILE, edit, seeds=[3, 4], sampling=Sampling(5)))
    for i, seed in enumerate((3, 4)):
        alone = last(prompt_to_prompt(sd, LION, CROCODILE, edit, seeds=[seed], sampling=Sampling(5)))
        torch.testing.assert_close(both[[i, 2 + i]], alone, rtol=1e-3, atol=1e-3)  # batches of other sizes round differently


def test_it_starts_from_an_inverted_picture_and_the_original_comes_back(sd):
    x_0 = encode(sd, torch.cat([picture(0), picture(1)]))
    *_, noise = invert(sd, [LION] * 2, x_0, steps=80)
    sampling = Sampling(80, guidance_scale=1.0)
    rows = last(prompt_to_prompt(sd, LION, CROCODILE, seeds=[0, 0], sampling=sampling, x=noise.x_t))
    back = last(sd.denoise([LION] * 2, seeds=[0, 0], steps=80, guidance_scale=1, x=noise.x_t))
    torch.testing.assert_close(rows[:2], back, rtol=1e-3, atol=1e-3)  # batches of other sizes round differently
    assert not torch.allclose(rows[2:], back, atol=1e-2)


def test_sdxls_two_contexts_are_edited_alike():
    sd = small_model(xl_config())
    rows = last(prompt_to_prompt(sd, LION, CROCODILE, AttentionEdit(local_blend=("lion", "crocodile")), sampling=Sampling(3)))
    plain = last(sd.denoise([LION, CROCODILE], seeds=[0, 0], steps=3))
    assert torch.equal(rows[0], plain[0]) and not torch.allclose(rows[1], plain[1], atol=1e-3)


def test_a_latent_that_is_sent_takes_the_place_of_both(sd):
    walk = prompt_to_prompt(sd, LION, CROCODILE, AttentionEdit(local_blend=("lion", "crocodile")), sampling=Sampling(3))
    first = next(walk)
    following = walk.send(torch.zeros_like(first.x_t))
    other = prompt_to_prompt(sd, LION, CROCODILE, AttentionEdit(local_blend=("lion", "crocodile")), sampling=Sampling(3))
    next(other)
    assert not torch.equal(following.x_t, next(other).x_t)


# --- local blend ------------------------------------------------------------------------------------------------------


def test_the_local_blend_keeps_the_original_where_neither_word_is_looked_at():
    maps = torch.zeros(2, 1, 4, 4)
    maps[0, 0, 0, 0], maps[1, 0, 3, 3], maps[0, 0, 0, 3] = 1.0, 2.0, 0.3  # the last is not above 0.3 of the largest
    x_t = torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)])
    kept, edited = local_blend(x_t, maps[0], maps[1])
    expected = torch.zeros(8, 8)
    expected[:4, :4] = expected[4:, 4:] = 1  # a cell and its neighbours, 2 x 2 latent cells each
    assert torch.equal(kept, x_t[0]) and torch.equal(edited[0], expected)


def test_the_blend_is_of_the_words_maps_after_the_edit_and_begins_after_a_fifth_of_the_steps(sd, monkeypatch):
    calls = []
    blend = local_blend
    monkeypatch.setattr("minidiff.editing.prompt_to_prompt.local_blend", lambda *args: calls.append(args) or blend(*args))
    edit = AttentionEdit(1.0, 0.0, local_blend=("lion", "crocodile"))
    steps = list(prompt_to_prompt(sd, LION, CROCODILE, edit, sampling=Sampling(10)))
    assert len(calls) == 8  # steps 2 to 9
    x_t, original, edited = calls[-1]
    assert original.shape == edited.shape == (1, 8, 8)  # of 8 x 8, 4 x 4 and the middle's 2 x 2: the nearest to 16 x 16
    torch.testing.assert_close(original, edited)  # five tokens with a fifth each, all through the loop
    outside = steps[-1].x_t[0] == steps[-1].x_t[1]
    wide = F.max_pool2d(original[:, None], 3, 1, 1)[0]
    assert torch.equal(outside.all(dim=0), (wide <= 0.3 * wide.max())[0])


# --- what cannot be edited --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "original, edited, edit, message",
    [
        (LION, LION, dict(reweight={"dog": 2.0}), "word 'dog' is not in the prompt 'a lion on a blue background'; its words are a, lion"),
        (LION, CROCODILE, dict(local_blend=("crocodile", "crocodile")), "word 'crocodile' is not in the prompt 'a lion"),
        (LION, CROCODILE, dict(words={"": 0.5}), "word '' is not in the prompt"),
        (LION, BIRD, dict(align="replace"), "prompts of 6 and 8 words cannot be replaced word for word"),
        ("dog", LION, dict(align="refine"), "have no word in common"),
        (LION, LION, dict(cross=1.2), r"cross 1.2 is outside 0\.\.1"),
        (LION, LION, dict(self_attention=-0.1), r"self_attention -0.1 is outside 0\.\.1"),
        (LION, LION, dict(words={"lion": float("nan")}), r"lion nan is outside 0\.\.1"),
        (LION, LION, dict(reweight={"lion": float("inf")}), "reweight 'lion' by inf: expected a finite number"),
        (LION, LION, dict(align="swap"), "align 'swap' unknown; choose replace, refine"),
    ],
)
def test_what_cannot_be_edited_is_refused_before_any_step(sd, original, edited, edit, message):
    with pytest.raises(ValueError, match=message):
        prompt_to_prompt(sd, original, edited, AttentionEdit(**edit))


def test_an_inpainting_model_and_latents_of_other_numbers_are_refused(sd):
    with pytest.raises(ValueError, match="an inpainting model"):
        prompt_to_prompt(small_model(small_config(in_channels=9)), LION, CROCODILE)
    with pytest.raises(ValueError, match="x has shape"):
        prompt_to_prompt(sd, LION, CROCODILE, seeds=[0, 1], x=torch.zeros(1, 4, 8, 8))
