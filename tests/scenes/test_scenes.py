"""The bundled captioned scenes: labels, splits, pictures, licences, and the word pieces made for them."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
from open_clip.tokenizer import SimpleTokenizer, bytes_to_unicode
from transformers import CLIPTokenizer

from minidiff.scenes import make_sheet, train_bpe
from minidiff.scenes.art import (
    CELL,
    COLOURS,
    HERE,
    SIZE,
    STYLES,
    SUBJECTS_A_ROW,
    art,
    paint_background,
    sheet,
    subject_names,
    subjects,
    tint_picture,
    visible_backgrounds,
)
from minidiff.scenes.prompts import prompts
from minidiff.scenes.scenes import SPLITS, Item, bpe_merges, caption_of, compose, held_out_pairs, is_held_out_pair, sample_scene
from tests import small_models


def scenes(split: str, count: int = 400, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, split=split) for _ in range(count)]


@pytest.fixture(scope="module")
def training_scenes():
    return scenes("train", 4000)


# --- subjects and sheet -----------------------------------------------------------------------------------------------


def test_the_sheet_has_a_filled_cell_for_each_subject_in_each_style():
    assert sheet().shape == (CELL * len(subjects()) // SUBJECTS_A_ROW, CELL * SUBJECTS_A_ROW * len(STYLES), 4)
    for name in subjects():
        for style in STYLES:
            assert max(art(name, style).shape[:2]) == CELL
            assert (art(name, style)[..., 3] > 127).mean() > 0.2
    assert (HERE / "sheet.webp").stat().st_size <= 2_000_000


def test_there_are_enough_subjects_and_each_held_out_one_has_a_known_class():
    held_out, train = subject_names(held_out=True), subject_names(held_out=False)
    assert len(held_out) == 20 and 100 <= len(train) <= 110
    assert len({row["code"] for row in json.loads((HERE / "subjects.json").read_text())}) == 130
    for name in held_out:
        assert sum(subjects()[name].class_name == subjects()[other].class_name for other in train) >= 2


def test_a_picture_is_cut_scaled_and_centred_in_its_cell():
    picture = make_sheet.Image.new("RGBA", (80, 40))
    picture.paste((255, 0, 0, 255), (10, 5, 42, 21))  # 32 wide, 16 high
    cell = np.asarray(make_sheet.fit_cell(picture))
    assert cell.shape == (CELL, CELL, 4)
    assert (cell[CELL // 4 : 3 * CELL // 4] == (255, 0, 0, 255)).all()
    assert (cell[: CELL // 4] == 0).all() and (cell[3 * CELL // 4 :] == 0).all()


def test_the_licences_name_each_family_and_carry_the_required_texts():
    text = (HERE / "LICENSES.md").read_text()
    for words in (
        "Noto Emoji",
        "Google LLC",
        "Apache License",
        "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION",
        "Twemoji",
        "Twitter, Inc and other contributors",
        "https://creativecommons.org/licenses/by/4.0/legalcode",
        "Fluent Emoji",
        "Copyright (c) Microsoft Corporation",
        "Changes to all of them",
        "emojibase-data",
        "Miles Johnson",
        "UNICODE LICENSE V3",
        "Unicode, Inc.",
    ):
        assert words in text, words


# --- splits -----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_scene_and_another_seed_another_one():
    for a, b in zip(scenes("train", 50), scenes("train", 50)):
        assert a.caption == b.caption
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.mask, b.mask)
    assert [a.caption for a in scenes("train", 20)] != [b.caption for b in scenes("train", 20, seed=1)]


def test_the_held_out_tenth_is_the_same_on_every_machine():
    assert is_held_out_pair("cat", "dog") == is_held_out_pair("dog", "cat")
    two, coloured = held_out_pairs()
    train = len(subject_names(held_out=False))
    # A tenth by a hash: binomial, three standard deviations are 0.012 of the pairs and 0.026 of the tints.
    assert abs(len(two) / (train * (train - 1) / 2) - 0.1) < 0.012
    assert abs(len(coloured) / (train * len(COLOURS)) - 0.1) < 0.026
    assert two[0] == ("cat", "dog") and coloured[0] == ("cat", "black")


def test_training_shows_no_held_out_subject_and_no_held_out_pair(training_scenes):
    for scene in training_scenes:
        assert not any(subjects()[thing.subject].held_out for thing in scene.objects)
        assert not any(thing.colour and is_held_out_pair(thing.subject, thing.colour) for thing in scene.objects)
        assert len(scene.objects) == 1 or not is_held_out_pair(*(thing.subject for thing in scene.objects))


def test_the_held_out_splits_show_what_training_does_not():
    for scene in scenes("held_out_subjects"):
        assert all(subjects()[thing.subject].held_out for thing in scene.objects)
    for scene in scenes("held_out_pairs"):
        names = [thing.subject for thing in scene.objects]
        assert not any(subjects()[name].held_out for name in names)
        assert is_held_out_pair(*names) if len(names) == 2 else is_held_out_pair(names[0], scene.objects[0].colour)
    assert {subjects()[t.subject].held_out for s in scenes("all_subjects") for t in s.objects} == {True, False}


def test_training_shows_every_subject_style_and_background(training_scenes):
    seen = training_scenes
    assert {thing.subject for scene in seen for thing in scene.objects} == set(subject_names(held_out=False))
    assert {scene.style for scene in seen} == set(STYLES)
    assert {scene.background for scene in seen} == set(COLOURS)


# --- captions and labels ----------------------------------------------------------------------------------------------


def test_captions_say_what_the_labels_say():
    for scene in scenes("all_subjects", 1000):
        rest = scene.caption
        if rest.endswith(" style"):
            assert rest.endswith(f" in {scene.style} style")
            rest = rest.removesuffix(f" in {scene.style} style")
        if rest.endswith(" background"):
            article = "an" if scene.background[0] in "aeiou" else "a"
            assert rest.endswith(f" on {article} {scene.background} background")
            rest = rest.removesuffix(f" on {article} {scene.background} background")
        rest = re.sub("^an? (photo|picture|image|icon) of ", "", rest)
        phrases = rest.split(f" {scene.relation} ") if scene.relation else [rest]
        assert len(phrases) == len(scene.objects)
        for phrase, thing in zip(phrases, scene.objects):
            article, words = phrase.split(" ", 1)
            assert article == ("an" if words[0] in "aeiou" else "a")
            for label in (thing.size, thing.colour):
                if label is not None:
                    assert words.startswith(f"{label} ")
                    words = words.removeprefix(f"{label} ")
            assert words in (thing.subject, thing.class_name)


def test_captions_have_the_stated_shares(training_scenes):
    seen = training_scenes
    count = len(seen)
    # 4,000 draws: three standard deviations of a share are at most 0.024.
    assert abs(sum(len(scene.objects) == 1 for scene in seen) / count - 0.5) < 0.024
    assert abs(sum("background" in scene.caption for scene in seen) / count - 0.8) < 0.024
    assert abs(sum(scene.caption.endswith("style") for scene in seen) / count - 0.6) < 0.024
    things = [thing for scene in seen for thing in scene.objects]
    assert abs(sum(thing.colour is not None for thing in things) / len(things) - 0.12) < 0.024
    by_class = sum(any(thing.subject not in scene.caption for thing in scene.objects) for scene in seen)
    assert abs(by_class / count - 0.1) < 0.024


def test_a_caption_is_written_in_full():
    items = [Item("apple", colour="blue", size="small"), Item("dog", by_class=True)]
    assert caption_of(items, "left of", "orange", "noto") == ("a small blue apple left of an animal on an orange background in noto style")
    assert caption_of([Item("owl")], None, None, None) == "an owl"


def test_objects_stand_as_the_relation_says_and_do_not_overlap():
    for scene in scenes("train", 1000):
        if scene.relation is None:
            continue
        (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = (thing.box for thing in scene.objects)
        assert ax1 <= bx0 or bx1 <= ax0 or ay1 <= by0 or by1 <= ay0
        if scene.relation == "left of":
            assert ax1 <= bx0
        if scene.relation == "above":
            assert ay1 <= by0


def test_small_is_smaller_than_large():
    longest = {"small": [], "large": []}
    for scene in scenes("train", 1000):
        for thing in scene.objects:
            if thing.size is not None:
                x0, y0, x1, y1 = thing.box
                longest[thing.size].append(max(x1 - x0, y1 - y0))
    assert max(longest["small"]) <= 0.57 * SIZE and min(longest["large"]) >= 0.84 * SIZE


def test_the_evaluation_prompts_are_fixed_and_name_training_subjects():
    assert len(prompts()) == 40 and len({prompt.subjects for prompt in prompts()}) == 40
    assert prompts()[0].text == "a pizza on a yellow background"
    for prompt in prompts():
        assert prompt.text.endswith(
            f"{prompt.subjects[0]} on {'an' if prompt.background[0] in 'aeiou' else 'a'} {prompt.background} background"
        )
        assert not subjects()[prompt.subjects[0]].held_out


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_the_mask_is_where_the_picture_differs_from_its_background():
    for style in STYLES:
        scene = compose([Item("octopus", px=88, centre=(60.0, 68.0))], background="green", style=style)
        (thing,) = scene.objects
        plain = paint_background("green", (0.0, 0.0, 0.0), 0.0)
        moved = np.abs(scene.image - plain).max(-1)
        assert moved[scene.mask == 0].max() <= 0.5  # rounding to 8 bits
        assert (moved[scene.mask > 0.99] > 10).mean() > 0.9
        rows, columns = np.nonzero(scene.mask)
        x0, y0, x1, y1 = thing.box
        assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == pytest.approx((x0, y0, x1, y1), abs=2)
        assert max(x1 - x0, y1 - y0) == 88
        np.testing.assert_array_equal(scene.mask, thing.mask)


def test_the_masks_of_two_objects_add_up_also_where_one_covers_the_other():
    scene = compose([Item("cat", 80), Item("dog", 60)], background="blue", style="noto", relation="and")
    np.testing.assert_allclose(scene.objects[0].mask + scene.objects[1].mask, scene.mask)
    assert scene.mask.max() <= 1 + 1e-6  # fp32
    assert scene.objects[0].mask[SIZE // 2, SIZE // 2] == 0  # the dog is in front
    apart = [Item("cat", 60, (32.0, 64.0)), Item("dog", 60, (96.0, 64.0))]
    scene = compose(apart, background="blue", style="noto", relation="left of")
    assert not np.logical_and(*(thing.mask > 0 for thing in scene.objects)).any()


def test_no_dark_fringe_is_drawn_around_an_object():
    # A white ghost on white: where it is half transparent, black from transparent pixels would show as gray.
    scene = compose([Item("ghost", 82, colour="white")], background="white", style="twemoji")
    edge = (scene.mask > 0.05) & (scene.mask < 0.5)
    assert edge.sum() > 20 and scene.image[edge].min() > 200


@pytest.mark.parametrize("colour", COLOURS)
def test_a_tint_keeps_to_its_colour_and_keeps_the_shading(colour):
    for name in ("cat", "panda", "banana", "robot"):
        for style in STYLES:
            before, after = art(name, style), tint_picture(art(name, style), colour)
            solid = before[..., 3] > 200
            mean = after[solid][:, :3].mean(0)
            distance = {other: np.linalg.norm(mean - np.array(rgb)) for other, rgb in COLOURS.items()}
            assert min(distance, key=distance.get) == colour, (name, style, mean)
            light, dark = before[solid][:, :3].mean(-1), after[solid][:, :3].mean(-1)
            assert np.corrcoef(light, dark)[0, 1] > 0.7
            np.testing.assert_array_equal(before[..., 3], after[..., 3])


def test_a_sampled_object_stands_out_from_its_background():
    for scene in scenes("all_subjects", 1000):
        for thing in scene.objects:
            assert thing.colour != scene.background
            assert scene.background in visible_backgrounds(thing.subject, scene.style, thing.colour)


def test_any_two_objects_share_a_background():
    for style in STYLES:
        choices = {visible_backgrounds(name, style, tint) for name in subjects() for tint in (None, *COLOURS)}
        assert min(len(set(a) & set(b)) for a in choices for b in choices) >= 2


def test_the_background_looks_like_its_name():
    for scene in scenes("train"):
        empty = scene.image[scene.mask == 0]
        mean = empty.mean(0)
        distance = {name: np.linalg.norm(mean - np.array(rgb)) for name, rgb in COLOURS.items()}
        assert min(distance, key=distance.get) == scene.background


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: compose([Item("catt")], background="red", style="noto"), "subject 'catt' unknown; choose cat, dog"),
        (lambda: compose([Item("cat")], background="rd", style="noto"), "background 'rd' unknown; choose red, orange"),
        (lambda: compose([Item("cat")], background="red", style="apple"), "style 'apple' unknown; choose noto"),
        (lambda: compose([Item("cat", colour="x")], background="red", style="noto"), "colour 'x' unknown; choose red"),
        (lambda: compose([Item("cat")] * 3, background="red", style="noto"), "3 items given; a scene has 1 or 2"),
        (lambda: compose([Item("cat")] * 2, background="red", style="noto"), "relation None with 2 items; two need"),
        (lambda: compose([Item("cat", 160)], background="red", style="noto"), "leaves the 128 x 128 picture; move it or"),
        (lambda: sample_scene(np.random.default_rng(0), split="test"), "split 'test' unknown; choose train, held_out_"),
    ],
)
def test_a_mistake_is_named_with_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- word pieces ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """The shipped bpe.txt as transformers and as open_clip read it."""
    folder: Path = tmp_path_factory.mktemp("bpe")
    text = (HERE / "bpe.txt").read_text(encoding="utf-8")
    letters = list(bytes_to_unicode().values())
    merged = ["".join(line.split()) for line in text.split("\n")[1:]]
    vocabulary = [*letters, *(c + "</w>" for c in letters), *merged, "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text(text)
    with gzip.open(folder / "bpe.txt.gz", "wb") as packed:
        packed.write(text.encode())
    theirs = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    return theirs, SimpleTokenizer(bpe_path=str(folder / "bpe.txt.gz"))


def test_transformers_and_open_clip_read_the_word_pieces_alike(tokenizers):
    ours, theirs = tokenizers
    assert len(ours) == theirs.vocab_size
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.sot_token_id, theirs.eot_token_id)
    texts = [scene.caption for split in SPLITS for scene in scenes(split, 100)]
    for text in [*texts, "a photo of sks dog", "Zebras, 1999!", "naïve café"]:
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text)


def test_every_word_of_captions_and_templates_is_one_token(tokenizers):
    _, theirs = tokenizers
    words = set(train_bpe.needed_words()) | {w for split in SPLITS for s in scenes(split) for w in s.caption.split()}
    assert {"sks", "ktn", "pll", "ucd", "photo", "animal", "background"} <= words and len(train_bpe.RARE_WORDS) == 10
    for word in words:
        assert len(theirs.encode(word)) == 1, word


def test_the_word_pieces_file_is_what_its_script_makes():
    merges = train_bpe.train(train_bpe.needed_words())
    lines = (HERE / "bpe.txt").read_text(encoding="utf-8").split("\n")
    assert lines[0] == "#version: 0.2" and lines[-1] != ""
    assert lines[1:] == [" ".join(pair) for pair in merges] == list(bpe_merges())


def test_merges_are_made_from_the_most_frequent_pair_on():
    # Sennrich et al.'s own kind of example: "lo" is in both words, so it is first; then the alphabet decides.
    assert train_bpe.train(["low", "lot"]) == [("l", "o"), ("lo", "t</w>"), ("lo", "w</w>")]
    assert train_bpe.join_pair(("a", "a", "a"), ("a", "a")) == ("aa", "a")


def test_the_small_models_of_the_tests_speak_the_same_language():
    assert bpe_merges() == small_models.MERGES
