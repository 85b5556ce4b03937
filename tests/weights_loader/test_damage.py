"""A thousand damaged files of all kinds: each is read, or ends in one error for the user, in little time and memory."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import weights_loader
from minidiff.adapters.tokens import NewTokens
from minidiff.controlnet import create_controlnet
from tests.checkpoints import family_model, ldm_tensors, part_to_file
from tests.small_files import random_delta, random_lora
from weights_loader.adapters import lora as lora_files
from weights_loader.adapters.custom_diffusion import write_custom_diffusion
from weights_loader.adapters.embedding import write_embedding
from weights_loader.adapters.lora import write_lora
from weights_loader.metadata import config_to_json
from weights_loader.save import save_parts
from weights_loader.write import write_safetensors

COUNT = 1000
SECONDS, MEGABYTES = 5, 1000

# Reads each file as a user would: [how, path] a line. Prints what came of it, the seconds, and the peak of memory above the imports.
READ = """
import json, resource, sys, time, traceback
import torch
import weights_loader
from minidiff.config import ModelConfig
from weights_loader.metadata import config_from_json
config = config_from_json(open(sys.argv[2]).read())
sd = weights_loader.load(sys.argv[3])
WAYS = {
    "model": lambda path: weights_loader.load(path, config=config),
    "stated": weights_loader.load,
    "lora": lambda path: weights_loader.read_lora(path, sd),
    "embedding": lambda path: weights_loader.read_embedding(path, sd),
    "custom": lambda path: weights_loader.read_custom_diffusion(path, sd),
    "vae": lambda path: weights_loader.load(sys.argv[3], vae=path),
    "controlnet": lambda path: weights_loader.read_controlnet(path, sd),
}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
for line in open(sys.argv[1]):
    how, path = json.loads(line)
    for act in (WAYS[how], lambda path: weights_loader.inspect(path, verify=True)):
        start = time.process_time()
        try:
            act(path)
            result = "read"
        except (ValueError, OSError) as error:
            result = "refused" if str(error).strip() and len(str(error)) < 3000 else "mute"
        except BaseException:
            result = traceback.format_exc()
        print(json.dumps([how, path, result, time.process_time() - start, peak() - before]), flush=True)
