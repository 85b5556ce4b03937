# %% [markdown]
# # 02 A diffusion model in sixty lines
#
# **What does the network learn, and how is it taught?**
#
# - Explains: [minidiff/trainers/engine/diffusion_loss.py](../minidiff/trainers/engine/diffusion_loss.py)
# - You change: `diffusion_loss`, what every Stable Diffusion was trained on
# - Minutes: 25
# - Picture: [figures/02-cloud.png](figures/02-cloud.png)
#
# ![The whole pipeline; this lesson is about the training loss](figures/pipeline-training.svg)
#
# Lesson 01 put noise into a picture. Here a network learns to find that noise, from nothing, in seconds. To be able to see everything, the
# pictures are as small as can be: two numbers, so that each is a point in the plane. Data, network, loss, training and drawing together are
# about sixty lines, and all of them stand on this page. Stable Diffusion does the same with more numbers.

# %% [markdown]
# ## Guess first
#
# The network is shown a noisy point and must say what noise is in it. Its loss is the mean squared error. An answer of "none" has loss 1,
# since the noise has variance 1. After training, at which timesteps is the loss still large?
#
# 1. At late ones, where there is nearly nothing but noise.
# 2. At early ones, where there is hardly any noise.
# 3. It is about the same everywhere.

# %% [markdown]
# ## Data: points on a spiral
#
# Pictures of cats are few among all possible pictures; likewise these points lie on a thin line in the plane. They are scaled to variance
# 1, as lesson 01 did with latents. The noise schedule is that of Stable Diffusion 1.x, taken as it is.

# %%
import time
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import nn

from lessons.common import BLUE, ORANGE, PINK, start
from minidiff.config import SD1
from minidiff.scenes.scenes import Item, compose
from minidiff.schedule import NoiseSchedule
from minidiff.trainers.engine.diffusion_loss import NoiseSample
from minidiff.trainers.engine.diffusion_loss import diffusion_loss as library_loss
from minidiff.unet import UNet

lesson = start("02_diffusion_in_sixty_lines")

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
all_at = partial(torch.full, (len(data),), device=lesson.device)
into_noise = [schedule.q_sample(data, all_at(t), normal(*data.shape)) for t in shown]
assert all(x_t.shape == data.shape == (len(data), 2) for x_t in into_noise)
print(f"{T} timesteps; variance of the data {data.var():.1f}")


# %%
def draw_clouds(rows, labels, colours):
    size = (6, 1.05 * len(rows) + 0.3)
    fig, axes = plt.subplots(len(rows), len(shown), figsize=size, squeeze=False)
    for clouds, axis_row, label, colour in zip(rows, axes, labels, colours):
        axis_row[0].set_ylabel(label, fontsize=13)
        for cloud, axis in zip(clouds, axis_row):
            axis.scatter(*cloud.cpu().T, s=0.6, color=colour, linewidths=0)
            axis.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xticks=[], yticks=[], aspect="equal")
    for t, axis in zip(shown, axes[0]):
        axis.set_title(f"t = {t}", fontsize=13)
    return fig


fig = draw_clouds([into_noise], ["data"], [BLUE])
lesson.show(fig, "data", "A spiral dissolves into a round cloud.")

# %% [markdown]
# ## A network that is told the time
#
# It is given a noisy point `x_t` and its timestep `t`, and answers with two numbers: the noise that it believes to be in there, called
# `eps_hat`. Inside are four layers. The time comes in as a handful of waves, because a network makes more of sixteen numbers between -1 and
# 1 than of a single one up to 999; lesson 06 looks at that closely. The place comes in as waves besides, so that fine detail is learned
# sooner.


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
    """A network that begins with the same random weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().to(lesson.device)


model = new(Denoiser)
x_t, t = into_noise[3], torch.full((len(data),), shown[3], device=lesson.device)
eps_hat = model(x_t, t)
assert eps_hat.shape == x_t.shape
print(f"waves: {2 * len(model.frequency)} numbers, of t up to {T - 1}, between -1 and 1")
print(f"{sum(p.numel() for p in model.parameters()):,} parameters")

# %% [markdown]
# ## Your turn: diffusion_loss
#
# How does one teach it? Take a clean point $x_0$, draw a timestep $t$ and noise $\epsilon$, jump to $x_t$ as in lesson 01, show $x_t$ and
# $t$ to the network, and compare its answer with the noise (Ho et al. 2020, DDPM, eq. 14):
#
# $$\mathrm{loss} = \left\Vert \; \epsilon - \hat\epsilon \left( \sqrt{\bar\alpha_t} \; x_0 + \sqrt{1 - \bar\alpha_t} \; \epsilon, \; t \right) \right\Vert^2$$
#
# The noise is known because we put it in ourselves: no labels are needed, and no two networks that fight each other. Give back one loss a
# sample, shape `[B]`: the *mean* of the squares over a sample's two numbers. So you can see later which timesteps are hard.
# `schedule.q_sample(x_0, t, eps)` is the jump.


# %%
def diffusion_loss(model, schedule, x_0, t, eps):
    """DDPM eq. 14, one loss a sample [B]; x_0 and eps [B, 2], t [B], model(x_t, t) -> [B, 2]."""
    # YOUR CODE, about 3 lines


def library(model, schedule, x_0, t, eps):
    """The library's takes pictures with captions: a point is one of 1 x 1 pixels, without."""

    def unet(x_t, t, context):
        return model(x_t[..., 0, 0], t)[..., None, None]

    draws = NoiseSample(t, eps[..., None, None])
    return library_loss(unet, schedule, x_0[..., None, None], x_0[..., None], draws)


