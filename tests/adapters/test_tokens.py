"""New words: trained rows beside the table, spelled by both kinds of tokenizer, taken off without a trace."""

import copy

import pytest
import torch

from minidiff.adapters.tokens import RARE_TOKENS, NewTokens, create_tokens
from tests.small_models import small_model


@pytest.fixture
def sd():
    return small_model()


def vectors(n=1, seed=0, width=16):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def state(sd):
    return {name: tensor.clone() for part in (sd.text_encoder, sd.unet) for name, tensor in part.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def with_larger_table(sd, rows):
    """The reference: the rows at the end of a table of their own, the ids written in by hand."""
    encoder = copy.deepcopy(sd.text_encoder)
    table = encoder.token_embedding.weight
    encoder.token_embedding = torch.nn.Embedding.from_pretrained(torch.cat([table, rows]))
    return encoder


def test_a_prompt_is_encoded_as_with_the_rows_at_the_end_of_the_table(sd):
    size = sd.config.text_encoder.vocab_size
    a, photo, of = (sd.tokenizer.encode(word)[0] for word in ("a", "the", "of"))
    tokens = NewTokens({"<cat>": vectors(2), "<dog>": vectors(1, 1)})
    expected = with_larger_table(sd, torch.cat([vectors(2), vectors(1, 1)]))
    tokens.attach(sd)
    ids = sd.tokenizer(["a <dog> of the <cat>"])
    assert ids[0, 1:7].tolist() == [a, size + 2, of, photo, size, size + 1]
    assert torch.equal(sd.text_encoder(ids), expected(ids))


def test_a_prompt_without_new_words_is_encoded_bit_for_bit_as_before(sd):
    before = sd.encode_prompts(["a red cat"])
    NewTokens({"<cat>": vectors()}).attach(sd)
    assert torch.equal(sd.encode_prompts(["a red cat"]), before)


def test_training_moves_the_new_rows_and_nothing_else(sd):
    tokens = create_tokens(sd, {"<cat>": 2}, {"<cat>": "a"})
    start, before = tokens.rows["<cat>"].detach().clone(), state(sd)
    tokens.attach(sd)
    for module in (sd.text_encoder, sd.unet, sd.vae):
        module.requires_grad_(False)
    optimizer = torch.optim.AdamW([*tokens.parameters(), *sd.text_encoder.parameters()], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        sd.text_encoder(sd.tokenizer(["a <cat> and <cat>", "the cat"]))[..., 0].square().mean().backward()
        optimizer.step()
    moved = (tokens.rows["<cat>"] - start).abs().amax(dim=1)
    assert (moved > 1e-2).all() and not torch.equal(*tokens.rows["<cat>"])  # each vector goes its own way
    assert same(state(sd), before)
    tokens.detach()
    assert same(state(sd), before)


def test_the_gradient_of_a_row_is_that_of_a_tables_row(sd):
    tokens = NewTokens({"<cat>": vectors(2)})
    reference = with_larger_table(sd, vectors(2))
    reference.token_embedding.weight.requires_grad_(True)
    tokens.attach(sd)
    ids = sd.tokenizer(["<cat> and <cat> again"])
    for encoder in (sd.text_encoder, reference):
        encoder(ids).pow(3).sum().backward()
    expected = reference.token_embedding.weight.grad[-2:]
    torch.testing.assert_close(tokens.rows["<cat>"].grad, expected, rtol=1e-5, atol=1e-5)  # fp32: other order of additions


def test_detaching_gives_the_model_back_in_any_order(sd):
    prompt, tokenizer = "a <cat> , a <dog>", sd.tokenizer
    ids, context = tokenizer([prompt]), sd.encode_prompts([prompt])
    one, two = NewTokens({"<cat>": vectors(3)}), NewTokens({"<dog>": vectors(2, 1), "v1.5": vectors()})
    one.attach(sd)
    two.attach(sd)
    dog = sd.encode_prompts(["<dog>"])
    one.detach()
    assert torch.equal(sd.encode_prompts(["<dog>"]), dog) and list(sd.tokenizer.added) == ["<dog>", "v1.5"]
    one.attach(sd)
    assert torch.equal(sd.encode_prompts(["<dog>"]), dog)
    two.detach()
    one.detach()
    one.detach()  # without effect
    assert torch.equal(sd.tokenizer([prompt]), ids) and torch.equal(sd.encode_prompts([prompt]), context)
    assert sd.tokenizer.added == tokenizer.added == {} and sd.text_encoder.added == {}


def test_ids_begin_after_a_table_that_is_larger_than_the_vocabulary(sd):
    table = sd.text_encoder.token_embedding.weight.data
    sd.text_encoder.token_embedding = torch.nn.Embedding.from_pretrained(torch.cat([table, vectors(3)]))
    NewTokens({"<cat>": vectors()}).attach(sd)
    assert sd.tokenizer.encode("<cat>") == [sd.config.text_encoder.vocab_size + 3]
    assert sd.encode_prompts(["<cat>"]).shape[-1] == 16


def test_in_half_precision_the_rows_stay_float32_and_the_context_does_not(sd):
    sd.text_encoder.to(torch.bfloat16)
    tokens = NewTokens({"<cat>": vectors().half()})
    tokens.attach(sd)
    assert sd.encode_prompts(["a <cat>"]).dtype == torch.bfloat16
    assert {rows.dtype for rows in tokens.rows.values()} == {torch.float32}


def test_the_vectors_start_from_a_word_a_number_or_at_random(sd):
    table = sd.text_encoder.token_embedding.weight.detach()
    of = sd.tokenizer.encode("of")[0]
    tokens = create_tokens(sd, {"<a>": 3, "<b>": 1}, {"<a>": "of", "<b>": 7})
    assert torch.equal(tokens.rows["<a>"], table[of].expand(3, -1)) and torch.equal(tokens.rows["<b>"], table[7:8])
    draw = [create_tokens(sd, {"<a>": 30}, generator=torch.Generator().manual_seed(seed)).rows["<a>"] for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    # 480 numbers of deviation 1 around 0: four times the deviation of their mean, and of their deviation.
    noise = (draw[0].detach() - table.mean(0)) / table.std(0)
    assert abs(noise.mean()) < 0.19 and abs(noise.std() - 1) < 0.13
    assert len(set(RARE_TOKENS)) == 3


def test_a_start_can_be_trained_without_moving_the_word_it_came_from(sd):
    tokens = create_tokens(sd, {"<a>": 1}, {"<a>": "of"})
    before = state(sd)
    with torch.no_grad():
        tokens.rows["<a>"].add_(1)
    assert same(state(sd), before)


@pytest.mark.parametrize(
    "words, start, message",
    [
        ({"a": 1}, {"a": "of"}, "placeholder 'a' is a word of the vocabulary already"),
        ({"": 1}, {"": "of"}, "placeholder '' is empty or has whitespace in it"),
        ({"my cat": 1}, {"my cat": "of"}, "placeholder 'my cat' is empty or has whitespace in it"),
        ({"<a>": 1, "<A>": 1}, {}, "placeholder '<A>' was added before"),
        ({"<old>": 1}, {}, "placeholder '<old>' was added before"),
        ({"<a>": 1}, {"<a>": "zebraic"}, r"start 'zebraic' is not a single token but \d \('z', 'e', .*choose a word of one token"),
        ({"<a>": 1}, {"<a>": " "}, r"start ' ' is not a single token but 0 \(nothing\)"),
        ({"<a>": 1}, {"<a>": "<old>"}, "start '<old>' is itself a new word"),
        ({"<a>": 1}, {"<a>": 10**6}, r"start 1000000 is no token; expected 0\.\."),
        ({"<a>": 1}, {"<b>": "of"}, "a start is given for '<b>', which is not among the new words '<a>'"),
        ({"<a>": 1}, {}, "'<a>' has no word to start from: give one in start, or a torch.Generator"),
        ({"<a>": 0}, {}, "0 vectors for '<a>'; expected 1 to 30"),
        ({"<a>": 31}, {}, "31 vectors for '<a>'; expected 1 to 30"),
        ({}, {}, "no new words given"),
    ],
)
def test_a_word_that_cannot_be_is_refused_in_one_line(words, start, message, sd):
    NewTokens({"<old>": vectors()}).attach(sd)
    with pytest.raises(ValueError, match=message) as caught:
        create_tokens(sd, words, start)
    assert "\n" not in str(caught.value)


def test_attaching_what_does_not_fit_changes_nothing(sd):
    one = NewTokens({"<cat>": vectors()})
    one.attach(sd)
    added, rows = dict(sd.tokenizer.added), dict(sd.text_encoder.added)
    with pytest.raises(ValueError, match="<cat>: attached already; detach first"):
        one.attach(sd)
    with pytest.raises(ValueError, match="placeholder '<cat>' was added before"):
        NewTokens({"<new>": vectors(), "<cat>": vectors()}).attach(sd)
    with pytest.raises(ValueError, match="the vectors of '<new>' are 8 wide, those of this model's words 16"):
        NewTokens({"<new>": vectors(width=8)}).attach(sd)
    assert sd.tokenizer.added == added and sd.text_encoder.added.keys() == rows.keys()
    with pytest.raises(ValueError, match=r"the rows of '<x>' have shape \(16,\)"):
        NewTokens({"<x>": vectors()[0]})
