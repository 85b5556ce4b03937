"""Pickles that attack: each is first given to Python's own pickle to show that it works, then to ours."""

import collections
import copyreg
import datetime
import enum
import functools
import mmap
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from weights_loader.read import read
from weights_loader.read.pickles import InertObject, Name, unpickle
from weights_loader.read.torch_files import LEGACY_MAGIC


class Trap:
    """Leaves a file behind when it is made by __new__, or given a state."""

    def __new__(cls, path=None):
        if path:
            Path(path).touch()
        return super().__new__(cls)

    def __setstate__(self, path):
        Path(path).touch()


def write_file(path: Path, container: str, payload: bytes):
    """Put a pickle where each of torch's formats has its object."""
    if container == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", payload)
            archive.writestr("archive/version", "3\n")
    elif container == "legacy":
        before = [LEGACY_MAGIC, 1001, {"little_endian": sys.byteorder == "little"}]
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in before) + payload + pickle.dumps([], 2))
    else:
        path.write_bytes(payload)


def unpickle_bytes(content: bytes):
    buffer = mmap.mmap(-1, len(content))
    buffer[:] = content
    no_weights = {}.__getitem__
    return unpickle(buffer, len(content), no_weights, no_weights)


CONTAINERS = ("zip", "legacy", "bare")
TRAP = f"c{__name__}\nTrap\n"
# What each writes for `SHELL` touches the canary by a shell, for `CANARY` by its path.
CALLING = {
    "REDUCE": "cos\nsystem\n(VSHELL\ntR.",
    "INST": "(VSHELL\nios\nsystem\n.",
    "OBJ": "(cos\nsystem\nVSHELL\no.",
    "STACK_GLOBAL": "Vos\nVsystem\n\x93(VSHELL\ntR.",
    "dotted name": "\x80\x04Vos\nVpath.os.system\n\x93(VSHELL\ntR.",
    "eval": "cbuiltins\neval\n(V__import__('os').system('SHELL')\ntR.",
    "getattr of an import": "cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVsystem\ntR(VSHELL\ntR.",
    "partial": "cfunctools\npartial\n(cos\nsystem\nVSHELL\ntR(tR.",
    "in place of a weight": "(Vw\ncos\nsystem\n(VSHELL\ntRd.",
    "class made by REDUCE": TRAP + "(VCANARY\ntR.",
}
MAKING = {
    "NEWOBJ": TRAP + "(VCANARY\nt\x81.",
    "NEWOBJ_EX": TRAP + "(VCANARY\nt}\x92.",
    "BUILD": TRAP + "(t\x81VCANARY\nb.",
}


def payload_for(template: str, canary: Path) -> bytes:
    return template.replace("SHELL", f"touch {canary}").replace("CANARY", str(canary)).encode("latin1")


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("attack", CALLING)
def test_a_call_is_refused_with_the_name_of_the_function_and_not_made(tmp_path, attack, container):
    canary, file = tmp_path / "canary", tmp_path / "model.ckpt"
    payload = payload_for(CALLING[attack], canary)
    pickle.loads(payload)
    assert canary.exists(), "the attack itself does not work"
    canary.unlink()

    write_file(file, container, payload)
    with pytest.raises(ValueError, match=r"model.ckpt: refused: the file asks to call '[\w.]+'"):
        read(file)
    assert not canary.exists()


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("attack", MAKING)
def test_an_object_of_a_foreign_class_is_not_made_but_told(tmp_path, attack, container):
    canary, file = tmp_path / "canary", tmp_path / "model.ckpt"
    payload = payload_for(MAKING[attack], canary)
    pickle.loads(payload)
    assert canary.exists(), "the attack itself does not work"
    canary.unlink()

    write_file(file, container, payload)
    with pytest.raises(ValueError, match=f"no tensors in it; '{__name__}.Trap' is not a known name.* an object of {__name__}.Trap"):
        read(file)
    assert not canary.exists()


