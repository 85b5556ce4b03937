# %% [markdown]
# # 12 Train a text-to-image model
#
# **What does it take to train such a model, and how does one see that it learns?**
#
# - Explains: [minidiff/trainers/from_scratch.py](../minidiff/trainers/from_scratch.py), [minidiff/trainers/optimizer.py](../minidiff/trainers/optimizer.py)
# - You change: `ema_update`, the running mean of all weights, which is what is kept
# - Minutes: 35
# - Picture: [figures/12-after.png](figures/12-after.png)
#
# All parts have been on the table: noise, loss, U-Net, latents, words. Here they are trained together. From nothing that takes hours on a
# laptop, so this lesson goes on from a model that was stopped on purpose, and looks at what decides how a training ends: what the network
# is asked for, what the learning rate does, which weights are kept, and whether the model reads its captions at all.

# %% [markdown]
# ## Guess first
#
# The model goes on learning for less than a minute, twice: from the same weights, on the same pictures in the same order. In one run the
# learning rate stays as it was, in the other it falls in a line to zero, so that the last steps hardly move anything.
#
# 1. Does the loss fall, stay or rise in the first run, and in the second?
# 2. The captions of some pictures are exchanged, so that each is shown with the words for another. By how much does the loss rise: hardly,
#    by a tenth, by half?

# %% [markdown]
# ## A model that was stopped halfway
#
# Beside the bundled model lies a second one, `half`: a narrower U-Net, and the bundled model's autoencoder (lesson 08), which is done and
# stays as it is. Text encoder and U-Net learnt together, for 800 steps at a learning rate that never fell. What it has learnt by then can
# be seen. Above are scenes, below what it draws from their captions.

# %%
import copy
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

from lessons.common import BLUE, ORANGE, picture_grid, start
from minidiff.config import SD1
from minidiff.pipeline import to_images
from minidiff.scenes.scenes import sample_scene

# %%
from minidiff.text_encoder import TextEncoder
from minidiff.trainers.diffusion_loss import Draws, squared_error
from minidiff.trainers.from_scratch import DiffusionTask, Latents, pixels_of
from minidiff.trainers.loop import Training
from minidiff.trainers.optimizer import ExponentialAverage
from minidiff.trainers.recipe import RECIPES, Settings
from minidiff.unet import UNet

# %%
lesson = start("12_train_a_text_to_image_model")
bundled = lesson.model == "tiny"
half = replace(lesson, model="half" if bundled else lesson.model).load()
schedule, T, size = half.schedule, half.schedule.config.timesteps, half.config.image_size
numbers = sum(p.numel() for part in (half.text_encoder, half.unet) for p in part.parameters())
print(f"{numbers:,} numbers are trained")
if bundled:
    print(f"{RECIPES['half'].steps} steps of {RECIPES['half'].batch} samples until now")


