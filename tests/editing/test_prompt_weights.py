"""Weights and chunks: the grammar with its positions, the arithmetic against its closed form, and nothing changed where none is asked for."""

import pytest
import torch

from minidiff.editing.prompt_weights import MOST, Weighted, WeightedText, parse_weights
from minidiff.pipeline import StableDiffusion
from tests.small_models import CONTEXT_LENGTH, small_model

ROOM = CONTEXT_LENGTH - 2


@pytest.fixture
def sd() -> StableDiffusion:
    return small_model()


@pytest.fixture
def weighted(sd) -> WeightedText:
    return WeightedText(sd.text.tokenizers, sd.text.encoders)


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
    first, second = weighted.chunks(parse_weights(f"{text} {word}"))
    assert len(first) == ROOM - 1 and len(second) == pieces
    huge = "qx" * ROOM
    counts = [len(chunk) for chunk in weighted.chunks(parse_weights(huge))]
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

    sd.text = WeightedText(sd.text.tokenizers, sd.text.encoders)
    tokens = create_tokens(sd, {"<it>": 3}, {"<it>": "cat"})
    tokens.attach(sd)
    (chunk,) = sd.text.chunks(parse_weights("a (<it>:1.5)"))
    assert [weight for _, weight in chunk] == [1, 1.5, 1.5, 1.5]
    assert sd.text(["a (<it>:1.5)"]).context.shape == (1, CONTEXT_LENGTH, 16)
