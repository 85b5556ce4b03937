"""No public function changes the tensors it is given, and none is missing here.

A function counts if it takes a tensor (or an array), or is a method of a class that holds some; the list is read from the source. Tensors
anywhere in the arguments are watched: in lists, in the object a method belongs to, in the weights of a module.
"""

import ast
import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minidiff
from minidiff import (
    attention,
    attention_maps,
    blocks,
    compare,
    conditioning,
    controlnet,
    cuda_graph,
    files,
    guidance,
    heat_maps,
    hints,
    pipeline,
    samplers,
    text_encoder,
    tiled_decode,
    transfer,
    unet,
    vae,
)
from minidiff.adapters import custom_diffusion, dropout, extraction, layer_change, low_rank, merge_concepts, parallel
from minidiff.bench import attention_cases
from minidiff.bench import correctness as bench_correctness
from minidiff.bench import race as bench_race
from minidiff.bundled import attention_edits, edits, evaluate, tasks
from minidiff.bundled import judge as judge_network
from minidiff.bundled import train_judge as judge_trainer
from minidiff.bundled.train_judge import JudgeTask, judge_config
from minidiff.cli import control as cli_control
from minidiff.cli import edit as cli_edit
from minidiff.cli import heat as cli_heat
from minidiff.cli import studio as cli_studio
from minidiff.cli import verify as cli_verify
from minidiff.config import ScheduleConfig, TextEncoderConfig, UNetConfig, VAEConfig
from minidiff.editing import canvas, image_to_image, inpaint, inversion, masks, null_text, prompt_steps, prompt_to_prompt
from minidiff.editing import start as edit_start
from minidiff.evaluation import alignment, kid, pairs, weights
from minidiff.evaluation.open_clip import OpenClip
from minidiff.kernels import choices, cpu_attention, cross_attention, dispatch, geglu, group_norm_silu, self_attention, tiles
from minidiff.samplers import Denoiser, Level
from minidiff.scenes import art
from minidiff.scenes import hints as scene_hints
from minidiff.scenes.prompts import fixed_prompts
from minidiff.schedule import NoiseSchedule, zero_terminal_snr
from minidiff.study import measure
from minidiff.trainers.data import cache, regularisation
from minidiff.trainers.engine import diffusion_loss, distributed, loop, memory, optimizer
from minidiff.trainers.methods import controlnet_task, prior_preservation
from tests.small_models import small_model

SOURCES = ("model", "real", "reconstructed")  # of the evaluation's figures
TINY = attention_cases.AttentionCase("tiny", 6, 5, heads=2, head_dim=8, calls=1, batch=1, dtype="float32")
LEVEL_FUNCTIONS = (samplers.timestep_levels, samplers.fractional_levels, samplers.karras_levels)
PACKAGE = Path(minidiff.__file__).parent


def takes_tensors(function: ast.FunctionDef) -> bool:
    arguments = function.args
    annotations = [a.annotation for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs] if a.annotation]
    return any(kind in ast.unparse(annotation) for annotation in annotations for kind in ("Tensor", "ndarray", "Mask"))


def holds_tensors(cls: ast.ClassDef) -> bool:
    return any(isinstance(field, ast.AnnAssign) and "Tensor" in ast.unparse(field.annotation) for field in cls.body)


def public_functions() -> Iterator[str]:
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(["minidiff", *path.relative_to(PACKAGE).with_suffix("").parts])
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and takes_tensors(node):
                yield f"{module}.{node.name}"
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and (method.name == "__call__" or not method.name.startswith("_")):
                        if holds_tensors(node) or takes_tensors(method):
                            yield f"{module}.{node.name}.{method.name}"


