"""What a prompt or a size asks for in vain: a line with the nearest right thing.

<lora:cat:0.7>, AND, [a:b:0.5]   syntax of web interfaces that is read as text here
a unicorn                        a word that the bundled model was never shown
--size 512                       far from the size that a model was trained at
"""

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

# (what a prompt has, what is said of it); {0} is all that was found, {1} and {2} its parts
SYNTAX = (
    (r"<(?:lora|lyco):([^:>]+):?([\d.]*)[^>]*>", "{0} in a prompt is text here; give --lora {1}.safetensors:{2}"),
    (r"<hypernet:[^>]+>", "{0} in a prompt is text here; hypernetworks are not supported"),
    (
        r"\[[^\[\]:]*:[^\[\]:]*:[\d.]+\]",
        "{0} is text here; to change the words along the way, start from a picture: --image FILE --strength 0.6",
    ),
    (r"\[[^\[\]|]*\|[^\[\]]*\]", "{0} is text here; give two prompts for two pictures, or weights as (cat:1.2)"),
    (r"\bAND\b", "AND is the word 'and' here; to make one part count more, give it a weight as (cat:1.2)"),
    (r"\bBREAK\b", "BREAK is a word here; long prompts are split into chunks by themselves"),
    (r"\(\(+[^():]*\)+", "{0}: brackets without a number are text here; write a weight as (word:1.2)"),
    (r"\[[^\[\]:|]+\]", "{0}: square brackets are text here; write a weight as (word:0.9)"),
    (r"\bembedding:([\w.-]+)", "{0} is text here; give --embedding {1}.safetensors, and its word in the prompt"),
)
GRAMMAR = "a an of on in and background style small large"  # of the captions, beside nouns and colours
FAR = 1.5  # a side this many times longer or shorter than the model's own shows it


def syntax_notes(prompts: Iterable[str]) -> Iterator[str]:
    """Yield a line for each kind of syntax that has no effect here."""
    text = "\n".join(prompts)
    for pattern, words in SYNTAX:
        if found := re.search(pattern, text):
            yield words.format(found[0], *(part or "1" for part in found.groups()))


def negative_notes(negative_prompt: str | None, guidance_scale: float) -> Iterator[str]:
    """Yield a line for a negative prompt at the scale at which nothing is guided away from it."""
    if negative_prompt and guidance_scale == 1:
        yield "--negative-prompt has no effect at --guidance-scale 1, which draws the prompt alone; give a larger scale"


def learned_words() -> frozenset[str]:
    """Return every word of the captions that the bundled model was trained with."""
    from minidiff.scenes.art import COLOURS, STYLES, subject_names, subjects
    from minidiff.scenes.scenes import MEDIA, RELATIONS

    names = subject_names(held_out=False)
    phrases = (*names, *(subjects()[name].class_name for name in names), *COLOURS, *STYLES, *MEDIA, *RELATIONS, GRAMMAR)
    return frozenset(word for phrase in phrases for word in phrase.split())


def word_notes(prompts: Iterable[str], added: Iterable[str]) -> Iterator[str]:
    """Yield a line with the words that the bundled model was never shown, each with the nearest one that it was.

    Args:
        prompts: what is asked for
        added: words that were learned since, as "<cat>"
    """
    known, text = learned_words(), " ".join(prompts).lower()
    for pattern in (*(rf"(?<!\w){re.escape(word)}(?!\w)" for word in added), *(pattern for pattern, _ in SYNTAX)):
        text = re.sub(pattern, " ", text, flags=re.IGNORECASE)
    missing = dict.fromkeys(word for word in re.findall(r"[^\W\d_]+", text) if word not in known)
    if missing:
        said = ", ".join(f"{word} ({near}?)" if (near := nearest(word, known)) else word for word in missing)
        yield f"the bundled model was never shown the words {said}; `minidiff list subjects` and `list styles` have those it knows"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return a known word that is spelled like this one, or for a subject that was held out of training one of its class."""
    from minidiff.scenes.art import subject_names, subjects

    if close := get_close_matches(word, known, 1, 0.75):
        return close[0]
    if word not in subjects():
        return None
    return next((name for name in subject_names(held_out=False) if subjects()[name].class_name == subjects()[word].class_name), None)


def size_notes(size: tuple[int, int], own: int) -> Iterator[str]:
    """Yield a line for pictures far from the size in pixels that the model was trained at."""
    width, height = size
    if max(size) > FAR * own:
        zoom = f"; --zoom {max(size) // own} enlarges a picture of its own size" if max(size) >= 2 * own else ""
        yield f"the model was trained at {own} x {own} pixels; at {width} x {height} things tend to repeat{zoom}"
    elif FAR * min(size) < own:
        yield f"the model was trained at {own} x {own} pixels; at {width} x {height} pictures are cruder"
