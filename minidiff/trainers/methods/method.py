"""The interface of a training method: its presets, how it is built, and which files it ends in. One file per method; table.py lists them.

A new method is a file with four things, and a line in table.py; the command line needs nothing else:

    @dataclass ... class MyOptions      its numbers, a PhaseOptions; each field is a flag, each line under `Args:` the flag's help
    PRESETS                             numbers that work, for each family of models
    build(sd, concepts, options, cache) -> TrainingRun of FinetuneTasks (finetune_task.py)
    METHOD = Method(...)

Importing a method costs nothing: `build` imports torch and the rest when it is called, so that --help appears at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar, runtime_checkable

from minidiff.trainers.methods.options import Family, PhaseOptions

if TYPE_CHECKING:
    from minidiff.trainers.methods.finetune_task import TrainingRun


@runtime_checkable
class MethodOptions(Protocol):
    """The options of a method: a dataclass, whose phases are trained one after the other. Class pictures are the last one's."""

    def phases(self) -> tuple[PhaseOptions, ...]: ...


Numbers = TypeVar("Numbers", bound=MethodOptions)


@dataclass(frozen=True)
class Method(Generic[Numbers]):
    """A training method, as the table and the command line know it.

    Args:
        summary: what it does, a sentence or two for --help
        presets: numbers that work, for each family
        build: build(sd, concepts, options, cache=None) puts the run together, and raises ValueError for all that is wrong. The results in
            its TrainingRun (lora, tokens, custom_diffusion, controlnet, or none: the model itself) say which files are written
        formats: spellings of these files, and for whom each is; the first one is taken by default
        low_rank_presets: presets behind --low-rank, where the method can train a LoRA in place of the model's weights
        start_from: a kind of result, as "custom_diffusion", that training can add to; build then takes it as start_from=
        needs_images: whether there is nothing to learn without a folder of pictures
        example: flags of a run, for --help; --out is added to them
    """

    summary: str
    presets: Mapping[Family, Numbers]
    build: "Callable[..., TrainingRun]"
    formats: Mapping[str, str] = field(default_factory=dict)
    low_rank_presets: Mapping[Family, Numbers] = field(default_factory=dict)
    start_from: str | None = None
    needs_images: bool = True
    example: str = "--images cat-pictures --token sks --class-word cat"

    @property
    def options(self) -> type:
        """Return the class of its options."""
        return type(next(iter(self.presets.values())))
