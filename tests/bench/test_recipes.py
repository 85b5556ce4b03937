"""The recipes of bench/README.md: each command runs in miniature, its memory is what is computed, and the README says so."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch

import minidiff.bench
import weights_loader
from minidiff.bench.recipes import FILES, RECIPES, USABLE, format_recipes
from minidiff.bundled.edits import renew_tables
from minidiff.cli import model as cli_model
from minidiff.cli import train
from minidiff.config import SD1, SDXL
from minidiff.markdown import format_bytes
from minidiff.offload import Offload
from minidiff.trainers.engine import memory
from tests.checkpoints import family_model
from tests.command import runner
from tests.small_concepts import picture_folder
from weights_loader.empty_parts import empty_parts

README = (Path(minidiff.bench.__file__).parent / "README.md").read_text(encoding="utf-8")
SECTION = README.split("<!-- recipes -->\n")[1].split("<!-- end of recipes -->")[0].rstrip("\n")
RENEW = "renew it: python -m minidiff.bench.recipes minidiff/bench/README.md"
NAMES = [f"{recipe.card} GB, {recipe.title}" for recipe in RECIPES]

# What the miniature has in place of the real thing: a small random model of the same family under the checkpoint's name, ...
MODELS = {FILES["sd1"]: "SD 1", FILES["sdxl"]: "SDXL"}
# ... and fewer steps behind the words of the command, which stay as they are.
FEWER = {
    "generate": ("--steps", "2"),
    "train": ("--steps", "2", "--num-samples", "1", "--sample-every", "0"),
    "from-scratch": ("--steps", "2", "--vae-steps", "2", "--scenes", "8", "--batch", "2", "--vae-batch", "2", "--threads", "1"),
}
# A GPU computes in bfloat16 by itself; the small vocabulary has not the words that new ones start from, but these.
ON_A_CPU = {"train": ("--precision", "bfloat16"), "custom-diffusion": ("--start", "ktn")}
RESULTS = {
    "train lora": "lora.safetensors",
    "train custom-diffusion": "custom-diffusion.safetensors",
    "train fine-tune": "model.safetensors",
    "train from-scratch": "model.safetensors",
}


def figures():
    """The bytes of each recipe, as the README has them."""
    rows = re.findall(r"^\| (\w+, [\w ]+) \| ([\d.]+) (GB|MB) \|", SECTION, flags=re.MULTILINE)
    assert [title for title, *_ in rows] == [recipe.title for recipe in RECIPES], RENEW
    return [round(float(number) * {"GB": 1e9, "MB": 1e6}[unit]) for _, number, unit in rows]


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "SAMPLE_STEPS", 1)
    monkeypatch.setattr(memory, "estimate_memory", lambda *_: memory.Memory(1, 2, 3, 4, 5, 6))  # seconds each time
    picture_folder(tmp_path / "cat-pictures", seed=1)
    picture_folder(tmp_path / "class-pictures", seed=2)
    picture_folder(tmp_path / "pictures", seed=3, captions=("a cat", "a dog", "a house"))
    return runner(monkeypatch, tmp_path, capsys)


def miniature(words):
    """The arguments of a recipe's command with fewer steps."""
    name, kind = words[1], words[2]
    more = FEWER.get(kind) or FEWER[name] + ON_A_CPU.get(name, ()) + ON_A_CPU.get(kind, ())
    return [*words[1:], *more]