diffusion_loss = lesson.check(diffusion_loss, instead=library)

# %% [markdown]
# ## Training
#
# Fresh points, timesteps and noise at every step; the loss is averaged over the batch, and Adam does the rest. Along the way the loss is
# also measured bin by bin: ten bins of timesteps, the same samples every time.

# %%
steps, batch = (300, 256) if lesson.quick else (3000, 512)
bins = torch.linspace(0, T, 11).long()


test = []
for low, high in pairwise(bins.tolist()):
    x_0 = spiral(500)
    t = torch.randint(low, high, (500,), generator=generator).to(lesson.device)
    test.append((x_0, t, normal(500, 2)))


@torch.no_grad()
def loss_by_bin(answer):
    """Mean loss in each bin; answer(x_t, t) is a model, or anything that guesses noise."""
    return [float(diffusion_loss(answer, schedule, *draws).mean()) for draws in test]


# %%
def train(model):
    """Yields the loss of each step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, steps)
    for _ in range(steps):
        t = torch.randint(T, (batch,), generator=generator).to(lesson.device)
        loss = diffusion_loss(model, schedule, spiral(batch), t, normal(batch, 2)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        yield loss.detach()


# %%
begin, measured, losses = time.perf_counter(), {0: loss_by_bin(model)}, []
for i, loss in enumerate(train(model), start=1):
    losses.append(loss)
    if i in (steps // 10, steps):
        measured[i] = loss_by_bin(model)
        print(f"step {i}: mean of the last losses {torch.stack(losses[-steps // 20 :]).mean():.3f}")
print(f"{time.perf_counter() - begin:.0f} seconds")

# %% [markdown]
# ## The cloud moves to the data
#
# Now the network draws. Start with points that are nothing but noise. Ask for the noise, take it out completely for a guess at $x_0$, and
# put *less* of it back: as much as belongs to a timestep a little lower. Then ask again. Lesson 03 says why this is right. The timesteps
# stand at even distances and begin with the last one, which is called `trailing`.


# %%
@torch.no_grad()
def walk_back(model, x, steps):
    """Yields (t, x_t) from noise down to t = 0."""
    timesteps = [*schedule.timesteps(steps, "trailing").tolist(), 0]
    yield timesteps[0], x
    for now, then in pairwise(timesteps):
        t = torch.full((len(x),), now, device=x.device)
        eps_hat = model(x, t)
        x0_hat = schedule.x0_from_eps(x, t, eps_hat)
        x = schedule.q_sample(x0_hat, torch.full_like(t, then), eps_hat)
        yield then, x


noise = normal(2000, 2)
walked = dict(walk_back(model, noise, steps=50 if lesson.quick else 100))

# %%
back = [walked[t] for t in shown]
fig = draw_clouds([into_noise, back], ["data", "model"], [BLUE, ORANGE])
lesson.show(fig, "cloud", "A spiral dissolves; below, right to left, noise becomes a spiral.")


def off_the_spiral(points):
    """Distance of each point to the nearest of many true ones."""
    return torch.cdist(points, spiral(5000)).amin(dim=1)


for name, points in {"noise": noise, "model": walked[0], "data": spiral(2000)}.items():
    print(f"{name}: {off_the_spiral(points).mean():.3f} off the spiral on average")

# %% [markdown]
# Read the lower row from right to left. At each `t` it looks like the upper row at the same `t`: that is the whole idea. Nobody gave the
# model a formula of the spiral, and it does not keep the points it was shown. It has learned in which direction the data lie.

# %% [markdown]
# ## The loss, bin by bin
#
# Is a loss of so much good or bad? Taken alone, the number says little, because part of it cannot be avoided: a noisy point may have come
# from several places of the spiral, and nobody can know which. The best possible answer is the average over all those places, each as
# likely as it is. With data this small it can be computed, from a few thousand true points and a softmax; no network is needed.

# %%
known = spiral(1000 if lesson.quick else 8000)


def best_possible(x_t, t):
    """eps that follows from the mean of x_0 over the known points, given x_t."""
    alpha_bar = schedule.alpha_bar.float().to(x_t.device)[t][:, None, None]
    squares = (x_t[:, None] - alpha_bar.sqrt() * known).square().sum(dim=-1)
    likely = (-squares / (2 * (1 - alpha_bar[..., 0]))).softmax(dim=-1)  # a share for each of them
    assert likely.shape == (len(x_t), len(known))
    return schedule.eps_from_x0(x_t, t, likely @ known)


# %%
curves = {f"after {i} steps" if i else "untrained": losses for i, losses in measured.items()}
curves["best possible"] = loss_by_bin(best_possible)
middles = ((bins[1:] + bins[:-1]) / 2).tolist()
fig, axis = plt.subplots()
for (label, losses), marker in zip(curves.items(), "os^D"):
    axis.plot(middles, losses, marker=marker, label=label)
    print(f"{label}: mean {sum(losses) / 10:.2f}, first {losses[0]:.2f}, last {losses[-1]:.2f}")
axis.set(xlabel="timestep t", ylabel="loss", ylim=(0, None), xlim=(0, T))
axis.legend()
lesson.show(fig, "bins", "The loss falls with t, and training brings it near the best possible.")

# %% [markdown]
# The second guess is right. At a late timestep $x_t$ *is* the noise, nearly, so it is easily told. At an early one, noise that points along
# the line has only moved the point to another place of the line, where it looks as clean as before. Of the two numbers of the noise at best
# one can be told: the one across. Training can only close the gap to the lowest curve.
#
# Two things follow that hold for every diffusion model, large ones too. The mean loss falls at first, and then looks as if nothing happened
# while the pictures still get better. And losses can only be compared at the same timesteps, so minidiff's trainers log them by bin.

# %% [markdown]
# ## Break it: keep the time from the network
#
# The classic slip: `t` is drawn, used for the jump, and never reaches the network, or reaches it as a constant. Nothing crashes, and the
# loss still falls.


# %%
class WithoutTime(Denoiser):
    def forward(self, x_t, t):
        return super().forward(x_t, torch.zeros_like(t))


blind = new(WithoutTime)
fallen = torch.stack(list(train(blind)))
print(f"its loss falls from {fallen[0]:.2f} to {fallen[-steps // 20 :].mean():.2f}")
curves = {"with the time": measured[steps], "without": loss_by_bin(blind)}
for label, losses in curves.items():
    print(f"{label}: mean {sum(losses) / 10:.2f}, first {losses[0]:.2f}, last {losses[-1]:.2f}")

# %%
lost = dict(walk_back(blind, noise, steps=50 if lesson.quick else 100))
for name, points in {"with the time": walked[0], "without": lost[0]}.items():
    print(f"{name}: {off_the_spiral(points).mean():.3f} off the spiral on average")
rows = [back, [lost[t] for t in shown]]
fig = draw_clouds(rows, ["with t", "without"], [ORANGE, PINK])
lesson.show(fig, "without-time", "Without the time a spiral forms too early; many points miss it.")

# %% [markdown]
# The same point in the plane means different things: early, a place beside the line; late, a bit of noise like any other. A network that
# does not know which answers something in between: a spiral forms too early, and many points never find it. Its loss falls and then
# settles, as losses do. Only beside another network's, bin by bin, or in the picture, can it be seen that something is wrong.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/02_diffusion_in_sixty_lines.py --model v1-5-pruned-emaonly.safetensors` measures the loss of a checkpoint that you have.
# It is the same loss: `diffusion_loss` of `minidiff/trainers/engine/diffusion_loss.py` has a caption besides, the context of lesson 00. What the
# bundled model answers is not the noise but the mixture v that lesson 01 mentioned, so its curve has another shape. Below it is measured
# twice on four scenes: with their captions, and with empty ones.

# %%
sd = lesson.load()
subjects = {"frog": "pink", "mushroom": "brown", "burger": "white", "cactus": "orange"}
scenes = [compose([Item(s)], background=b, style="noto") for s, b in subjects.items()]
pixels = torch.stack([torch.from_numpy(scene.image) for scene in scenes]).permute(0, 3, 1, 2)
pixels = F.interpolate(pixels / 127.5 - 1, size=(sd.config.image_size,) * 2, mode="bilinear")
with torch.no_grad():
    x_0 = sd.vae.encode(pixels.to(lesson.device)).mean * sd.config.vae.scaling_factor
B, C, H, W = x_0.shape
assert (len(scenes), sd.config.vae.latent_channels) == (B, C)
captions = {"with captions": [scene.caption for scene in scenes], "without": [""] * B}
edges = torch.linspace(0, sd.schedule.config.timesteps, 4 if lesson.quick else 11).long()

# %%
curves = {label: [] for label in captions}
for low, high in pairwise(edges.tolist()):
    t = torch.linspace(low, high - 1, 2 * B).long().to(lesson.device)  # each scene at two timesteps
    draws = NoiseSample(t, normal(2 * B, C, H, W))
    for label, texts in captions.items():
        context = sd.encode_prompts(2 * texts)
        with torch.no_grad():
            loss = library_loss(sd.unet, sd.schedule, x_0.repeat(2, 1, 1, 1), context, draws)
        assert loss.shape == (2 * B,)
        curves[label].append(float(loss.mean()))

# %%
fig, axis = plt.subplots()
for (label, losses), marker in zip(curves.items(), "os"):
    axis.plot((edges[1:] + edges[:-1]) / 2, losses, marker=marker, label=label)
    print(f"{label}: mean {sum(losses) / len(losses):.2f}, last {losses[-1]:.2f}")
axis.set(xlabel="timestep t", ylabel=f"loss of {sd.schedule.config.prediction}", ylim=(0, None))
axis.legend()
lesson.show(fig, "real", "Loss with and without captions: captions help at late timesteps.")
with torch.device("meta"):  # shapes without numbers
    large = UNet(SD1.unet)
millions = sum(p.numel() for p in large.parameters()) / 1e6
print(f"U-Net of Stable Diffusion 1.x: {millions:.0f} million")

# %% [markdown]
# Look where the two curves part: where the noise has left little of the picture, the words say what the picture cannot. At early timesteps
# the picture speaks for itself.
#
# The U-Net of Stable Diffusion 1.x has 860 million parameters instead of the thousands above. It learned by your three lines.

# %% [markdown]
# ## On a GPU
#
# ```bash
# python lessons/02_diffusion_in_sixty_lines.py --device cuda
# ```
#
# One minute. Expect no gain: the network is so small that starting each of its operations costs more than doing it. Then set `width=1024` and
# 20,000 steps of 8,192 points: some minutes on a GPU, hours here. The curve comes nearer to the best possible, and cannot pass it.

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
# The second answer is right. At late timesteps the noisy point is almost the noise itself, which is easy to predict. At early ones most of
# the noise is hidden in the data's own spread.

# %% [markdown]
# ## Quiz
#
# 1. The mean loss has stopped falling and the samples still improve. Is something wrong?
# 2. A model predicts zero for all noise. What is its loss, and at which timesteps?
# 3. What happens to a network that is always told the same t?
#
# <details><summary>Answers</summary>
#
# 1. No. Most of the loss is the part that cannot be avoided; what still improves is a small share of it.
# 2. One, at every timestep, because the noise has variance one.
# 3. It predicts an average over all noise levels: its loss still falls, and its samples miss the data.
#
# </details>

# %% [markdown]
# ## Now you
#
# Replace the spiral by data of your own: two rings, a letter, the outline of a country. Predict in which bins of t the unavoidable loss
# will be higher than the spiral's, and where the samples will go wrong first. Train, and compare the curves.

# %% [markdown]
# ## Read next
#
# - `minidiff/trainers/engine/diffusion_loss.py`: `sample_noise` draws t and noise, `squared_error` is your first two lines, `diffusion_loss` your mean,
#   with a mask and a weight for who wants them.
# - `minidiff/trainers/engine/loop.py` is the loop around it.
# - Ho, Jain and Abbeel 2020, "Denoising diffusion probabilistic models", algorithm 1 and eq. 14.
# - Lesson 03: why the walk back is right, and how few steps it needs.
