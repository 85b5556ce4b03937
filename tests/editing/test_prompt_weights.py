"""Weights and chunks: the grammar with its positions, the arithmetic against its closed form, and nothing changed where none is asked for."""

from dataclasses import replace

import pytest
import torch

from minidiff.editing.prompt_weights import MOST, Weighted, WeightedText, WeightedTwoEncoders, parse_weights, split_chunks, weighted_side
from minidiff.pipeline import StableDiffusion
from minidiff.two_encoders import FIRST, SECOND, SizeNumbers, TwoEncoders
from tests.small_models import CONTEXT_LENGTH, small_model, xl_config

ROOM = CONTEXT_LENGTH - 2


@pytest.fixture
def sd() -> StableDiffusion:
    return small_model()


@pytest.fixture
def weighted(sd) -> WeightedText:
    return weighted_side(sd.text)


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("a cat", [("a cat", 1)]),
        ("a (red:1.3) cat", [("a ", 1), ("red", 1.3), (" cat", 1)]),
        ("(a red cat : .5 )", [("a red cat ", 0.5)]),
        ("(a (red:1.5) cat:1.2)", [("a ", 1.2), ("red", 1.5), (" cat", 1.2)]),  # the inner one takes the place
        ("(a (red) cat:2)", [("a (red) cat", 2)]),
        ("a cat (cartoon) :)", [("a cat (cartoon) :)", 1)]),
        (r"a \(red:1.3\) cat", [("a (red:1.3) cat", 1)]),
        ("(note: red) (a", [("(note: red) (a", 1)]),
        ("(note: 3 cats)", [("(note: 3 cats)", 1)]),
        ("(cat:0)", [("cat", 0)]),
        ("", []),
    ],
)
def test_only_a_bracket_with_a_number_is_a_weight(prompt, expected):
    assert parse_weights(prompt) == [Weighted(text, weight) for text, weight in expected]


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("a (cat:1.3", "the bracket at character 3 is never closed"),
        ("a (cat:1,3)", "the bracket at character 3 has no weight behind its colon: '1,3' is no number of 0 or more"),
        ("(cat:-1)", "the bracket at character 1 has no weight behind its colon: '-1'"),
        ("(cat:1.3.4)", "'1.3.4' is no number"),
        ("a clock (at 12:30)", f"the bracket at character 9 has the weight 30; weights go from 0 to {MOST:g}"),
        ("a (:1.3) cat", "the bracket at character 3 weighs nothing"),
        ("a ((red:1.2) cat:1.3", "the bracket at character 3 is never closed"),
    ],
)
def test_what_is_wrong_is_said_with_its_place_and_a_way_out(prompt, said):
    with pytest.raises(ValueError) as error:
        parse_weights(prompt)
    assert said in str(error.value) and "write (word:1.3), or \\( for a bracket that is text" in str(error.value)
    assert str(error.value).startswith(f"prompt {prompt!r}")


def test_prompts_without_weights_are_encoded_as_ever_bit_for_bit(sd, weighted):
    prompts = ["a cat on a red background", "a smiley :) (small)", ""]
    assert torch.equal(weighted(prompts).context, sd.text(prompts).context)
    assert torch.equal(weighted(["a \\(cat\\)"]).context, sd.text(["a (cat)"]).context)


