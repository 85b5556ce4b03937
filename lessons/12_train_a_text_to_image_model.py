# %% [markdown]
# # 12 Train a text-to-image model
#
# **What does it take to train such a model, and how do we see that it learns?**
#
# - Explains: [minidiff/bundled/tasks.py](../minidiff/bundled/tasks.py), [minidiff/trainers/engine/optimizer.py](../minidiff/trainers/engine/optimizer.py)
# - You change: `velocity`, `ema_update` and `rate_at`: the target, the average that is kept, and the learning rate
# - Minutes: 50
# - Picture: [figures/12-stations.png](figures/12-stations.png)
#
# ![The whole pipeline; this lesson is about the training loss](figures/pipeline-training.svg)
#
# Noise, loss, U-Net, latents, words: you have met all the parts. Now we train them together, from scratch, for about half a minute. That is
# far too short for pictures of things. It is long enough to see what is learned first, and two models that were trained for longer show
# what comes later.

# %% [markdown]
# ## Guess first
#
# A U-Net and a text encoder start with random weights and learn from a few hundred captioned scenes. We train them twice, with the same
# start, the same scenes and the same noise. In one run the learning rate is constant. In the other it falls to zero over the last fifth of
# the steps.
#
# 1. What appears first in the pictures: shapes, the colours of things, or backgrounds?
# 2. At which timesteps does the loss fall first: at early ones, where little noise hides the picture, in the middle, or at late ones?
# 3. Which run has the lower loss at its end?

# %% [markdown]
# ## A model that knows nothing
#
# We train the U-Net together with the text encoder; nobody tells either of them what the vectors between them should mean. The VAE was
# trained before (lesson 08) and stays frozen; we use that of the bundled model. To be fast, our U-Net is narrow, with attention at its
# finest level only, and the text encoder has a single layer.

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
from minidiff.config import SD1
from minidiff.pictures import to_pixels
from minidiff.pipeline import to_images

lesson = start("12_train_a_text_to_image_model")

# %%
done, bundled = lesson.load(), lesson.model == "tiny"
schedule, T, size = done.schedule, done.schedule.config.timesteps, done.config.image_size
config = done.config
if bundled:
    n = len(config.unet.widths) - 1  # levels but the coarsest
    unet = replace(config.unet, widths=(32,) * n + (64,), heads=(1,) * n + (2,))
    unet = replace(unet, attention=(True,) + (False,) * n)
    config = replace(config, unet=unet, text_encoder=replace(config.text_encoder, layers=1))
    print(f"a U-Net of widths {config.unet.widths}; the bundled model's: {done.config.unet.widths}")

# %%
from minidiff.bundled.tasks import DiffusionTask, Latents
from minidiff.scenes.scenes import sample_scene


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
from minidiff.conditioning import TextSide


def draw(text_encoder, unet, prompts):
    sd = copy.copy(done)
    sd.text = TextSide(done.text.tokenizers, {"text_encoder": text_encoder})
    sd.unet = unet
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
# The scenes are composed anew for each training: one or two emoji on a plain colour, with a caption made from the labels. (A *style* is one
# of three sets of emoji, each by different artists.) The VAE encodes every scene once, before the training, so that a step needs no pixels.
#
# `DiffusionTask` says what is trained and with which loss, `Settings` says how, and `Training` is the loop. Four choices differ from those of
# lesson 02:
#
# - There are two optimizers, Muon for matrices and AdamW for everything else. AdamW is a relative of Adam: in a step, every number moves about
#   equally far. Muon treats a matrix as a whole and makes its step equally large in all directions, so that rare directions are learned as
#   fast as common ones.
# - One caption in ten is left empty, so that guidance has an unconditional prediction (lesson 10).
# - Timesteps are not drawn equally often. Most are drawn from the middle on, where the words decide (lesson 10).
# - The recipe of the bundled model gives more weight to cells with an object (`object_weight`), because plain backgrounds are soon learned. Our
#   run is too short to get beyond backgrounds, so all cells count the same.

# %%
from minidiff.trainers.engine.loop import Training
from minidiff.trainers.engine.settings import Settings

# Few samples a step and a high rate: the best for so little time, found by trial.
rate = 0.0125 if bundled else RECIPES["half"].learning_rate / 100  # more would ruin a large model
recipe = replace(RECIPES["half"], object_weight=0.0)
decay = recipe.ema_decay


