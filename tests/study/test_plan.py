"""The study's runs: all named differently, with equal budgets, each changing what its name says."""

import pytest

from minidiff.scenes.art import subject_names
from minidiff.study import plan


def test_every_run_has_a_name_of_its_own_that_is_a_file_name():
    names = [run.name for run in plan.list_runs("all")]
    assert len(names) == len(set(names)) and all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-") for name in names)


def test_subjects_are_held_out_and_their_classes_are_not():
    assert set(plan.SUBJECTS) <= set(subject_names(held_out=True)) and set(plan.SUBJECTS.values()) <= set(subject_names(held_out=False))


def steps(options):
    return sum(part.settings.steps * part.settings.batch for part in options.phases())


@pytest.mark.parametrize("part", list(plan.VARIANTS))
def test_all_methods_see_as_many_samples(part):
    assert {name: steps(variant.options) for name, variant in plan.variants(part).items()} == dict.fromkeys(
        plan.variants(part), 4 * plan.STEPS
    )


def test_a_variant_of_custom_diffusion_differs_in_one_thing():
    base = plan.standard_options("custom-diffusion")
    for name, changed in (
        ("augmentation", "sizes"),
        ("no regularisation", "prior"),
        ("random first token", "start"),
        ("all of cross-attention", "all_of_attention"),
    ):
        options = plan.custom_variants()[name].options
        assert [field for field in vars(base) if getattr(base, field) != getattr(options, field)] == [changed], name


def test_what_was_mended_differs_in_its_numbers_alone():
    for name, old in plan.unmended_variants().items():
        new = plan.method_variants()[name]
        assert old.method == new.method == name and type(old.options) is type(new.options) and old.options != new.options


def test_unknown_parts_are_named():
    with pytest.raises(ValueError, match="part 'all of it' unknown; choose all, methods"):
        plan.list_runs("all of it")
    with pytest.raises(ValueError, match="part 'pairs' has no variants"):
        plan.variants("pairs")
