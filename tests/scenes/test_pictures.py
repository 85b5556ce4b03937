"""Pictures of one subject to personalise with: the thing alone, varied, the same on two runs."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from minidiff.scenes.pictures import subject_scenes


def test_the_subject_stands_alone_on_different_backgrounds_at_different_sizes_and_places():
    scenes = subject_scenes("tiger", "fluent", 5, np.random.default_rng(0))
    assert [[thing.subject for thing in scene.objects] for scene in scenes] == [["tiger"]] * 5
    assert len({scene.background for scene in scenes}) == 5 and {scene.style for scene in scenes} == {"fluent"}
    boxes = [scene.objects[0].box for scene in scenes]
    assert len({x1 - x0 for x0, _, x1, _ in boxes}) == 5 and len({(x0, y0) for x0, y0, _, _ in boxes}) == 5


def test_more_pictures_than_backgrounds_begin_again():
    scenes = subject_scenes("tiger", "noto", 15, np.random.default_rng(0))
    assert len(scenes) == 15 and len({scene.background for scene in scenes}) < 12


@pytest.mark.parametrize(
    "subject, style, count, message",
    [("griffin", "noto", 5, "subject 'griffin' unknown"), ("tiger", "oil", 5, "style 'oil' unknown"), ("tiger", "noto", 0, "0 pictures")],
)
def test_what_cannot_be_drawn_is_named(subject, style, count, message):
    with pytest.raises(ValueError, match=message):
        subject_scenes(subject, style, count, np.random.default_rng(0))


def test_the_command_writes_the_scenes(tmp_path):
    command = [
        sys.executable,
        "-m",
        "minidiff.scenes.pictures",
        "tiger",
        str(tmp_path / "new"),
        "--style",
        "noto",
        "--count",
        "2",
        "--seed",
        "3",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(tmp_path / "new")), done.stderr
    scenes = subject_scenes("tiger", "noto", 2, np.random.default_rng(3))
    for i, scene in enumerate(scenes):
        with Image.open(tmp_path / "new" / f"{i}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), scene.image)
    done = subprocess.run([*command[:3], "griffin", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "subject 'griffin' unknown" in done.stderr and "Traceback" not in done.stderr
