"""The judge's file: there and back, what is refused, and the shipped judge's scores on scenes that it never saw."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minidiff.bundled.judge import Judge, JudgeOutput
from minidiff.bundled.train_judge import judge_config, make_labels
from minidiff.pictures import to_pixels
from minidiff.scenes.scenes import COLOURS, STYLES, sample_scene, subjects
from minidiff.trainers.engine.loop import with_seed
from weights_loader.judge import BUNDLED, KEY, load_judge, save_judge

SMALL = dataclasses.replace(judge_config(), widths=(8, 8, 8, 16), heads=2)


@pytest.fixture(scope="module")
def small():
    with with_seed(0):
        return Judge(SMALL).eval()


@pytest.fixture
def file(small, tmp_path):
    save_judge(small, tmp_path / "judge.safetensors")
    return tmp_path / "judge.safetensors"


def rewrite(file, change=lambda tensors: tensors, metadata=None):
    with safe_open(file, framework="pt") as opened:
        tensors, found = {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()
    save_file(change(tensors), file, metadata=found if metadata is None else metadata)


def test_a_judge_comes_back_in_float16(small, file):
    back = load_judge(file)
    assert back.config == SMALL and not back.training
    for name, tensor in small.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor.half().float())
        assert not back.get_parameter(name).requires_grad


def test_a_file_that_is_not_there_or_no_judge_is_refused(file, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        load_judge(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match="no judge: its metadata have no minidiff.judge"):
        load_judge(BUNDLED.with_name("tiny.safetensors"))


@pytest.mark.parametrize(
    "metadata, message",
    [("{", "no JSON"), ("[]", "expected an object"), ('{"wide": 1}', "field 'wide' unknown"), ("{}", "missing")],
)
def test_metadata_that_are_no_config_are_refused(file, metadata, message):
    rewrite(file, metadata={KEY: metadata})
    with pytest.raises(ValueError, match=f"judge.safetensors.*{message}"):
        load_judge(file)


def test_numbers_that_make_no_judge_are_refused(file):
    values = json.loads(json.dumps(dataclasses.asdict(SMALL)))
    rewrite(file, metadata={KEY: json.dumps(values | {"heads": 3})})
    with pytest.raises(ValueError, match="16 does not divide into 3 heads"):
        load_judge(file)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: {name: t for name, t in tensors.items() if name != "styles.bias"}, "'styles.bias' is missing"),
        (lambda tensors: tensors | {"more": torch.zeros(1)}, "'more' is unknown"),
        (lambda tensors: tensors | {"styles.bias": torch.zeros(4)}, r"'styles.bias' has shape \(4,\), expected \(3,\)"),
    ],
)
def test_weights_that_are_not_the_judges_are_refused(file, change, message):
    rewrite(file, change)
    with pytest.raises(ValueError, match=message):
        load_judge(file)


# ----------------------------------------------------------------------------------------------- the judge that ships


@pytest.fixture(scope="module")
def judge():
    return load_judge()


def test_the_shipped_judge_is_small_and_knows_the_scenes_labels(judge):
    assert BUNDLED.stat().st_size <= 2_000_000
    assert (judge.config.subjects, judge.config.colours, judge.config.styles) == (tuple(subjects()), tuple(COLOURS), STYLES)


# Its scores on 10,000 fresh scenes (seed 12345), half of them with one subject: a share of right answers each; 1 is stated as 0.9999.
STATED = {"one subject": 0.9986, "held-out subject": 0.9999, "two subjects": 0.9873, "background": 0.9999, "style": 0.999, "tint": 0.9981}


def scores(judge, seed, count):
    """Of each question how many scenes answered right, and how many were asked."""
    rng, config = np.random.default_rng(seed), judge.config
    asked = {name: [] for name in STATED}
    for _ in range(count // 100):
        scenes = [sample_scene(rng, split="all_subjects") for _ in range(100)]
        labels, reading = make_labels(scenes, config), judge.read(to_pixels(np.stack([scene.image for scene in scenes])))
        likeliest = reading.shares().topk(2).indices
        first = labels.subject[:, 0]
        right = {
            "background": reading.backgrounds.argmax(1) == labels.background,
            "style": reading.styles.argmax(1) == labels.style,
            "tint": reading.tint_of(first) == labels.tint[:, 0],
        }
        for name, answers in right.items():
            asked[name] += answers.tolist()
        for i, scene in enumerate(scenes):
            if len(scene.objects) == 2:
                asked["two subjects"].append(set(likeliest[i].tolist()) == set(labels.subject[i].tolist()))
            else:
                name = "held-out subject" if subjects()[scene.objects[0].subject].held_out else "one subject"
                asked[name].append(likeliest[i, 0].item() == first[i].item())
    return {name: (sum(answers), len(answers)) for name, answers in asked.items()}


def assert_as_stated(found, stated):
    for name, (right, count) in found.items():
        share = stated[name]
        # Four standard errors of a binomial, plus one scene: a share that is as stated fails less than once in 10,000 draws.
        margin = 4 * (share * (1 - share) / count) ** 0.5 + 1 / count
        assert abs(right / count - share) <= margin, f"{name}: {right} of {count}, stated {share}"


def test_the_shipped_judge_is_right_as_often_as_stated(judge):
    assert_as_stated(scores(judge, seed=1, count=300), STATED)


@pytest.mark.slow
def test_the_shipped_judge_is_right_as_often_as_stated_on_many_scenes(judge):
    assert_as_stated(scores(judge, seed=2, count=10_000), STATED)


def test_a_wrong_statement_is_noticed():
    with pytest.raises(AssertionError, match="style: 80 of 100, stated 0.98"):
        assert_as_stated({"style": (80, 100)}, {"style": 0.98})


def test_captions_find_their_pictures(judge):
    rng = np.random.default_rng(3)
    scenes = [sample_scene(rng, split="all_subjects") for _ in range(50)]
    pictures, texts = (
        judge.encode_pictures(to_pixels(np.stack([scene.image for scene in scenes]))),
        judge.encode_texts([s.caption for s in scenes]),
    )
    found = (pictures @ texts.T).argmax(dim=1)
    # 40 of 50 leaves room for captions that say little ("an animal"), which fit several pictures.
    assert (found == torch.arange(50)).sum() >= 40


def test_two_readings_are_the_same(judge):
    pixels = to_pixels(np.stack([sample_scene(np.random.default_rng(seed)).image for seed in range(4)]))
    first, second = judge.read(pixels), judge.read(pixels)
    assert all(torch.equal(getattr(first, field.name), getattr(second, field.name)) for field in dataclasses.fields(JudgeOutput))