# %%
@torch.no_grad()
def compose(count, seed):
    """Scenes: their pixels, their captions, and what the training needs of them."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    captions = [scene.caption for scene in scenes]
    pixels = F.interpolate(pixels_of(np.stack([scene.image for scene in scenes])), (size, size))
    mean = [half.vae.encode(part.to(lesson.device)).mean.cpu() for part in pixels.split(10)]
    mean = torch.cat(mean)
    mask = torch.from_numpy(np.stack([scene.mask for scene in scenes]))[:, None]
    mask = F.adaptive_avg_pool2d(mask, mean.shape[-2:])  # the share of object in each cell
    return pixels, captions, Latents(mean, half.tokenizer(captions), mask)


# %%
def draw(text_encoder, unet, prompts):
    sd = copy.copy(half)
    sd.text_encoder, sd.unet = text_encoder, unet
    *_, last = sd.denoise(prompts, seeds=range(len(prompts)), steps=drawing_steps)
    pixels = sd.decode(last.x_t)
    assert pixels.shape == (len(prompts), 3, size, size)
    return to_images(pixels)

# %%
count, steps, batch = (24, 4, 2) if lesson.quick else (300, 40, 8)
drawing_steps = 3 if lesson.quick else 15
pixels, captions, scenes = compose(count, seed=0)
B, c, h, w = scenes.mean.shape
assert (B, c, h) == (count, half.config.vae.latent_channels, size // half.config.vae.factor)
assert scenes.mask.shape == (B, 1, h, w)
shown = captions[:6]
drawn = {"before": draw(half.text_encoder, half.unet, shown)}
fig = picture_grid([to_images(pixels[: len(shown)]), drawn["before"]], labels=["scenes", "half"])
lesson.show(fig, "half", "Scenes; below, patches in their colours on the right backgrounds.")
for caption in shown:
    print(caption)

# %% [markdown]
# The background is right, the colours are near, and the thing itself is a patch, at best with a hint of its shape. Scenes are composed anew
# for each training and never stored: an emoji or two on a plain colour, with a caption made of the labels. The autoencoder encodes each
# once, before the training, so that a step needs no pixels. `mask` says how much of a cell an object covers; such cells count more in the
# loss, because a plain background is soon learnt.

# %% [markdown]
# ## What the network is asked for: v
#
# Lesson 02 asked for the noise $\epsilon$. The bundled models answer with the mixture that lesson 01 called v, the *velocity* (Salimans and
# Ho 2022, section 4):
#
# $$v = \sqrt{\bar\alpha_t} \; \epsilon - \sqrt{1 - \bar\alpha_t} \; x_0$$
#
# Why? Think of a network that does not look at the picture at all, and answers with the best multiple of $x_t$. Asked for $\epsilon$, it
# takes $\sqrt{1 - \bar\alpha_t} \; x_t$ and is off by $\bar\alpha_t$: at late timesteps by next to nothing, since $x_t$ *is* the noise
# there. Asked for v, the best multiple is zero, and it is off by one at every timestep. (Off in the mean square, for latents of variance
# one.) So with v there is as much to learn at the last timestep as at the first.

# %%
*_, test = compose(4 if lesson.quick else 16, seed=1)
x_0 = (test.mean * half.config.vae.scaling_factor).to(lesson.device)
tokens = test.tokens.to(lesson.device)
generator = torch.Generator().manual_seed(0)
edges = torch.linspace(0, T, 4 if lesson.quick else 7).long()
middles = ((edges[1:] + edges[:-1]) / 2).tolist()
test_draws = []
for low, high in zip(edges.tolist(), edges[1:].tolist()):
    t = torch.linspace(low, high - 1, len(x_0)).long()
    eps = torch.randn(x_0.shape, generator=generator)
    test_draws.append(Draws(t.to(lesson.device), eps.to(lesson.device)))


# %%
@torch.no_grad()
def measure(text_encoder, unet):
    """Losses [2, bins, samples]: with each picture's own caption, with its neighbour's."""
    context = text_encoder(tokens)
    rows = []
    for words in (context, context.roll(1, dims=0)):
        errors = [squared_error(unet, schedule, x_0, words, draws) for draws in test_draws]
        rows.append(torch.stack([error.mean(dim=(1, 2, 3)).cpu() for error in errors]))
    return torch.stack(rows)


losses = {"before": measure(half.text_encoder, half.unet)}
assert losses["before"].shape == (2, len(test_draws), len(x_0))

# %%
alpha_bar = schedule.alpha_bar.float()
a = torch.stack([alpha_bar[draws.t.cpu()] for draws in test_draws])
own = losses["before"][0]
as_v = own if schedule.config.prediction == "v" else own / a
as_eps = as_v * a
fig, axis = plt.subplots()
axis.plot(middles, as_v.mean(dim=1), marker="o", color=BLUE, label="v, half")
axis.plot(middles, as_eps.mean(dim=1), marker="s", color=ORANGE, label="$\\epsilon$, half")
axis.plot(torch.ones(T), color=BLUE, linestyle="--", linewidth=1, label="v, a multiple of $x_t$")
axis.plot(alpha_bar, "--", color=ORANGE, linewidth=1, label="$\\epsilon$, a multiple of $x_t$")
axis.set(xlabel="timestep t", ylabel="loss", ylim=(0, 1.05))
axis.legend(fontsize=11, ncols=2, loc="upper right", bbox_to_anchor=(1, 0.95))
lesson.show(fig, "targets", "Loss of v stays below one line at 1; loss of eps falls to zero.")

# %% [markdown]
# Full lines are the half-trained model, which answers with v; its errors can be counted as errors of $\epsilon$ too, by the factor
# $\bar\alpha_t$. As $\epsilon$ its late answers look perfect, and so do those of a network that knows nothing. As v they are the worst.
#
# The very last timestep shows it best. The schedule ends in pure noise (lesson 01), so $\sqrt{\bar\alpha_t}$ is zero there. Then $x_t =
# \epsilon$ and $v = -x_0$: the words are all that there is to go by, and the target is the whole picture.

# %%
last = torch.full((len(x_0),), T - 1, device=lesson.device)
eps = test_draws[-1].eps
x_t = schedule.q_sample(x_0, last, eps)
print(f"left of the picture at t = {T - 1}: {alpha_bar[-1].sqrt():.3f}")
print(f"x_t is off eps by {(x_t - eps).square().mean().sqrt():.3f}")
v = schedule.velocity(x_0, last, eps)
print(f"v is off -x_0 by {(v + x_0).square().mean().sqrt():.3f}")
back = schedule.x0_from_eps(x_t, last, eps)
print(f"x_0 from eps: {int(back.isfinite().sum())} of {back.numel()} numbers are finite")
back = schedule.x0_from_v(x_t, last, v)
print(f"x_0 from v: {int(back.isfinite().sum())} of {back.numel()}")

# %% [markdown]
# From a perfect $\epsilon$ nothing can be got back there; it is 0 / 0. A model that begins its pictures at pure noise has to be asked for
# something else, and v is that.

# %% [markdown]
# ## Your turn: ema_update
#
# Each step of training follows the gradient of a few samples, and which samples they are is chance. So the weights shake. Two things tame
# that. The first is a running mean of all weights, kept beside them and never trained itself; it is called EMA, *exponential moving
# average*, and the file that is given away holds it, as that of `half` does. After every step, with $n$ the number of steps before it,
#
# $$\bar w \leftarrow d \, \bar w + (1 - d) \, w \qquad d = \min \left( \mathrm{decay}, \; \frac{1 + n}{10 + n} \right)$$
#
# With a decay of 0.9995 it looks back over some 2,000 steps. But at the beginning the mean is only the weights that training began with, so
# d starts low and rises with n: the mean looks back over the last tenth or so of the steps taken, until the decay is reached. In a run as
# short as ours these are a handful.

# %%
def ema_update(mean, weight, decay, n):
    """The new mean; mean and weight of one shape, decay a number, n the steps before this one."""
    # YOUR CODE, about 2 lines


def of_the_library(mean, weight, decay, n):
    module = torch.nn.ParameterDict({"w": mean.clone()})
    average = ExponentialAverage(module, decay)
    average.steps = n
    module["w"].data.copy_(weight)
    average.update(module)
    return average.mean["w"]


ema_update = lesson.check(ema_update, instead=of_the_library)

# %%
decay = RECIPES["half"].average
print(f"decay {decay}: the mean of some {1 / (1 - decay):,.0f} steps")
for n in (0, 10, 100, 1000, 100_000):
    d = min(decay, (1 + n) / (10 + n))
    print(f"n = {n:6}: d = {d:.4f}, looks back {1 / (1 - d):,.0f}")

# %% [markdown]
# ## A rate that stays, a rate that falls
#
# The other is the learning rate. At a constant rate the weights keep shaking, however long it goes on. A rate that falls lets them come to
# rest.
#
# `DiffusionTask` says what is trained and what its loss is, `Settings` says how, and `Training` is the loop. The optimizers are two: Muon
# for the matrices, which makes a step equally large in all directions of a matrix, and AdamW for everything else, a relative of the Adam in
# lesson 02, in which every number moves about equally far. Captions are left empty for one sample in ten, so that guidance (lesson 00) has
# an answer without words to compare with.
#
# Both runs go on at the rate at which `half` was made; `constant` and `linear` are the library's names for what becomes of it. After every
# step the weights of the U-Net's last convolution are written down, to follow one of them.

# %%
RATE = RECIPES["half"].learning_rate
rate = RATE if bundled else RATE / 100  # all of it would ruin a large model


def prepare(falls, config, steps):
    settings = Settings(
        steps=steps, batch=batch, learning_rate=rate, schedule=falls, clip=None, average=decay
    )
    task = DiffusionTask(config, RECIPES["half"], scenes, lesson.device, half)
    return Training(task, settings, lesson.device)


def weight_of(unet):
    return unet.conv_out.weight.detach().cpu().clone()


# %%
runs = {falls: prepare(falls, half.config, steps) for falls in ("constant", "linear")}
seen, rates = {}, {}
for falls, training in runs.items():
    unet, text_encoder = training.task.unet, training.task.text_encoder
    seen[falls], rates[falls] = [weight_of(unet)], []
    for step in training.run():
        seen[falls].append(weight_of(unet))
        rates[falls].append(step.rate)
    losses[falls] = measure(text_encoder, unet)
    print(f"{falls}: rate {rates[falls][0]:.4g} at first, {rates[falls][-1]:.1g} at last")
print(f"{steps} steps of {batch}; half had steps of {RECIPES['half'].batch}")

# %%
averages = {}
for falls, weights in seen.items():
    mean, averages[falls] = weights[0], [weights[0]]
    for n, weight in enumerate(weights[1:]):
        mean = ema_update(mean, weight, decay, n)
        averages[falls].append(mean)
    kept = runs[falls].averages["unet"].mean["conv_out.weight"].cpu()
    assert mean.shape == kept.shape and torch.allclose(mean, kept, atol=1e-5)

# %%
fig, (top, bottom) = plt.subplots(2, figsize=(6, 4.6), sharex=True, height_ratios=(1, 2))
for falls, style in (("constant", "-"), ("linear", "--")):
    top.plot(range(1, steps + 1), [1000 * rate for rate in rates[falls]], style)
    one, mean = (
        [float(weight.flatten()[0]) for weight in history[falls]] for history in (seen, averages)
    )
    bottom.plot(one, style, label=f"{falls}, the weight")
    bottom.plot(mean, style, color="black", linewidth=1, label=f"{falls}, its mean")
top.set(ylabel="1000 × rate", ylim=(0, None))
bottom.set(xlabel="step", ylabel="one weight")
bottom.legend(fontsize=11)
lesson.show(fig, "weight", "One weight wanders on at a constant rate, rests where the rate falls.")

# %%
for falls, training in runs.items():
    modules, means = training.task.modules, training.averages
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(means[name].put_in(module))
        losses[f"{falls}, mean"] = measure(**modules)
        drawn[falls] = draw(**modules, prompts=shown)
for name, (own, _) in losses.items():
    print(f"{name:14} loss {own.mean():.3f}")
ends = {name: float(own.mean()) for name, (own, _) in losses.items()}
if bundled and not lesson.quick:
    assert ends["constant"] > ends["constant, mean"] > ends["linear, mean"] > ends["before"]

# %% [markdown]
# Both end higher than they began, which answers the first guess. `half` is not what the last of its steps left behind but the mean of many,
# and those were steps of 64 samples. Eight samples at the same rate shake the weights out of that quiet place. The constant rate goes on
# shaking them, and its loss is the highest. The mean takes some of that out, though it looks back over a few steps only. Where the rate
# falls, the weights come to rest, and the loss comes down again a good part of the way; there the mean has nothing left to do. In the
# picture each mean follows its weight smoothly and a little late.
#
# To get below the beginning takes more than a minute: more samples a step, many more steps, and the fall at the end. The whole recipe has
# all three, and the bundled model shows where it leads.

# %% [markdown]
# ## The loss, bin by bin
#
# One number hides where the loss is (lesson 02). Beside the beginning and the end of the falling run stands the bundled model: the same
# scenes and the same loss, a wider U-Net, some thousands of steps, and a rate that fell.

# %%
if bundled:
    done = lesson.load()
    losses["bundled"] = measure(done.text_encoder, done.unet)
    drawn["bundled\nmodel"] = draw(done.text_encoder, done.unet, shown)
curves = {"before": "before", "linear, mean": "after", "bundled": "bundled model"}
curves = {label: losses[name].mean(dim=-1) for name, label in curves.items() if name in losses}
fig, axis = plt.subplots()
for (label, (own, _)), marker in zip(curves.items(), "os^"):
    axis.plot(middles, own, marker=marker, label=label)
    print(f"{label:14} first {own[0]:.2f}, lowest {own.min():.2f}, last {own[-1]:.2f}")
axis.set(xlabel="timestep t", ylabel="loss", ylim=(0, None))
axis.legend()
lesson.show(fig, "bins", "Loss before and after, and the bundled model's.")

# %% [markdown]
# All curves are lowest in the middle. At early timesteps v is nearly the noise, and of that a part cannot be told (lesson 02). At late ones
# it is nearly the picture, of which only the words speak. The bundled model is ahead everywhere.

# %% [markdown]
# ## Does the model read?
#
# Loss alone does not tell whether the words are heard. So measure it twice: with each picture's own caption, and with its neighbour's. A
# model that does not read has the same loss both times; what the wrong words cost is what the right ones are worth.

# %%
fig, axis = plt.subplots()
for (label, (own, other)), marker in zip(curves.items(), "os^"):
    axis.plot(middles, other - own, marker=marker, label=label)
    added = other.mean() / own.mean() - 1
    print(f"{label}: loss {own.mean():.3f}, with another's caption {added:.0%} more")
axis.set(xlabel="timestep t", ylabel="added by a wrong caption")
axis.legend()
lesson.show(fig, "reads", "A wrong caption costs little at early timesteps, most at late ones.")

# %% [markdown]
# The second guess: for the half-trained model wrong words add roughly half of its loss again, and most of that at late timesteps. At early
# ones the picture speaks for itself. So it reads. The bundled model reads much better: there wrong words cost more than its whole loss. A
# loss that hardly falls any more can hide that; this number does not.

# %%
rows = [to_images(pixels[: len(shown)]), *drawn.values()]
fig = picture_grid(rows, labels=["scenes", *drawn])
lesson.show(fig, "after", "Scenes; patches before and after; the bundled model draws the things.")

# %% [markdown]
# The pictures agree with the loss. The constant run has torn things apart, look at the mushroom; the falling run stands between it and the
# beginning; and the bundled model draws things that can be named, most of them.

# %% [markdown]
# ## Break it: exchange the target
#
# The classic slip is one line: the model answers with v, and is trained to answer with $\epsilon$, because that is what the first papers
# and most code examples do. Shapes fit, nothing complains. Here with the recipe's own rate.

# %%
other = "eps" if schedule.config.prediction == "v" else "v"
config = replace(half.config, schedule=replace(half.config.schedule, prediction=other))
mistaken = prepare("constant", config, 2 if lesson.quick else 20)
fell = [float(step.loss) for step in mistaken.run()]
print(f"asked for {other}: loss {fell[0]:.2f} at first, {np.mean(fell[-5:]):.2f} at last")
losses["exchanged"] = measure(**mistaken.task.modules)
if bundled and not lesson.quick:
    assert np.mean(fell[-5:]) < 0.5 * ends["before"] and losses["exchanged"][0].mean() > 1
for name in ("before", "exchanged"):
    by_bin = losses[name][0].mean(dim=-1)
    print(f"{name}: by the right target {by_bin.mean():.2f}, in the last bin {by_bin[-1]:.2f}")

# %%
drawn["exchanged"] = draw(**mistaken.task.modules, prompts=shown)
rows = [drawn["before"], drawn["exchanged"]]
fig = picture_grid(rows, labels=["before", "target\nexchanged"])
lesson.show(fig, "exchanged", "Patches before; nearly plain brown after the target was exchanged.")

# %% [markdown]
# The loss falls in these few steps to less than half of what the right target has, and looks well. It is cheaply earned: at late timesteps
# $x_t$ is the noise. The sampler still takes the answer for v, and every caption gives nearly the same plain brown. By the right target the
# model is now worse than one that answers nothing, whose loss is one. No loss says anything alone: hold it against that of an answer that
# knows nothing, as above, and look at pictures early.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/12_train_a_text_to_image_model.py --model v1-5-pruned-emaonly.safetensors --device cuda` does the same with a checkpoint
# of yours, on the same scenes, enlarged, at a learning rate 100 times lower: it has seen far more than emoji, and a larger rate would take
# that from it. `emaonly` in its name says that the file holds the averages alone, as this lesson's `half` does. It answers with $\epsilon$,
# as all of Stable Diffusion 1.x; Stable Diffusion 2.x in its larger version answers with v.
#
# What stands in memory while all of it is trained, without any activations? Each number four times in float32: the weight, its gradient,
# Muon's memory of earlier gradients, and the average.

# %%
with torch.device("meta"):  # shapes alone
    large = [UNet(SD1.unet), TextEncoder(SD1.text_encoder)]
total = sum(p.numel() for part in large for p in part.parameters())
print(f"Stable Diffusion 1.x: {total / 1e6:.0f} million numbers are trained")
print(f"four times in float32: {4 * 4e-9 * total:.1f} GB")
print(f"this model: {4 * 4e-9 * numbers:.3f} GB")
print(f"learning rates: {RATE:g} and {RATE / 100:g}, 100 times lower")

# %% [markdown]
# And this lesson keeps three such trainings. So one seldom trains all of a large model; lessons 14 to 17 show what is done instead.

# %% [markdown]
# ## On a GPU
#
# The whole training, from nothing, of the model that ships and of the judge of its pictures, on all 40,000 scenes:
#
# ```bash
# minidiff train from-scratch runs/mine --recipe bundled
# ```
#
# Before it begins it measures a few steps and says how many minutes it will take on your machine: hours on a laptop. Stopped and started
# again it goes on where it was. Expect backgrounds first, then colours, then shapes, in `samples-*.png`, and in the folder at the end a
# model, and a card that says how many of its pictures the judge could name. `--recipe half --vae tiny` makes the model that this lesson
# began with.

# %% [markdown]
# ## Read next
#
# - `minidiff/trainers/from_scratch.py`: `DiffusionTask`, what you have trained, and before it `AutoencoderTask`, which comes first.
# - `minidiff/trainers/loop.py`: `Training.run` is the loop, `minidiff/trainers/optimizer.py` has `ExponentialAverage`, your two lines, and
#   Muon.
# - Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models", eq. 3; Salimans and Ho 2022, "Progressive
#   distillation for fast sampling of diffusion models", section 4, on v; Lin et al. 2023 on the last timestep.
# - Lesson 14: to teach a finished model one thing more.
