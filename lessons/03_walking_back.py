# %% [markdown]
# # 03 Walking back: DDPM and DDIM
#
# **How does one get from noise to a picture, when every look at it is only a guess?**
#
# - Explains: [minidiff/samplers.py](../minidiff/samplers.py)
# - You change: `ddim_step`, one step from noise towards the picture
# - Minutes: 30
# - Picture: [figures/03-paths.png](figures/03-paths.png)
#
# Lesson 02 ended with a few lines that walked a cloud of noise back to the data, and promised to say why they are right. Such lines are
# called a *sampler*. Two are the grandparents of all others: DDPM (Ho et al. 2020), which draws fresh noise on the way, and DDIM (Song et
# al. 2021), which draws none. Here both walk with the bundled model, and their errors are measured.

# %% [markdown]
# ## Guess first
#
# DDPM and DDIM start from the very same noise, with the same model, prompt and number of steps. What comes out?
#
# 1. The same picture: the start and the model decide.
# 2. The same, but DDPM's is noisier, since it adds noise.
# 3. Two different pictures, both clean.

# %% [markdown]
# ## A guess at every noise level
#
# The U-Net answers with the noise, or with the mixture v. From either follows a guess at the clean latent $x_0$ (lesson 01), called
# `x0_hat`. The lines below work it out, with the guidance of lesson 00 around the U-Net, in a function `look(x_t, t)`. A walk needs nothing
# else of the model.

# %%
from itertools import pairwise

import torch
from matplotlib import pyplot as plt

from lessons.common import picture_grid, start
from minidiff.config import SD1
from minidiff.guidance import guided
from minidiff.pipeline import noise_source, to_images
from minidiff.schedule import NoiseSchedule

lesson = start("03_walking_back")
sd = lesson.load()
schedule, T = sd.schedule, sd.schedule.config.timesteps
alpha_bar = schedule.alpha_bar.float().to(lesson.device)

# %%
prompts = ["a fox on a green background", "a mushroom on a blue background"]
prompts.append("a cactus on an orange background")
B, C = len(prompts), sd.config.vae.latent_channels
H = W = sd.config.image_size // sd.config.vae.factor
cond, uncond = sd.encode_prompts(prompts), sd.encode_prompts([""] * B)
model = guided(sd.unet, cond, uncond, sd.config.guidance_scale)
x0_from = schedule.x0_from_v if schedule.config.prediction == "v" else schedule.x0_from_eps


@torch.no_grad()
def look(x_t, t):
    """x0_hat: what the model takes the clean latents of x_t for; t is one number."""
    t = torch.full((B,), t, device=x_t.device)
    return x0_from(x_t, t, model(x_t, t))


# %%
seeds = [0, 1, 2]  # one a prompt
x_T = noise_source(seeds, (C, H, W), lesson.device)()
steps = 6 if lesson.quick else 20
timesteps = [*schedule.timesteps(steps).tolist(), 0]
x0_hat = look(x_T, timesteps[0])
assert x0_hat.shape == x_T.shape == (B, C, H, W)
print(f"timesteps: {', '.join(map(str, timesteps[:4]))}, ... {timesteps[-2]}, {timesteps[-1]}")

# %% [markdown]
# A walk visits these timesteps one after the other. At the first, `x_t` is noise alone, so the first guess is made from nothing but the
# words. The best answer is an average over all that may be behind the noise (lesson 02), here over everything that the words allow: a blur.
# It is no picture yet, but it says where to go. At timestep `0` hardly any noise is left, and the walk ends.

# %% [markdown]
# ## A step: all the noise out, less of it in
#
# The guess at the picture implies a guess at the noise, from the jump of lesson 01 solved for it. Write `now` for the timestep where we
# are:
#
# $$\hat\epsilon = \left( x_{now} - \sqrt{\bar\alpha_{now}} \; \hat x_0 \right) / \sqrt{1 - \bar\alpha_{now}}$$
#
# Now jump again, with the two guesses, to the next lower timestep, `then`:
#
# $$x_{then} = \sqrt{\bar\alpha_{then}} \; \hat x_0 + \sqrt{1 - \bar\alpha_{then}} \; \hat\epsilon$$
#
# That is DDIM (Song et al. 2021, eq. 12 with $\sigma = 0$; their $\alpha$ is our $\bar\alpha$). Were the guess the truth, this would be
# exactly the $x_{then}$ that the same picture and the same noise give. It is not the truth. But one goes only a little way by it, and from
# there looks again, with less noise in the way.

