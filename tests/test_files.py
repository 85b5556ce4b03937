"""Files that are whole or not there at all, digests that do not change, and runs that know their folder again."""

import json
import os
import signal

import pytest
import torch

from minidiff.files import atomic_write, check_same, checksum, digest, ensure_same_run, exclusive, fingerprint, remove_leftovers, write_text
from tests.small_task import SmallTask, forked

# --- whole or not at all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [b"the old file", None])
def test_a_write_that_fails_midway_leaves_the_old_file_and_nothing_else(tmp_path, error, old):
    path = tmp_path / "a.bin"
    if old:
        path.write_bytes(old)
    with pytest.raises(type(error)), atomic_write(path) as file:
        file.write(b"half")
        assert len(os.listdir(tmp_path)) == 1 + bool(old)
        raise error
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == ([old] if old else [])


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as first:
        first.write(b"first")
        write_text(path, "second")
        assert path.read_text() == "second"
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.forks
def test_what_a_killed_writer_left_can_be_removed(tmp_path):
    path = tmp_path / "a[1].txt"

    def run():
        with atomic_write(path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(run) == -signal.SIGKILL
    (tmp_path / "other.txt").touch()
    assert len(os.listdir(tmp_path)) == 2 and not path.exists()
    remove_leftovers(path)
    assert os.listdir(tmp_path) == ["other.txt"]


@pytest.mark.forks
def test_the_next_save_to_a_place_clears_what_a_killed_one_left_and_no_other(tmp_path):
    path = tmp_path / "a.txt"

    def run():
        with atomic_write(path):
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(run) == -signal.SIGKILL and len(os.listdir(tmp_path)) == 1
    with atomic_write(path) as first:  # a writer at work
        (at_work,) = os.listdir(tmp_path)
        write_text(path, "second")
        assert sorted(os.listdir(tmp_path)) == sorted([at_work, "a.txt"])
        first.write(b"first")
    assert os.listdir(tmp_path) == ["a.txt"] and path.read_text() == "first"


def test_text_is_written_whole_over_what_was_there(tmp_path):
    for text in ("one", "± two"):
        write_text(tmp_path / "a.txt", text)
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "± two" and os.listdir(tmp_path) == ["a.txt"]


# --- digests ----------------------------------------------------------------------------------------------------------


def test_digests_are_those_that_states_and_caches_on_disks_hold():
    module = torch.nn.Linear(2, 1)
    module.load_state_dict({"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])})
    assert checksum(module) == 2987300529
    assert fingerprint(module) == "81a53f42ff081c2f8f8f61ab438e8f81adfc12481bad94c097d2351ea1273582"
    assert digest([b"ab", b"c"]) == digest([b"abc"]) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2


def test_a_checksum_knows_weights_again_and_notices_the_least_change():
    task = SmallTask()
    before = checksum(task.net)
    assert checksum(SmallTask().net) == before
    with torch.no_grad():
        task.net[0].bias[0] = torch.nextafter(task.net[0].bias[0], torch.tensor(9.0))
    assert checksum(task.net) != before


def test_a_fingerprint_tells_weights_names_and_dtypes_apart():
    def linear(bias=0.0, dtype=torch.float32):
        module = torch.nn.Linear(2, 2)
        torch.nn.init.ones_(module.weight)
        torch.nn.init.constant_(module.bias, bias)
        return module.to(dtype)

    prints = [fingerprint(m) for m in (linear(), linear(1e-7), linear(dtype=torch.bfloat16), torch.nn.Sequential(linear()))]
    assert len(set(prints)) == 4 and fingerprint(linear()) == prints[0]


# --- the same run? ----------------------------------------------------------------------------------------------------


def test_every_difference_is_named(tmp_path):
    check_same(tmp_path, {"a": 1, "b": "x"}, {"a": 1, "b": "x"})
    with pytest.raises(ValueError, match=r"holds another run \(b 'x', now 'y'; c None, now 2; d 3, now None\)"):
        check_same(tmp_path, {"a": 1, "b": "x", "d": 3}, {"a": 1, "b": "y", "c": 2})


def test_a_folder_is_claimed_by_the_first_run_and_known_again(tmp_path):
    path = tmp_path / "new" / "run.json"
    ensure_same_run(path, {"steps": 3, "sizes": (1, 2)})
    ensure_same_run(path, {"steps": 3, "sizes": (1, 2)})
    with pytest.raises(ValueError, match=r"new holds pictures of others \(steps 3, now 4\); choose another place, or ask for the same"):
        ensure_same_run(path, {"steps": 4, "sizes": (1, 2)}, holds="pictures of others")
    assert json.loads(path.read_text()) == {"steps": 3, "sizes": [1, 2]}


def test_defaults_fill_in_what_an_older_run_does_not_name_and_what_may_change_is_ignored(tmp_path):
    path = tmp_path / "run.json"
    ensure_same_run(path, {"steps": 3, "machine": "first"})
    ensure_same_run(path, {"steps": 3, "flip": 0.5, "machine": "second"}, defaults={"flip": 0.5, "steps": 9}, ignore=("machine",))
    with pytest.raises(ValueError, match=r"\(flip 0.5, now 0.25\)"):
        ensure_same_run(path, {"steps": 3, "flip": 0.25}, defaults={"flip": 0.5}, ignore=("machine",))


def test_a_file_that_is_no_json_is_said_to_be_none(tmp_path):
    for text in ("{", ""):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match=r"run\.json: no JSON .*; choose an empty folder"):
            ensure_same_run(tmp_path / "run.json", {})


@pytest.mark.parametrize("text", ["[]", "3", '"a"', "null"])
def test_a_file_that_holds_no_settings_is_said_to(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json: no settings of a run; choose an empty folder"):
        ensure_same_run(tmp_path / "run.json", {"seed": 0})


def test_a_folder_is_one_runs_at_a_time(tmp_path):
    with exclusive(tmp_path):
        with pytest.raises(ValueError, match="another run is at work there; wait for its end, or choose another folder"):
            with exclusive(tmp_path):
                pass
    with exclusive(tmp_path):  # given free again
        pass
    assert list(tmp_path.iterdir()) == []
