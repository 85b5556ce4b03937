import pytest

from minidiff.trainers.recipe import Recipe


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch": 0}, "batch 0: a recipe needs at least 1"),
        ({"steps": -1}, "steps -1"),
        ({"learning_rate": float("nan")}, "learning_rate nan"),
        ({"caption_dropout": 1.5}, "caption_dropout 1.5 is outside 0..1"),
        ({"average": -0.1}, "average -0.1"),
    ],
)
def test_a_recipe_that_cannot_be_followed_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        Recipe(**change)
