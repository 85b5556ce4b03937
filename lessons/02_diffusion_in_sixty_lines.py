# %% [markdown]
# # 02 A diffusion model in sixty lines
#
# **What does the network learn, and how is it trained?**
#
# - Explains: [minidiff/trainers/engine/diffusion_loss.py](../minidiff/trainers/engine/diffusion_loss.py)
# - You change: `diffusion_loss`, `train` and `mean_x0`: what is learned, how, and how well it can be
# - Minutes: 45
# - Picture: [figures/02-cloud.png](figures/02-cloud.png)
#
# ![The whole pipeline; this lesson is about the training loss](figures/pipeline-training.svg)
#
# Lesson 01 added noise to a picture. In this lesson a network learns to predict that noise, from scratch and within a minute. To keep
# everything in view, the pictures are as small as possible: two numbers each, so every picture is a point in the plane. Data, network, loss,
# training and sampling take about sixty lines together. Stable Diffusion does the same with more numbers.

# %% [markdown]
# ## Guess first
#
# The network sees a noisy point and predicts the noise in it. Its loss is the mean squared error. Predicting no noise at all gives a loss of
# one, because the noise has variance one. After training, at which timesteps is the loss still large?
#
# 1. At late ones, where there is almost nothing but noise.
# 2. At early ones, where there is hardly any noise.
# 3. It is about the same everywhere.

# %% [markdown]
# ## Data: points on a spiral
#
# Of all possible pictures only a few show cats. In the same way, our points fill only a thin line of the plane, a spiral. They are scaled to
# a variance of one, as the latents were in lesson 01. The noise schedule is that of Stable Diffusion 1.x.

# %%
import time
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from lessons.common import BLUE, ORANGE, PINK, cloud_grid, curves, scene_latents, start
from minidiff.config import SD1
from minidiff.scenes.scenes import Item, compose
from minidiff.schedule import NoiseSchedule
from minidiff.trainers.engine.diffusion_loss import NoiseSample
from minidiff.trainers.engine.diffusion_loss import diffusion_loss as library_loss
from minidiff.unet import UNet

lesson = start("02_diffusion_in_sixty_lines")
sd = lesson.load()

# %%
generator = torch.Generator().manual_seed(0)
schedule = NoiseSchedule(SD1.schedule)
T = schedule.config.timesteps


def normal(*shape):
    return torch.randn(shape, generator=generator).to(lesson.device)


def spiral(n):
    turn = 3 * torch.pi * torch.rand(n, generator=generator).sqrt().to(lesson.device)
    points = turn[:, None] * torch.stack([turn.cos(), turn.sin()], dim=-1)
    return points / 4.7 + 0.03 * normal(n, 2)


# %%
data = spiral(2000)
shown = [0, 59, 139, 259, 499, T - 1]
columns = [f"t = {t}" for t in shown]
all_at = partial(torch.full, (len(data),), device=lesson.device)
noised = [schedule.q_sample(data, all_at(t), normal(*data.shape)) for t in shown]
assert all(x_t.shape == data.shape == (len(data), 2) for x_t in noised)
print(f"{T} timesteps; variance of the data {data.var():.1f}")
fig = cloud_grid([noised], columns, ["data"], [BLUE])
lesson.show(fig, "data", "A spiral dissolves into a round cloud.")

# %% [markdown]
# ## A network that is told the time
#
# The network takes a noisy point `x_t` and its timestep `t`, and returns two numbers: the noise it believes to be in the point, `eps_hat`.
# It has four layers. The timestep enters as the sines and cosines of several waves. A network can use a handful of numbers between $-1$ and
# $1$ far better than a single number of up to three digits (lesson 06). The position enters as waves too, in addition to the two
# coordinates, so that fine detail is learned sooner.