def test_the_message_names_what_would_have_been_called(tmp_path):
    for template, name in (("REDUCE", "os.system"), ("INST", "os.system"), ("OBJ", "os.system"), ("eval", "builtins.eval")):
        write_file(tmp_path / "x.pt", "bare", payload_for(CALLING[template], tmp_path / "canary"))
        with pytest.raises(ValueError, match=f"asks to call '{name}'"):
            read(tmp_path / "x.pt")


def test_state_outside_the_file_cannot_be_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("MINIDIFF_TRAP", raising=False)
    for payload, changed in (
        (b"cos\nenviron\nVMINIDIFF_TRAP\nV1\ns.", lambda: "MINIDIFF_TRAP" in os.environ),
        (b"csys\npath\nVMINIDIFF_TRAP\na.", lambda: "MINIDIFF_TRAP" in sys.path),
    ):
        pickle.loads(payload)
        assert changed()
        monkeypatch.delenv("MINIDIFF_TRAP", raising=False)
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != "MINIDIFF_TRAP"])
        write_file(tmp_path / "x.pt", "bare", payload)
        with pytest.raises(ValueError, match="'(os.environ|sys.path)'"):
            read(tmp_path / "x.pt")
        assert not changed()


def test_attributes_of_a_known_function_cannot_be_set(tmp_path):
    write_file(tmp_path / "x.pt", "bare", b"ctorch._utils\n_rebuild_tensor_v2\n}Vx\nI1\nsb.")
    with pytest.raises(ValueError, match="sets the attributes of 'torch._utils._rebuild_tensor_v2'"):
        read(tmp_path / "x.pt")


def test_numbered_extensions_are_refused(tmp_path):
    copyreg.add_extension("os", "getcwd", 240)
    try:
        payload = b"\x80\x02\x82\xf0)R."
        assert pickle.loads(payload) == os.getcwd()
        write_file(tmp_path / "x.pt", "bare", payload)
        with pytest.raises(ValueError, match="refused: .*EXT1"):
            read(tmp_path / "x.pt")
    finally:
        copyreg.remove_extension("os", "getcwd", 240)


