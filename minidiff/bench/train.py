"""How long a training step of a LoRA, and of Custom Diffusion, takes: `minidiff bench train`.

    random weights, one picture -> minidiff's methods, and the loops of diffusers' examples (peft for the LoRA) -> steps in turn

The picture's latents are made ahead for all, and so is the text that no step changes: a LoRA's captions; Custom Diffusion trains a word,
so its text encoder runs in every step, and each step has a class picture beside the subject's. Errors are those of the loss at the same
latent, noise, timestep and context, before the first step. Memory is counted from loading the weights, but without the VAE's encoding.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any  # diffusers' objects: their types are no help

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from minidiff.bench.common import BenchRecord, check_arguments, model_config
from minidiff.bench.contender import serve
from minidiff.bench.pipelines import COMPILED, OF_STEPS, make_jobs, minidiff_model, start_worker, with_backend
from minidiff.bench.race import RaceRules, race_models
from minidiff.bench.worker_protocol import answer_with
from minidiff.config import ModelConfig

METHODS = ("lora", "custom-diffusion")
RANK = 4
RATE = 1e-5
T = 501  # of the loss that is compared


def bench_train(
    against: bool = True,
    out: Path | None = None,
    rounds: int | None = None,
    model: str | ModelConfig = "sd1",
    size: int | None = None,
    methods: tuple[str, ...] = METHODS,
    device: str = "cpu",
    rules: RaceRules = RaceRules(),
) -> Iterator[str]:
    """Measure, and yield the lines of Markdown tables. Raises ValueError for unknown names and if diffusers or peft is missing.

    Args:
        against: Race the loops of diffusers' examples as well.
        out: A .json file for every number.
        rounds: By default 2 on a CPU, 10 on a GPU.
        model: A name of `model_config`, or a config.
        size: Pixels a side; None is the model's own, on a CPU half of it.
        methods: Of METHODS.
        device: Of all contenders.
        rules: Who takes part, on which weights, how long.
    """
    on_cpu = torch.device(device).type == "cpu"
    rounds = (2 if on_cpu else 10) if rounds is None else rounds
    check_arguments(rounds, out, against, ("diffusers", "peft"))
    if unknown := [name for name in methods if name not in METHODS]:
        raise ValueError(f"method {unknown[0]!r} unknown; choose {', '.join(METHODS)}")
    config = model_config(model)
    size = size or config.image_size // (2 if on_cpu else 1)
    settings = {"bench": "train", "model": str(config), "size": size, "methods": list(methods), "rounds": rounds, "device": device}

    def write_inputs(folder: Path) -> None:
        for name in ("subject", "class"):
            (folder / name).mkdir()
            pixels = np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / "0.png")
        torch.save(sample(config, size), folder / "sample.pt")

    jobs = rules.choose(make_train_jobs(device, against))
    parts = [
        (
            f"\nA step of {method}, {size} x {size}\n",
            f"{method}: ",
            {name: job | {"method": method, "size": size} for name, job in jobs.items()},
        )
        for method in methods
    ]
    yield from race_models(__name__, parts, config, write_inputs, BenchRecord(out, settings), rules)


def make_train_jobs(device: str, against: bool) -> dict[str, dict]:
    """Return the contenders' jobs: bfloat16 by autocast, and float32 for the errors and as the usual choice on a CPU."""
    return make_jobs(device, against, (*OF_STEPS, "diffusers bfloat16", "diffusers channels-last", "diffusers max-autotune"))


def sample(config: ModelConfig, size: int) -> dict[str, Tensor]:
    """Draw what the losses are compared at: a scaled latent, noise, a timestep, a context, and of SDXL pooled vector and size numbers."""
    generator = torch.Generator().manual_seed(0)
    cells, length = size // config.vae.factor, config.text_encoder.context_length
    x_0, eps = torch.randn(2, 1, config.vae.latent_channels, cells, cells, generator=generator)
    context = torch.randn(1, length, config.unet.context_width, generator=generator)
    drawn = {"x_0": x_0, "eps": eps, "t": torch.tensor([T]), "context": context}
    if width := config.unet.pooled_width:
        drawn |= {"pooled": torch.randn(1, width, generator=generator), "sizes": torch.tensor([[size, size, 0, 0, size, size]]).float()}
    return drawn


# ------------------------------------------------------------------------------------------------------------ minidiff


def prepare(job: dict) -> Callable[[dict], dict]:
    """Prepare a step, and the loss to compare, in the contender's process."""
    peak, device, dtype = start_worker(job)
    given = {name: x.to(device) for name, x in torch.load(f"{job['folder']}/sample.pt").items()}
    step, loss = {"diffusers": _diffusers, "minidiff": _minidiff}[job["library"]](job, device, dtype, given)
    peak.reset()
    return with_backend(job, answer_with(step, peak, check=loss))