# %% [markdown]
# ## Your turn: ddim_step
#
# `alpha_bar` is the table of lesson 01, `now` and `then` are timesteps as whole numbers, so that `alpha_bar[now]` is one value. Two lines,
# one for each equation.


# %%
def ddim_step(alpha_bar, x_t, x0_hat, now, then):
    """From timestep now to then < now; alpha_bar [T], x_t and x0_hat [B, C, H, W]."""
    # YOUR CODE, about 2 lines


def library(alpha_bar, x_t, x0_hat, now, then):
    now, then = (torch.full((len(x_t),), t, device=x_t.device) for t in (now, then))
    eps_hat = schedule.eps_from_x0(x_t, now, x0_hat)
    return schedule.q_sample(x0_hat, then, eps_hat)


ddim_step = lesson.check(ddim_step, instead=library)

# %% [markdown]
# First the claim: with the true $x_0$ one step lands where `q_sample` would. Then the walk, beside the library's own.

# %%
true_x_0, eps = (noise_source(seeds, (C, H, W), lesson.device)() for _ in range(2))
high, low = (torch.full((B,), t, device=lesson.device) for t in (T * 3 // 4, T // 4))
landed = ddim_step(alpha_bar, schedule.q_sample(true_x_0, high, eps), true_x_0, T * 3 // 4, T // 4)
off = (landed - schedule.q_sample(true_x_0, low, eps)).abs().max()
assert off < 1e-4
print(f"with the true x_0 one step is off by {off:.0e}")


# %%
def ddim_walk(x_t, timesteps):
    """Yields x0_hat and x_t after each step."""
    for now, then in pairwise(timesteps):
        x0_hat = look(x_t, now)
        x_t = ddim_step(alpha_bar, x_t, x0_hat, now, then)
        yield x0_hat, x_t


ddim = list(ddim_walk(x_T, timesteps))
*_, own = sd.denoise(prompts, steps=steps, seeds=seeds, sampler="ddim")
assert torch.allclose(ddim[-1][1], own.x_t, atol=1e-3)
print(f"{steps} steps end within {(ddim[-1][1] - own.x_t).abs().max():.0e} of the library's")

# %% [markdown]
# ## DDPM: a part of the noise is new
#
# DDPM came first, and reasons otherwise. The way into noise was random: many $x_{then}$ lead to the same $x_{now}$. So on the way back it
# *draws* one of them, among those that fit both $x_{now}$ and the guess at $x_0$. Worked out, this is the same step with other noise: of
# its variance a share $r$ comes from noise freshly drawn (Song et al. 2021, eq. 16 with $\eta = 1$):
#
# $$r = \frac{1 - \bar\alpha_{now} / \bar\alpha_{then}}{1 - \bar\alpha_{now}} \qquad \mathrm{noise} = \sqrt{1 - r} \; \hat\epsilon + \sqrt{r} \; \epsilon_{new}$$
#
# Roots, since variances add (lesson 01): $(1 - r) + r = 1$. The longer the step, the larger $r$; with $r = 0$ it would be DDIM's step.


# %%
def renewed(now, then):
    return (1 - alpha_bar[now] / alpha_bar[then]) / (1 - alpha_bar[now])


def ddpm_step(alpha_bar, x_t, x0_hat, now, then, eps_new):
    r = renewed(now, then)
    now, then = (torch.full((len(x_t),), t, device=x_t.device) for t in (now, then))
    mixed = (1 - r).sqrt() * schedule.eps_from_x0(x_t, now, x0_hat) + r.sqrt() * eps_new
    return schedule.q_sample(x0_hat, then, mixed)


for now, then in list(pairwise(timesteps))[:: steps // 4]:
    print(f"t = {now:3} to {then:3}: {renewed(now, then):.0%} of the noise is new")


# %%
def ddpm_walk(x_t, timesteps, draw, step=ddpm_step):
    """Yields x0_hat and x_t after each step."""
    for now, then in pairwise(timesteps):
        x0_hat = look(x_t, now)
        x_t = step(alpha_bar, x_t, x0_hat, now, then, draw())
        yield x0_hat, x_t


draw = noise_source(seeds, (C, H, W), lesson.device)
ddpm = list(ddpm_walk(draw(), timesteps, draw))
*_, own = sd.denoise(prompts, steps=steps, seeds=seeds, sampler="ddim", eta=1.0)
assert torch.allclose(ddpm[-1][1], own.x_t, atol=1e-3)

# %% [markdown]
# ## One seed, two paths
#
# Same start, same prompts, same steps. Here are the guesses of both on the way for the first prompt, and the ends for two, with a second
# walk of DDPM that draws other fresh noise.

# %%
at = torch.linspace(0, steps - 1, 6).round().int().tolist()
rows = [to_images(sd.decode(torch.stack([walk[i][0][0] for i in at]))) for walk in (ddim, ddpm)]
fig = picture_grid(rows, [f"step {i + 1}" for i in at], ["DDIM", "DDPM"])
lesson.show(fig, "paths", "Guesses of DDIM and DDPM: one blur at first, two foxes at the end.")

# %%
draw = noise_source([seed + 10 for seed in seeds], (C, H, W), lesson.device)
second = list(ddpm_walk(x_T, timesteps, draw))  # the same start, other fresh noise


def distance(a, b):
    return float((a - b).square().mean().sqrt())


ends = [walk[-1][1] for walk in (ddim, ddpm, second)]
print(f"the two DDPM walks end {distance(ends[1], ends[2]):.2f} apart")
print(f"DDIM ends {distance(ends[0], ends[1]):.2f} from the first of them")
columns = [to_images(sd.decode(x_t)) for x_t in ends]
row = [picture for of_one_prompt in list(zip(*columns))[:2] for picture in of_one_prompt]
fig = picture_grid([row], ["DDIM", "DDPM", "DDPM"] * 2)
lesson.show(fig, "ends", "Fox and mushroom, three walks each: every walk ends elsewhere.")

# %% [markdown]
# The third guess is right. All pictures are clean and show what the words say; they differ in what the words leave open. DDIM is a function
# of its start: one noise, one picture. DDPM replaces the noise on the way, and the start with it. In this model's first step it replaces
# all: timestep `999` is noise alone, and any latent may have led to it. And then? Below is how much of the latent after the first step is
# left in each later $x_t$. As in lesson 01 it is measured by the factor that brings the one nearest to the other.

# %%
fig, axis = plt.subplots()
for label, walk, marker in (("DDIM", ddim, "o"), ("DDPM", ddpm, "s")):
    first = walk[0][1]
    left = [float((x_t * first).sum() / (first * first).sum()) for _, x_t in walk]
    axis.plot(timesteps[1:], left, marker=marker, label=label)
    print(f"{label}: left halfway {left[steps // 2 - 1]:.2f}")
root = (1 - alpha_bar).sqrt().cpu()
axis.plot(root, color="black", linewidth=1, label=r"$\sqrt{1-\bar\alpha_t}$")
axis.set(xlabel="timestep t", ylabel="left of the first $x_t$", xlim=(T, 0))
axis.legend()
lesson.show(fig, "forgets", "DDIM keeps its first noise as long as any; DDPM soon loses it.")

# %% [markdown]
# The thin line is the size of the noise at each timestep. DDIM stays above it: to the end its noise is the first noise, and the picture
# that appears resembles that noise a little as well. So with DDIM the start alone decides the picture: two starts can be blended, and one
# can walk backwards from a picture to its start. Of DDPM's start hardly anything is left after a few steps.

# %% [markdown]
# ## Error against the number of steps
#
# With more and more steps DDIM comes to one fixed picture. So it has an error: how far it ends from a walk of very many steps. Both axes
# below are logarithmic. On such axes a law like "twice the steps, half the error" is a straight line of slope $-1$: where the steps become
# ten times as many, the error becomes a tenth.

# %%
counts, many = ((1, 2, 4, 8), 16) if lesson.quick else ((1, 2, 4, 8, 16, 32), 128)


def end_of(n):
    *_, (_, x_t) = ddim_walk(x_T, [*schedule.timesteps(n).tolist(), 0])
    return x_t


goal = end_of(many)
errors = [distance(end_of(n), goal) for n in counts]
for n, error in zip(counts, errors):
    print(f"{n:3} steps: {error:.2f}")
slope = torch.tensor(errors[-1] / errors[1]).log2() / (len(counts) - 2)
assert lesson.model != "tiny" or -2 < slope < -0.5
print(f"slope from 2 steps on: {slope:.1f}")

# %%
fig, axis = plt.subplots()
axis.loglog(counts, errors, marker="o", label="DDIM, this model")
law = [errors[-1] * counts[-1] / n for n in counts]
axis.loglog(counts, law, "k--", label="slope -1", linewidth=1)
axis.set(xlabel="steps", ylabel="distance to the end", xticks=counts, xticklabels=counts)
axis.minorticks_off()
axis.legend()
lesson.show(fig, "error", "DDIM's error falls in a straight line on logarithmic axes.")

# %% [markdown]
# The error falls about as the dashed line does: with twice the steps about half of it is left.
#
# DDPM has no such goal: each walk ends elsewhere, and rightly so. Its error is in the *distribution* of its ends: all of them together
# should be spread as the data are. That is hard to measure in pictures, and easy for data so simple that the best guess is known. Let the
# data be one number, normally distributed around zero with standard deviation $s$. Then the best guess, the average over all $x_0$ that may
# have led to $x_t$, is
#
# $$\hat x_0 = \frac{\sqrt{\bar\alpha} \; s^2}{\bar\alpha \, s^2 + 1 - \bar\alpha} \; x_t$$
#
# With it a step only multiplies $x_t$ by a factor, and adds noise if it is DDPM's. The variance is then multiplied by the square of the
# factor, and the variance of the noise is added. So the deviation at the end, the root of the variance, can be followed exactly, without
# drawing anything, and compared with $s$. The code gets the factor from a step that is given $1$ and no fresh noise, and the size of the
# noise from one that is given nothing but fresh noise of $1$.

# %%
s, more_counts = 0.5, (2, 4, 8, 16, 32, 64, 128, 256)
one, none = torch.ones(1, device=lesson.device), torch.zeros(1, device=lesson.device)


def deviation(step, n):
    """Of what comes out when x_T has deviation 1."""
    variance = 1.0
    for now, then in pairwise([*schedule.timesteps(n, "trailing").tolist(), 0]):
        guess = alpha_bar[now].sqrt() * s**2 / (alpha_bar[now] * s**2 + 1 - alpha_bar[now])
        factor = step(alpha_bar, one, guess * one, now, then, none)
        added = step(alpha_bar, none, none, now, then, one)
        variance = float(factor**2 * variance + added**2)
    return variance**0.5


def ddim_with_noise(alpha_bar, x_t, x0_hat, now, then, eps_new):
    return ddim_step(alpha_bar, x_t, x0_hat, now, then)


# %%
wanted = float((alpha_bar[0] * s**2 + 1 - alpha_bar[0]) ** 0.5)  # at t = 0 there is a little noise
fig, axis = plt.subplots()
for label, step, marker in (("DDIM", ddim_with_noise, "o"), ("DDPM", ddpm_step, "s")):
    off = [1 - deviation(step, n) / wanted for n in more_counts]
    assert min(off) > 0  # always too small
    axis.loglog(more_counts, off, marker=marker, label=label)
    print(f"{label}: after 8 steps {off[2]:.1%} too small, after 64 {off[5]:.1%}")
axis.set(xlabel="steps", ylabel="deviation too small by", xticks=more_counts)
axis.set_xticklabels(more_counts)
axis.minorticks_off()
axis.legend()
lesson.show(fig, "exact", "Both errors fall with the steps; DDPM's stays the larger.")

# %% [markdown]
# Both come out too narrow: with few steps the ends lie too near the average. But DDIM needs about half of DDPM's steps for the same error,
# and DDPM's line is the flatter one: its fresh noise is right only for short steps. DDPM was meant to visit all timesteps, one after the
# other. DDIM's authors got by with ten to fifty times fewer. Lesson 11 has samplers whose lines fall more steeply.

# %% [markdown]
# ## Break it: new noise without making room
#
# The classic slip with DDPM: the fresh noise is added, and $\hat\epsilon$ is not shortened by $\sqrt{1 - r}$ for it. There is then more
# noise in $x_t$ than belongs to its timestep, and the U-Net, which is told `t`, takes out only what belongs there.


# %%
def crowded_step(alpha_bar, x_t, x0_hat, now, then, eps_new):
    kept = ddim_step(alpha_bar, x_t, x0_hat, now, then)
    return kept + (renewed(now, then) * (1 - alpha_bar[then])).sqrt() * eps_new


draw = noise_source(seeds, (C, H, W), lesson.device)
crowded = list(ddpm_walk(draw(), timesteps, draw, step=crowded_step))
for label, walk in (("right", ddpm), ("without room", crowded)):
    half, end = walk[steps // 2 - 1][1].std(), walk[-1][1].std()
    print(f"{label}: deviation of x_t halfway {half:.2f}, at the end {end:.2f}")
print(f"distance of the ends: {distance(ddpm[-1][1], crowded[-1][1]):.2f}")

# %%
right, wrong = (to_images(sd.decode(walk[-1][1])) for walk in (ddpm, crowded))
row = [picture for pair in zip(right, wrong) for picture in pair]
fig = picture_grid([row], ["right", "no room"] * B)
lesson.show(fig, "crowded", "Three pictures, each beside what is left of it without room.")

# %% [markdown]
# Whenever noise is added, something must be taken off for it, or the variance is not what the network was taught.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/03_walking_back.py --model v1-5-pruned-emaonly.safetensors` draws the same figures for a checkpoint that you have. Which
# timesteps a sampler visits is a choice as well, called *spacing*. The original counts up from 1 in equal strides (`leading`) and stops
# short of the last timestep; the bundled model counts down from it (`trailing`).

# %%
sd1 = NoiseSchedule(SD1.schedule)
for spacing in ("leading", "trailing"):
    visited = sd1.timesteps(20, spacing).tolist()
    kept = sd1.alpha_bar[visited[0]].sqrt()
    print(f"{spacing}: {visited[0]}, {visited[1]}, ... {visited[-1]}")
    print(f"  {kept:.1%} of the picture expected at the start")

# %% [markdown]
# At its first step Stable Diffusion 1.x is told the timestep 951, at which a little of a picture should be left, and is given pure noise.
# In training it has learned to make use of that little: the mean colour, for one, can be read from it. Pure noise always reads as a middling
# colour. So it rarely makes a picture that is nearly black or nearly white as a whole (Lin et al. 2023).

# %% [markdown]
# ## On a GPU
#
# ```bash
# python lessons/03_walking_back.py --model v1-5-pruned-emaonly.safetensors --device cuda
# ```
#
# Three minutes. Expect DDIM's error to fall along the same line, further from it at few steps: photographs have more to decide than emoji.
# Then raise `counts` to `(1, ..., 128)` and `many` to 1000: at which number of steps can your eyes no longer tell the picture from the last
# one?

# %% [markdown]
# ## Read next
#
# - `minidiff/samplers.py`: `ddim` is your two lines with a share of fresh noise, `ddpm` the same as its authors wrote it; `levels` says
#   which noise levels are visited; `sample` is the walk.
# - Song, Meng and Ermon 2021, "Denoising diffusion implicit models", section 4: eq. 12 and eq. 16. Ho et al. 2020, algorithm 2.
# - Lesson 11: the walk as a curve, and steps that follow its bends.
# - Lesson 04: inside the U-Net, beginning with attention.
