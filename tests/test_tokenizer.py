"""The tokenizer against transformers' CLIPTokenizer (SD 1.x) and open_clip's SimpleTokenizer (SD 2.x), on awkward text."""

import copy
import importlib
import importlib.util
import json
import subprocess
import sys
import unicodedata
import warnings
from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError
from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTokenizer

from minidiff import tokenizer as module
from minidiff.config import SD1, SD2, TokenizerConfig
from minidiff.tokenizer import Tokenizer

# On these kinds of text the two cleanings differ: SD 1.x and SD 2.x read different tokens.
DIFFERENT = {
    "curly quotes": ["don’t", "the cat’s “bowl”", "‘single’", "O’Brien„s"],
    "ligatures": ["ﬁne ﬂowers", "oﬃce", "ﬀ ﬄ", "ﬅ", "ǅ ǆ"],
    "full width": ["ＡＢＣ　ｘｙｚ", "１２３", "！？", "中国，山水", "ｶﾀｶﾅ"],
    "HTML entities": ["salt &amp; pepper", "&lt;b&gt;", "caf&eacute;", "&#39;s", "&amp;lt;", "&quot;x&quot;"],
    "special words of CLIP": ["<|endoftext|>", "a<|startoftext|>b", "<|startoftext|> cat <|endoftext|> dog"],
    "special words of open_clip": ["<start_of_text>", "a <end_of_text> b", "<END_OF_TEXT>"],
    "mojibake": ["schÃ¶n", "âœ” done", "Ã©tÃ©"],
    "control characters": ["a\x00b", "bell\x07", "a\x1cb", "a\x0bb\x0cc", "back\x08space", "\x7f"],
    "terminal colours": ["\x1b[31mred\x1b[0m"],
    "invisible marks": ["a\ufeffb", "\ufeffcat"],
    "the old next-line character": ["a\x85b"],
    "capital sigma at the end of a word": ["ΟΔΟΣ", "ΣΑΣ ΣΟΦΟΣ"],
    "long s after an apostrophe": ["'ſ"],
}
# On these they agree.
ALIKE = {
    "plain words": ["a photo of a cat", "cat", "An astronaut riding a horse, oil painting.", "supercalifragilisticexpialidocious"],
    "nothing": ["", " ", "\t\n", "\u3000"],
    "whitespace": ["  two   spaces ", "tab\ttab", "line\nline\r\nline", "a\u00a0b", "a\u2003b\u2009c", "a\u2028b"],
    "apostrophes": ["don't DON'T", "it's they're we'll I'm I've he'd", "'s", "''", "rock 'n' roll", "'tis", "dogs'", "x's's", "'S'LL"],
    "numbers": ["12345", "3.14159", "1,000,000", "4k 8K", "2x2", "½ ¾", "²³", "Ⅷ", "١٢٣", "१२", "一二三"],
    "punctuation": ["!!!", "...", "a.b.c", "<lora:x:0.8>", "C++", "a_b-c", "\\n", "%%", "`~@#$^*+={}"],
    "prompt weights": ["(((masterpiece)))", "cat:1.3", "[a|b]", "(cat:1.2), [dog]"],
    "mixed case": ["CaT", "NASA", "iPhone", "McDONALD'S"],
    "Turkish": ["İstanbul ISPARTA ı i", "DİYARBAKIR"],
    "German": ["Straße STRASSE ẞ", "Über GRÖSSE", "Fußgängerübergänge"],
    "accents": ["café", "cafe\u0301", "e\u0301e\u0300\u0327", "naïve façade", "Ñandú", "Å Å", "ő ű", "\u0301alone"],
    "Vietnamese": ["phở bò", "Nguyễn", "tiếng Việt"],
    "Greek": ["Αθήνα", "σοφός", "ΩΜΕΓΑ α"],
    "Cyrillic": ["Москва", "ЁЖИК", "й и\u0306", "Київ"],
    "Armenian and Georgian": ["Հայաստան", "თბილისი ᲗᲑᲘᲚᲘᲡᲘ"],
    "Chinese": ["一只猫", "中国水墨画", "繁體中文", "𠀀𠮷"],
    "Japanese": ["猫の写真", "カタカナ ひらがな", "が か\u3099", "々〆"],
    "Korean": ["고양이 사진", "\u1100\u1161\u11a8", "한국어"],
    "Thai": ["แมว", "ภาพถ่ายของแมว", "น้ำ"],
    "Indic": ["बिल्ली", "தமிழ்", "বিড়াল", "ক্ষ", "മലയാളം"],
    "right to left": ["قطة جميلة", "חתול", "שָׁלוֹם", "مَرْحَبًا", "cat قطة cat", "\u202bקרא\u202c"],
    "emoji": ["🐱", "🐱🐶🦊", "a 🐱 on a 🛋️", "👩‍👩‍👧‍👦", "👍🏽", "🇩🇪🇫🇷", "❤️", "1️⃣", "☃", "🏴󠁧󠁢󠁥󠁮󠁧󠁿"],
    "joiners and marks": ["a\u200bb", "a\u200db", "a\u200cb", "soft\u00adhyphen", "a\u2060b", "\u200e\u200f"],
    "symbols": ["€100 £5 ¥", "™ © ®", "→ ⇒ ∞ ≠ ∑", "♠♥", "①②", "℃ ℉", "№ 5", "µ µ", "K K", "Ω Ω"],
    "alphabets of mathematics": ["𝐛𝐨𝐥𝐝", "𝒶𝒷", "𝟙𝟚"],
    "dashes and ellipsis": ["a–b—c", "wait…", "‐‑‒"],
    "runes and cuneiform": ["ᚠᚢᚦ", "𒀀𒁀", "ሰላም", "ᏣᎳᎩ ꮳ"],
    "combining piles": ["Z̴̧͎a̵l̶g̷o̸", "o\u0302\u0323", "a\u0315\u0300\u05ae\u0300\u0062"],
    "web": ["https://example.com/?q=a&b=c#d", "user@example.com", "#hashtag @name", "<b>bold</b>", "&nosuch;"],
    "very long": ["cat " * 200, "x" * 500, "!" * 300, "🐱" * 120, "a1" * 90],
}
TEMPLATES = ["{}", "a photo of {}, sharp", "x{}y", "{}'s", "({}) {}", "7{}7"]
TEXTS = [text for kind in (DIFFERENT, ALIKE) for texts in kind.values() for text in texts]
EVERYTHING = list(dict.fromkeys(template.replace("{}", text) for text in TEXTS for template in TEMPLATES))
FEW_MERGES = 400