def test_a_weight_moves_its_tokens_away_from_the_empty_prompt_and_no_others(sd, weighted):
    plain, empty = sd.text(["a red cat"]).context[0], sd.text([""]).context[0]
    red = dict(sd.tokenizer.words("a red cat"))["red"]
    others = [i for i in range(CONTEXT_LENGTH) if i not in red]
    for weight in (0.0, 0.5, 1.4):
        (context,) = weighted([f"a (red:{weight}) cat"]).context
        # Rounding of float32 in a batch of another size.
        torch.testing.assert_close(context[red], empty[red] + weight * (plain[red] - empty[red]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(context[others], plain[others], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(plain[red], empty[red], atol=0.1)


def test_a_prompt_does_not_depend_on_the_others_of_its_batch(weighted):
    alone = weighted(["a (red:1.5) cat"]).context
    beside = weighted(["a (red:1.5) cat", "a (blue:0.2) dog"]).context[:1]
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-6)


def long_prompt(words: int) -> str:
    return " ".join(["cat", "dog", "red"][i % 3] for i in range(words))


def test_a_long_prompt_is_its_chunks_encoded_apart_and_put_in_a_row(sd, weighted):
    words = long_prompt(2 * ROOM + 3).split()
    assert all(len(sd.tokenizer.encode(word)) == 1 for word in words)
    chunks = [" ".join(words[i : i + ROOM]) for i in range(0, len(words), ROOM)]
    (context,) = weighted([" ".join(words)]).context
    assert context.shape == (3 * CONTEXT_LENGTH, 16)
    torch.testing.assert_close(context, torch.cat(list(sd.text(chunks).context)), rtol=1e-5, atol=1e-6)


def test_shorter_prompts_are_filled_up_with_empty_chunks(sd, weighted):
    short = weighted([long_prompt(ROOM + 1), "a cat"]).context[1]
    torch.testing.assert_close(short, torch.cat(list(sd.text(["a cat", ""]).context)), rtol=1e-5, atol=1e-6)


def test_words_stay_whole_unless_a_chunk_is_too_short_for_them(sd, weighted):
    word = "qwxzjvk"
    pieces = len(sd.tokenizer.encode(word))
    assert pieces > 2
    text = long_prompt(ROOM - 1)
    first, second = split_chunks(sd.tokenizer, parse_weights(f"{text} {word}"))
    assert len(first) == ROOM - 1 and len(second) == pieces
    huge = "qx" * ROOM
    counts = [len(chunk) for chunk in split_chunks(sd.tokenizer, parse_weights(huge))]
    assert sum(counts) == len(sd.tokenizer.encode(huge)) > ROOM and counts[0] == ROOM


def test_weights_hold_in_every_chunk(sd, weighted):
    text = long_prompt(ROOM)
    plain = weighted([f"{text} red"]).context[0]
    strong = weighted([f"{text} (red:1.5)"]).context[0]
    changed = (plain - strong).abs().amax(dim=1) > 1e-4
    assert changed.nonzero().flatten().tolist() == [CONTEXT_LENGTH + 1]


def test_long_prompts_make_pictures_with_guidance_whatever_the_negative_prompt(sd, weighted):
    sd.text = weighted
    prompt = long_prompt(ROOM + 5)
    *_, step = sd.denoise([prompt, "a (cat:1.3)"], negative_prompt="a dog", steps=2, seeds=[0, 1])
    *_, alone = sd.denoise([prompt], negative_prompt="a dog", steps=2, seeds=[0])
    torch.testing.assert_close(step.x_t[:1], alone.x_t, rtol=1e-4, atol=1e-4)
    *_, other = sd.denoise("a cat", negative_prompt=prompt, steps=2, guidance_scale=1)
    assert other.x_t.isfinite().all()


def test_learned_words_are_read_too_whenever_they_are_attached(sd):
    from minidiff.adapters.tokens import create_tokens

    sd.text = weighted_side(sd.text)
    tokens = create_tokens(sd, {"<it>": 3}, {"<it>": "cat"})
    tokens.attach(sd)
    (chunk,) = split_chunks(sd.tokenizer, parse_weights("a (<it>:1.5)"))
    assert [weight for _, weight in chunk] == [1, 1.5, 1.5, 1.5]
    assert sd.text(["a (<it>:1.5)"]).context.shape == (1, CONTEXT_LENGTH, 16)


# --- two text encoders ------------------------------------------------------------------------------------------------

SIZE = (32, 32)


@pytest.fixture
def xl() -> StableDiffusion:
    return small_model(xl_config())


def test_two_encoders_read_prompts_without_weights_as_ever_bit_for_bit(xl):
    prompts, text = ["a cat on a red background", "a smiley :) (small)", ""], weighted_side(xl.text)
    for ours, plain in zip(text(prompts, SIZE).tensors(), xl.text(prompts, SIZE).tensors()):
        assert torch.equal(ours, plain)
    for ours, plain in zip(text.guided(prompts, None, SIZE), xl.text.guided(prompts, None, SIZE)):
        assert all(map(torch.equal, ours.tensors(), plain.tensors()))


def test_each_encoder_weighs_its_own_tokens_and_the_pooled_vector_is_without_weights(xl):
    """ComfyUI's arithmetic: both encoders move away from their own empty prompt; of the pooled vector nothing is weighted."""
    plain, empty, red = xl.text(["a red cat"], SIZE), xl.text([""], SIZE), 2  # start, a, red
    others = [i for i in range(CONTEXT_LENGTH) if i != red]
    for weight in (0.0, 0.5, 1.4):
        ours = weighted_side(xl.text)([f"a (red:{weight}) cat"], SIZE)
        moved = empty.context[0, red] + weight * (plain.context[0, red] - empty.context[0, red])
        torch.testing.assert_close(ours.context[0, red], moved, rtol=1e-5, atol=1e-6)  # float32 in a batch of another size
        torch.testing.assert_close(ours.context[0, others], plain.context[0, others], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.pooled, plain.pooled, rtol=1e-5, atol=1e-6)


def test_long_prompts_are_chunks_for_both_and_the_first_one_is_pooled(xl):
    words = long_prompt(2 * ROOM + 3).split()
    chunks = [" ".join(words[i : i + ROOM]) for i in range(0, len(words), ROOM)]
    ours, apart = weighted_side(xl.text)([" ".join(words), "a cat"], SIZE), xl.text(chunks, SIZE)
    assert ours.context.shape == (2, 3 * CONTEXT_LENGTH, 40)
    torch.testing.assert_close(ours.context[0], torch.cat(list(apart.context)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.pooled[:1], apart.pooled[:1], rtol=1e-5, atol=1e-6)
    short = xl.text(["a cat", "", ""], SIZE)
    torch.testing.assert_close(ours.context[1], torch.cat(list(short.context)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.pooled[1:], short.pooled[:1], rtol=1e-5, atol=1e-6)


def test_a_longer_second_prompt_fills_the_first_encoder_up_with_empty_chunks(xl):
    text = replace(weighted_side(xl.text), prompt_2=long_prompt(ROOM + 1))
    context = text(["a (cat:1.2)"], SIZE).context
    assert context.shape == (1, 2 * CONTEXT_LENGTH, 40)
    torch.testing.assert_close(context[0, CONTEXT_LENGTH:, :16], xl.text([""], SIZE).context[0, :, :16], rtol=1e-5, atol=1e-6)


def test_what_a_text_side_was_told_before_stays(xl):
    before = replace(xl.text, prompt_2="a dog", sizes=SizeNumbers(crop=(3, 5)), zero_negative=False)
    after = weighted_side(before)
    assert isinstance(after, TwoEncoders) and (after.prompt_2, after.sizes.crop, after.zero_negative) == ("a dog", (3, 5), False)
    assert after.tokenizers is xl.text.tokenizers and set(after.encoders) == {FIRST, SECOND}
    again = weighted_side(after)
    assert type(again) is type(after) is WeightedTwoEncoders and (again.prompt_2, again.sizes) == ("a dog", SizeNumbers(crop=(3, 5)))


def test_a_picture_of_two_encoders_depends_on_the_weight(xl):
    def latent(prompt: str):
        *_, step = xl.denoise(prompt, steps=2, size=32, text=weighted_side(xl.text))
        return step.x_t

    assert torch.equal(latent("a (red:1) cat"), latent("a red cat"))
    assert (latent("a (red:3) cat") - latent("a red cat")).abs().max() > 1e-4
    assert latent(long_prompt(ROOM + 5)).isfinite().all()