def _minidiff(job: dict, device: torch.device, dtype: torch.dtype, given: dict[str, Tensor]) -> tuple[Callable, Callable]:
    """Return our step, as `minidiff train` takes it, and the loss."""
    from minidiff.conditioning import Conditioning
    from minidiff.trainers.engine.diffusion_loss import NoiseSample, diffusion_loss
    from minidiff.trainers.engine.loop import Training
    from minidiff.trainers.engine.settings import Settings
    from minidiff.trainers.methods.options import Concept, DataOptions, Prior, family_of
    from minidiff.trainers.methods.table import METHODS, preset

    sd = minidiff_model(job, device, dtype)
    folder = Path(job["folder"])
    settings = Settings(
        steps=10**6, batch=1, learning_rate=RATE, precision=job["dtype"], compile=job["how"] == "compiled", save_every=10**6
    )
    options = preset(job["method"], family_of(sd.config))
    options = replace(options, settings=settings, data=DataOptions(size=job["size"]))
    if job["method"] == "lora":
        options = replace(options, low_rank=replace(options.low_rank, rank=RANK, layers=("attention",)))
        method = METHODS["lora"].build(sd, [Concept(images=folder / "subject", prompt="a photo of a dog")], options)
    else:
        options = replace(options, sizes="none", prior=Prior(kind="folder"))
        concept = Concept(images=folder / "subject", class_images=folder / "class", token="<new1>", class_word="dog")
        method = METHODS["custom-diffusion"].build(sd, [concept], options)
    walk = Training(method.phases[0].__enter__(), settings, device).run()

    def loss() -> Tensor:
        draws = NoiseSample(given["t"], given["eps"])
        told = Conditioning(given["context"], given.get("pooled"), given.get("sizes")).to(device, dtype)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return diffusion_loss(lambda x_t, t, context: sd.unet(x_t.to(dtype), t, context), sd.schedule, given["x_0"], told, draws)

    return lambda: next(walk).loss, loss


# ------------------------------------------------------------------------------------------------- diffusers' examples


def _diffusers(job: dict, device: torch.device, dtype: torch.dtype, given: dict[str, Tensor]) -> tuple[Callable, Callable]:
    """Return the step of diffusers' train_text_to_image_lora.py or train_custom_diffusion.py on precomputed latents, and the loss."""
    from diffusers import DDPMScheduler, UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]
    from transformers import CLIPTextModel, CLIPTokenizer

    folder, batch = f"{job['folder']}/model", 1 if job["method"] == "lora" else 2
    if "pooled" in given and batch > 1:
        raise ValueError("no example of diffusers teaches Custom Diffusion to a model of two text encoders")
    unet: Any = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    unet.requires_grad_(False).to(device, dtype)
    text_encoder: Any = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")
    text_encoder.requires_grad_(False).to(device)
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    scheduler: Any = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    learn = {"lora": _diffusers_lora, "custom-diffusion": _diffusers_custom_diffusion}[job["method"]]
    trained, encode, after = learn(unet, text_encoder, tokenizer, device, dtype)
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    latents = torch.cat([given["x_0"]] * batch)
    told: dict[str, Any] = {}
    if "pooled" in given:
        told = {"added_cond_kwargs": {"text_embeds": given["pooled"].to(dtype), "time_ids": given["sizes"]}}
    network = torch.compile(unet, mode=COMPILED["compiled"]) if job["how"] == "compiled" else unet

    def loss_at(x_0: Tensor, eps: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """Return the loss of each sample."""
        x_t = scheduler.add_noise(x_0, eps, t)
        target = eps if scheduler.config.prediction_type == "epsilon" else scheduler.get_velocity(x_0, eps, t)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            prediction = network(x_t.to(dtype), t, context.to(dtype), return_dict=False, **told)[0]
        return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))

    def step() -> Tensor:
        eps = torch.randn_like(latents)
        t = torch.randint(scheduler.config.num_train_timesteps, (batch,), device=device)
        loss = loss_at(latents, eps, t, given["context"] if told else encode()).sum()  # a context that no step changes
        loss.backward()
        after()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step, lambda: loss_at(*(given[name] for name in ("x_0", "eps", "t", "context")))


def _diffusers_lora(
    unet: Any, text_encoder: Any, tokenizer: Any, device: torch.device, dtype: torch.dtype
) -> tuple[list[nn.Parameter], Callable, Callable]:
    """Return the LoRA's parameters in float32, the context, and what follows the backward pass."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    cast_training_params(unet, torch.float32)
    with torch.no_grad():
        context = text_encoder(_tokens(tokenizer, text_encoder, "a photo of a dog").to(device))[0]
    return [p for p in unet.parameters() if p.requires_grad], lambda: context, lambda: None


def _diffusers_custom_diffusion(
    unet: Any, text_encoder: Any, tokenizer: Any, device: torch.device, dtype: torch.dtype
) -> tuple[list[nn.Parameter], Callable, Callable]:
    """Return Custom Diffusion's parameters, the context, and what follows the backward pass."""
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0

    tokenizer.add_tokens("<new1>")
    new = tokenizer.convert_tokens_to_ids("<new1>")
    text_encoder.resize_token_embeddings(len(tokenizer))
    table = text_encoder.get_input_embeddings().weight.requires_grad_(True)
    processors = {}
    for name in unet.attn_processors:
        module = unet.get_submodule(name.removesuffix(".processor"))
        of_text = name.endswith("attn2.processor")
        sizes = {"hidden_size": module.to_q.out_features, "cross_attention_dim": module.to_k.in_features if of_text else None}
        processor = CustomDiffusionAttnProcessor2_0(of_text, train_q_out=False, **sizes).to(device)
        if of_text:
            with torch.no_grad():
                processor.to_k_custom_diffusion.weight.copy_(module.to_k.weight)
                processor.to_v_custom_diffusion.weight.copy_(module.to_v.weight)
        processors[name] = processor
    trained = [table, *chain.from_iterable(processor.parameters() for processor in processors.values())]
    unet.set_attn_processor(processors)  # empties the dict
    rows = torch.cat([_tokens(tokenizer, text_encoder, text) for text in ("photo of a <new1> dog", "photo of a dog")]).to(device)

    def encode() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return text_encoder(rows)[0]

    def after() -> None:  # the whole table gets a gradient; that of the other words is set to nought
        table.grad[torch.arange(len(table), device=device) != new] = 0

    return trained, encode, after


def _tokens(tokenizer: Any, text_encoder: Any, text: str) -> Tensor:
    length = text_encoder.config.max_position_embeddings
    return tokenizer(text, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids


if __name__ == "__main__":
    serve(prepare)
