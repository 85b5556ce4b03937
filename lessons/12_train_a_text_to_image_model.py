# %% [markdown]
# # 12 Train a text-to-image model
#
# **What does it take to train such a model, and how does one see that it learns?**
#
# - Explains: [minidiff/bundled/tasks.py](../minidiff/bundled/tasks.py), [minidiff/trainers/engine/optimizer.py](../minidiff/trainers/engine/optimizer.py)
# - You change: `ema_update`, the running mean of all weights, which is what is kept
# - Minutes: 35
# - Picture: [figures/12-stations.png](figures/12-stations.png)
#
# ![The whole pipeline; this lesson is about the training loss](figures/pipeline-training.svg)
#
# All parts have been on the table: noise, loss, U-Net, latents, words. Here they are trained together, from nothing, for about half a
# minute. That is far too short for pictures of things. It is long enough to see what comes first, and two models that were trained for
# longer show what comes later.

# %% [markdown]
# ## Guess first
#
# A U-Net and a text encoder begin with random numbers and learn from a few hundred captioned scenes. In one run the learning rate stays as
# it is. In another, with the same beginning, the same scenes and the same noise, it falls to zero over the last fifth of the steps.
#
# 1. What is the first thing to be seen in the pictures: shapes, the things' colours, or the backgrounds?
# 2. At which timesteps does the loss fall first: at early ones, where little noise hides the picture, in the middle, or at late ones?
# 3. Which run has the lower loss at its end?

# %% [markdown]
# ## A model that knows nothing
#
# What is trained is the U-Net, and together with it the text encoder; nobody tells the one what the other's vectors mean. The autoencoder
# (lesson 08) is done before and stays as it is: here it is that of the bundled model. To be quick the U-Net is narrow, with attention at
# its finest level only, and the text encoder has one layer.

# %%
import copy
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

from lessons.common import BLUE, ORANGE, picture_grid, start
from minidiff.bundled.recipe import RECIPES
from minidiff.bundled.tasks import DiffusionTask, Latents
from minidiff.config import SD1
from minidiff.pictures import to_pixels
from minidiff.pipeline import to_images
from minidiff.scenes.scenes import sample_scene

# %%
from minidiff.text_encoder import TextEncoder
from minidiff.trainers.engine.diffusion_loss import NoiseSample, squared_error
from minidiff.trainers.engine.ema import EMA
from minidiff.trainers.engine.loop import Training
from minidiff.trainers.engine.settings import Settings
from minidiff.unet import UNet

# %%
lesson = start("12_train_a_text_to_image_model")
bundled = lesson.model == "tiny"
done = lesson.load()
schedule, T, size = done.schedule, done.schedule.config.timesteps, done.config.image_size
config = done.config
if bundled:
    unet = replace(config.unet, widths=(32, 32, 64), heads=(1, 1, 2))
    unet = replace(unet, attention=(True, False, False))
    config = replace(config, unet=unet, text_encoder=replace(config.text_encoder, layers=1))
    print(f"a U-Net of widths {config.unet.widths}; the bundled model's: {done.config.unet.widths}")


