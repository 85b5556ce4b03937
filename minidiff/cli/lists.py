"""`minidiff list KIND`: what there is to choose from."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import tyro

from minidiff.cli.public_checkpoints import PUBLIC_CHECKPOINTS
from minidiff.config import check_choice
from minidiff.trainers.methods.table import METHODS

if TYPE_CHECKING:
    from weights_loader.families import Family


def show(kind: tyro.conf.Positional[str], /) -> None:
    """List what can be chosen: samplers, subjects, styles, methods, families, dialects or checkpoints.

        minidiff list samplers
        minidiff list checkpoints

    Args:
        kind: samplers; subjects and styles that the bundled model knows; training methods; families of models that can be loaded; dialects,
            the spellings of files; checkpoints, public files that fit, none of which is downloaded
    """
    check_choice("list", kind, LISTS)
    for line in LISTS[kind]():
        print(line)


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield rows as lines, with every cell but the last padded to the width of its column."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join([*(f"{cell:{width}}" for cell, width in zip(row[:-1], widths)), row[-1]]).rstrip()


def samplers() -> Iterable[str]:
    """Return each sampler, its name in web interfaces and half a line about it."""
    from minidiff.samplers import SAMPLERS

    names = {name: f"{row.web_name} {row.web_schedule or row.own_spacing or ''}".strip() for name, row in SAMPLERS.items()}
    return columns([(name, names[name], row.help) for name, row in SAMPLERS.items()])


def subjects() -> Iterator[str]:
    """Yield the subjects of the bundled model by class, and those it was not shown."""
    from minidiff.scenes.art import subject_names
    from minidiff.scenes.art import subjects as all_subjects

    known = all_subjects()
    classes = dict.fromkeys(known[name].class_name for name in subject_names(held_out=False))
    of = {kind: [name for name in subject_names(held_out=False) if known[name].class_name == kind] for kind in classes}
    yield from columns([(kind, ", ".join(names)) for kind, names in of.items()])
    yield f"\nnot learned, to teach it: {', '.join(subject_names(held_out=True))}"


def styles() -> Iterable[str]:
    """Return the styles, colours, sizes and positions of the bundled model's captions, each with an example."""
    from minidiff.scenes.art import COLOURS, STYLES
    from minidiff.scenes.scenes import RELATIONS

    return columns(
        [
            ("styles", ", ".join(STYLES), f'"a fox in {STYLES[0]} style"'),
            ("colours", ", ".join(COLOURS), '"a blue fox on a yellow background"'),
            ("sizes", "small, large", '"a small fox"'),
            ("positions", ", ".join(RELATIONS), '"a fox left of a key"'),
        ]
    )


def methods() -> Iterable[str]:
    """Return the training methods."""
    return columns([(name, method.summary) for name, method in METHODS.items()])


def families() -> Iterable[str]:
    """Return the families of models, their pictures' size, and what variants there are."""
    from weights_loader.families import FAMILIES

    return columns(list(dict.fromkeys((one.name, pixels(one), variants(one)) for one in FAMILIES)))


def pixels(family: "Family") -> str:
    """Return the sizes of a family's pictures."""
    if family.any_size:
        return "any size"
    return " or ".join(map(str, sorted({family.config.image_size, *family.image_sizes.values()}))) + " pixels"


def variants(family: "Family") -> str:
    """Return the variants of a family, as "also inpainting"."""
    named = [name.strip() for name in family.variants.values() if name]
    return f"also {', '.join(named)}" if named else ""


def dialects() -> Iterator[str]:
    """Yield the spellings of files that are read and written."""
    from weights_loader.adapters.lora import DIALECTS
    from weights_loader.name_table import LAYOUTS

    rows = [("whole model", layout, "read and written") for layout in LAYOUTS]
    rows += [("lora", dialect.name, "read and written" if dialect.pack else "read") for dialect in DIALECTS]
    for method in ("textual-inversion", "custom-diffusion", "controlnet"):
        rows += [(method, name, f"read and written: {what}") for name, what in METHODS[method].formats.items()]
    yield from columns(rows)


def checkpoints() -> Iterator[str]:
    """Yield the public checkpoints, by family; unofficial mirrors are marked as such."""
    for one in PUBLIC_CHECKPOINTS:
        yield f"{one.family}, {one.date}"
        yield f"  {one.repository}: {one.file}, {one.size}, {one.licence}"
        if one.mirror_of:
            yield f"  an unofficial mirror: {one.mirror_of} was taken down"
    yield "\nAll are on huggingface.co. Nothing is downloaded: save a file and give it as --model, a ControlNet as --controlnet."


LISTS: dict[str, Callable[[], Iterable[str]]] = {
    "samplers": samplers,
    "subjects": subjects,
    "styles": styles,
    "methods": methods,
    "families": families,
    "dialects": dialects,
    "checkpoints": checkpoints,
}