def prepare(config, steps):
    settings = Settings(steps=steps, batch=batch, learning_rate=rate, ema_decay=decay)
    init = None if bundled else done  # a checkpoint of yours continues from its weights
    task = DiffusionTask(config, recipe, scenes, lesson.device, init)
    return Training(task, replace(settings, max_grad_norm=None), lesson.device)


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
# Every caption gives the same kind of noise.

# %% [markdown]
# ## What the network predicts: v
#
# In lesson 02 the network predicted the noise $\epsilon$. The bundled models predict the mixture that lesson 01 called v, the *velocity*
# (Salimans and Ho 2022, section 4):
#
# $$v = \sqrt{\bar\alpha_t} \; \epsilon - \sqrt{1 - \bar\alpha_t} \; x_0$$
#
# Why? Imagine a network that does not look at the picture and just returns the best multiple of $x_t$. If it should predict $\epsilon$, the
# best multiple is $\sqrt{1 - \bar\alpha_t} \; x_t$, with an error of $\bar\alpha_t$: next to nothing at late timesteps, because there $x_t$
# *is* the noise. If it should predict v, the best multiple is zero, with an error of one at every timestep. (Errors are mean squares, for
# latents of variance one.) With v there is as much to learn at the last timestep as at the first.

# %% [markdown]
# ## Your turn: velocity
#
# Write this target. `alpha_bar` is the table of lesson 01, and `t` has shape `[B]`, one timestep for each sample. `alpha_bar[t]` gives B
# values; add three axes with `[:, None, None, None]` to multiply whole latents. Two lines.
#
# When it is right, you see what it makes of one picture and one noise at a few timesteps.


# %%
def velocity(alpha_bar, x_0, t, eps):
    """sqrt(a) eps - sqrt(1 - a) x_0 with a = alpha_bar[t]; x_0 and eps [B, C, H, W], t [B]."""
    # YOUR CODE, about 2 lines


velocity = lesson.check(velocity)

# %% [markdown]
# To see the difference between the two targets, we need a model that has learned something. `half` comes with the bundled model. It is
# wider than yours and was stopped on purpose before it was finished.

# %%
from minidiff.trainers.engine.diffusion_loss import NoiseSample, squared_error

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
alpha_bar = schedule.alpha_bar.float()  # on the CPU
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
# The full lines are the half-trained model, which predicts v. Its prediction of the noise follows from that,
# $\epsilon = \sqrt{\bar\alpha_t} \; v + \sqrt{1 - \bar\alpha_t} \; x_t$, where $x_t$ is known, so the same predictions have, as
# $\epsilon$, the error of v times $\bar\alpha_t$. Judged as $\epsilon$, late predictions look perfect, but so do those of a network that
# knows nothing. Judged as v, they are the worst.
#
# The very last timestep is the clearest case. The schedule ends in pure noise (lesson 01), so $\sqrt{\bar\alpha_t}$ is zero,
# $x_t = \epsilon$ and $v = -x_0$. Only the words tell anything about the picture, and the target is the whole picture.

# %%
last = torch.full((len(x_0),), T - 1, device=lesson.device)
eps = test_draws[-1].eps
x_t = schedule.q_sample(x_0, last, eps)
print(f"left of the picture at t = {T - 1}: {alpha_bar[-1].sqrt():.3f}")
print(f"x_t is off eps by {(x_t - eps).square().mean().sqrt():.3f}")
v = velocity(alpha_bar.to(lesson.device), x_0, last, eps)
print(f"v is off -x_0 by {(v + x_0).square().mean().sqrt():.3f}")
back = schedule.x0_from_eps(x_t, last, eps)
print(f"x_0 from eps: {int(back.isfinite().sum())} of {back.numel()} numbers are finite")
back = schedule.x0_from_v(x_t, last, v)
print(f"x_0 from v: {int(back.isfinite().sum())} of {back.numel()}")
assert torch.allclose(v, schedule.velocity(x_0, last, eps), atol=1e-5)

# %% [markdown]
# There, even a perfect $\epsilon$ says nothing about the picture: the way back of lesson 01 divides zero by zero. A model that starts from
# pure noise needs another target, and v is one.