def examples() -> list[partial]:
    """A call of every public function, on small random inputs."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    x, time, context = torch.randn(2, 8, 4, 4), torch.randn(2, 32), torch.randn(2, 3, 6)
    t = torch.tensor([10, 700])
    unet_config = UNetConfig(widths=(8, 16), blocks_per_level=1, attention=(True, False), heads=(2, 2), context_width=6, groups=4)
    vae_config = VAEConfig(widths=(8, 16), blocks_per_level=1, groups=4)
    text_config = TextEncoderConfig(vocab_size=50, context_length=6, width=8, layers=1, heads=2)
    pooling = replace(text_config, penultimate=True, projection=4)
    x_t, eps = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    gaussian = vae.DiagonalGaussian(x_t, eps)
    schedule = NoiseSchedule(ScheduleConfig())
    denoise, now, then = Denoiser(lambda x_t, t: 0.5 * x_t, "eps", torch.float32), Level(700, 0.1), Level(500, 0.3)
    noise = partial(torch.randn, x_t.shape)
    alpha_bar = schedule.alpha_bar.numpy()
    sd = small_model()
    full = conditioning.Conditioning(torch.randn(2, 3, 16))
    net, hint = controlnet.create_controlnet(sd.config, sd.unet, torch.Generator()), torch.rand(2, 3, 16, 16)
    control, photograph = controlnet.Control(net, hint), np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    cells, ones = x.to(tiles.DEVICE, memory_format=torch.channels_last), torch.ones(8, device=tiles.DEVICE)
    conversions = [schedule.x0_from_eps, schedule.eps_from_x0, schedule.x0_from_v, schedule.eps_from_v]
    weight = nn.Parameter(torch.ones(3))
    changes = {"unet.down.0.transformers.0.blocks.0.cross_attention.to_k": torch.randn(16, 16)}
    answer, draws = lambda x_t, t, context: 0.5 * x_t, diffusion_loss.NoiseSample(t, eps)
    judge = JudgeTask(judge_config(), 0, torch.device("cpu")).judge
    pixels, two = torch.rand(2, 3, 128, 128), torch.tensor([0, 1])
    features, labels = (
        torch.randn(8, 4),
        judge_trainer.Labels(torch.rand(2, 2, 8, 8) / 2, two[:, None].repeat(1, 2), two[:, None].repeat(1, 2), two, two),
    )
    with torch.no_grad():
        reading = judge.read(pixels)
    picture, hole = torch.rand(1, 3, 32, 32), F.pad(torch.ones(1, 1, 16, 16), (8, 8, 8, 8))
    few, x_0, cells_of_hole = edit_start.Sampling(2), torch.randn(1, 4, 8, 8), masks.to_cells(hole, 4)
    lion, red_lion = "a lion", "a red lion"
    changing = prompt_to_prompt.AttentionEdit(1.0, 1.0, local_blend=("lion", "lion"))
    plan = prompt_to_prompt.make_plan(sd.tokenizer, lion, red_lion, changing, pictures=1, steps=2, guided=False)
    crosses = attention_maps.Layer("down.0.transformers.0", "cross", (2, 3), 2), torch.rand(2, 2, 6, 32)
    up = list(inversion.invert(sd, ["a cat"], x_0, steps=2))
    heat = heat_maps.HeatMaps(1, [1, 2])
    list(heat.watch(sd.denoise(lion, steps=1), sd.unet))
    verdict = evaluate.Verdict(True, True, None, None, None, 0.5)
    public_clip = OpenClip.__new__(OpenClip)  # around any network
    public_clip.model, public_clip.image_size, public_clip.device = (
        SimpleNamespace(encode_image=lambda x, normalize: x.mean((2, 3))),
        128,
        torch.device("cpu"),
    )
    public_clip.mean = public_clip.std = torch.ones(3, 1, 1)
    posterior = SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: pixels[..., ::8, ::8]))
    pipe = SimpleNamespace(vae=SimpleNamespace(encode=lambda x: posterior, config=SimpleNamespace(scaling_factor=0.5)))
    return [
        partial(parallel.BottleneckAdapter(8, 2, torch.Generator(), behind=True).forward, q),
        partial(parallel.BottleneckAdapter(8, 2, torch.Generator()).forward, q),
        partial(parallel.MultiHeadParallelAdapter(8, 2, 2, torch.Generator()).forward, q),
        partial(parallel.linear, torch.randn(3, 2)),
        partial(layer_change.LayerChange.forward, low_rank.LowRank(torch.randn(2, 8), torch.randn(4, 2), 1.0), q),
        partial(low_rank.LowRank(torch.randn(2, 8), torch.randn(4, 2), 1.0).forward, q),
        partial(extraction.rank_for_energy, torch.tensor([3.0, 1.0]), 0.5, "sum"),
        partial(attention.attention_weights, q, k, 2),
        partial(attention.naive_attention, q, k, v, 2),
        partial(attention.attention, q, k, v, 2),
        partial(dispatch.select_backend, q, k, v, 2),
        partial(dispatch.fused_attention, "pytorch", q, k, v, 2),
        partial(attention.Attention(8, 2).forward, q, k),
        partial(attention_cases.exact, TINY, attention_cases.inputs(TINY, "normal"), torch.device("cpu")),
        partial(bench_race.relative_error, q, 2 * q),
        partial(attention_maps.with_attention_maps, sd.denoise("a cat", steps=2), sd.unet),
        partial(attention_maps.word_map, {"layer": torch.rand(2, 4, 4, 5)}, [1, 2], (8, 8)),
        partial(custom_diffusion.compress, changes),
        partial(custom_diffusion.compress(changes).deltas),
        partial(custom_diffusion.from_deltas, sd, changes),
        partial(merge_concepts.merge_directions, torch.randn(2, 8), torch.randn(20, 8)),
        partial(weights.layer_changes, changes, changes),
        partial(weights.relative_changes, changes, changes),
        partial(public_clip.encode_pictures, pixels),
        partial(measure.chroma, pixels),
        partial(blocks.timestep_embedding, t, 8),
        partial(blocks.TimeEmbedding(8).forward, t),
        partial(blocks.AddedEmbedding(3, 8).forward, torch.randn(2, 3), torch.rand(2, 6)),
        partial(blocks.norm_silu, nn.GroupNorm(4, 8), x),
        partial(blocks.geglu, q),
        partial(blocks.tile_rows, x, 4),
        partial(blocks.add_rows, x, x[:1]),
        partial(blocks.ResBlock(8, 16, 4, 1e-5, 32).forward, x, time),
        partial(blocks.FeedForward(8).forward, q),
        partial(blocks.TransformerBlock(8, 2, 6).forward, q, context),
        partial(blocks.SpatialTransformer(8, 2, 6, 4).forward, x, context),
        partial(compare.difference, "layer", x, x + 1),
        partial(compare.outputs_by_layer, nn.Linear(8, 8), nn.Linear.__call__, (q,)),
        partial(guidance.guide, x_t, eps, 7.5),
        partial(guidance.guided, lambda x_t, t, context: x_t, context, context, 7.5),
        partial(full.tensors),
        partial(full.with_tensors, [q]),
        partial(full.to, torch.device("cpu"), torch.float64),
        partial(conditioning.Conditioning(q[:1]).expand, 3),
        partial(conditioning.as_conditioning, q),
        partial(net.hint_block.forward, hint),
        partial(net.forward, x_t, t, full, torch.randn(2, 16, 4, 4)),
        partial(control.interval, [900, 500]),
        partial(controlnet.prepare_hint, hint, net),
        partial(controlnet.scaled_residuals, control, x_t, t, full, torch.randn(2, 16, 4, 4), True),
        *(partial(function, photograph) for function in hints.HINTS.values()),
        partial(hints.inpaint, photograph, photograph[..., 0]),
        partial(hints.edge_f1, photograph, photograph[::-1]),
        partial(scene_hints.rim, photograph[..., 0] > 99),
        partial(controlnet_task.edges_of, hint[0], "tile"),
        partial(controlnet_task.mean_f1, [[photograph]], [photograph]),
        partial(sd.predict, x_t, t, full),
        partial(sd.denoise, "a cat", x=torch.randn(1, 4, 8, 8), start=1, steps=2),
        partial(sd.decode, torch.randn(1, 4, 8, 8)),
        partial(pipeline.to_images, torch.randn(1, 3, 8, 8)),
        partial(denoise.model_output, x_t, now),
        partial(denoise.to_x0_eps, eps, x_t, now),
        partial(denoise.__call__, x_t, now),
        *(partial(samplers.sample, denoise.model, x_t, schedule, sampler=name, steps=5, noise=noise) for name in samplers.SAMPLERS),
        partial(samplers.ddpm, denoise, x_t, now, then, noise),
        partial(samplers.ddim, denoise, x_t, now, then, 1.0, noise),
        partial(samplers.plms, denoise, x_t, now, then, (eps, eps)),
        partial(samplers.euler, denoise, x_t, now, then),
        partial(samplers.euler_ancestral, denoise, x_t, now, then, noise),
        partial(samplers.heun, denoise, x_t, now, then),
        partial(samplers.dpmpp_2m, denoise, x_t, now, then, (Level(800, 0.05), eps)),
        *(partial(function, schedule, alpha_bar, 5, "linspace") for function in LEVEL_FUNCTIONS),
        partial(art.tint_picture, np.full((4, 4, 4), 200, np.uint8), "red"),
        *(partial(method, x_t, t, eps) for method in [schedule.q_sample, schedule.velocity, schedule.target, *conversions]),
        partial(schedule.snr, t),
        partial(schedule.timesteps, 5),
        partial(zero_terminal_snr, schedule.alpha_bar),
        partial(text_encoder.quick_gelu, x),
        partial(text_encoder.TextBlock(text_config).forward, q),
        partial(text_encoder.TextEncoder(text_config).embed, torch.tensor([[1, 2, 3]])),
        partial(text_encoder.TextEncoder(text_config).forward, torch.tensor([[1, 2, 3]])),
        partial(text_encoder.TextEncoder(pooling).pool, torch.randn(1, 3, 8), torch.tensor([2])),
        partial(tasks.to_pixels, np.zeros((1, 4, 4, 3), np.uint8)),
        partial(tasks.resize, x_t, 3),
        partial(tasks.encode_scenes, np.zeros((1, 8, 8, 3), np.uint8), vae.VAE(vae_config), torch.device("cpu")),
        partial(tasks.reconstruction_loss, torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4), torch.rand(1, 1, 4, 4)),
        partial(tasks.Latents(x_t, t[:, None], x_t[:, :1]).scaling_factor),
        partial(diffusion_loss.squared_error, answer, schedule, x_t, context, draws),
        partial(diffusion_loss.diffusion_loss, answer, schedule, x_t, context, draws, mask=x_t[:, :1], min_snr=5.0),
        partial(prior_preservation.prior_preservation_loss, features[:, 0], 4, 1.0),
        partial(diffusion_loss.min_snr_weight, schedule, t, 5.0),
        partial(transfer.to_device, torch.device("cpu"), x_t),
        partial(memory.bytes_of, [x_t]),
        partial(distributed.mean, x_t.sum()),
        partial(optimizer.orthogonalise, torch.randn(4, 6)),
        partial(cache.Batch.concatenate, [cache.Batch(x_t, x_t[:, :1], ("a", "b"), ("", ""), torch.ones(2, 6))] * 2),
        partial(regularisation.nearest, torch.randn(4), torch.randn(6, 4)),
        partial(kid.kernel, features, features + 1),
        partial(kid.block_sums, features.double(), torch.arange(8) % 2, torch.arange(4) % 2, 2),
        partial(kid.scale_features, features),
        partial(files.tensor_bytes, q),
        partial(kid.kid, features, features + 1, blocks=2),
        partial(alignment.text_alignment, features, features + 1),
        partial(alignment.image_alignment, features, features + 1),
        partial(pairs.dependence, np.array([[1.0, -1.0, 0.0]])),
        partial(alignment.check_size, pixels, 128, "judge"),
        partial(few.denoise, sd, ["a cat"], [0], x_0),
        partial(edit_start.encode, sd, picture),
        partial(edit_start.encode_rows, sd, picture, 2),
        partial(edit_start.first_noise, [0], x_0),
        partial(edit_start.add_noise, x_0, now, x_0 + 1),
        partial(image_to_image.image_to_image, sd, "a cat", picture, sampling=few),
        partial(image_to_image.unchanged, x_0, 2),
        partial(inpaint.inpaint, sd, "a cat", picture, hole, sampling=few),
        partial(inpaint.size_of, picture),
        partial(inpaint.same_noise, x_0, x_0 + 1, few.levels(sd.schedule)),
        partial(inpaint.keep_known, few.denoise(sd, ["a cat"], [0], x_0), lambda i: x_0, cells_of_hole),
        partial(inpaint.with_hole, sd, picture, hole),
        partial(inversion.invert, sd, ["a cat"], x_0, steps=2),
        partial(null_text.null_text, sd, ["a cat"], x_0, up, iterations=1),
        partial(prompt_to_prompt.prompt_to_prompt, sd, lion, red_lion, changing, sampling=few, x=x_0),
        partial(plan.acts, 0),
        partial(plan.change, 0, {}, crosses[0], lambda rows: crosses[1][rows]),
        partial(plan.edit_maps, 0, crosses[1]),
        partial(prompt_to_prompt.word_maps, crosses[1], ([1], [2]), (2, 3)),
        partial(prompt_to_prompt.local_blend, x_t, torch.rand(1, 2, 2), torch.rand(1, 2, 2)),
        partial(prompt_steps.step_at, few.levels(sd.schedule), t),
        partial(prompt_steps.halves, q, True),
        partial(prompt_steps.Kept(q, attention.Attention(8, 2)).forward, q),
        partial(prompt_steps.kept_cross_attention, sd.unet, {"middle.transformer.blocks.0": q}),
        partial(heat_maps.HeatMaps(1, [1]).watch, sd.denoise(lion, steps=1), sd.unet),
        partial(heat_maps.overlap, crosses[1][0, :, 0], crosses[1][1, :, 0]),
        partial(heat_maps.lay_over, picture, torch.rand(1, 4, 4)),
        partial(cli_heat.write_heat_maps, Path(tempfile.mkdtemp()) / "heat.png", heat, sd, [lion], picture),
        partial(canvas.resize, picture, 20, 10),
        partial(canvas.fit, picture, 20, 10, "pad"),
        partial(canvas.pad_to_cells, picture, 5),
        partial(canvas.outpaint, picture, {"left": 4}, hole),
        partial(canvas.Crop(2, 3, 8, 6).cut, picture),
        partial(canvas.Crop(2, 3, 8, 6).put_back, torch.rand(1, 3, 12, 16), picture),
        partial(canvas.crop_around, hole, 64, 64),
        partial(canvas.make_canvas, picture, hole, 4, (64, 64)),
        partial(canvas.make_canvas(picture, hole, 4).follow, picture + 1),
        partial(canvas.make_canvas(picture, hole, 4).finish, picture + 1),
        partial(masks.check_mask, hole),
        partial(masks.mask_box, hole),
        partial(masks.to_cells, hole, 4),
        partial(masks.cover_cells, hole, 4),
        partial(masks.grow_small_mask, hole, 4),
        partial(masks.feather, hole, 3),
        partial(masks.paste, picture, picture + 1, hole),
        partial(cli_studio.Film([], [], [picture]).picture, 1),
        partial(cli_studio.Film([], [], [picture], [picture[0, :1]]).attention, 0, 1),
        partial(cli_edit.prepare_edit, cli_edit.EditFlags(), (picture, hole), sd, None),
        partial(cli_edit.Edit(picture, None, 0.5).denoise, sd, ["a cat"], [0], few),
        partial(cli_edit.Edit.size.fget, cli_edit.Edit(picture, None, 0.5)),
        partial(cli_control.Frame((32, 32), lambda x: x).follow_hint, picture[0]),
        partial(cli_verify.run_text, sd, "text_encoder", sd.tokenizer(["a cat"])),
        partial(cli_verify.add_hole, x_0[:1], sd.unet, (x_0,)),
        partial(cli_verify.their_hole, pipe, pixels),
        partial(cli_edit.Edit(picture, canvas.make_canvas(picture, hole, 4), 0.5).finish, picture + 1),
        partial(edits.known_latents, "fresh", x_0, [0], few.levels(sd.schedule)),
        partial(attention_edits.outside, judge, pixels),
        partial(edits.found, judge, pixels, "cat"),
        partial(edits.mean_change, picture, picture + 1, hole),
        partial(edits.rim_of, hole, 2),
        partial(alignment.drift, features, features + 1),
        partial(judge_network.contrastive_loss, features, features + 1, torch.tensor(1.0)),
        partial(judge_network.AttentionPool(8, 4, 2).forward, x),
        partial(judge.pictures.forward, pixels),
        partial(judge.read, pixels),
        partial(judge.encode_pictures, pixels),
        partial(judge.encode_tokens, judge.tokenizer(["a cat"])),
        partial(reading.shares),
        partial(reading.centroids, two),
        partial(reading.tint_of, two),
        partial(evaluate.reconstruct, sd, torch.rand(1, 3, 32, 32)),
        partial(evaluate.judge_batch, judge, pixels, fixed_prompts()[:2]),
        partial(
            evaluate.summarize_verdicts,
            fixed_prompts()[:4],
            {name: [verdict] * 4 for name in SOURCES},
            dict.fromkeys((*SOURCES, "reference"), features[:4]),
        ),
        partial(judge_trainer.augment, pixels, [np.random.default_rng(i) for i in range(2)]),
        partial(labels.to, torch.device("cpu")),
        partial(unet.DownLevel(8, 8, 2, 1, False, unet_config).forward, x, time, context),
        partial(unet.UpLevel(8, [8, 8], 8, 2, 1, True, unet_config).forward, x, [x + 1, x + 2], time, context),
        partial(unet.Middle(8, 2, 1, unet_config).forward, x, time, context),
        partial(unet.UNet(unet_config).forward, x_t, t, context),
        partial(unet.UNet(unet_config).encode, x_t, t, context, x),
        partial(cross_attention.fused_cross_attention, *(y.to(tiles.DEVICE) for y in (q, k, v)), 1),
        partial(cross_attention.run_cross_attention, *(y.to(tiles.DEVICE) for y in (q, k, v)), 1),
        partial(cross_attention.unsupported, q, k, v, 1),
        partial(choices.find, "geglu", ones, (1, 8)),
        partial(dispatch.select_kernel, "geglu", ones, (1, 8)),
        partial(self_attention.fused_self_attention, *(y.to(tiles.DEVICE) for y in (q, k, v)), 1),
        partial(self_attention.run_self_attention, *(y.to(tiles.DEVICE) for y in (q, k, v)), 1),
        partial(self_attention.unsupported, q, k, v, 1),
        partial(cpu_attention.tiled_attention, *(y.bfloat16() for y in (q, k, v)), 1),
        partial(cpu_attention.unsupported, q, k, False),
        partial(tiles.refusal, q, k, v, 1),
        partial(bench_correctness.forward_and_backward, torch.mul, (x, x + 1), x),
        partial(bench_correctness.judge, lambda: (x,), [lambda: (x + 1e-3,)], {"out": x.double()}),
        partial(bench_correctness.relative_errors, (x,), {"out": x.double()}),
        partial(distributed.backward, (weight * 2).sum(), None, True),
        partial(distributed.TrainedWeights([]).forward, x.sum()),
        partial(geglu.fused_geglu, ones),
        partial(geglu.run_geglu, ones),
        partial(geglu.unsupported, ones),
        partial(group_norm_silu.fused_group_norm_silu, cells, 4, ones, ones, 1e-5),
        partial(group_norm_silu.run_group_norm_silu, cells, 4, ones, ones, 1e-5),
        partial(group_norm_silu.unsupported, cells, 4, ones, ones),
        partial(tiles.capability_of, ones),
        partial(tiles.no_kernel_for, ones),
        partial(tiles.device_of, ones),
        partial(tiled_decode.should_tile, vae_config, x_t),
        partial(tiled_decode.decode_tiled, vae.VAE(vae_config), x_t),
        partial(cuda_graph.UNetGraph(sd.unet, []).__call__, x_t, t, full),
        partial(gaussian.sample, torch.Generator()),
        partial(gaussian.kl),
        partial(dropout.SampleDropout(0.5).forward, x),
        partial(dropout.set_row_seeds, nn.ModuleList([dropout.SampleDropout(0.5)]), torch.tensor([1, 2])),
        partial(dropout.uniform, torch.tensor([1, 2]), 0, 4),
        partial(loop.LossWatch().add, 1, torch.tensor(1.0), 0.1),
        partial(vae.AttentionBlock(8, 4).forward, x),
        partial(vae.Middle(8, 4).forward, x),
        partial(vae.DownLevel(8, 8, False, vae_config).forward, x),
        partial(vae.UpLevel(8, 8, False, vae_config).forward, x),
        partial(vae.Encoder(vae_config).forward, torch.randn(1, 3, 8, 8)),
        partial(vae.Decoder(vae_config).forward, x_t),
        partial(vae.VAE(vae_config).encode, torch.randn(1, 3, 8, 8)),
        partial(vae.VAE(vae_config).decode, x_t),
    ]


def name(call: partial) -> str:
    return f"{call.func.__module__}.{call.func.__qualname__}"


def tensors(value: object) -> Iterator[Tensor | np.ndarray]:
    """Every tensor and array inside a value."""
    if isinstance(value, (Tensor, np.ndarray)):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.state_dict().values()
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value) or isinstance(value, (NoiseSchedule, pipeline.StableDiffusion)):
        yield from tensors(vars(value))


def assert_pure(call: partial):
    """Calls, and asserts that no tensor the call was given has changed; the result, if a generator, is walked to its end."""
    given = list(tensors((getattr(call.func, "__self__", None), call.args, call.keywords)))
    assert given, f"{name(call)}: the example gives it no tensor to change"
    before = [np.copy(g) if isinstance(g, np.ndarray) else g.detach().clone() for g in given]
    result = call()
    if isinstance(result, Iterator):
        list(result)
    for now, then in zip(given, before):
        assert np.array_equal(now, then) if isinstance(now, np.ndarray) else torch.equal(now.detach(), then), (
            f"{name(call)} changed its input"
        )


@pytest.mark.parametrize("call", [pytest.param(call, id=name(call)) for call in examples()])
def test_a_public_function_leaves_its_inputs_as_they_were(call):
    assert_pure(call)


def test_every_public_function_is_tried():
    public, tried = set(public_functions()), {name(call) for call in examples()}
    assert public - tried == set(), "give these an example above"
    assert tried - public == set(), "these are gone"


def test_a_function_that_does_change_its_input_is_caught():
    def scaled(x):
        return x.mul_(2)

    def hidden(x):
        x["latents"][0] /= 0.18215
        return x

    with pytest.raises(AssertionError, match="scaled changed its input"):
        assert_pure(partial(scaled, torch.ones(3)))
    with pytest.raises(AssertionError, match="hidden changed its input"):
        assert_pure(partial(hidden, {"latents": [torch.ones(3)]}))
    with pytest.raises(AssertionError, match="forward changed its input"):
        assert_pure(partial(nn.BatchNorm2d(2).forward, torch.ones(1, 2, 3, 3)))  # its running mean
