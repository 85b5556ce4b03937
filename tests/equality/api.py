"""What the probe asks of a tree, in the words of each side: all that depends on names and places.

`Old` speaks to a861b28. `New` is what its successor is called by: where a name or a place changes, override the method here. Names of layers
and parameters in results are Old's, or those of files, whatever a tree calls them itself: see `New.name`.
"""

from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

CPU = torch.device("cpu")


class Old:
    """The names of commit a861b28."""

    # --- the model ----------------------------------------------------------------------------------------------------

    @property
    def loader(self):
        """Return the module with load, save, and the write_ and read_ functions of lora, embedding and custom_diffusion."""
        import weights_loader

        return weights_loader

    def load(self, name="tiny", **settings):
        """Return a StableDiffusion. settings: dtype, lora, embeddings, custom_diffusion."""
        return self.loader.load(name, **settings)

    def savings(self, default: bool):
        """Return what is kept of the savings: the two that remember the text's keys and the table of times are off unless default."""
        from minidiff.savings import Savings

        return Savings(keys_values=default, time_table=default)

    def draw(self, sd, prompts, default_savings=False, **settings) -> dict[str, Tensor]:
        """Return x_t and x0_hat of all steps, the pixels, and the attention maps where asked for; settings are those of sd.denoise."""
        steps = list(sd.denoise(prompts, savings=self.savings(default_savings), **settings))
        maps = {f"maps {self.name(layer)}": [step.attention_maps[layer] for step in steps] for layer in steps[0].attention_maps or ()}
        stacked = {"x_t": [step.x_t for step in steps], "x0_hat": [step.x0_hat for step in steps]} | maps
        times = torch.tensor([float(step.t) for step in steps])
        return {"t": times, "pixels": sd.decode(steps[-1].x_t)} | {name: torch.stack(parts) for name, parts in stacked.items()}

    def generate(self, sd, prompts, *, seed: int, batch: int, steps: int) -> list:
        """Return `batch` pictures per prompt as 8-bit images, by sd.generate with its defaults otherwise."""
        return sd.generate(prompts, seed=seed, batch=batch, steps=steps, savings=self.savings(False))

    def decode_tiled(self, sd, z: Tensor, rows: int | None) -> Tensor:
        """Decode an unscaled latent some rows at a time."""
        from minidiff.strips import decode_in_strips

        return decode_in_strips(sd.vae, z, rows)

    def decode_whole(self, sd, latents: Tensor) -> Tensor:
        """Decode scaled latents at once."""
        return sd.decode(latents, strips=False)

    def attention_backend(self, name: str):
        """Choose, within a block, "naive" for the written-out attention or "pytorch"."""
        from minidiff.attention import attention_backend

        return attention_backend({"naive": "by_hand"}.get(name, name))

    def weights(self, sd) -> dict[str, Tensor]:
        """Return all weights by their names in an LDM checkpoint."""
        from weights_loader.dialects import to_file

        return to_file(sd.text_encoder, "ldm") | to_file(sd.unet, "ldm") | to_file(sd.vae, "ldm")

    def name(self, name: str) -> str:
        """Return Old's name of a layer or of a part of an adapter."""
        return name

    # --- adapters -----------------------------------------------------------------------------------------------------

    def lora(self, sd, sets: tuple[str, ...], seed=0, **settings):
        """Create a LoRA on sets of layers (attention, transformer, conv, text_encoder). settings: rank, alpha, init."""
        from minidiff.adapters.lora import PATTERNS, create_lora

        generator = torch.Generator().manual_seed(seed)
        return create_lora(sd, sum((PATTERNS[name] for name in sets), ()), generator=generator, **{"rank": 4, "alpha": 3.0} | settings)

    def parallel(self, sd, method: str, sets: tuple[str, ...], seed=0):
        """Create adapters of the parallel family on attention or feed_forward."""
        from minidiff.adapters.family import PATTERNS, create_adapters

        generator = torch.Generator().manual_seed(seed)
        return create_adapters(sd, sum((PATTERNS[name] for name in sets), ()), method=method, rank=4, generator=generator)

    def tokens(self, sd, vectors: dict[str, int], start: dict, seed=0):
        """Create new words."""
        from minidiff.adapters.tokens import create_tokens

        return create_tokens(sd, vectors, start, torch.Generator().manual_seed(seed))

    def custom_diffusion(self, sd, layers="keys and values", tokens=None):
        """Create a Custom Diffusion."""
        from minidiff.adapters.custom_diffusion import create_custom_diffusion

        return create_custom_diffusion(sd, layers, tokens)

    def parameters(self, adapter) -> dict[str, nn.Parameter]:
        """Return an adapter's parameters by names that both sides share."""
        if hasattr(adapter, "rows"):
            return dict(adapter.rows)
        if hasattr(adapter, "biases"):
            named = {f"{layer}.weight": p for layer, p in adapter.layers.items()} | {
                f"{layer}.bias": p for layer, p in adapter.biases.items()
            }
            return {self.name(name): p for name, p in named.items()} | (self.parameters(adapter.tokens) if adapter.tokens else {})
        return {self.name(f"{layer}.{name}"): p for layer, part in adapter.layers.items() for name, p in part.named_parameters()}

    def merge_concepts(self, sd, concepts, targets, regularisation):
        """Merge several Custom Diffusions into one, and return it with the figures of the report."""
        from minidiff.adapters.custom_diffusion import merge_concepts

        merged, report = merge_concepts(sd, concepts, targets, regularisation, ridge=1e-3)
        return merged, [
            report.rows,
            report.regularisation_rows,
            report.residual,
            report.drift,
            report.condition,
            report.regularisation_condition,
        ]

    def compress(self, sd, delta, energy: float):
        """Compress the changes of a Custom Diffusion by their singular values; return them, and a Custom Diffusion made of them."""
        from minidiff.adapters.custom_diffusion import compress, from_deltas

        compressed = compress(delta.deltas(sd), share=energy)
        return compressed, from_deltas(sd, compressed.deltas(), delta.tokens, delta.biases)

    def merge_lora(self, sd, lora):
        """Put a LoRA into the model's weights; return what undoes it."""
        from minidiff.adapters.lora import merge_lora

        return merge_lora(sd, lora)

    def extract_lora(self, base, tuned, sets: tuple[str, ...], rank: int, energy: float):
        """Return the LoRA that turns one model into the other."""
        from minidiff.adapters.lora import PATTERNS, extract_lora

        return extract_lora(base, tuned, sum((PATTERNS[name] for name in sets), ()), rank=rank, share=energy, of="frobenius")

    # --- training -----------------------------------------------------------------------------------------------------

    def scenes(self, subject: str, count: int, seed: int) -> list[tuple[np.ndarray, str]]:
        """Return bundled pictures of a subject, each with its caption."""
        from minidiff.scenes.pictures import subject_scenes

        return [(scene.image, scene.caption) for scene in subject_scenes(subject, "fluent", count, np.random.default_rng(seed))]

    def concept(self, images: Path, token: str, class_images: Path):
        """Return a concept of class "tiger"."""
        from minidiff.trainers.presets import Concept

        return Concept(images=images, token=token, class_word="tiger", class_images=class_images)

    def options(self, method: str):
        """Return the bundled model's preset with ten steps, and in each method something else beside it."""
        from minidiff.trainers.presets import LowRankOptions, Prior, preset

        options, folder = preset(method, "bundled"), Prior(kind="folder", weight=0.7)

        def short(options, samples=None, **changes):
            settings = replace(options.settings, **{"steps": 10, "batch": 2, **changes})
            return replace(options, settings=settings, samples=replace(options.samples, **samples or {}))

        match method:
            case "lora":
                options = short(options, {"flip": 0.5, "caption_dropout": 0.3, "min_snr": 5.0}, warm_up=3, schedule="cosine", average=0.9)
                return replace(options, low_rank=LowRankOptions(rank=4, init="kaiming", text_encoder=True, text_scale=0.5))
            case "dreambooth":
                return replace(short(options, accumulate=2), prior=folder, text_encoder=True, text_scale=0.1)
            case "dreambooth-lora":
                return replace(short(options, {"crop": "random"}, precision="bfloat16"), prior=folder)
            case "textual-inversion":
                return short(options, {"offset_noise": 0.1}, schedule="linear")
            case "pivotal-tuning":
                return replace(options, tokens=short(options.tokens), lora=short(options.lora))
            case "custom-diffusion":
                return replace(short(options, average=0.9), prior=Prior(kind="near", count=4), sizes="paper", all_of_attention=True)
            case "fine-tune":
                return short(options, checkpointing=True, schedule="flat_then_linear", clip=None)

    def train(self, sd, method: str, concept) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Train with a method; return the losses, and what was trained."""
        from minidiff.trainers import methods

        function = {"dreambooth-lora": "dreambooth", "pivotal-tuning": "pivotal"}.get(method, method.replace("-", "_"))
        run = getattr(methods, function)(sd, [concept], self.options(method))
        losses = [step.loss for _, step in run.run(CPU)]
        adapters = [adapter for adapter in (run.lora, run.tokens, run.custom_diffusion) if adapter is not None]
        return losses, {name: p for adapter in adapters for name, p in self.parameters(adapter).items()} or self.weights(sd)

    def fill_class_images(self, sd, concept, kind: str, count: int) -> None:
        """Fill a concept's folder of class pictures: "generated" by the model, or the nearest "scenes"."""
        from minidiff.trainers.presets import Prior, Samples

        from minidiff.trainers.methods import fill_class_images

        for _ in fill_class_images(sd, concept, Prior(kind=kind, count=count, steps=4), "a photo of a {}", Samples()):
            pass

    def from_scratch(self, folder: Path) -> tuple[Iterable[tuple[str, Tensor]], list]:
        """Return the (stage, loss) of ten steps of the VAE and of the U-Net, to be iterated, and the list that then holds the model."""
        from minidiff.trainers.from_scratch import bundled_config
        from minidiff.trainers.recipe import Recipe
        from minidiff.trainers.run import run_from_scratch

        recipe, models = Recipe(scenes=100, vae_steps=10, vae_batch=8, steps=10, batch=8), []
        run = run_from_scratch(bundled_config(), recipe, folder, CPU, models.append)
        return ((progress.stage, progress.loss) for progress in run if progress.loss is not None), models

    def judge(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Train the judge for ten steps; return the losses and its weights."""
        from minidiff.trainers.judge import JUDGE_SETTINGS, JudgeTask, judge_config
        from minidiff.trainers.loop import train

        task = JudgeTask(judge_config(), 0, CPU)
        losses = [step.loss for step in train(task, replace(JUDGE_SETTINGS, steps=10, batch=8), CPU)]
        return losses, {self.name(name): tensor for name, tensor in task.judge.state_dict().items()}


class New(Old):
    """The names of the tree that comes after: override here what is called otherwise, or is somewhere else."""

    def name(self, name: str) -> str:
        """Return Old's name of a layer of this side."""
        return name.replace(".blocks.0.", ".block.") if ".transformer" in name else name

    # --- the model ----------------------------------------------------------------------------------------------------

    def draw(self, sd, prompts, default_savings=False, attention_maps=False, **settings) -> dict[str, Tensor]:
        from minidiff.attention_maps import with_attention_maps

        steps = sd.denoise(prompts, **settings)
        steps = list(with_attention_maps(steps, sd.unet) if attention_maps else steps)
        maps = {f"maps {self.name(layer)}": [step.attention_maps[layer] for step in steps] for layer in steps[0].attention_maps or ()}
        stacked = {"x_t": [step.x_t for step in steps], "x0_hat": [step.x0_hat for step in steps]} | maps
        times = torch.tensor([float(step.t) for step in steps])
        return {"t": times, "pixels": sd.decode(steps[-1].x_t)} | {name: torch.stack(parts) for name, parts in stacked.items()}

    def generate(self, sd, prompts, *, seed: int, batch: int, steps: int) -> list:
        return sd.generate(prompts, seed=seed, batch=batch, steps=steps)

    def decode_tiled(self, sd, z: Tensor, rows: int | None) -> Tensor:
        from minidiff.tiled_decode import decode_tiled

        return decode_tiled(sd.vae, z, rows)

    def decode_whole(self, sd, latents: Tensor) -> Tensor:
        return sd.decode(latents, tiled=False)

    def attention_backend(self, name: str):
        from minidiff.kernels.dispatch import attention_backend

        return attention_backend(name)

    def weights(self, sd) -> dict[str, Tensor]:
        from weights_loader.save import tensors_of

        return tensors_of(sd, "ldm")

    # --- adapters -----------------------------------------------------------------------------------------------------

    def parallel(self, sd, method: str, sets: tuple[str, ...], seed=0):
        from minidiff.adapters.parallel import LAYER_PATTERNS, create_adapters

        generator = torch.Generator().manual_seed(seed)
        return create_adapters(sd, sum((LAYER_PATTERNS[name] for name in sets), ()), method=method, rank=4, generator=generator)

    def merge_concepts(self, sd, concepts, targets, regularisation):
        from minidiff.adapters.merge_concepts import merge_concepts

        merged, report = merge_concepts(sd, concepts, targets, regularisation, ridge=1e-3)
        figures = [
            report.rows,
            report.regularisation_rows,
            report.residual,
            report.drift,
            report.condition,
            report.regularisation_condition,
        ]
        return merged, figures

    def extract_lora(self, base, tuned, sets: tuple[str, ...], rank: int, energy: float):
        from minidiff.adapters.extraction import extract_lora
        from minidiff.adapters.lora import PATTERNS

        return extract_lora(base, tuned, sum((PATTERNS[name] for name in sets), ()), rank=rank, energy=energy, criterion="frobenius")

    # --- training -----------------------------------------------------------------------------------------------------

    def concept(self, images: Path, token: str, class_images: Path):
        """Return a concept of class "tiger"."""
        from minidiff.trainers.methods.options import Concept

        return Concept(images=images, token=token, class_word="tiger", class_images=class_images)

    def options(self, method: str):
        """Return the bundled model's preset with ten steps, and in each method something else beside it.

        No dropout, which a861b28 drew for a whole batch: it is drawn for each sample now, so that a batch in parts gives the same.
        """
        from minidiff.trainers.methods.options import LowRankOptions, Prior
        from minidiff.trainers.methods.table import preset

        options, folder = preset(method, "bundled"), Prior(kind="folder", weight=0.7)

        def short(options, data=None, **changes):
            settings = replace(options.settings, **{"steps": 10, "batch": 2, **changes})
            return replace(options, settings=settings, data=replace(options.data, **data or {}))

        match method:
            case "lora":
                data = {"flip": 0.5, "caption_dropout": 0.3, "min_snr": 5.0}
                options = short(options, data, warmup_steps=3, schedule="cosine", ema_decay=0.9)
                return replace(options, low_rank=LowRankOptions(rank=4, init="kaiming", text_encoder=True, text_scale=0.5))
            case "dreambooth":
                return replace(short(options, gradient_accumulation=2), prior=folder, text_encoder=True, text_scale=0.1)
            case "dreambooth-lora":
                return replace(short(options, {"crop": "random"}, precision="bfloat16"), prior=folder)
            case "textual-inversion":
                return short(options, {"offset_noise": 0.1}, schedule="linear")
            case "pivotal-tuning":
                return replace(options, tokens=short(options.tokens), lora=short(options.lora))
            case "custom-diffusion":
                return replace(short(options, ema_decay=0.9), prior=Prior(kind="near", count=4), sizes="paper", all_of_attention=True)
            case "fine-tune":
                return short(options, checkpointing=True, schedule="linear_after_hold", max_grad_norm=None)

    def train(self, sd, method: str, concept) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Train with a method; return the losses, and what was trained."""
        from minidiff.trainers.methods.table import METHODS

        run = METHODS["dreambooth" if method == "dreambooth-lora" else method].build(sd, [concept], self.options(method))
        losses = [step.loss for _, step in run.run(CPU)]
        adapters = [adapter for adapter in (run.lora, run.tokens, run.custom_diffusion) if adapter is not None]
        return losses, {name: p for adapter in adapters for name, p in self.parameters(adapter).items()} or self.weights(sd)

    def fill_class_images(self, sd, concept, kind: str, count: int) -> None:
        """Fill a concept's folder of class pictures: "generated" by the model, or the nearest "scenes"."""
        from minidiff.trainers.methods.options import Prior
        from minidiff.trainers.methods.prior_preservation import fill_class_images
        from minidiff.trainers.methods.table import preset

        options = replace(preset("lora", "bundled"), prior=Prior(kind=kind, count=count, steps=4), prompt="a photo of a {}")
        for _ in fill_class_images(sd, concept, options):
            pass

    def from_scratch(self, folder: Path) -> tuple[Iterable[tuple[str, Tensor]], list]:
        """Return the (stage, loss) of ten steps of the VAE and of the U-Net, to be iterated, and the list that then holds the model."""
        from minidiff.bundled.recipe import Recipe
        from minidiff.bundled.run import run_from_scratch
        from minidiff.bundled.tasks import bundled_config

        recipe, models = Recipe(scenes=100, vae_steps=10, vae_batch=8, steps=10, batch=8), []
        run = run_from_scratch(bundled_config(), recipe, folder, CPU, models.append)
        return ((progress.stage, progress.loss) for progress in run if progress.loss is not None), models

    def judge(self) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Train the judge for ten steps; return the losses and its weights."""
        from minidiff.bundled.train_judge import JUDGE_SETTINGS, JudgeTask, judge_config
        from minidiff.trainers.engine.loop import train

        task = JudgeTask(judge_config(), 0, CPU)
        losses = [step.loss for step in train(task, replace(JUDGE_SETTINGS, steps=10, batch=8), CPU)]
        return losses, {self.name(name): tensor for name, tensor in task.judge.state_dict().items()}


def side() -> Old:
    """Return the side that the tree on sys.path speaks, by a module that only the old one has."""
    return Old() if find_spec("minidiff.savings") else New()