# %% [markdown]
# ## Your turn: ema_update
#
# Each training step follows the gradient of a few random samples, so the weights jitter. Two things reduce the jitter. The first is an
# *exponential moving average* of all weights, EMA for short. It is kept next to the weights and never trained itself, and it is usually
# what is saved in the end. After every step, with $n$ the number of steps before it,
#
# $$\bar w \leftarrow d \, \bar w + (1 - d) \, w \qquad d = \min \left( \mathrm{decay}, \; \frac{1 + n}{10 + n} \right)$$
#
# The closer $d$ is to one, the more steps the average covers, about $1 / (1 - d)$ of them. At the beginning it should forget the random
# weights quickly, so $d$ starts low and rises with $n$ until it reaches the decay. Two lines. When it is right, you see the average follow
# a weight that jitters.


# %%
def ema_update(mean, weight, decay, n):
    """The new mean; mean and weight of one shape, decay a number, n the steps before this one."""
    # YOUR CODE, about 2 lines


ema_update = lesson.check(ema_update)

# %%
print(f"decay {decay}: it covers about {1 / (1 - decay):,.0f} steps")
for n in (0, 10, 100, 1000, 100_000):
    d = min(decay, (1 + n) / (10 + n))
    print(f"n = {n:6}: d = {d:.4f}, covers about {1 / (1 - d):,.0f}")

# %% [markdown]
# ## Your turn: rate_at
#
# The second thing is the learning rate. At a constant rate the weights keep jittering, however long the training lasts. If the rate falls,
# they settle. Write a rate that is constant for the first `hold` steps and then falls in a straight line, so that it would reach zero at
# `steps`:
#
# $$\mathrm{rate} \cdot \min \left( 1, \; \frac{\mathrm{steps} - \mathrm{step}}{\mathrm{steps} - \mathrm{hold}} \right)$$
#
# Two lines. When it is right, you see the curve.


# %%
def rate_at(step, steps, hold, rate):
    """The learning rate of a step, counted from 0: constant for `hold` steps, then down to 0."""
    # YOUR CODE, about 2 lines


rate_at = lesson.check(rate_at)

# %% [markdown]
# Now train. After four fifths of the steps, a second run continues from the state of the first, with its weights and its optimizers'
# memory. From there on both see the same samples, and only the learning rate differs. (The library calls the falling rate `linear`; for it,
# the steps already taken count as the warm-up, after which it falls.) After every step we write down the weights of the U-Net's last
# convolution, and we measure the loss after a third of the steps and at both ends.


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
hold = 4 * steps // 5
assert np.allclose(rates["linear"], [rate_at(i, steps, hold, rate) for i in range(steps)])
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
# It learns: both losses end well below the start. The falling rate ends lower than the constant one, although it has seen the same samples.
# Its weights have settled, and what the last few samples had added by chance is gone. The average does nearly the same for the constant
# run. Where the rate falls, the weights hardly move in the end, so the average has nothing left to smooth. The figure also shows the price
# of an average: it lags behind a weight that is still on its way.
#
# One run as short as this shows the jitter and what reduces it, not how much either is worth in a long training. The models that come with
# minidiff are averages of this kind.

# %% [markdown]
# ## Where the loss has fallen
#
# A single number hides where the loss is (lesson 02). Here it is in bins of timesteps: before the first step, after a third of your run, at
# the end of your run with the falling rate, and for two models that were trained for longer.

# %%
if bundled:
    losses["bundled"] = measure(done.text_encoder, done.unet)
    samples = {"your run": steps * batch, "half": RECIPES["half"].steps * RECIPES["half"].batch}
    samples["bundled model"] = RECIPES["bundled"].steps * RECIPES["bundled"].batch
    for name, many in samples.items():
        print(f"{name:14}{many:8,} samples")

# %%
by_stage = {"nothing": begin, f"after {steps // 3}": "a third", "linear": "your run"}
by_stage |= {"half": "half", "bundled": "bundled model"} if bundled else {}
by_stage = {label: losses[name].mean(dim=-1) for name, label in by_stage.items()}
fig, axis = plt.subplots(figsize=(6, 4.2))
for (label, (own, _)), marker in zip(by_stage.items(), "xsov^"):
    axis.plot(middles, own, marker=marker, label=label)
axis.set(xlabel="timestep t", ylabel="loss", ylim=(0, None))
axis.legend(fontsize=11, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.2))
lesson.show(fig, "bins", "Loss above one at nothing; falls first in the middle, later everywhere.")

# %%
for label, (own, _) in by_stage.items():
    print(f"{label:14} first {own[0]:.2f}, lowest {own.min():.2f}, last {own[-1]:.2f}")