@pytest.fixture(scope="module")
def open_clips():
    return SimpleTokenizer()


@pytest.fixture(scope="module")
def few_merges(open_clips):
    return tuple(" ".join(merge) for merge in open_clips.bpe_ranks)[:FEW_MERGES]


def clip_tokenizer(folder, vocabulary, merges):
    """transformers' CLIPTokenizer from the two files that a checkpoint folder holds."""
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(piece, piece): i for piece, i in vocabulary.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


@pytest.fixture(scope="module")
def clips(tmp_path_factory, open_clips):
    return clip_tokenizer(tmp_path_factory.mktemp("clip"), open_clips.encoder, [" ".join(m) for m in open_clips.bpe_ranks])


def rows(tokenizer, texts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what was cut off, tested below
        return tokenizer(texts)


def test_the_tokens_of_sd_1_are_those_of_transformers(clips):
    ours = Tokenizer(SD1.tokenizer)
    for text in EVERYTHING:
        assert ours.encode(text) == clips(text, add_special_tokens=False)["input_ids"], text
    expected = clips(EVERYTHING, padding="max_length", truncation=True, max_length=77, return_tensors="pt")["input_ids"]
    assert torch.equal(rows(ours, EVERYTHING), expected)


def test_the_tokens_of_sd_2_are_those_of_open_clip(open_clips):
    ours = Tokenizer(SD2.tokenizer)
    for text in EVERYTHING:
        assert ours.encode(text) == open_clips.encode(text), text
    assert torch.equal(rows(ours, EVERYTHING), open_clips(EVERYTHING))


def test_the_other_familys_padding_would_be_noticed(clips, open_clips):
    one, two = replace(SD1.tokenizer, padding="zero"), replace(SD2.tokenizer, padding="end")
    expected = clips(["a cat"], padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    assert torch.equal(Tokenizer(SD1.tokenizer)(["a cat"]), expected)
    assert not torch.equal(Tokenizer(one)(["a cat"]), expected)
    expected = open_clips(["a cat"])
    assert torch.equal(Tokenizer(SD2.tokenizer)(["a cat"]), expected)
    assert not torch.equal(Tokenizer(two)(["a cat"]), expected)


@pytest.mark.parametrize("kind", DIFFERENT)
def test_sd_1_and_sd_2_read_different_tokens_from(kind):
    one, two = Tokenizer(SD1.tokenizer), Tokenizer(SD2.tokenizer)
    for text in DIFFERENT[kind]:
        assert one.encode(text) != two.encode(text), text


@pytest.mark.parametrize("kind", ALIKE)
def test_sd_1_and_sd_2_read_the_same_tokens_from(kind):
    one, two = Tokenizer(SD1.tokenizer), Tokenizer(SD2.tokenizer)
    for text in ALIKE[kind]:
        assert one.encode(text) == two.encode(text), text


def test_every_character_of_most_alphabets_reads_as_in_transformers(clips):
    ours = Tokenizer(SD1.tokenizer)
    assigned = [chr(code) for code in range(0x3100) if unicodedata.category(chr(code)) != "Cn"]
    texts = [f"a{character}B {character}'s" for character in assigned]
    for text, expected in zip(texts, clips(texts, add_special_tokens=False)["input_ids"]):
        assert ours.encode(text) == expected, ascii(text)


def test_a_list_of_merges_gives_a_small_vocabulary_that_both_libraries_agree_on(tmp_path, few_merges):
    ours = Tokenizer(TokenizerConfig(merges=few_merges))
    assert (ours.vocab_size, ours.start_id, ours.end_id) == (512 + FEW_MERGES + 2, 512 + FEW_MERGES, 512 + FEW_MERGES + 1)
    theirs = clip_tokenizer(tmp_path, ours.bpe.encoder, few_merges)
    for text in EVERYTHING:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
    assert max(map(max, filter(None, map(ours.encode, EVERYTHING)))) < ours.vocab_size


def test_the_rows_are_start_tokens_end_and_padding():
    one, two = Tokenizer(SD1.tokenizer), Tokenizer(SD2.tokenizer)
    assert (one.vocab_size, one.start_id, one.end_id) == (49408, 49406, 49407)
    cat = [49406, 320, 1125, 539, 320, 2368, 49407]
    assert one(["a photo of a cat"]).tolist() == [cat + [49407] * 70]
    assert two(["a photo of a cat"]).tolist() == [cat + [0] * 70]
    assert one([]).shape == (0, 77) and one(["", "x"]).shape == (2, 77) and one([""]).dtype == torch.int64
    assert Tokenizer(TokenizerConfig(context_length=8))(["a photo of a cat"]).tolist() == [cat + [49407]]


@pytest.mark.parametrize("config", [SD1.tokenizer, SD2.tokenizer])
def test_a_long_prompt_is_cut_with_a_warning_that_shows_what_was_lost(config):
    tokenizer = Tokenizer(config)
    fits = "cat " * 75
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = tokenizer([fits])
    assert full[0, -1] == tokenizer.end_id and full[0, -2] == tokenizer.encode("cat")[0]
    with pytest.warns(UserWarning, match="the prompt has 79 tokens and the model reads 75; cut off: 'on a blue sofa'"):
        assert torch.equal(tokenizer([fits + "on a blue SOFA"]), full)


def test_decode_gives_the_cleaned_text_back():
    tokenizer = Tokenizer(SD1.tokenizer)
    for text in ("a photo of a cat , 4 2 !", "schöne grüße", "一只猫", "🐱"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer(["A Cat"])[0].tolist()) == "a cat"
    assert tokenizer.decode([]) == ""
    for wrong in (49408, -1):
        with pytest.raises(ValueError, match=rf"token id {wrong} is outside 0\.\.49407"):
            tokenizer.decode([320, wrong])


@pytest.mark.parametrize("config", [SD1.tokenizer, SD2.tokenizer, TokenizerConfig(context_length=9)])
def test_the_words_know_the_rows_of_their_tokens(config):
    tokenizer = Tokenizer(config)
    text = "A giraffe's supercalifragilistic photo, 42"
    row = rows(tokenizer, [text])[0].tolist()
    words = tokenizer.words(text)
    assert [word for word, _ in words][:4] == ["a", "giraffe", "'s", "supercalifragilistic"]
    flat = [position for _, positions in words for position in positions]
    assert flat == list(range(1, row.index(tokenizer.end_id)))  # each token once, in order, none beyond the cut
    for word, positions in words[:3]:
        assert tokenizer.decode([row[p] for p in positions]) == word
    assert len(words[3][1]) > 1
    if config.context_length == 77:
        assert [word for word, _ in words][4:] == ["photo", ",", "4", "2"]
    assert tokenizer.words("") == []


def test_a_special_word_in_the_prompt_is_one_word():
    assert Tokenizer(SD1.tokenizer).words("a <|endoftext|>") == [("a", [1]), ("<|endoftext|>", [2])]


def test_open_clip_as_a_whole_is_not_imported():
    code = (
        "import sys; from minidiff.config import SD2; from minidiff.tokenizer import Tokenizer; Tokenizer(SD2.tokenizer)(['a cat']);"
        "print(sorted({'open_clip', 'torchvision', 'timm', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_open_clip_is_imported_after_all_where_its_file_needs_it(monkeypatch):
    def needs_its_package(spec):
        raise ImportError("attempted relative import with no known parent package")

    monkeypatch.setattr(importlib.util, "module_from_spec", needs_its_package)
    assert module._open_clip_tokenizer.__wrapped__() is importlib.import_module("open_clip.tokenizer")


def test_a_missing_open_clip_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install open_clip_torch"):
        module._open_clip_tokenizer.__wrapped__()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(cleaning="bert"), "cleaning 'bert' unknown; choose clip, open_clip"),
        (dict(padding="right"), "padding 'right' unknown; choose end, zero"),
        (dict(context_length=2), "context_length 2"),
        (dict(added=("<a>", "<A>")), "added .*expected words that are not empty and differ by more than case"),
        (dict(added=("",)), "added .*expected words that are not empty"),
        (dict(merges=("a b", "ab")), "merge 1 is 'ab'; expected two pieces"),
        (dict(merges=("a b", "")), "merge 1 is ''; expected two pieces"),
        (dict(merges=("a b", "b c", "ab c", "a bc")), "two merges give the same piece"),
        (dict(merges=("a b",) * 48895), "48895 merges; at most 48894"),
    ],
)
def test_a_config_that_cannot_be_is_refused(settings, message):
    config = TokenizerConfig()
    for name, value in settings.items():
        object.__setattr__(config, name, value)  # past the annotations, which are checked in tests only
    with pytest.raises(ValueError, match=message):
        Tokenizer(config)