REBUILD = "ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    "arguments",
    [
        b"(tR.",  # none
        b"(Vtext\nI0\n(I1\nt(I1\nt\x89NtR.",  # text as storage
        b"(NI0\n(I1\nt(I1\nt\x89NtR.",
        b"(" + REBUILD.encode() + b"I0\n(I1\nt(I1\nt\x89NtR.",  # a function as storage
        b"]R.",  # a list instead of a tuple
    ],
)
def test_a_tensor_from_odd_arguments_is_a_damaged_file(tmp_path, arguments):
    write_file(tmp_path / "x.pt", "bare", REBUILD.encode() + arguments)
    with pytest.raises(ValueError, match="damaged"):
        read(tmp_path / "x.pt")


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(
    "shape, stride, offset, message",
    [
        ((5,), (1,), 0, "needs 5 elements of a storage that has 4"),
        ((2, 2), (3, 1), 0, "needs 5 elements"),
        ((4,), (1,), 1, "needs 5 elements"),
        ((4,), (-1,), 3, "expected integers from 0"),
        ((1,), (1,), -1, "expected integers from 0"),
        ((2, 2), (1,), 0, "one stride an axis"),
        ((2,), (1.0,), 0, "expected integers"),
        ((2,), (True,), 0, "expected integers"),
        ((8,), (0,), 0, "needs 8 elements of a storage that has 4"),  # one number, seen eight times
        ((2**31, 2**31), (0, 0), 0, "needs 4611686018427387904 elements"),
        ((1,) * 20, (1,) * 20, 0, "expected a few integers"),
    ],
)
def test_a_view_beyond_its_storage_is_refused(tmp_path, monkeypatch, container, shape, stride, offset, message):
    tensor = torch.zeros(4)

    class Forged:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (tensor._typed_storage(), offset, shape, stride, False, {})

    file = tmp_path / "x.pt"
    if container == "bare":
        file.write_bytes(pickle.dumps({"w": Forged()}))
    else:
        torch.save({"w": Forged()}, file, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(ValueError, match=message):
        read(file)


@pytest.mark.parametrize("container", CONTAINERS)
def test_what_a_training_script_leaves_beside_the_weights_does_not_stop_the_reading(tmp_path, container):
    weight = torch.arange(6.0).reshape(2, 3)
    saved = {
        "state_dict": {"w": weight},
        "callbacks": {Trap: {"best": np.float64(0.5), "monitor": "loss"}},
        "hyper_parameters": Namespace(learning_rate=1e-4),
        "history": np.arange(3),
        "device": torch.device("cpu"),
        "done": {1, 2},
    }
    file = tmp_path / "last.ckpt"
    if container == "bare":
        file.write_bytes(pickle.dumps(saved))
    else:
        torch.save(saved, file, _use_new_zipfile_serialization=container == "zip")
    checkpoint = read(file)
    assert list(checkpoint.tensors) == ["w"] and torch.equal(checkpoint.tensors["w"], weight)
    notes = " ".join(checkpoint.notes)
    for told in (f"'{__name__}.Trap' is not a known name", "'argparse.Namespace' is not a known name", "'hyper_parameters' stands beside"):
        assert told in notes


class Mode(enum.Enum):
    FAST = "fast"


@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_outside_the_state_dict_are_inert_and_told(protocol, tmp_path):
    hyper_parameters = {
        "data": Path("/data"),
        "started": datetime.datetime(2024, 5, 1),
        "last": collections.deque([1, 2]),
        "mode": Mode.FAST,
        "loss": functools.partial(print, 3),
    }
    saved = {"state_dict": {"w": torch.ones(3)}, "hyper_parameters": hyper_parameters, "ema_loss": torch.zeros(1)}
    torch.save(saved, tmp_path / "x.ckpt", pickle_protocol=protocol)
    checkpoint = read(tmp_path / "x.ckpt")
    assert list(checkpoint.tensors) == ["w"]
    told = " ".join(checkpoint.notes)
    assert "'datetime.datetime' is not a known name" in told and "'hyper_parameters' stands beside the state dict: a dict of 5" in told
    torch.save(saved["state_dict"] | {"mode": hyper_parameters["last"]}, tmp_path / "x.ckpt", pickle_protocol=protocol)
    with pytest.raises(ValueError, match="asks to call 'collections.deque', and weights need no call"):
        read(tmp_path / "x.ckpt")


def test_a_call_by_which_attacks_work_is_refused_wherever_it_stands(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, ("true",)

    torch.save({"state_dict": {"w": torch.ones(3)}, "hyper_parameters": {"x": [Attack()]}}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="refused: the file asks to call '(posix|nt).system'"):
        read(tmp_path / "x.ckpt")


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_dict_of_parameters_is_read_as_data(form, tmp_path):
    words = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.arange(4.0)[None])})
    torch.save({"string_to_param": words}, tmp_path / "x.pt", _use_new_zipfile_serialization=form == "zip")
    checkpoint = read(tmp_path / "x.pt")
    assert list(checkpoint.tensors) == ["string_to_param.*"] and checkpoint.notes == ()
    assert torch.equal(checkpoint.tensors["string_to_param.*"], torch.arange(4.0)[None])


def test_a_tensor_with_attributes_is_read_without_them(tmp_path):
    tensor = torch.arange(3.0)
    tensor.note = "mine"
    torch.save({"w": tensor}, tmp_path / "x.pt")
    assert torch.equal(read(tmp_path / "x.pt").tensors["w"], torch.arange(3.0))


REDUCE_AGAIN = b"h\x01h\x02R"  # the function and the arguments in places 1 and 2 of the memo


def text(letters: int) -> bytes:
    return b"X" + struct.pack("<I", letters) + b"a" * letters


