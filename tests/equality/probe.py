"""Do the work of one part in the tree that comes first on sys.path, and write every tensor: `python -P probe.py PART FILE`.

A part yields items, (name, function that returns {name: tensor}). Each starts from a freshly loaded model and fixed seeds, so that it does not
matter which others ran before it, and one that fails is recorded without ending the rest. What depends on names is in api.py.
"""

import json
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

Items = Iterator[tuple[str, Callable[[], dict[str, Tensor]]]]
SAMPLERS = ("ddpm", "ddim", "plms", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_karras")
METHODS = ("lora", "dreambooth", "dreambooth-lora", "textual-inversion", "pivotal-tuning", "custom-diffusion", "fine-tune")
FAMILY = ("adapter", "parallel", "scaled_parallel", "multi_head_parallel", "prefix")
PROMPT = "a red apple on a blue background"
PROMPTS = [PROMPT, "a cat to the left of a tree, pixel art", "a yellow car"]
WORDS = {"<cat>": 2, "<dog>": 1}


def randn(*shape: int, name: str = "") -> Tensor:
    """Return unit normals that depend on the name only."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def randomised(api, adapter, scale: float = 0.03):
    """Return the adapter with noise on each parameter, so that it has an effect; the noise depends on the parameter's name."""
    for name, p in api.parameters(adapter).items():
        p.data += scale * randn(*p.shape, name=name)
    return adapter


def draw(api) -> Items:
    """What the model draws."""

    def drawing(prompts=PROMPT, model="tiny", dtype=None, **settings) -> dict[str, Tensor]:
        return api.draw(api.load(model, dtype=dtype), prompts, **{"steps": 6, **settings})

    for sampler in SAMPLERS:
        yield sampler, partial(drawing, sampler=sampler, steps=9)
        yield f"{sampler} without guidance", partial(drawing, sampler=sampler, guidance_scale=1)
        yield f"{sampler} bfloat16", partial(drawing, sampler=sampler, dtype=torch.bfloat16, steps=4)
        for spacing in ("leading", "linspace", "trailing"):
            yield f"{sampler} {spacing}", partial(drawing, sampler=sampler, spacing=spacing, seeds=[5], steps=5)
    yield "default savings", partial(drawing, default_savings=True)
    yield "the other bundled model", partial(drawing, model="half")
    yield "several prompts", partial(drawing, PROMPTS, seeds=[3, 1, 2**63])
    yield "several seeds", partial(drawing, seeds=range(5), sampler="ddpm")
    yield "eta", partial(drawing, eta=0.6, seeds=[1, 2])
    yield "negative prompt", partial(drawing, PROMPTS, negative_prompt="blue, pixel art", guidance_scale=7.5)
    yield "attention maps", partial(drawing, PROMPTS[:2], seeds=[0, 1], attention_maps=True)
    yield "attention maps without guidance", partial(drawing, guidance_scale=1, attention_maps=True, sampler="heun", steps=3)
    yield "bfloat16 batch", partial(drawing, PROMPTS, dtype=torch.bfloat16)
    for size in (32, 96, (96, 64), (44, 76)):
        yield f"size {size}", partial(drawing, PROMPTS[:2], size=size, steps=4)

    def naive() -> dict[str, Tensor]:
        with api.attention_backend("naive"):
            return drawing(PROMPTS, steps=4)

    def pictures() -> dict[str, Tensor]:
        images = api.generate(api.load(), PROMPTS, seed=4, batch=2, steps=4)
        return {str(i): torch.from_numpy(np.array(image)) for i, image in enumerate(images)}

    @torch.no_grad()
    def text() -> dict[str, Tensor]:
        sd = api.load()
        prompts = ["", *PROMPTS, "Ünïcode  wörds, CAPITALS; 12345 don't", "a very long prompt " * 10]
        return {"tokens": sd.tokenizer(prompts), "context": sd.encode_prompts(prompts)}

    @torch.no_grad()
    def vae(dtype: torch.dtype) -> dict[str, Tensor]:
        sd = api.load(dtype=dtype)
        pixels = torch.tanh(randn(2, 3, 64, 96, name="pixels")).to(dtype)
        posterior, z = sd.vae.encode(pixels), randn(2, 4, 16, 24, name="z")
        result = {"mean": posterior.mean, "logvar": posterior.logvar, "kl": posterior.kl(), "decoded": sd.vae.decode(z.to(dtype))}
        tiled = {f"{rows} rows": api.decode_tiled(sd, z.to(dtype), rows) for rows in (1, 7, 16, None)}
        return result | tiled | {"decode": sd.decode(z), "decode whole": api.decode_whole(sd, z)}

    yield "pictures", pictures
    yield "naive attention", naive
    yield "text", text
    yield "vae", partial(vae, torch.float32)
    yield "vae bfloat16", partial(vae, torch.bfloat16)
    yield "vae, big latent", lambda: {"pixels": api.load().decode(randn(1, 4, 210, 210, name="big"))}  # 2^25 values: tiled by itself


def lora(api, sd, *sets: str, **settings):
    """Return a LoRA with an effect."""
    return randomised(api, api.lora(sd, sets or ("attention", "text_encoder"), **settings))


def words(api, sd, *names: str):
    """Return new words with an effect; all of WORDS by default."""
    vectors = {name: WORDS[name] for name in names or WORDS}
    return randomised(api, api.tokens(sd, vectors, {"<cat>": "cat"} if "<cat>" in vectors else {}), 0.1)


def concept(api, sd, word="<new1>", layers="keys and values"):
    """Return a Custom Diffusion with an effect, and a word."""
    delta = randomised(api, api.custom_diffusion(sd, layers, api.tokens(sd, {word: 1}, {word: "cat"})))
    delta.requires_grad_(False)
    return delta


def captions() -> list[str]:
    """Return captions for the merge of concepts, enough to fix a map of the bundled model's text."""
    things, colours = (
        ("cat", "dog", "car", "tree", "apple", "house", "ship", "cup", "bird"),
        ("red", "blue", "green", "yellow", "white", "black"),
    )
    return [f"a {colour} {thing} on a {other} background" for thing in things for colour in colours for other in colours[:4]]


def adapters(api) -> Items:
    """What the model draws with each kind of adapter; also the adapters themselves as they are created."""

    def attached(make: Callable, prompt: str = PROMPT, dtype=None) -> dict[str, Tensor]:
        sd = api.load(dtype=dtype)
        before = api.draw(sd, prompt, steps=4)["x_t"]
        parts = make(sd)
        tensors = {f"{i} {name}": p.detach().clone() for i, part in enumerate(parts) for name, p in api.parameters(part).items()}
        for part in parts:
            part.attach(sd)
        drawn = api.draw(sd, [prompt, PROMPTS[1]], seeds=[0, 1], steps=4)
        assert drawn["pixels"].isfinite().all() and not torch.equal(drawn["x_t"][:, 0], before[:, 0]), "the adapter has no effect"
        for part in reversed(parts):
            part.detach()
        assert torch.equal(api.draw(sd, prompt, steps=4)["x_t"], before), "detach leaves a trace"
        return tensors | drawn

    def merged_lora() -> dict[str, Tensor]:
        sd, base = api.load(), api.load()
        undo = api.merge_lora(sd, lora(api, sd, "conv", "text_encoder"))
        result = api.draw(sd, PROMPT, steps=4) | api.weights(sd)
        extracted = api.parameters(api.extract_lora(base, sd, ("conv",), 3, 0.9))
        undo()
        return (
            result
            | {f"extracted {name}": p for name, p in extracted.items()}
            | {f"undone {name}": p for name, p in api.weights(sd).items()}
        )

    def merged_concepts() -> dict[str, Tensor]:
        sd = api.load()
        names = ("<new1>", "<new2>")
        targets = [[f"a photo of a {name}", f"a {name} cat on a red background"] for name in names]
        merged, report = api.merge_concepts(sd, [concept(api, sd, name) for name in names], targets, captions())
        figures = {"report": torch.tensor(report, dtype=torch.float64)}
        return figures | attached(lambda sd: [merged], "a photo of a <new1> and a <new2>" if merged.tokens else PROMPT)

    def compressed() -> dict[str, Tensor]:
        parts, made = api.compress(sd := api.load(), concept(api, sd), 0.6)
        factors = {f"{name} {half}": p for name, pair in parts.layers.items() for half, p in zip("uv", pair)}
        return {api.name(name): p for name, p in factors.items()} | attached(lambda sd: [made], "a <new1> cat")

    def from_files(with_concept: bool) -> dict[str, Tensor]:
        sd = api.load()
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, f"{i}.safetensors") for i in range(4)]
            api.loader.write_lora(paths[0], lora(api, sd, "transformer", alpha=4.0), sd, "diffusers")
            api.loader.write_lora(paths[1], lora(api, sd, seed=1, rank=2), sd, "kohya")
            api.loader.write_embedding(paths[2], words(api, sd, "<dog>"), "diffusers")
            api.loader.write_custom_diffusion(paths[3], concept(api, sd), sd)
            more = {"custom_diffusion": paths[3], "embeddings": paths[2]} if with_concept else {}
            sd = api.load(lora=((paths[0], 0.7), (paths[1], -0.4)), **more)
        return api.draw(sd, "a <new1> cat and a <dog>" if with_concept else PROMPT, steps=4)

    for name in ("attention", "transformer", "conv", "text_encoder"):
        yield f"lora {name}", partial(attached, lambda sd, name=name: [lora(api, sd, name)])
    yield "lora kaiming", partial(attached, lambda sd: [lora(api, sd, init="kaiming", alpha=1.0, rank=40)])
    yield "lora bfloat16", partial(attached, lambda sd: [lora(api, sd, "conv")], dtype=torch.bfloat16)
    for method in FAMILY:
        sets = ("attention",) if method in ("multi_head_parallel", "prefix") else ("attention", "feed_forward")
        yield method, partial(attached, lambda sd, method=method, sets=sets: [randomised(api, api.parallel(sd, method, sets), 0.1)])
    yield "new tokens", partial(attached, lambda sd: [words(api, sd)], "a <cat> and a <dog>")
    yield "custom diffusion", partial(attached, lambda sd: [concept(api, sd)], "a <new1> cat")
    yield (
        "custom diffusion, all of cross-attention",
        partial(attached, lambda sd: [concept(api, sd, layers="cross_attention")], "a <new1> cat"),
    )
    yield "lora and custom diffusion", partial(attached, lambda sd: [lora(api, sd), concept(api, sd)], "a <new1> cat")
    yield (
        "lora, words and prefix",
        partial(
            attached, lambda sd: [words(api, sd), lora(api, sd), randomised(api, api.parallel(sd, "prefix", ("attention",)))], "a <cat>"
        ),
    )
    yield "merged lora", merged_lora
    yield "merged concepts", merged_concepts
    yield "compressed custom diffusion", compressed
    yield "two loras of files", partial(from_files, False)
    yield "two loras, words and custom diffusion of files", partial(from_files, True)