def test_a_bare_string_is_refused():
    with pytest.raises((ValueError, TypeCheckError), match="a cat"):
        Tokenizer(SD1.tokenizer)("a cat")


# ---------------------------------------------------------------------------------------------------------- placeholders

ADDED = {"<Cat>": (49408, 49409), "<cat>2": (49410,), "sks-1": (49411,), "<Ü>": (49412,)}


@pytest.mark.parametrize("config", [SD1.tokenizer, SD2.tokenizer])
@pytest.mark.parametrize(
    "text, expected",
    [
        ("a <cat>", ["a", 49408, 49409]),
        ("<CAT>'s x<cat>y", [49408, 49409, "'s", "x", 49408, 49409, "y"]),
        ("<cat>2 <cat>3", [49410, 49408, 49409, "3"]),  # the longest first
        ("sks-1, masks-1 sks-12", [49411, ",", "masks", "-", "1", "sks", "-", "1", "2"]),  # a word only where it stands alone
        ("<ü><u\u0308> <U\u0308>", [49412, 49412, 49412]),  # however its letters are written
        ("<cat><cat>", [49408, 49409, 49408, 49409]),
        ("<cat", ["<", "cat"]),
    ],
)
def test_a_placeholder_is_its_ids_wherever_it_stands(text, expected, config):
    plain, tokenizer = Tokenizer(config), Tokenizer(config, ADDED)
    ids = [i for part in expected for i in ([part] if isinstance(part, int) else plain.encode(part))]
    if text == "<cat":
        ids = plain.encode(text)
    assert tokenizer.encode(text) == ids
    assert tokenizer([text])[0, 1 : len(ids) + 1].tolist() == ids