# %%
class Denoiser(nn.Module):
    def __init__(self, width=128):
        super().__init__()
        self.register_buffer("frequency", torch.pi * 2.0 ** torch.arange(8) / T)
        layers = [nn.Linear(2 + 2 * (8 + 4), width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        layers += [nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x_t, t):
        angles = torch.cat([t[:, None] * self.frequency, 2 * x_t, 4 * x_t], dim=-1)
        return self.layers(torch.cat([x_t, angles.sin(), angles.cos()], dim=-1))


# %%
def new(kind):
    """A network that starts with the same random weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().to(lesson.device)


model = new(Denoiser)
eps_hat = model(noised[3], all_at(shown[3]))
assert eps_hat.shape == noised[3].shape
print(f"the timestep enters as {2 * len(model.frequency)} numbers")
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# ## Your turn: diffusion_loss
#
# How do we train it? Take a clean point $x_0$, a random timestep $t$ and noise $\epsilon$. Jump to $x_t$ as in lesson 01, show $x_t$ and $t$
# to the network, and compare its prediction with the noise (Ho et al. 2020, DDPM, eq. 14):
#
# $$\mathrm{loss} = \left\Vert \; \epsilon - \hat\epsilon \left( \sqrt{\bar\alpha_t} \; x_0 + \sqrt{1 - \bar\alpha_t} \; \epsilon, \; t \right) \right\Vert^2$$
#
# We know the noise because we added it ourselves, so no labels are needed.
#
# Write the loss of each sample, shape `[B]`, in two lines. `schedule.q_sample(x_0, t, eps)` is the jump. The loss of a sample is the *mean*
# of the squared differences over its numbers, the last axis. Averaging over the batch comes later, so that we can see which timesteps are
# hard.


# %%
def diffusion_loss(model, schedule, x_0, t, eps):
    """DDPM eq. 14, one loss per sample [B]; x_0 and eps [B, 2], t [B], model(x_t, t) -> [B, 2]."""
    # YOUR CODE, about 2 lines


diffusion_loss = lesson.check(diffusion_loss)

# %%
steps, batch = (300, 256) if lesson.quick else (3000, 512)


def draw_loss(model):
    """The mean loss over a new batch of points, timesteps and noise."""
    t = torch.randint(T, (batch,), generator=generator).to(lesson.device)
    return diffusion_loss(model, schedule, spiral(batch), t, normal(batch, 2)).mean()


before = draw_loss(model)
assert before.shape == ()
print(f"loss of the untrained network: {before:.2f}")

# %% [markdown]
# ## Your turn: train
#
# Training repeats four calls. `draw_loss()` returns the loss of a new batch. `optimizer.zero_grad()` clears the gradients of the step
# before, because PyTorch adds new ones to them. `loss.backward()` computes the gradients, and `optimizer.step()` moves the weights. Write
# the loop as a generator: after each step, `yield loss.detach()`, the loss without the record of how it was computed.
#
# A right loop fits a straight line and reports how far its loss falls.


# %%
def train(optimizer, draw_loss, steps):
    """Take that many steps; yield the loss of each, detached."""
    # YOUR CODE, about 6 lines


train = lesson.check(train)

# %% [markdown]
# We also measure the loss in ten bins of timesteps, always on the same samples: first untrained, then on the way, and at the end. The
# optimizer is Adam, with a learning rate that falls along a straight line.

# %%
bins = torch.linspace(0, T, 11).long()
test = []
for low, high in pairwise(bins.tolist()):
    t = torch.randint(low, high, (500,), generator=generator).to(lesson.device)
    test.append((spiral(500), t, normal(500, 2)))


@torch.no_grad()
def loss_by_bin(predict):
    """Mean loss in each bin; predict(x_t, t) is a model, or anything else that predicts noise."""
    return [float(diffusion_loss(predict, schedule, *samples).mean()) for samples in test]


# %%
def training(model):
    """Yield the loss of each step of a whole training run."""
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, steps)
    for loss in train(optimizer, partial(draw_loss, model), steps):
        decay.step()
        yield loss


begin, measured, losses = time.perf_counter(), {0: loss_by_bin(model)}, []
for i, loss in enumerate(training(model), start=1):
    losses.append(loss)
    if i in (steps // 10, steps):
        measured[i] = loss_by_bin(model)
        print(f"step {i}: mean of the last losses {torch.stack(losses[-steps // 20 :]).mean():.3f}")
print(f"{time.perf_counter() - begin:.0f} seconds")

# %% [markdown]
# ## The cloud moves to the data
#
# Now the network generates points. Start with pure noise. Ask for the noise in each point, remove all of it to get a prediction of $x_0$,
# and put *less* of it back: the amount that belongs to a somewhat lower timestep. Then ask again. Lesson 03 explains why this works.


# %%
@torch.no_grad()
def walk_back(model, x, steps):
    """Yield (t, x_t) from noise down to t = 0."""
    timesteps = [*schedule.timesteps(steps, "trailing").tolist(), 0]
    yield timesteps[0], x
    for now, then in pairwise(timesteps):
        t = torch.full((len(x),), now, device=x.device)
        eps_hat = model(x, t)
        x0_hat = schedule.x0_from_eps(x, t, eps_hat)
        x = schedule.q_sample(x0_hat, torch.full_like(t, then), eps_hat)
        yield then, x


# %%
noise = normal(2000, 2)
path = dict(walk_back(model, noise, steps=50 if lesson.quick else 100))
back = [path[t] for t in shown]
fig = cloud_grid([noised, back], columns, ["data", "model"], [BLUE, ORANGE])
lesson.show(fig, "cloud", "A spiral dissolves; below, right to left, noise becomes a spiral.")


def off_the_spiral(points):
    """Distance of each point to the nearest of many true ones."""
    return torch.cdist(points, spiral(5000)).amin(dim=1)


for name, points in {"noise": noise, "model": path[0], "data": spiral(2000)}.items():
    print(f"{name}: {off_the_spiral(points).mean():.3f} off the spiral on average")

# %% [markdown]
# Read the lower row from right to left. At each `t` it looks like the row above it at the same `t`; that is the whole idea. Nobody gave the
# model a formula for the spiral. It has learned in which direction the data lie.

# %% [markdown]
# ## The best possible prediction
#
# Is the loss after training good or bad? The number alone says little, because part of it cannot be avoided. A noisy point may have come
# from several places of the spiral, and nothing in it says from which. The best possible prediction of $x_0$ is the average over all those
# places, weighted by how likely each of them led to $x_t$. The likelihood is that of the noise, a normal distribution:
#
# $$w_i \propto \exp \left( - \frac{\Vert x_t - \sqrt{\bar\alpha_t} \; p_i \Vert^2}{2 (1 - \bar\alpha_t)} \right), \qquad \hat x_0 = \sum_i w_i \, p_i$$
#
# For data this simple we can compute it from a few thousand points $p_i$, without a network.

# %% [markdown]
# ## Your turn: mean_x0
#
# Write this average for N noisy points and M data points. `a` holds $\bar\alpha_t$ of each noisy point, shape `[N, 1]`. Three lines. First
# the squared distances, shape `[N, M]`: `x_t[:, None]` has shape `[N, 1, 2]`, `a[:, None].sqrt() * points` has shape `[N, M, 2]`; subtract,
# square, and sum over the last axis. Then the weights: softmax takes the exponential and makes each row add up to one. Then the average, a
# matrix product.
#
# When it is right, you see how the best prediction changes as the noise grows.


# %%
def mean_x0(x_t, a, points):
    """Mean of points [M, 2], by how likely each led to x_t [N, 2]; a [N, 1] -> [N, 2]."""
    # YOUR CODE, about 3 lines


mean_x0 = lesson.check(mean_x0)

# %%
known = spiral(1000 if lesson.quick else 8000)


def best_possible(x_t, t):
    """The noise that follows from the best prediction of x_0."""
    a = schedule.alpha_bar.float().to(x_t.device)[t][:, None]
    x0_hat = mean_x0(x_t, a, known)
    assert x0_hat.shape == x_t.shape
    return schedule.eps_from_x0(x_t, t, x0_hat)


by_bin = {f"after {i} steps" if i else "untrained": losses for i, losses in measured.items()}
by_bin["best possible"] = loss_by_bin(best_possible)

# %%
middles = ((bins[1:] + bins[:-1]) / 2).tolist()
for label, losses in by_bin.items():
    print(f"{label}: mean {sum(losses) / 10:.2f}, first {losses[0]:.2f}, last {losses[-1]:.2f}")
lines = {label: (middles, losses) for label, losses in by_bin.items()}
fig = curves(lines, "timestep t", "loss", ylim=(0, None), xlim=(0, T))
lesson.show(fig, "bins", "The loss falls with t, and training brings it near the best possible.")

# %% [markdown]
# At a late timestep, $x_t$ is almost the noise itself, so the noise is easy to predict. At an early timestep, noise that points along the
# line has only moved the point to another place on the line, where it looks as clean as before. Of the two numbers of the noise, at best one
# can be predicted: the one across the line. Training can only close the gap to the lowest curve.
#
# Two things follow, and they hold for every diffusion model. First, the mean loss soon seems to stand still while the samples still improve,
# because most of what is left cannot be avoided. Second, losses can only be compared at the same timesteps. That is why minidiff's trainers
# log them by bin.

# %% [markdown]
# ## Break it: keep the time from the network
#
# A classic mistake: `t` is drawn and used for the jump, but never reaches the network, or reaches it as a constant. Nothing crashes, and the
# loss still falls.


# %%
class WithoutTime(Denoiser):
    def forward(self, x_t, t):
        return super().forward(x_t, torch.zeros_like(t))


blind = new(WithoutTime)
fallen = torch.stack(list(training(blind)))
print(f"its loss falls from {fallen[0]:.2f} to {fallen[-steps // 20 :].mean():.2f}")
for label, losses in {"with the time": measured[steps], "without": loss_by_bin(blind)}.items():
    print(f"{label}: mean {sum(losses) / 10:.2f}, first {losses[0]:.2f}, last {losses[-1]:.2f}")

# %%
lost = dict(walk_back(blind, noise, steps=50 if lesson.quick else 100))
for name, points in {"with the time": path[0], "without": lost[0]}.items():
    print(f"{name}: {off_the_spiral(points).mean():.3f} off the spiral on average")
rows = [back, [lost[t] for t in shown]]
fig = cloud_grid(rows, columns, ["with t", "without"], [ORANGE, PINK])
lesson.show(fig, "without-time", "Without the time a spiral forms too early; many points miss it.")

# %% [markdown]
# The same point in the plane means different things. Early, it is a place next to the line; late, it is noise like any other. A network
# that does not know the timestep predicts something in between. In its row the spiral appears far too early, and many points are still off
# the line at the end. Its loss falls and then settles, as losses do. You only see that something is wrong by comparing with another network, bin
# by bin, or by looking at the samples.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/02_diffusion_in_sixty_lines.py --model v1-5-pruned-emaonly.safetensors` measures the loss of a checkpoint of yours. The
# loss is the same: `diffusion_loss` in `minidiff/trainers/engine/diffusion_loss.py` also takes the caption as a context. The bundled model
# predicts the mixture v of lesson 01 instead of the noise, so its curve has another shape. We measure it twice on four scenes, with their
# captions and with empty ones.

# %%
subjects = {"frog": "pink", "mushroom": "brown", "burger": "white", "cactus": "orange"}
scenes = [compose([Item(s)], background=b, style="noto") for s, b in subjects.items()]
x_0 = scene_latents(sd, scenes)
B, C, H, W = x_0.shape
assert (len(scenes), sd.config.vae.latent_channels) == (B, C)
captions = {"with captions": [scene.caption for scene in scenes], "without": [""] * B}
edges = torch.linspace(0, sd.schedule.config.timesteps, 4 if lesson.quick else 11).long()

# %%
by_caption = {label: [] for label in captions}
for low, high in pairwise(edges.tolist()):
    t = torch.linspace(low, high - 1, 2 * B).long().to(lesson.device)  # each scene at two timesteps
    draws = NoiseSample(t, normal(2 * B, C, H, W))
    for label, texts in captions.items():
        context = sd.encode_prompts(2 * texts)
        with torch.no_grad():
            loss = library_loss(sd.unet, sd.schedule, x_0.repeat(2, 1, 1, 1), context, draws)
        assert loss.shape == (2 * B,)
        by_caption[label].append(float(loss.mean()))

# %%
lines = {label: ((edges[1:] + edges[:-1]) / 2, losses) for label, losses in by_caption.items()}
for label, losses in by_caption.items():
    print(f"{label}: mean {sum(losses) / len(losses):.2f}, last {losses[-1]:.2f}")
fig = curves(lines, "timestep t", f"loss of {sd.schedule.config.prediction}", ylim=(0, None))
lesson.show(fig, "real", "Loss with and without captions: captions help at late timesteps.")
with torch.device("meta"):  # shapes without numbers
    large = UNet(SD1.unet)
millions = sum(p.numel() for p in large.parameters()) / 1e6
print(f"U-Net of Stable Diffusion 1.x: {millions:.0f} million parameters")

# %% [markdown]
# Look where the two curves separate. Where the noise has left little of the picture, the words tell the network what the picture cannot. At
# early timesteps the picture speaks for itself.
#
# The U-Net of Stable Diffusion 1.x has 860 million parameters. It was trained with your two lines.

# %% [markdown]
# ## On a GPU
#
# ```bash
# python lessons/02_diffusion_in_sixty_lines.py --device cuda
# ```
#
# One minute. Expect no gain: the network is so small that launching its operations costs more than computing them. Then set `width=1024`
# and 20,000 steps of 8,192 points, which takes some minutes on a GPU and hours on a processor. The curve comes closer to the best possible
# one and cannot pass it.

# %% [markdown]
# ## What you now know
#
# - To train a diffusion model: draw data, a timestep and noise; jump; predict the noise; take the mean squared error.
# - The network must be told t, because the same point means different things at different noise levels.
# - Part of the loss cannot be avoided: a noisy point may come from several places of the data.
# - The best prediction is an average over all the places it may come from, weighted by how likely each is.
# - Losses are only comparable at the same timesteps, so they are measured in bins of t.

# %% [markdown]
# ## Your guess
#
# The second answer is right, as the figure of the losses by bin shows. At late timesteps the noisy point is almost the noise itself, which
# is easy to predict. At early ones, noise along the line cannot be told from the spread of the data.

# %% [markdown]
# ## Quiz
#
# 1. The mean loss has stopped falling and the samples still improve. Is something wrong?
# 2. A model always predicts that there is no noise. What is its loss, and at which timesteps?
# 3. What happens to a network that is always told the same t?
#
# <details><summary>Answers</summary>
#
# 1. No. Most of the loss is the part that cannot be avoided; what still improves is a small share of it.
# 2. About one, at every timestep, because the noise has variance one.
# 3. It predicts an average over all noise levels: its loss still falls, and its samples miss the data.
#
# </details>

# %% [markdown]
# ## Now you
#
# Replace the spiral with data of your own: two rings, a letter, the outline of a country. Predict in which bins of t the unavoidable loss
# is higher than the spiral's, and where the samples will go wrong first. Train, and compare the curves.

# %% [markdown]
# ## Read next
#
# - `minidiff/trainers/engine/diffusion_loss.py`: `sample_noise` draws t and noise, `squared_error` computes your squared differences, and
#   `diffusion_loss` takes your mean, with an optional mask and weight.
# - `minidiff/trainers/engine/loop.py` is the loop around it, your `train`.
# - Ho, Jain and Abbeel 2020, "Denoising diffusion probabilistic models", algorithm 1 and eq. 14.
# - Lesson 03: why the way back works, and how few steps it needs.