def train(api) -> Items:
    """Ten steps of each method and of training from scratch: losses, and what was trained."""

    def concept_in(folder: str, token: str):
        images, class_images = Path(folder, "tiger"), Path(folder, "class")
        for path, scenes in ((images, api.scenes("tiger", 5, 0)), (class_images, api.scenes("lion", 3, 1) + api.scenes("tiger", 3, 2))):
            path.mkdir()
            for i, (image, caption) in enumerate(scenes):
                Image.fromarray(image).save(path / f"{i}.png")
                (path / f"{i}.txt").write_text(caption, encoding="utf-8")
        return api.concept(images, token, class_images)

    def method(name: str) -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            token = "<tiger>" if name in ("textual-inversion", "pivotal-tuning", "custom-diffusion") else "ktn"
            losses, trained = api.train(api.load(), name, concept_in(folder, token))
        return {"losses": torch.stack(losses)} | trained

    def class_images(kind: str) -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder, "made")
            api.fill_class_images(api.load(), api.concept(Path(folder), "ktn", made), kind, 6)
            return {path.name: torch.from_numpy(np.array(Image.open(path))) for path in sorted(made.glob("*.png"))}

    def from_scratch() -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            progress, models = api.from_scratch(Path(folder))
            losses: dict[str, list[Tensor]] = {}
            for stage, loss in progress:
                losses.setdefault(f"losses {stage}", []).append(loss.clone())
        return {name: torch.stack(values) for name, values in losses.items()} | api.weights(models[0])

    def judge() -> dict[str, Tensor]:
        losses, weights = api.judge()
        return {"losses": torch.stack(losses)} | weights

    for name in METHODS:
        yield name, partial(method, name)
    yield "class images, generated", partial(class_images, "generated")
    yield "class images, scenes", partial(class_images, "scenes")
    yield "from scratch", from_scratch
    yield "judge", judge


