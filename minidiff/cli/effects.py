"""Flags of training that were given and have no effect beside the others: each is said before the first step.

A rule is a flag, when it has none, and why. The options are those of a method's last phase, which has its class pictures.
"""

from collections.abc import Callable, Collection
from typing import Any

from minidiff.trainers.methods.options import Concept
from minidiff.trainers.methods.override import places

NO_CLASS_PICTURES = "there are no class pictures; --prior says which"
Rule = tuple[str, Callable[[Any], bool], str]


def _prior_is(*kinds: str) -> Callable[[Any], bool]:
    return lambda options: options.prior.kind in kinds


def _text_encoder_stays(options: Any) -> bool:
    low_rank = getattr(options, "low_rank", None)
    return not getattr(options if low_rank is None else low_rank, "text_encoder", True)


RULES: tuple[Rule, ...] = (
    ("prior_weight", _prior_is("none"), NO_CLASS_PICTURES),
    ("class_images", _prior_is("none"), NO_CLASS_PICTURES),
    ("class_prompt", _prior_is("none"), NO_CLASS_PICTURES),
    ("prior_count", _prior_is("none"), NO_CLASS_PICTURES),
    ("prior_count", _prior_is("folder"), "--prior folder takes all pictures of --class-images"),
    ("prior_steps", _prior_is("none", "folder", "near", "scenes"), "class pictures are not generated"),
    ("prior_guidance_scale", _prior_is("none", "folder", "near", "scenes"), "class pictures are not generated"),
    ("prior_min_similarity", _prior_is("none", "folder", "generated", "scenes"), "only --prior near compares captions"),
    ("text_scale", _text_encoder_stays, "the text encoder is not trained; --text-encoder yes trains it"),
    ("size_phrases", lambda options: getattr(options, "sizes", "") == "none", "--sizes none shows the subject at one size"),
)


def without_effect(given: Collection[str], options: Any, concepts: Collection[Concept]) -> list[str]:
    """Return a line for each flag that was given and has no effect.

    Args:
        given: names of flags, as prior_count
        options: of the method, with these flags in them
        concepts: what is learned
    """
    last, has_prior = options.phases()[-1], "prior" in {flat.name for flat in places(options)}
    rules = [rule for rule in RULES if has_prior or not rule[0].startswith(("prior", "class"))]  # others refuse class pictures themselves
    lines = [f"--{flag.replace('_', '-')} has no effect: {why}" for flag, is_idle, why in rules if flag in given and is_idle(last)]
    if "class_word" in given and isinstance(getattr(options.phases()[0], "start", None), str):  # of a word alone: captions do not have it
        lines.append("--class-word has no effect: --start says which word the new one starts from")
    if all(concept.captions or concept.prompt for concept in concepts):
        templates = [flag for flag in ("kind", "template_set") if flag in given and hasattr(options.phases()[0], flag)]
        lines += [f"--{flag.replace('_', '-')} has no effect: every concept brings its own captions" for flag in templates]
    return lines