def hostile(n: int) -> dict[str, bytes]:
    """Pickles of some n bytes that ask for far more."""
    return {
        "a size of something else than numbers": b"ctorch\nSize\n(" + text(n) + b"tR.",
        # One value in the memo, from which another one is made n times.
        "a text made into bytes": b"](c_codecs\nencode\nq\x01" + text(n) + b"Vlatin1\n\x86q\x02" + REDUCE_AGAIN * n + b"e.",
        "a dict of pairs": b"](ccollections\nOrderedDict\nq\x01](" + b"K\x01K\x02\x86" * n + b"e\x85q\x02" + REDUCE_AGAIN * n + b"e.",
        "a long name before many": b"}" + text(n) + b"](" + b"N" * n + b"es.",
        "a deep nest": b"]" * n + b"a" * (n - 1) + b".",
        "dicts without end": b"](" + b"}" * n * 30 + b"e.",
        "marks without end": b"(" * n * 30 + b".",
        "nothing without end": b"](" + b"N" * n * 50 + b"e.",
    }


@pytest.mark.parametrize("name", [name for name in hostile(1) if "end" not in name])
def test_a_pickle_that_asks_for_far_more_than_it_holds_is_refused(name, tmp_path):
    (tmp_path / "x.pt").write_bytes(hostile(20_000)[name])
    with pytest.raises(ValueError, match="damaged|no weights"):
        read(tmp_path / "x.pt")


MEASURE = """
import resource, sys, time
import torch
from weights_loader.read import read
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
for file in sys.argv[1:]:
    start = time.process_time()
    try:
        read(file)
    except ValueError:
        pass
    print(time.process_time() - start, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux counts it")
def test_hostile_pickles_take_little_time_and_memory(tmp_path):
    cases = hostile(600_000)
    for i, content in enumerate(cases.values()):
        (tmp_path / f"{i}.pt").write_bytes(content)
    files = [str(tmp_path / f"{i}.pt") for i in range(len(cases))]
    command = [sys.executable, "-c", MEASURE, *files]
    printed = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True).stdout
    for name, line in zip(cases, printed.splitlines(), strict=True):
        seconds, megabytes = map(float, line.split())
        assert seconds < 5 and megabytes < 1000, f"{name}: {line}"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_those_of_pythons_own_pickle(protocol):
    shared = ["shared"]
    value = {
        "numbers": [0, 1, 255, 256, -1, 70000, 2**31, 2**80, -(2**2100), 0.5, True, False, None],
        "text": ("", "é😀\n\\", "x" * 300),
        "bytes": bytearray(b"ab") if protocol == 5 else "ab",
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        7: {"twice": (shared, shared)},
    }
    loaded, inert = unpickle_bytes(pickle.dumps(value, protocol))
    assert loaded == value and inert == ()
    assert loaded[7]["twice"][0] is loaded[7]["twice"][1]


def test_names_and_objects_stay_text():
    (name, inert_object), inert = unpickle_bytes(pickle.dumps([Trap, Trap()], 2))
    assert name == Name(f"{__name__}.Trap") and inert == (name.path,)
    assert isinstance(inert_object, InertObject) and inert_object.name == name


def test_nesting_without_end_is_an_error_and_not_a_crash(tmp_path):
    deep = 300_000
    for payload in (
        b"}" + b")" + b"\x85" * deep + b"I1\ns.",  # a tuple that deep as a key: hashing it would overflow the stack
        b"ccollections\nOrderedDict\n(((" + b")" + b"\x85" * deep + b"I1\ntttR.",
        b"]q\x00h\x00a.",  # a list that holds itself
        b"]" * 30_000 + b"a" * 29_999 + b".",
    ):
        write_file(tmp_path / "x.pt", "bare", payload)
        with pytest.raises(ValueError):
            read(tmp_path / "x.pt")


def test_a_pickle_that_says_it_is_longer_than_the_file_is_cut_short(tmp_path):
    write_file(tmp_path / "x.pt", "bare", b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.")
    with pytest.raises(ValueError, match="damaged or cut short"):
        read(tmp_path / "x.pt")