def tensors_of(tree, name: str = "") -> dict[str, Tensor]:
    """Return the tensors of a tree of dicts by their paths."""
    if isinstance(tree, Tensor):
        return {name: tree}
    parts = tree.items() if isinstance(tree, dict) else ()
    return {key: tensor for part, inner in parts for key, tensor in tensors_of(inner, f"{name}/{part}").items()}


def in_file(path: Path) -> dict[str, Tensor]:
    """Return what a file or a folder holds, read without the project: tensors, and other files as bytes."""
    if path.is_dir():
        parts = {str(one.relative_to(path)): in_file(one) for one in sorted(path.rglob("*")) if one.is_file()}
        return {f"{file} {name}": tensor for file, tensors in parts.items() for name, tensor in tensors.items()}
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".bin", ".pt", ".ckpt"):
        return tensors_of(torch.load(path, weights_only=True))
    return {"bytes": torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)}


def files(api) -> Items:
    """What is written, and what is read back."""

    def written(name: str, write: Callable, read: Callable) -> dict[str, Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            path, sd = Path(folder, name), api.load(dtype="file" if "model" in name else None)
            write(path, sd)
            raw = {f"file {key}": tensor.clone() for key, tensor in in_file(path).items()}
            return raw | {f"read {key}": tensor.clone() for key, tensor in read(path, sd).items()}

    def read_lora(path: Path, sd) -> dict[str, Tensor]:
        back = api.loader.read_lora(path, sd)
        back.attach(sd)
        return {**api.parameters(back), "x_t": api.draw(sd, PROMPT, steps=1)["x_t"]}  # which alpha has a part in

    def write_compressed(path: Path, sd):
        delta = concept(api, sd)
        api.loader.write_custom_diffusion(path, delta, sd, None, api.compress(sd, delta, 0.5)[0])

    def read_delta(path: Path, sd) -> dict[str, Tensor]:
        return api.parameters(api.loader.read_custom_diffusion(path, sd))

    for naming in ("diffusers", "kohya"):
        for sets in (("attention",), ("conv", "text_encoder")):
            write = partial(
                lambda path, sd, naming, sets: api.loader.write_lora(path, lora(api, sd, *sets, alpha=4.0), sd, naming),
                naming=naming,
                sets=sets,
            )
            yield f"lora {naming} {'+'.join(sets)}", partial(written, "a.safetensors", write, read_lora)
    for form, suffix in (("diffusers", "safetensors"), ("diffusers", "bin"), ("a1111", "safetensors"), ("a1111", "pt")):
        names = tuple(WORDS) if form == "diffusers" else ("<cat>",)
        write = partial(
            lambda path, sd, names, form: api.loader.write_embedding(path, words(api, sd, *names), form), names=names, form=form
        )
        yield (
            f"embedding {form} {suffix}",
            partial(written, f"a.{suffix}", write, lambda path, sd: api.parameters(api.loader.read_embedding(path, sd))),
        )
    for layers in ("keys and values", "cross_attention"):
        for name in ("a.safetensors", "a.bin", "a.ckpt", "folder"):
            write = partial(
                lambda path, sd, layers: api.loader.write_custom_diffusion(path, concept(api, sd, layers=layers), sd), layers=layers
            )
            yield f"custom diffusion {layers} {name}", partial(written, name, write, read_delta)
    for name in ("a.safetensors", "a.bin", "a.ckpt"):
        yield f"custom diffusion compressed {name}", partial(written, name, write_compressed, read_delta)
    for layout, name in (("ldm", "model.safetensors"), ("diffusers", "model")):
        write = partial(lambda path, sd, layout: api.loader.save(sd, path, layout), layout=layout)
        yield f"model {layout}", partial(written, name, write, lambda path, sd: api.weights(api.load(path)))


class ParityRows:
    """A plugin of pytest that keeps the largest error of each row of the parity table, and the tests that failed."""

    def __init__(self):
        self.rows: dict[str, Tensor] = {}
        self.errors: dict[str, str] = {}

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.errors[f"parity/{report.nodeid}"] = report.longreprtext.splitlines()[-1]
        for kind, value in report.user_properties if report.when == "call" and report.passed else ():
            if kind == "parity":
                part, reference, dtype, error = value
                name, error = f"parity/{part}, {reference}, {dtype}".replace(":", ""), torch.tensor(error, dtype=torch.float64)
                self.rows[name] = torch.maximum(error, self.rows.get(name, error))


def parity() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Run the parity tests of the tree; return the exact numbers behind the table."""
    import pytest

    plugin = ParityRows()
    pytest.main(["-q", "--parity-table", "-p", "no:cacheprovider", "tests/parity"], plugins=[plugin])
    return {f"{name}:error": error for name, error in plugin.rows.items()}, plugin.errors


PARTS = {"draw": draw, "adapters": adapters, "train": train, "files": files, "parity": parity}


def run_items(part: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a part, named ITEM:TENSOR, and the errors of the items that failed."""
    import api

    torch.set_num_threads(1)
    tensors, errors = {}, {}
    for name, function in PARTS[part](api.side()):
        torch.manual_seed(0)
        item = f"{part}/{name}"
        try:
            tensors |= {f"{item}:{key}": value.detach().contiguous().clone() for key, value in function().items()}
        except Exception as error:
            traceback.print_exc(limit=-3)
            errors[item] = f"{type(error).__name__}: {error}".splitlines()[0]
    return tensors, errors


if __name__ == "__main__":
    part, path = sys.argv[1], Path(sys.argv[2])
    tensors, errors = parity() if part == "parity" else run_items(part)
    imported = Path(sys.modules["minidiff"].__file__)
    assert imported.is_relative_to(Path.cwd()), f"minidiff was imported from {imported}, not from {Path.cwd()}"
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, {"errors": json.dumps(errors)})
    temporary.replace(path)