# %% [markdown]
# The loss falls first in the middle. There $x_t$ shows enough of the picture to work with, and enough noise to tell from it. At early
# timesteps v is nearly the noise, part of which cannot be predicted (lesson 02), and training draws few of them. At late ones v is nearly
# the picture (with a minus sign), and only the words say what is in it, so the loss stays high there. The longer trainings have curves of
# the same kind, further down.
#
# A network that always returns zero would have a loss of one. Before its first step, our model is above that: its predictions are not zero
# and have nothing to do with the target.

# %% [markdown]
# ## Does the model read?
#
# The loss alone does not tell whether the model uses the words. So we measure it twice: with each picture's own caption, and with its
# neighbour's. If the model does not read, both are equal. What a wrong caption adds to the loss is what the right one is worth.

# %%
fig, axis = plt.subplots()
for (label, (own, other)), marker in zip(by_stage.items(), "xsov^"):
    axis.plot(middles, other - own, marker=marker, label=label)
    added = other.mean() / own.mean() - 1
    print(f"{label}: loss {own.mean():.3f}, with another's caption {added:.0%} more")
axis.set(xlabel="timestep t", ylabel="added by a wrong caption")
axis.legend(fontsize=11)
lesson.show(fig, "reads", "A wrong caption costs nothing at first, more and more later on.")

# %% [markdown]
# Read the lines in their order. After a third of your run, a wrong caption costs almost nothing: the model has learned about pictures and
# does not read yet. Reading comes later, first at late timesteps, where the words are most of what there is, and it improves for a long
# time, long after the loss has become flat. This number shows progress that the loss hides.

# %% [markdown]
# ## Four stations of one training
#
# These are three models of different widths, so it is not truly one training, but the order of events is the same in all of them.

# %%
stations = {"scenes": to_images(pixels[: len(shown)]), begin.replace(" ", "\n"): nothing}
stations["your run"] = draw(**runs["linear"].task.modules, prompts=shown)
if bundled:
    stations["half"] = draw(half.text_encoder, half.unet, shown)
    stations["bundled\nmodel"] = draw(done.text_encoder, done.unet, shown)
fig = picture_grid(list(stations.values()), labels=list(stations))
lesson.show(fig, "stations", "Scenes, and what four stages of training make of their captions.")

# %% [markdown]
# Backgrounds come first. With nothing learned, all pictures are alike. After your run, light and dark backgrounds can be told apart, and
# there is much noise left and no thing. `half`, after many times as many samples, has the backgrounds, the colours of things, and patches
# in place of the things. The bundled model draws things.

# %% [markdown]
# ## Break it: swap the target
#
# The classic mistake is one line: a model that should predict v is trained to predict $\epsilon$, because the first papers and most
# examples do that. The shapes fit, and there is no error message.

# %%
other = "eps" if schedule.config.prediction == "v" else "v"
asked_otherwise = replace(config, schedule=replace(config.schedule, prediction=other))
mistaken = prepare(asked_otherwise, 2 if lesson.quick else 20)
for _ in mistaken.run():
    pass
looks = measure(**mistaken.task.modules, asked=mistaken.task.schedule)[0].mean(dim=-1)
is_so = measure(**mistaken.task.modules)[0].mean(dim=-1)
print(f"{mistaken.done} steps, trained to predict {other}")
print(f"by that target: loss {looks.mean():.2f}, in the last bin {looks[-1]:.2f}")
print(f"by the right one: loss {is_so.mean():.2f}, in the last bin {is_so[-1]:.2f}")
if bundled and not lesson.quick:
    assert looks.mean() < ends["linear"] < 1 < is_so.mean()

# %%
rows = [stations["your run"], draw(**mistaken.task.modules, prompts=shown)]
fig = picture_grid(rows, labels=["your run", "target\nswapped"])
lesson.show(fig, "exchanged", "Your run; below, a run whose target was swapped.")

# %% [markdown]
# After these few steps the loss is already far below that of your whole run. It is a cheap success: at late timesteps $x_t$ is the noise,
# so predicting noise is easy. But the sampler still takes the prediction for v, and the pictures are nearly the same for every caption.
# Judged by the right target, the model is worse than one that always returns zero. No loss means anything alone. Compare it with the loss
# of a prediction that knows nothing, and look at pictures early.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/12_train_a_text_to_image_model.py --model v1-5-pruned-emaonly.safetensors --device cuda` does the same with a checkpoint
# of yours, on the same scenes, enlarged. It continues from the checkpoint's weights, at a learning rate 100 times lower than the bundled
# model's: the checkpoint has seen far more than emoji, and a large rate would destroy that. `emaonly` in its name says that the file only
# holds the averages. It predicts $\epsilon$, as all of Stable Diffusion 1.x does; of Stable Diffusion 2.x, the version for larger pictures
# predicts v.
#
# How much memory does it take to train all of it, activations not counted? There are four numbers for each weight, in float32: the weight,
# its gradient, the optimizer's memory of earlier gradients, and the average.