def test_the_readme_has_every_recipe_and_nothing_else():
    commands = [shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", SECTION, flags=re.DOTALL) for line in block.splitlines()]
    assert [words for words in commands if words[0] != "#"] == [recipe.words() for recipe in RECIPES], RENEW
    section = format_recipes(figures())
    assert section == SECTION and renew_tables(README, {"recipes": section}) == README, RENEW


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_the_command_runs_in_miniature(recipe, run, tmp_path, monkeypatch):
    words = recipe.words()
    for file, family in MODELS.items():
        if file in words:
            weights_loader.save(family_model(family), tmp_path / file)
            monkeypatch.setattr(train, "family_of", lambda config: recipe.model)  # whose presets it would have in full size
    taking_turns = []
    if "--offload" in words:  # to a GPU, in whose place the CPU stands; see test_offload.py for the GPU
        monkeypatch.setattr(cli_model, "choose_device", lambda name: torch.device("cuda"))
        monkeypatch.setattr("minidiff.offload.Offload", lambda sd, device: taking_turns.append(Offload(sd, torch.device("cpu"))))
    code, out, err = run(*miniature(words))
    assert code == 0, err
    written = tmp_path / recipe.out / RESULTS.get(recipe.command, "")
    assert written.is_file() and written.stat().st_size > 0
    assert len(taking_turns) == ("--offload" in words)
    if recipe.aim != "draw":
        use = re.findall("minidiff (generate .*)", err + out)[-1]  # what is printed to be done next
        code, _, err = run(*shlex.split(use), "--steps", "1", "--out", "drawn.png")
        assert code == 0 and (tmp_path / "drawn.png").is_file(), err


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_the_memory_is_the_computed_one(recipe):
    """The README rounds to a decimal; versions of PyTorch differ a little in what an operation keeps for the backward pass."""
    assert figures()[RECIPES.index(recipe)] == pytest.approx(recipe.memory(), rel=0.02, abs=5e7), RENEW


def test_every_recipe_fits_its_card_with_room_to_spare():
    assert [recipe.title for recipe, count in zip(RECIPES, figures()) if count > USABLE * recipe.card * 2**30] == []
    assert f"at most {USABLE:.0%}".replace("%", " %") in README


@pytest.mark.parametrize("recipe", RECIPES, ids=NAMES)
def test_what_to_expect_has_the_steps_of_the_preset(recipe):
    if recipe.aim != "draw" and recipe.model in FILES:
        settings = recipe.options().settings
        (steps, samples), *_ = re.findall(r"([\d,]+) steps of (\d+) sample", recipe.expect)
        assert (int(steps.replace(",", "")), int(samples)) == (settings.steps, settings.batch * settings.gradient_accumulation)


def test_each_card_draws_teaches_and_trains_with_both_models_somewhere():
    assert {(recipe.card, recipe.aim) for recipe in RECIPES} == {(card, aim) for card in (8, 12, 24) for aim in ("draw", "teach", "train")}
    assert {(recipe.aim, recipe.model) for recipe in RECIPES} >= {(aim, model) for aim in ("draw", "teach", "train") for model in FILES}


@cache
def numbers(config):
    """How many numbers each part of a model has."""
    return {name: sum(p.numel() for p in part.parameters()) for name, part in empty_parts(config).named().items()}


def test_what_does_not_fit_is_counted():
    (said,) = re.findall(r"What does not fit: (.*?)\n\n", README, flags=re.DOTALL)
    weights, sd1, sdxl = 2 * sum(numbers(SDXL).values()), 16 * numbers(SD1)["unet"], 16 * numbers(SDXL)["unet"]
    assert re.findall(r"[\d.]+ GB", said) == ["8 GB", format_bytes(weights), format_bytes(sd1), "12 GB", format_bytes(sdxl)]
    assert weights > 0.8 * 8 * 2**30 and sd1 > 12 * 2**30 and sdxl > 24 * 2**30


def test_four_rows_say_what_is_measured_and_no_file_has_a_gpu():
    """Once there is one, the rows have to say so."""
    table = README.split("| | measured | not measured |\n| --- | --- | --- |\n")[1].split("\n\n")[0].splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in table] == ["CPUs", "GPUs, speed", "GPUs, correctness", "memory"]
    assert "| GPUs, speed | nothing |" in table[1]
    for path in (Path(__file__).parents[1] / "benchmarks").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert re.search(r'"processor": "\S', text) and not re.search(r'"gpu": "', text), f"{path.name} was measured on a GPU"