"""


def originals(folder: Path) -> dict[str, tuple[str, Path]]:
    """Whole files of every kind: {name: (how it is read, its path)}."""
    sd = family_model("SD 1")
    files = {
        "model.safetensors": "stated",
        "model.ckpt": "model",
        "old.ckpt": "model",
        "parts.safetensors.index.json": "stated",
        "diffusers": "stated",
        "alone.safetensors": "vae",
        "lora.safetensors": "lora",
        "lora.pt": "lora",
        "kohya.safetensors": "lora",
        "word.safetensors": "embedding",
        "word.pt": "embedding",
        "word.bin": "embedding",
        "authors.pt": "embedding",
        "delta.bin": "custom",
        "delta": "custom",
        "xl.safetensors": "stated",
        "xl": "stated",
        "control.safetensors": "controlnet",
        "control": "controlnet",
    }
    weights_loader.save(sd, folder / "model.safetensors")
    trained = {"state_dict": ldm_tensors(sd), "epoch": 3, "hyper_parameters": {"path": Path("/data"), "rate": 1e-4}}
    torch.save(trained, folder / "model.ckpt")
    torch.save({"state_dict": ldm_tensors(sd)}, folder / "old.ckpt", _use_new_zipfile_serialization=False)
    save_parts(sd, folder)
    weights_loader.save(sd, folder / "diffusers", layout="diffusers")
    write_safetensors(folder / "alone.safetensors", part_to_file(sd, "vae", "diffusers"))
    lora, words = random_lora(sd, r"attention\.to_[kv]", (2,), (2.0,)), NewTokens({"<cat>": torch.ones(2, 16)})
    write_lora(folder / "lora.safetensors", lora, sd, "diffusers")
    write_lora(folder / "kohya.safetensors", lora, sd, "kohya")
    torch.save(lora_files.pack(lora, sd, "kohya")[0], folder / "lora.pt")
    write_embedding(folder / "word.safetensors", words)
    write_embedding(folder / "word.pt", words, "a1111")
    write_embedding(folder / "word.bin", words)
    torch.save({"string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(1, 16))})}, folder / "authors.pt")
    write_custom_diffusion(folder / "delta.bin", random_delta(sd), sd)
    write_custom_diffusion(folder / "delta", random_delta(sd), sd)
    for name in ("xl.safetensors", "xl"):
        weights_loader.save(family_model("SDXL"), folder / name, layout="diffusers" if name == "xl" else "ldm")
    net = create_controlnet(sd.config, sd.unet, torch.Generator().manual_seed(0))
    weights_loader.write_controlnet(folder / "control.safetensors", net, sd)
    weights_loader.write_controlnet(folder / "control", net, sd, "diffusers")
    (folder / "config.txt").write_text(config_to_json(sd.config))
    return {name: (how, folder / name) for name, how in files.items()}


def damage(content: bytes, chance: random.Random) -> bytes:
    """One of the ways in which files are damaged: mostly at the beginning and the end, where the structure stands."""
    size = len(content)
    place = min(size - 1, int(size * chance.choice((0.0, 1.0, chance.random(), chance.random() ** 8, 1 - chance.random() ** 8))))
    place = max(0, place - chance.randrange(200)) if chance.random() < 0.3 else place
    length = chance.choice((1, 1, 2, 4, 8, 50, 1000))
    match chance.randrange(7):
        case 0:
            return content[:place]  # cut
        case 1:
            return content[:place] + chance.randbytes(length) + content[place + length :]
        case 2:
            return content[:place] + content[place + length :]  # bytes lost
        case 3:
            return content[:place] + chance.randbytes(length) + content[place:]  # bytes too many
        case 4:
            return content[:place] + bytes(length) + content[place + length :]
        case 5:
            changed = bytearray(content)
            for _ in range(chance.choice((1, 3, 20))):
                changed[min(size - 1, int(size * chance.random() ** 6))] ^= 1 << chance.randrange(8)
            return bytes(changed)
        case _:
            other = chance.randrange(size)
            return content[:place] + content[other : other + length] + content[place + length :]  # a part of itself elsewhere


def damage_json(content: bytes, chance: random.Random) -> bytes:
    """Another value, a value of another type, or a key lost."""
    values = json.loads(content)
    key = chance.choice(list(values)) if isinstance(values, dict) and values else None
    if key is None or chance.random() < 0.3:
        return damage(content, chance)
    if chance.random() < 0.2:
        del values[key]
    else:
        values[key] = chance.choice((None, True, 0, -1, 10**9, 2**70, 0.5, "", "4", [], {}, [1] * 50, {"a": [None]}, float("inf")))
    return json.dumps(values).encode()


def damaged(name: str, source: Path, target: Path, chance: random.Random) -> Path:
    """Write a damaged copy of a file, or of a folder with one damaged file in it. Return what a user would give."""
    beside = sorted(source.parent.glob("*.safetensors")) if name.endswith("index.json") else []
    target.mkdir()
    for path in (source, *beside):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, target / path.name)
    inside = [target / source.name] if source.is_file() else sorted(path for path in (target / source.name).rglob("*") if path.is_file())
    victim = chance.choice(inside)
    change = damage_json if victim.suffix == ".json" else damage
    victim.write_bytes(change(victim.read_bytes(), chance))
    return target / source.name


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux counts it")
def test_a_thousand_damaged_files_are_read_or_refused_in_little_time_and_memory(tmp_path):
    (tmp_path / "whole").mkdir()
    whole, chance = originals(tmp_path / "whole"), random.Random(0)
    sample = tmp_path / "whole/model.safetensors"
    for start in range(0, COUNT, 100):
        work = tmp_path / "damaged"
        work.mkdir()
        names = [list(whole)[i % len(whole)] for i in range(start, start + 100)]
        given = [(whole[name][0], damaged(name, whole[name][1], work / str(i), chance)) for i, name in enumerate(names)]
        (tmp_path / "list").write_text("".join(json.dumps([how, str(path)]) + "\n" for how, path in given))
        command = [sys.executable, "-W", "ignore", "-c", READ, tmp_path / "list", tmp_path / "whole/config.txt", sample]
        printed = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        assert printed.returncode == 0, printed.stderr[-3000:]
        results = [json.loads(line) for line in printed.stdout.splitlines()]
        assert len(results) == 200
        assert sum(result == "refused" for _, _, result, _, _ in results) > 50, "the damage stops too few"
        for how, path, result, seconds, megabytes in results:
            assert result in ("read", "refused"), f"{how} {path}: {result}"
            assert seconds < SECONDS and megabytes < MEGABYTES, f"{how} {path}: {seconds} s, {megabytes} MB"
        shutil.rmtree(work)


def test_the_whole_files_that_are_damaged_can_be_read(tmp_path):
    sd = family_model("SD 1")
    ways = {
        "model": lambda path: weights_loader.load(path, config=sd.config),
        "stated": weights_loader.load,
        "lora": lambda path: weights_loader.read_lora(path, sd),
        "embedding": lambda path: weights_loader.read_embedding(path, sd),
        "custom": lambda path: weights_loader.read_custom_diffusion(path, sd),
        "vae": lambda path: weights_loader.load(tmp_path / "model.safetensors", vae=path),
        "controlnet": lambda path: weights_loader.read_controlnet(path, sd),
    }
    for how, path in originals(tmp_path).values():
        ways[how](path)