# %%
from minidiff.text_encoder import TextEncoder
from minidiff.unet import UNet

with torch.device("meta"):  # shapes alone
    large = [UNet(SD1.unet), TextEncoder(SD1.text_encoder)]
total = sum(p.numel() for part in large for p in part.parameters())
print(f"Stable Diffusion 1.x: {total / 1e6:.0f} million numbers are trained")
print(f"four times in float32: {4 * 4e-9 * total:.1f} GB")
print(f"this model: {4 * 4e-9 * numbers:.3f} GB")
RATE = RECIPES["bundled"].learning_rate
print(f"learning rates: {RATE:g} and {RATE / 100:g}, 100 times lower")

# %% [markdown]
# And this lesson keeps three such trainings. That is why large models are seldom trained as a whole; lessons 14 to 17 show what is done
# instead.

# %% [markdown]
# ## On a GPU
#
# The whole training from scratch of the model that ships, and of the judge of its pictures, on all of the recipe's scenes:
#
# ```bash
# minidiff train from-scratch runs/mine --recipe bundled
# ```
#
# Before it starts, it measures a few steps and tells you how many minutes it will take on your machine: hours on a laptop. If you stop it
# and start it again, it resumes. In `samples-*.png`, expect backgrounds first, then colours, then shapes. At the end the folder holds a
# model, and a card that says how many of its pictures the judge could name. `--recipe half --vae tiny` makes the model that is between
# yours and it.

# %% [markdown]
# ## What you now know
#
# - The U-Net and the text encoder are trained together on noisy latents; the VAE is trained before and stays frozen.
# - Predicting v leaves something to learn at every timestep, also where $x_t$ is pure noise.
# - An average of the weights, or a falling learning rate, removes the jitter of the last steps.
# - Backgrounds are learned first, then colours, then shapes; reading comes late and improves for long.
# - A loss means little alone: compare it by timestep, with wrong captions, and with a prediction that knows nothing.

# %% [markdown]
# ## Your guess
#
# Backgrounds come first, because most cells are background and one colour fills them all. The loss falls first in the middle, where picture
# and noise can be told apart. The run with the falling rate ends lower, as the list of losses shows: its weights settle.

# %% [markdown]
# ## Quiz
#
# 1. Your loss of v is one at every timestep. What may the network be doing?
# 2. You evaluate the average with the decay of a long training, but without the rise of $d$, after a short run. What do you see?
# 3. With a wrong caption the loss is the same as with the right one. Where would you look?
#
# <details><summary>Answers</summary>
#
# 1. Returning zero everywhere, or as good as that: it has learned nothing that the target does not have by itself.
# 2. Pictures of the random start: the average still consists mostly of the first weights.
# 3. At the words on their way: are the captions of the batch those of its pictures, does the context reach the U-Net, and has the training been
#    long enough?
#
# </details>

# %% [markdown]
# ## Now you
#
# Change one choice of the recipe: no empty captions (`caption_dropout`), half the learning rate with twice the steps, or a U-Net with
# attention at all levels. Before you run it, write down what happens to three numbers: the loss at the end, what a wrong caption adds, and
# the seconds a step takes. Then run it and compare with the lesson's.

# %% [markdown]
# ## Read next
#
# - `minidiff/bundled/tasks.py`: `DiffusionTask`, what you have trained, and before it `AutoencoderTask`, which comes first.
# - `minidiff/trainers/engine/loop.py`: `Training.run` is the loop. `minidiff/trainers/engine/ema.py` has your `ema_update`, and
#   `minidiff/trainers/engine/optimizer.py` your `rate_at`, with other schedules, and Muon.
# - Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models", eq. 3; Salimans and Ho 2022, "Progressive
#   distillation for fast sampling of diffusion models", section 4, on v; Lin et al. 2023, "Common diffusion noise schedules and sample
#   steps are flawed", on the last timestep.
# - Lesson 14: teach a finished model one thing more.
