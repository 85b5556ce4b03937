"""How commands end that cannot go on: mistyped words, no memory, faults of the program."""

import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from minidiff.cli.failures import explain
from tests.command import runner

CPU_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 1125899906842624 "
    "bytes. Error code 12 (Cannot allocate memory)"
)
CUDA_MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 7.79 GiB of which 5.12 GiB is free.\nmore"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys, tmp_path_factory):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("temporary")))
    return runner(monkeypatch, tmp_path, capsys)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["genrate", "a cat"], "command 'genrate' unknown; did you mean generate?"),
        (["trian", "lora"], "command 'trian' unknown; did you mean train?"),
        (["train", "lorra"], "command 'train lorra' unknown; did you mean train lora?"),
        (["qwertz"], "command 'qwertz' unknown; minidiff --help lists all"),
        (["generate", "a cat", "--stps", "3"], "--stps is no flag of this command (did you mean --steps?); minidiff generate --help-all"),
        (["generate", "a cat", "--steps"], "--steps needs a value behind it"),
        (["generate", "a cat", "--steps", "many"], "--steps many: expected a whole number"),
        (["generate", "a cat", "--eta", "much"], "--eta much: expected a number"),
        (["generate", "a cat", "--dtype", "fp16"], "--dtype fp16 (did you mean float16?): choose auto, float32, bfloat16, float16"),
        (["generate", "a cat", "--dtype", "bf16"], "--dtype bf16 (did you mean bfloat16?)"),
        (["generate", "a cat", "--prediction", "epsilon"], "--prediction epsilon"),
        (["generate", "a cat", "--zzz"], "--zzz is no flag of this command; minidiff generate --help-all lists all flags"),
        (["generate", "a cat", "--ema", "yes"], "yes: no flag before it takes it"),
        (["train", "lora", "--images", "cat", "--out", "run", "--learningrate", "1"], "(did you mean --learning-rate?)"),
        (["train", "lora", "--images", "cat", "--out", "run", "--precision", "fp16"], "--precision fp16 (did you mean float16?)"),
        (["train", "lora", "--images", "cat"], "--out"),
        (["train", "from-scratch", "run", "--stepps", "1"], "(did you mean --steps?)"),
        (["merge", "lora", "a.safetensors"], "--out is needed: a file name"),
        (["bench", "step", "--rounds", "0"], "--rounds 0: at least 1"),
        (["bench", "attention", "--sizes", "512", "0"], "--sizes 0: at least 1"),
        (["bench", "image", "--steps", "-3"], "--steps -3: at least 1"),
        (["convert", "tiny"], "PATH is needed: a file name ending in .safetensors"),
    ],
)
def test_a_mistyped_word_ends_in_one_line_with_the_nearest_right_one(run, tmp_path, args, said):
    code, out, err = run(*args)
    assert (code, out) == (2, "") and said in err and "Traceback" not in err
    assert len(err.splitlines()) == 1 and err.startswith("minidiff: ") and len(err) < 400
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (RuntimeError(CPU_MEMORY), "1,048,576.0 GiB"),
        (torch.OutOfMemoryError(CUDA_MEMORY), "20.00 GiB"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), ""),
        (RuntimeError("Storage size calculation overflowed with sizes=[1, 4, 9, 9]"), ""),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ""),
        (MemoryError(), ""),
        (np._core._exceptions._ArrayMemoryError((2**50,), np.dtype("uint8")), "1.00 PiB"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
@pytest.mark.parametrize(
    ("command", "helps"), [("generate a cat", "--size"), ("train lora", "--checkpointing"), ("merge lora", "programs")]
)
def test_no_memory_ends_in_one_line_with_what_would_help(error, size, command, helps):
    line, code = explain(error, command)
    assert code == 2 and line.startswith("out of memory") and helps in line and "\n" not in line and size in line


def test_a_picture_that_no_memory_holds(run, monkeypatch):
    from minidiff.pipeline import StableDiffusion

    def full(*_, **__):
        raise RuntimeError(CPU_MEMORY)

    monkeypatch.setattr(StableDiffusion, "denoise", full)
    code, out, err = run("generate", "a cat", "--size", "1000000", "--out", "a.png")
    assert (code, out) == (2, "") and "out of memory (1,048,576.0 GiB at once); what would help: a smaller --size" in err
    assert "Traceback" not in err


def test_another_runtime_error_is_no_lack_of_memory():
    assert "out of memory;" not in explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "generate")[0]


@pytest.mark.parametrize("flag", [[], ["--traceback"]])
def test_a_fault_of_the_program_is_written_to_a_file_that_the_line_names(run, tmp_path, monkeypatch, flag):
    def broken(*_, **__):
        raise KeyError("unexpected\nkey")

    monkeypatch.setattr("weights_loader.inspect", broken)
    code, out, err = run("inspect", "tiny", *flag)
    assert (code, out) == (1, "") and ("Traceback" in err) == bool(flag)
    line = err.splitlines()[-1]
    assert line.startswith("minidiff: a fault of minidiff itself (KeyError: ")
    path = Path(re.search(r"the traceback is in (\S+\.txt)$", line)[1])
    text = path.read_text()
    assert path.parent == Path(tempfile.gettempdir()) and "Traceback (most recent call last)" in text and "in broken" in text
    assert text.startswith("minidiff inspect tiny") and f"PyTorch {torch.__version__}" in text


def test_a_fault_whose_traceback_has_no_place_is_still_one_line(run, tmp_path, monkeypatch):
    monkeypatch.setattr("weights_loader.inspect", lambda *_, **__: {}["key"])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    code, out, err = run("inspect", "tiny")
    assert (code, out) == (1, "") and len(err.splitlines()) == 1
    assert "a fault of minidiff itself (KeyError: 'key'); --traceback shows where" in err and "nowhere" in err


def test_traceback_shows_where_a_users_mistake_was_found(run):
    code, _, err = run("generate", "a cat", "--size", "64x", "--traceback", "--steps", "1")
    assert code == 2 and "Traceback" in err and err.splitlines()[-1].startswith("minidiff: --size 64x")