# %%
@torch.no_grad()
def compose(count, seed):
    """Scenes: their pixels, their captions, and what the training needs of them."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    captions = [scene.caption for scene in scenes]
    pixels = F.interpolate(to_pixels(np.stack([scene.image for scene in scenes])), (size, size))
    mean = [done.vae.encode(part.to(lesson.device)).mean.cpu() for part in pixels.split(10)]
    mean = torch.cat(mean)
    mask = torch.from_numpy(np.stack([scene.mask for scene in scenes]))[:, None]
    mask = F.adaptive_avg_pool2d(mask, mean.shape[-2:])  # the share of object in each cell
    return pixels, captions, Latents(mean, done.tokenizer(captions), mask)


# %%
def draw(text_encoder, unet, prompts):
    sd = copy.copy(done)
    sd.text.encoders["text_encoder"], sd.unet = text_encoder, unet
    *_, last = sd.denoise(prompts, seeds=range(len(prompts)), steps=drawing_steps)
    pixels = sd.decode(last.x_t)
    assert pixels.shape == (len(prompts), 3, size, size)
    return to_images(pixels)


# %%
count, steps, batch = (24, 4, 2) if lesson.quick else (300, 160, 8)
drawing_steps = 3 if lesson.quick else 12
pixels, captions, scenes = compose(count, seed=0)
B, c, h, w = scenes.mean.shape
assert (B, c, h) == (count, done.config.vae.latent_channels, size // done.config.vae.factor)
assert scenes.mask.shape == (B, 1, h, w)
shown = captions[:6]
for caption in shown:
    print(caption)

# %% [markdown]
# Scenes are composed anew for each training and never stored: an emoji or two on a plain colour, with a caption made of the labels. (A
# *style* is one of three sets of emoji, each drawn by other hands.) The autoencoder encodes each scene once, before the training, so that a
# step needs no pixels.
#
# `DiffusionTask` says what is trained and what its loss is, `Settings` says how, and `Training` is the loop. There are two optimizers, Muon
# for the matrices and AdamW for everything else. AdamW is a relative of the Adam in lesson 02: in a step every number moves about equally
# far. Muon treats a matrix as a whole, and makes its step equally large in all directions, so that rare ones are learned as fast as common
# ones. Captions are left empty for one sample in ten, so that guidance (lesson 10) has an answer without words to compare with. Timesteps
# are not all drawn equally often, as they were in lesson 02: there are more from the middle on, where the words decide, and few early ones.
# The recipe of the bundled model lets cells with an object count more in the loss, by `object_weight`, because a plain background is soon
# learned. For a run as short as this one, the background is enough, and all cells count the same.

# %%
# Few samples a step and a high rate: best for so little time, by trial.
rate = 0.0125 if bundled else RECIPES["half"].learning_rate / 100  # more would ruin a large model
recipe = replace(RECIPES["half"], object_weight=0.0)
decay = recipe.ema_decay


def prepare(config, steps):
    settings = Settings(steps=steps, batch=batch, learning_rate=rate, ema_decay=decay)
    settings = replace(settings, max_grad_norm=None)
    init = None if bundled else done  # of your own checkpoint all is kept, and goes on learning
    task = DiffusionTask(config, recipe, scenes, lesson.device, init)
    return Training(task, settings, lesson.device)


# %%
first = prepare(config, steps)
beginner = first.task
numbers = sum(p.numel() for module in beginner.modules.values() for p in module.parameters())
print(f"{numbers:,} numbers are trained, in {steps} steps of {batch} samples")
begin = "nothing learned" if bundled else "before"
nothing = draw(beginner.text_encoder, beginner.unet, shown)
rows = [to_images(pixels[: len(shown)]), nothing]
fig = picture_grid(rows, labels=["scenes", begin.replace(" ", "\n")])
lesson.show(fig, "nothing", "Scenes; below, coloured noise of one kind for every caption.")

# %% [markdown]
# Noise goes in, and noise comes out, alike for every caption.

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
#
# To see it one needs a model that has learned something. Beside the bundled model lies `half`, wider than yours and stopped on purpose
# before it was done.

# %%
half = replace(lesson, model="half").load() if bundled else done
*_, test = compose(4 if lesson.quick else 12, seed=1)
x_0 = (test.mean * done.config.vae.scaling_factor).to(lesson.device)
tokens = test.tokens.to(lesson.device)
generator = torch.Generator().manual_seed(0)
edges = torch.linspace(0, T, 4 if lesson.quick else 7).long()
middles = ((edges[1:] + edges[:-1]) / 2).tolist()
test_draws = []
for low, high in zip(edges.tolist(), edges[1:].tolist()):
    t = torch.linspace(low, high - 1, len(x_0)).long()
    eps = torch.randn(x_0.shape, generator=generator)
    test_draws.append(NoiseSample(t.to(lesson.device), eps.to(lesson.device)))


# %%
@torch.no_grad()
def measure(text_encoder, unet, asked=None):
    """Losses [2, bins, samples]: with each picture's own caption, with its neighbour's."""
    context = text_encoder(tokens)
    rows = []
    for words in (context, context.roll(1, dims=0)):
        errors = [squared_error(unet, asked or schedule, x_0, words, draws) for draws in test_draws]
        rows.append(torch.stack([error.mean(dim=(1, 2, 3)).cpu() for error in errors]))
    return torch.stack(rows)


losses = {"half": measure(half.text_encoder, half.unet)}
assert losses["half"].shape == (2, len(test_draws), len(x_0))

# %%
alpha_bar = schedule.alpha_bar.float()
a = torch.stack([alpha_bar[draws.t.cpu()] for draws in test_draws])
own = losses["half"][0]
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
# Full lines are the half-trained model, which answers with v. From v follows
# $\epsilon = \sqrt{\bar\alpha_t} \; v + \sqrt{1 - \bar\alpha_t} \; x_t$, where $x_t$ is known. So the same answers have, as $\epsilon$, the
# loss times $\bar\alpha_t$. As $\epsilon$ the late ones look perfect, and so do those of a network that knows nothing. As v they are the
# worst.
#
# The very last timestep shows it best. The schedule ends in pure noise (lesson 01), so $\sqrt{\bar\alpha_t}$ is zero there. Then
# $x_t = \epsilon$ and $v = -x_0$: the words are all that there is to go by, and the target is the whole picture.

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
# There even a perfect $\epsilon$ says nothing about the picture: the way back of lesson 01 divides zero by zero. A model that begins its
# pictures at pure noise has to be asked for something else, and v is that.

# %% [markdown]
# ## Your turn: ema_update
#
# Each step of training follows the gradient of a few samples, and which samples they are is chance. So the weights shake. Two things tame
# that. The first is a running mean of all weights, kept beside them and never trained itself. It is called EMA, *exponential moving
# average*, and in the end it is what is saved to a file, in place of the weights, as for `half`. After every step, with $n$ the number of
# steps before it,
#
# $$\bar w \leftarrow d \, \bar w + (1 - d) \, w \qquad d = \min \left( \mathrm{decay}, \; \frac{1 + n}{10 + n} \right)$$
#
# With a decay of 0.9995 it looks back over some 2,000 steps. But at the beginning the mean is only the weights that training began with, so
# d starts low and rises with n: the mean looks back over the last tenth or so of the steps taken, until the decay is reached. In a run as
# short as ours these are never twenty steps.


# %%
def ema_update(mean, weight, decay, n):
    """The new mean; mean and weight of one shape, decay a number, n the steps before this one."""
    # YOUR CODE, about 2 lines


def of_the_library(mean, weight, decay, n):
    module = torch.nn.ParameterDict({"w": mean.clone()})
    average = EMA(module, decay)
    average.steps = n
    module["w"].data.copy_(weight)
    average.update(module)
    return average.mean["w"]


ema_update = lesson.check(ema_update, instead=of_the_library)

# %%
print(f"decay {decay}: the mean of some {1 / (1 - decay):,.0f} steps")
for n in (0, 10, 100, 1000, 100_000):
    d = min(decay, (1 + n) / (10 + n))
    print(f"n = {n:6}: d = {d:.4f}, looks back {1 / (1 - d):,.0f}")

# %% [markdown]
# ## A rate that stays, a rate that falls
#
# The second thing that tames the shaking is the learning rate. At a constant rate the weights keep shaking, however long it goes on. A rate
# that falls lets them come to rest. `constant` and `linear` are the library's names for the two. `linear` falls to zero in a straight line
# after a *warm-up*, some first steps in which the rate rises. Here the steps already taken count as the warm-up, so that it falls at once.
#
# Now train. After four fifths of the steps a second run takes up the first where it stands, with its weights and the memory of its
# optimizers; from there on both see the same samples, and only the rate is another. After every step the weights of the U-Net's last
# convolution are written down, to follow one of them. The loss is measured after a third of the steps, and at both ends.


# %%
def weight_of(unet):
    return unet.conv_out.weight.detach().cpu().clone()


def with_falling_rate(training):
    """The run once more from where it stands, with a rate that falls from here to the end."""
    other = prepare(config, steps)
    other.load_state_dict(copy.deepcopy(training.state_dict()))
    settings = replace(other.settings, schedule="linear", warmup_steps=training.done)
    other.settings = settings  # linear: falls after the warm-up, which is over
    return other


# %%
losses["nothing"] = measure(beginner.text_encoder, beginner.unet)
runs, seen, rates = {"constant": first}, {}, {}
seen["constant"], rates["constant"] = [weight_of(beginner.unet)], []
for step in first.run():
    seen["constant"].append(weight_of(beginner.unet))
    rates["constant"].append(step.lr)
    if step.done == steps // 3:
        losses[f"after {step.done}"] = measure(**first.task.modules)
    if step.done == 4 * steps // 5:
        runs["linear"] = with_falling_rate(first)
        seen["linear"], rates["linear"] = list(seen["constant"]), list(rates["constant"])
for step in runs["linear"].run():
    seen["linear"].append(weight_of(runs["linear"].task.unet))
    rates["linear"].append(step.lr)

# %%
averages = {}
for falls, weights in seen.items():
    mean, averages[falls] = weights[0], [weights[0]]
    for n, weight in enumerate(weights[1:]):
        mean = ema_update(mean, weight, decay, n)
        averages[falls].append(mean)
    kept = runs[falls].ema["unet"].mean["conv_out.weight"].cpu()
    assert mean.shape == kept.shape and torch.allclose(mean, kept, atol=1e-5)

# %%
fig, (top, bottom) = plt.subplots(2, figsize=(6, 4.6), sharex=True, height_ratios=(1, 2))
for falls, style in (("constant", "-"), ("linear", "--")):
    top.plot(range(1, steps + 1), [1000 * rate for rate in rates[falls]], style)
    one = [float(weight.flatten()[0]) for weight in seen[falls]]
    mean = [float(weight.flatten()[0]) for weight in averages[falls]]
    bottom.plot(one, style, label=f"{falls}, the weight")
    bottom.plot(mean, style, color="black", linewidth=1, label=f"{falls}, its mean")
top.set(ylabel="1000 × rate", ylim=(0, None))
bottom.set(xlabel="step", ylabel="one weight")
bottom.legend(fontsize=11)
lesson.show(fig, "weight", "One weight moves on at a constant rate, slows where the rate falls.")

# %%
for falls, training in runs.items():
    modules, means = training.task.modules, training.ema
    losses[falls] = measure(**modules)
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(means[name].swapped_in(module))
        losses[f"{falls}, mean"] = measure(**modules)

# %%
ends = {name: float(own.mean()) for name, (own, _) in losses.items()}
for name, loss in ends.items():
    print(f"{name:14} loss {loss:.3f}")
if bundled and not lesson.quick:
    assert max(ends["constant, mean"], ends["linear"]) < 1.02 * ends["constant"]
    assert ends["constant"] < 0.8 * ends["nothing"]

# %% [markdown]
# It learns: both losses end well below the beginning. And the third guess: the falling rate ends lower than the constant one. Nothing was
# learned that the other run had not seen; the weights have come to rest, and lost what a few samples had shaken into them. The mean does
# nearly the same for the constant run, though it looks back over a few steps only. Where the rate falls, the weights hardly move any more,
# and there is nothing left for the mean to do. In the picture each mean follows its weight smoothly and late, which is its price: while
# the weights still have a way to go, it is behind them.
#
# One run as short as this shows the shaking and what tames it, and not how much either is worth in a long one. `half`, whose rate never
# fell, is kept as its mean; the bundled model had both.

# %% [markdown]
# ## Where the loss has fallen
#
# One number hides where the loss is (lesson 02). So look at it bin by bin: before the first step, after a third of your run, at the
# end of its falling rate, and beside it two models that were trained for longer.

# %%
if bundled:
    losses["bundled"] = measure(done.text_encoder, done.unet)
    samples = {"your run": steps * batch, "half": RECIPES["half"].steps * RECIPES["half"].batch}
    samples["bundled model"] = RECIPES["bundled"].steps * RECIPES["bundled"].batch
    for name, many in samples.items():
        print(f"{name:14}{many:8,} samples")

# %%
curves = {"nothing": begin, f"after {steps // 3}": "a third", "linear": "your run"}
curves |= {"half": "half", "bundled": "bundled model"} if bundled else {}
curves = {label: losses[name].mean(dim=-1) for name, label in curves.items()}
fig, axis = plt.subplots(figsize=(6, 4.2))
for (label, (own, _)), marker in zip(curves.items(), "xsov^"):
    axis.plot(middles, own, marker=marker, label=label)
axis.set(xlabel="timestep t", ylabel="loss", ylim=(0, None))
axis.legend(fontsize=11, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2))
lesson.show(fig, "bins", "Loss above one at nothing; falls first in the middle, later everywhere.")

# %%
for label, (own, _) in curves.items():
    print(f"{label:14} first {own[0]:.2f}, lowest {own.min():.2f}, last {own[-1]:.2f}")

# %% [markdown]
# The second guess: the loss falls first in the middle. There $x_t$ shows enough of the picture to go on with, and enough noise to be told
# from it. At early timesteps v is nearly the noise, and of that a part cannot be told (lesson 02); they are also the ones that training
# draws least. At late ones v is nearly the picture, but for its sign, and only the words speak of that; there the loss stays highest. The
# longer trainings have the same shape, lower down.
#
# A network that always answers zero would have a loss of one. Before its first step the model is above that: its answers are not zero, and
# have nothing to do with the question.

# %% [markdown]
# ## Does the model read?
#
# Loss alone does not tell whether the words are heard. So measure it twice: with each picture's own caption, and with its neighbour's. A
# model that does not read has the same loss both times; what the wrong words cost is what the right ones are worth.

# %%
fig, axis = plt.subplots()
for (label, (own, other)), marker in zip(curves.items(), "xsov^"):
    axis.plot(middles, other - own, marker=marker, label=label)
    added = other.mean() / own.mean() - 1
    print(f"{label}: loss {own.mean():.3f}, with another's caption {added:.0%} more")
axis.set(xlabel="timestep t", ylabel="added by a wrong caption")
axis.legend(fontsize=11)
lesson.show(fig, "reads", "A wrong caption costs nothing at first, more and more later on.")

# %% [markdown]
# Look at the numbers. After a third of your run wrong words cost nothing: the model has learned about pictures, and does not read. By its
# end it has begun to, at late timesteps, where the words are most of what there is. Reading comes late, and goes on for long: for `half`
# wrong words add roughly half of its loss again, and for the bundled model more than its whole loss. A loss that hardly falls any more can
# hide that; this number does not.

# %% [markdown]
# ## Four stations of one training
#
# They are three models of different width, so not one training in truth; but what comes after what is the same in all.

# %%
stations = {"scenes": to_images(pixels[: len(shown)]), begin.replace(" ", "\n"): nothing}
stations["your run"] = draw(**runs["linear"].task.modules, prompts=shown)
if bundled:
    stations["half"] = draw(half.text_encoder, half.unet, shown)
    stations["bundled\nmodel"] = draw(done.text_encoder, done.unet, shown)
fig = picture_grid(list(stations.values()), labels=list(stations))
lesson.show(fig, "stations", "Scenes; noise; backgrounds; patches on backgrounds; things.")

# %% [markdown]
# The first guess: backgrounds come first. With nothing learned all pictures are alike. After your run white backgrounds are white and black
# ones black. Red shows at the edges, where hardly any scene has a thing; the yellow background has become red too. Nowhere is there a
# thing, and much of the noise is left. After forty times as many samples `half` has the backgrounds, the colours of things, and patches in
# place of the things. The bundled model, with ten times as many again, draws things, most of which can be named.

# %% [markdown]
# ## Break it: exchange the target
#
# The classic slip is one line: the model answers with v, and is trained to answer with $\epsilon$, because that is what the first papers
# and most code examples do. Shapes fit, nothing complains.

# %%
other = "eps" if schedule.config.prediction == "v" else "v"
asked_otherwise = replace(config, schedule=replace(config.schedule, prediction=other))
mistaken = prepare(asked_otherwise, 2 if lesson.quick else 20)
for _ in mistaken.run():
    pass
looks = measure(**mistaken.task.modules, asked=mistaken.task.schedule)[0].mean(dim=-1)
is_so = measure(**mistaken.task.modules)[0].mean(dim=-1)
print(f"{mistaken.done} steps, asked for {other}")
print(f"by that target: loss {looks.mean():.2f}, in the last bin {looks[-1]:.2f}")
print(f"by the right one: loss {is_so.mean():.2f}, in the last bin {is_so[-1]:.2f}")
if bundled and not lesson.quick:
    assert looks.mean() < ends["linear"] < 1 < is_so.mean()

# %%
rows = [stations["your run"], draw(**mistaken.task.modules, prompts=shown)]
fig = picture_grid(rows, labels=["your run", "target\nexchanged"])
lesson.show(fig, "exchanged", "Backgrounds above; nearly plain grey with the target exchanged.")

# %% [markdown]
# After these few steps the loss is far below that of your whole run, and looks well. It is cheaply earned: at late timesteps $x_t$ is the
# noise. The sampler still takes the answer for v, and every caption gives nearly the same grey. By the right target the model is now worse
# than one that always answers zero, whose loss is one. No loss says anything alone: hold it against that of an answer that knows nothing,
# as above, and look at pictures early.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/12_train_a_text_to_image_model.py --model v1-5-pruned-emaonly.safetensors --device cuda` does the same with a checkpoint
# of yours, on the same scenes, enlarged. It does not begin from nothing: the checkpoint goes on learning, at a rate 100 times lower than
# the bundled model's, because it has seen far more than emoji, and a larger rate would take that from it. `emaonly` in its name says that
# the file holds the averages alone, as those of the bundled models do. It answers with $\epsilon$, as all of Stable Diffusion 1.x does. Of
# Stable Diffusion 2.x the version for larger pictures answers with v.
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
RATE = RECIPES["bundled"].learning_rate
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
# model, and a card that says how many of its pictures the judge could name. `--recipe half --vae tiny` makes the model that stands between
# yours and it.

# %% [markdown]
# ## Read next
#
# - `minidiff/bundled/tasks.py`: `DiffusionTask`, what you have trained, and before it `AutoencoderTask`, which comes first.
# - `minidiff/trainers/engine/loop.py`: `Training.run` is the loop, `minidiff/trainers/engine/optimizer.py` has `EMA`, your two lines, and
#   Muon.
# - Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models", eq. 3; Salimans and Ho 2022, "Progressive
#   distillation for fast sampling of diffusion models", section 4, on v; Lin et al. 2023, "Common diffusion noise schedules and sample
#   steps are flawed", on the last timestep.
# - Lesson 14: to teach a finished model one thing more.
