"""`bench image` on a very small model: both libraries make the same picture. Its times mean nothing."""

import numpy as np
import pytest

from minidiff.bench import pipelines
from minidiff.bench.image import bench_image, prepare
from tests.small_models import small_config, xl_config


@pytest.mark.parametrize("config", [small_config(), xl_config()], ids=["SD", "SDXL"])
def test_ours_and_theirs_are_the_same_picture(config, tmp_path):
    pictures = []
    with pipelines.model_folder(config) as folder:
        for library in ("diffusers", "minidiff"):
            job = {"folder": str(folder), "device": "cpu", "how": "eager", "dtype": "float32", "library": library}
            answer = prepare(job | {"size": 32, "steps": 2})
            answer({"do": "check", "result": str(tmp_path / "result.npy")})
            pictures.append(np.load(tmp_path / "result.npy"))
    assert pictures[0].shape == (1, 3, 32, 32) and pictures[0].std() > 0.05 and 0 <= pictures[0].min() < pictures[0].max() <= 1
    # Two steps of float32 parity (1e-4 relative each) at guidance 7.5, then the decoder.
    np.testing.assert_allclose(pictures[1], pictures[0], atol=2e-3)


def test_nonsense_is_refused_at_once():
    with pytest.raises(ValueError, match="steps 0: give 1 or more"):
        next(bench_image(steps=0))


@pytest.mark.slow
def test_the_bench_runs_in_processes_of_its_own():
    lines = "\n".join(bench_image(rounds=1, model=small_config(), steps=1))
    assert "A picture of 32 x 32 in 1 steps" in lines and "refused" not in lines
    names = [line.split(" | ")[0] for line in lines.splitlines()[-3:]]
    assert names == ["| diffusers float32", "| diffusers bfloat16", "| minidiff bfloat16"]