@pytest.mark.parametrize("config", [SD1.tokenizer, SD2.tokenizer])
def test_placeholders_leave_all_other_text_as_it_was(config):
    plain, tokenizer = Tokenizer(config), Tokenizer(config, ADDED)
    for text in TEXTS:
        assert tokenizer.encode(text) == plain.encode(text), text
    assert tokenizer.vocab_size == plain.vocab_size and plain.added == {}
    assert tokenizer.without(ADDED).added == {} and list(tokenizer.without(["<cat>"]).added) == ["<cat>2", "sks-1", "<ü>"]


def test_single_token_placeholders_are_read_as_by_transformers(clips):
    theirs = copy.deepcopy(clips)
    theirs.add_tokens(["<cat>", "<cat>2", "<style-x>"])
    ours = Tokenizer(SD1.tokenizer, {"<cat>": (49408,), "<cat>2": (49409,), "<style-x>": (49410,)})
    for text in ("a photo of <cat>", "x<cat>y<cat>2", "<cat>'s <cat>3, in the <style-x>'s style", "<cat", "<<cat>>"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text


def test_a_checkpoints_own_words_are_behind_its_merges_and_beside_added_ones(few_merges):
    plain = Tokenizer(TokenizerConfig(merges=few_merges))
    own = Tokenizer(TokenizerConfig(merges=few_merges, added=("<Cat>", "a")), {"<cat>2": (5000,)})
    size = plain.vocab_size
    assert own.vocab_size == size + 2 and list(own.added) == ["<cat>2"]
    assert own.encode("<CAT> <cat>2 a x") == [size, 5000, size + 1, *plain.encode("x")]
    assert own.decode([size, 5000, size + 1]) == "<cat> <cat>2 a"
    assert own.without(["<cat>2"]).encode("<cat>2") == [size, *plain.encode("2")]
    with pytest.raises(ValueError, match="placeholder '<CAT>' is a word of the vocabulary already"):
        own.with_added({"<CAT>": (5001,)})


def test_decode_and_words_know_placeholders():
    tokenizer = Tokenizer(SD1.tokenizer, ADDED)
    assert tokenizer.decode(tokenizer.encode("a <cat> on SKS-1 , <cat> <cat>")) == "a <cat> on sks-1 , <cat> <cat>"
    assert tokenizer.decode([49409, 320]) == "<cat> a"  # its first vector was cut off
    assert tokenizer.words("a <cat>s") == [("a", [1]), ("<cat>", [2, 3]), ("s", [4])]
    with pytest.raises(ValueError, match="token id 49413 is outside"):
        tokenizer.decode([49413])


def test_cutting_counts_every_vector_of_a_placeholder():
    tokenizer = Tokenizer(replace(SD1.tokenizer, context_length=6), ADDED)
    with pytest.warns(UserWarning, match="the prompt has 6 tokens and the model reads 4; cut off: '<cat> ,'"):
        assert tokenizer(["a big red <cat>,"])[0, 1:5].tolist() == [*tokenizer.encode("a big red"), 49408]


@pytest.mark.parametrize(
    "name, message",
    [
        ("", "placeholder '' is empty or has whitespace in it; choose a word such as <cat>"),
        ("a\tb", "is empty or has whitespace in it"),
        ("cat", r"placeholder 'cat' is a word of the vocabulary already \(token 2368\)"),
        ("CAT", r"placeholder 'CAT' is a word of the vocabulary already \(token 2368\)"),
        ("<|endoftext|>", "is a word of the vocabulary already"),
        ("x<|endoftext|>", "would be split"),
        ("<CAT>", "placeholder '<CAT>' was added before"),
    ],
)
def test_a_placeholder_that_cannot_be_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(SD1.tokenizer, ADDED).with_added({name: (50000,)})
