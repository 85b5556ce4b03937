"""What the benchmarks share: the record on the disk, checks before minutes are spent, made-up weights."""

import json

import pytest
import torch

from minidiff.bench import common
from minidiff.bench.common import BenchRecord, check_arguments, model_config, random_model_to_run
from minidiff.machine import read_machine
from tests.small_models import small_config


def test_the_file_is_whole_after_each_number(tmp_path):
    out = tmp_path / "bench.json"
    record = BenchRecord(out, {"rounds": 3})
    for i, name in enumerate(("first", "second")):
        record.keep(name, {"seconds": i})
        written = json.loads(out.read_text())
        assert len(written["results"]) == i + 1 and not written["finished"]
    record.finish(sums=[1])
    written = json.loads(out.read_text())
    assert written["finished"] and written["sums"] == [1] and written["results"]["second"] == {"seconds": 1}
    assert (
        written["command"].split()[0] == "minidiff"
        and written["machine"]["versions"].startswith("torch ")
        and written["settings"] == {"rounds": 3}
    )
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_a_run_that_ended_early_is_gone_on_with_and_another_is_not(tmp_path):
    out = tmp_path / "bench.json"
    BenchRecord(out, {"rounds": 3}).keep("first", {"seconds": 1})
    assert BenchRecord(out, {"rounds": 3}).results == {"first": {"seconds": 1}}
    assert BenchRecord(out, {"rounds": 4}).results == {}
    BenchRecord(out, {"rounds": 3}).finish()
    assert BenchRecord(out, {"rounds": 3}).results == {}
    for broken in ("{", "[1]", '{"finished": false}'):
        out.write_text(broken)
        assert BenchRecord(out, {"rounds": 3}).results == {}


def test_numbers_of_another_machine_are_not_gone_on_with(tmp_path, monkeypatch):
    BenchRecord(tmp_path / "bench.json", {}).keep("first", {})
    monkeypatch.setattr(common, "read_machine", lambda: read_machine() | {"processor": "another"})
    assert BenchRecord(tmp_path / "bench.json", {}).results == {}


def test_what_would_fail_after_minutes_fails_at_once(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="rounds 0: give 1 or more"):
        check_arguments(0, None)
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere; make it first"):
        check_arguments(1, tmp_path / "nowhere" / "bench.json")
    with pytest.raises(ValueError, match="model 'sd3' unknown; choose sd1, sd2, sdxl, bundled"):
        model_config("sd3")
    monkeypatch.setattr(common.importlib.util, "find_spec", lambda name: None if name == "peft" else True)
    check_arguments(1, None, True)
    with pytest.raises(ValueError, match="peft is not installed: run pip install peft .*--no-against"):
        check_arguments(1, None, True, ("diffusers", "peft"))


def test_made_up_weights_keep_activations_at_their_size():
    sd = random_model_to_run(small_config())
    latents, context = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 16)
    with torch.no_grad():
        prediction = sd.unet(latents, torch.tensor([500]), context)
        pixels = sd.vae.decode(latents)
    assert 0.1 < prediction.std() < 10 and 0.1 < pixels.std() < 10
    weights = [p for part in sd.parts.values() for p in part.parameters()]
    assert len({p.data_ptr() for p in weights}) == len(weights)  # each its own memory: the cache must not hold the whole model
