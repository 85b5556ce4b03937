# %% [markdown]
# # 03 Walking back: DDPM and DDIM
#
# **How do we get from noise to a picture when every prediction of that picture is only a guess?**
#
# - Explains: [minidiff/samplers.py](../minidiff/samplers.py)
# - You change: `ddim_step`, `walk` and `ddpm_step`, a sampler from the step to the loop
# - Minutes: 45
# - Picture: [figures/03-paths.png](figures/03-paths.png)
#
# ![The whole pipeline; this lesson is about the denoising loop](figures/pipeline-sampler.svg)
#
# Lesson 02 ended with a few lines that moved a cloud of noise onto the data, and promised to explain them. Such lines are called a
# *sampler*. All later samplers descend from two: DDPM (Ho et al. 2020), which adds fresh noise at every step, and DDIM (Song et al. 2021),
# which adds none. In this lesson you write both, run them on the bundled model, and measure their errors.

# %% [markdown]
# ## Guess first
#
# DDPM and DDIM start from exactly the same noise, with the same model, prompt and number of steps. What comes out?
#
# 1. The same picture: the starting noise and the model decide everything.
# 2. The same picture, but DDPM's is noisier, because it adds noise.
# 3. Two different pictures, both clean.

# %% [markdown]
# ## A prediction at every noise level
#
# The U-Net predicts the noise, or the mixture v. Either one gives a prediction of the clean latent $x_0$ (lesson 01), which the code calls
# `x0_hat`. The function `look(x_t, t)` below returns it for a batch of latents, one for each prompt, with guidance (lesson 00). A sampler
# asks nothing else of the model.

# %%
from functools import partial
from itertools import pairwise

import torch

from lessons.common import curves, distance, picture_grid, start, x0_predictor
from minidiff.config import SD1
from minidiff.pipeline import noise_source, to_images
from minidiff.schedule import NoiseSchedule

lesson = start("03_walking_back")
sd = lesson.load()

# %%
prompts = ["a fox on a green background", "a mushroom on a blue background"]
prompts.append("a cactus on an orange background")
look = x0_predictor(sd, prompts)

# %%
B, C = len(prompts), sd.config.vae.latent_channels
H = W = sd.config.image_size // sd.config.vae.factor
seeds = [0, 1, 2]  # one for each prompt
x_T = noise_source(seeds, (C, H, W), lesson.device)()
steps = 6 if lesson.quick else 20
schedule, T = sd.schedule, sd.schedule.config.timesteps
alpha_bar = schedule.alpha_bar.float().to(lesson.device)
timesteps = [*schedule.timesteps(steps).tolist(), 0]

x0_hat = look(x_T, timesteps[0])
assert x0_hat.shape == x_T.shape == (B, C, H, W)
print(f"timesteps: {', '.join(map(str, timesteps[:4]))}, ... {timesteps[-2]}, {timesteps[-1]}")

# %% [markdown]
# The sampler visits these timesteps in order. At the first one `x_t` is pure noise, so the model has nothing to go on but the prompt. Its
# best prediction is the average over every picture that could be hidden in the noise (lesson 02), here every picture that fits the words:
# a blur. The blur is not a picture yet, but it points the way. At timestep `0` there is almost no noise left, and the trajectory ends.

# %% [markdown]
# ## One step: remove all the noise, put less of it back
#
# A prediction of the picture implies a prediction of the noise, `eps_hat`. Solve the closed-form forward process of lesson 01 for the noise,
# and call the current timestep `now`:
#
# $$\hat\epsilon = \left( x_{now} - \sqrt{\bar\alpha_{now}} \; \hat x_0 \right) / \sqrt{1 - \bar\alpha_{now}}$$
#
# Now apply the forward process again, with both predictions, to reach the next lower timestep, `then`:
#
# $$x_{then} = \sqrt{\bar\alpha_{then}} \; \hat x_0 + \sqrt{1 - \bar\alpha_{then}} \; \hat\epsilon$$
#
# This is DDIM (Song et al. 2021, eq. 12 with $\sigma = 0$; their $\alpha$ is our $\bar\alpha$). If the prediction were the truth, the step
# would land exactly where the same picture and the same noise belong at `then`. The prediction is wrong at first. But the step is short,
# and after it the model looks again, with less noise in the way.

# %% [markdown]
# ## Your turn: ddim_step
#
# Write one step. `alpha_bar` is the table of lesson 01. `now` and `then` are whole numbers, so `alpha_bar[now]` is a single value, a tensor
# without axes, and `alpha_bar[now].sqrt()` its root. Two lines, one for each equation.
#
# When your step is right, a picture appears: points of noise in a plane that your function moves onto a ring of eight data points. For
# such simple data the best prediction is known exactly, so no network is needed.


# %%
def ddim_step(alpha_bar, x_t, x0_hat, now, then):
    """From timestep now to then < now; alpha_bar [T], x_t and x0_hat [B, C, H, W]."""
    # YOUR CODE, about 2 lines


ddim_step = lesson.check(ddim_step)

# %% [markdown]
# First we test the claim above on latents of the model's size. With the true $x_0$ in place of a prediction, one step must land where
# `q_sample`, the library's forward process, does.

# %%
true_x_0, eps = (noise_source(seeds, (C, H, W), lesson.device)() for _ in range(2))
high, low = T * 3 // 4, T // 4
at = [torch.full((B,), t, device=lesson.device) for t in (high, low)]
x_high, x_low = (schedule.q_sample(true_x_0, t, eps) for t in at)
landed = ddim_step(alpha_bar, x_high, true_x_0, high, low)
assert landed.shape == x_low.shape
print(f"with the true x_0 one step is off by {(landed - x_low).abs().max():.0e}")

# %% [markdown]
# ## Your turn: walk
#
# A sampler is the loop around the step. The loop needs a prediction, `look(x_t, t)`, and a step, `step(x_t, x0_hat, now, then)`, which
# returns the next latent. Write it as a generator, so that every step can be watched: `pairwise(timesteps)` gives each timestep together
# with the next one; at each pair, look, take the step, and `yield x0_hat, x_t`, where `x_t` is the latent *after* the step.
#
# A right loop reports how near it brings noise to the ring of data points.


# %%
def walk(look, step, x_t, timesteps):
    """Yield x0_hat and the new x_t of each step; timesteps fall, and the last one is 0."""
    # YOUR CODE, about 4 lines


walk = lesson.check(walk)

# %%
ddim = list(walk(look, partial(ddim_step, alpha_bar), x_T, timesteps))
*_, own = sd.denoise(prompts, steps=steps, seeds=seeds, sampler="ddim")
off = (ddim[-1][1] - own.x_t).abs().max()
assert len(ddim) == steps and off < 1e-3
print(f"{steps} steps end within {off:.0e} of the library's")

# %% [markdown]
# ## DDPM: part of the noise is new
#
# DDPM came first and argues differently. The forward process is random: many different $x_{then}$ lead to the same $x_{now}$. So the way
# back *draws* one of them, from all that fit both $x_{now}$ and the prediction of $x_0$. Worked out, this is the same step with other
# noise. A share $r$ of the noise's variance is fresh (Song et al. 2021, eq. 16 with $\eta = 1$), and the rest is the predicted noise:
#
# $$r = \frac{1 - \bar\alpha_{now} / \bar\alpha_{then}}{1 - \bar\alpha_{now}}$$
#
# $$\mathrm{noise} = \sqrt{1 - r} \; \hat\epsilon + \sqrt{r} \; \epsilon_{new}$$
#
# Both factors are roots because variances add (lesson 01): $(1 - r) + r = 1$. The longer the step, the larger $r$ is. With $r = 0$ this
# would be DDIM's step.

# %% [markdown]
# ## Your turn: ddpm_step
#
# Write DDPM's step: the share `r`, the predicted noise as in `ddim_step`, the mixed noise, and the forward process to `then` with the mixed
# noise in place of $\hat\epsilon$. `eps_new` is fresh noise of the latents' shape. When it is right, the ring appears again. Compare the
# paths with those of DDIM.


# %%
def ddpm_step(alpha_bar, x_t, x0_hat, now, then, eps_new):
    """From timestep now to then < now; eps_new [B, C, H, W] is unit normal noise."""
    # YOUR CODE, about 4 lines


ddpm_step = lesson.check(ddpm_step)


# %%
def renewed(now, then):
    return (1 - alpha_bar[now] / alpha_bar[then]) / (1 - alpha_bar[now])


def ddpm_walk(draw, step=ddpm_step):
    """Walk with fresh noise from draw() at every step; the first draw is where it starts."""
    drawing = lambda x_t, x0_hat, now, then: step(alpha_bar, x_t, x0_hat, now, then, draw())
    return list(walk(look, drawing, x_T, timesteps))


for now, then in list(pairwise(timesteps))[:: steps // 4]:
    print(f"t = {now:3} to {then:3}: {renewed(now, then):.0%} of the noise is new")

# %%
draw = noise_source(seeds, (C, H, W), lesson.device)
assert torch.equal(draw(), x_T)  # a source of noise gives the start first
ddpm = ddpm_walk(draw)
*_, own = sd.denoise(prompts, steps=steps, seeds=seeds, sampler="ddim", eta=1.0)
off = (ddpm[-1][1] - own.x_t).abs().max()
assert off < 1e-3
print(f"DDPM ends within {off:.0e} of the library's")

# %% [markdown]
# ## One seed, two trajectories
#
# Same start, same prompts, same number of steps. The first figure shows the predictions of both samplers along the way, for the first
# prompt. The second shows where they end, for two prompts, and adds another run of DDPM with other fresh noise.

# %%
at = torch.linspace(0, steps - 1, 6).round().int().tolist()
rows = [to_images(sd.decode(torch.stack([path[i][0][0] for i in at]))) for path in (ddim, ddpm)]
fig = picture_grid(rows, [f"step {i + 1}" for i in at], ["DDIM", "DDPM"])
lesson.show(fig, "paths", "Predictions of DDIM and DDPM: the same blur first, two foxes at last.")

# %%
second = ddpm_walk(noise_source([seed + 10 for seed in seeds], (C, H, W), lesson.device))
ends = [path[-1][1] for path in (ddim, ddpm, second)]
print(f"the two runs of DDPM end {distance(ends[1], ends[2]):.2f} apart")
print(f"DDIM ends {distance(ends[0], ends[1]):.2f} from the first of them")
columns = [to_images(sd.decode(x_t)) for x_t in ends]
row = [picture for of_one_prompt in list(zip(*columns))[:2] for picture in of_one_prompt]
fig = picture_grid([row], ["DDIM", "DDPM", "DDPM"] * 2)
lesson.show(fig, "ends", "A fox and a mushroom, three runs each: every run ends elsewhere.")

# %% [markdown]
# All of these pictures are clean and show what the prompt says. They differ in what the prompt leaves open. DDIM is a function of its
# starting noise: one start, one picture. DDPM replaces the noise as it goes, so the starting noise is gradually lost. We can measure how
# much of it is left: for each later $x_t$, the least-squares factor $a$ that minimizes the distance between $x_t$ and $a$ times the latent
# after the first step, as in lesson 01.

# %%
left = {}
for label, path in (("DDIM", ddim), ("DDPM", ddpm)):
    first = path[0][1]
    share = [float((x_t * first).sum() / (first * first).sum()) for _, x_t in path]
    left[label] = timesteps[1:], share
    print(f"{label}: left halfway {share[steps // 2 - 1]:.2f}")
left[r"$\sqrt{1-\bar\alpha_t}$"] = range(T), (1 - alpha_bar).sqrt().cpu()
size_of_noise = list(left)[-1]
fig = curves(left, "timestep t", "left of the first $x_t$", dashed=[size_of_noise], xlim=(T, 0))
lesson.show(fig, "forgets", "DDIM keeps its first noise while there is any; DDPM soon loses it.")

# %% [markdown]
# The dashed line is the size of the noise at each timestep. DDIM stays above it: its noise is the first noise to the end, and even the
# picture resembles that noise a little. So with DDIM the start decides the picture. Two starts can be blended, and a picture can be walked
# back to the start it would come from. After a few steps of DDPM hardly anything of the start is left.

# %% [markdown]
# ## Error against the number of steps
#
# With more and more steps DDIM converges to one fixed picture. Its error is how far it ends from a run of very many steps. Both axes below
# are logarithmic. On such axes the law "twice the steps, half the error" is a straight line of slope $-1$.

# %%
counts, many = ((1, 2, 4, 8), 16) if lesson.quick else ((1, 2, 4, 8, 16, 32), 128)


def end_of(n):
    visited = [*schedule.timesteps(n).tolist(), 0]
    *_, (_, x_t) = walk(look, partial(ddim_step, alpha_bar), x_T, visited)
    return x_t


goal = end_of(many)
errors = [distance(end_of(n), goal) for n in counts]
for n, error in zip(counts, errors):
    print(f"{n:3} steps: {error:.2f}")
slope = torch.tensor(errors[-1] / errors[1]).log2() / (len(counts) - 2)
print(f"slope from 2 steps on: {slope:.1f}")

# %%
law = [errors[-1] * counts[-1] / n for n in counts]
lines = {"DDIM, this model": (counts, errors), "slope -1": (counts, law)}
axes = {"xlabel": "steps", "ylabel": "distance to the end"}
fig = curves(lines, **axes, log="xy", dashed=["slope -1"], xticks=counts)
lesson.show(fig, "error", "DDIM's error falls in a straight line on logarithmic axes.")

# %% [markdown]
# The error roughly follows the dashed line: twice the steps leave about half of it. A method with this law is called *first order*.

# %% [markdown]
# ## An error for DDPM
#
# DDPM has no fixed picture to converge to: each run ends elsewhere, as it should. Its error is in the *distribution* of its final samples,
# which should be spread as the data are. That is hard to measure in pictures, and easy for data so simple that the best prediction is
# known. Let the data be single numbers, normally distributed around zero with standard deviation $s$. The best prediction is then
#
# $$\hat x_0 = \frac{\sqrt{\bar\alpha} \; s^2}{\bar\alpha \, s^2 + 1 - \bar\alpha} \; x_t$$
#
# With this prediction a step multiplies $x_t$ by a factor, and DDPM adds noise of a certain size. The variance is multiplied by the square
# of the factor, and the variance of the noise is added. We can therefore follow the standard deviation exactly, without drawing a single
# sample, and compare it with $s$ at the end. The code finds the factor by giving the step a latent of $1$ and no fresh noise, and the size
# of the noise by giving it a latent of $0$ and fresh noise of $1$.

# %%
s, more_counts = 0.5, (2, 4, 8, 16, 32, 64, 128, 256)
one, none = torch.ones(1, device=lesson.device), torch.zeros(1, device=lesson.device)
without_noise = lambda *arguments: ddim_step(*arguments[:-1])  # all but eps_new


def deviation(step, n):
    """Standard deviation of the final samples when x_T has deviation 1."""
    variance = 1.0
    for now, then in pairwise([*schedule.timesteps(n, "trailing").tolist(), 0]):
        a = alpha_bar[now]
        guess = a.sqrt() * s**2 / (a * s**2 + 1 - a)
        factor = step(alpha_bar, one, guess * one, now, then, none)
        added = step(alpha_bar, none, none, now, then, one)
        variance = float(factor**2 * variance + added**2)
    return variance**0.5


# %%
expected = float((alpha_bar[0] * s**2 + 1 - alpha_bar[0]) ** 0.5)  # t = 0 has a little noise
lines = {}
for label, step in (("DDIM", without_noise), ("DDPM", ddpm_step)):
    off = [1 - deviation(step, n) / expected for n in more_counts]
    assert min(off) > 0  # always too small
    lines[label] = more_counts, off
    print(f"{label}: after 8 steps {off[2]:.1%} too small, after 64 {off[5]:.1%}")
fig = curves(lines, "steps", "deviation too small by", log="xy", xticks=more_counts)
lesson.show(fig, "exact", "Both errors fall with the steps; DDPM's stays the larger one.")

# %% [markdown]
# Both samplers come out too narrow: with few steps their samples stay too close to the average. DDIM needs about half as many steps as DDPM
# for the same error, and its line is the steeper one. DDPM's fresh noise is only right for short steps; it was designed to visit every
# timestep. DDIM's authors needed ten to fifty times fewer. Lesson 11 has samplers whose lines fall more steeply still.

# %% [markdown]
# ## Break it: add noise without making room
#
# The classic mistake with DDPM is to add the fresh noise and forget to shrink $\hat\epsilon$ by $\sqrt{1 - r}$. Then $x_t$ holds more noise
# than belongs to its timestep, and the U-Net, which is told `t`, removes only as much as belongs there.


# %%
def crowded_step(alpha_bar, x_t, x0_hat, now, then, eps_new):
    kept = ddim_step(alpha_bar, x_t, x0_hat, now, then)
    return kept + (renewed(now, then) * (1 - alpha_bar[then])).sqrt() * eps_new


draw = noise_source(seeds, (C, H, W), lesson.device)
draw()
crowded = ddpm_walk(draw, crowded_step)
for label, path in (("right", ddpm), ("no room", crowded)):
    half, end = path[steps // 2 - 1][1].std(), path[-1][1].std()
    print(f"{label}: deviation of x_t halfway {half:.2f}, at the end {end:.2f}")
print(f"distance between the ends: {distance(ddpm[-1][1], crowded[-1][1]):.2f}")

# %%
right, wrong = (to_images(sd.decode(path[-1][1])) for path in (ddpm, crowded))
row = [picture for pair in zip(right, wrong) for picture in pair]
fig = picture_grid([row], ["right", "no room"] * B)
lesson.show(fig, "crowded", "Three pictures, each next to what it becomes when no room is made.")

# %% [markdown]
# Whenever a sampler adds noise, it must first shrink what is there. Otherwise the variance is not the one the network was trained on.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/03_walking_back.py --model v1-5-pruned-emaonly.safetensors` draws the same figures for a checkpoint of yours. A sampler
# also chooses which timesteps it visits, its *spacing*. The original Stable Diffusion counts up from 1 in equal strides (`leading`) and
# stops short of the last timestep. The bundled model counts down from the last one (`trailing`).

# %%
sd1 = NoiseSchedule(SD1.schedule)
for spacing in ("leading", "trailing"):
    visited = sd1.timesteps(20, spacing).tolist()
    kept = sd1.alpha_bar[visited[0]].sqrt()
    print(f"{spacing}: {visited[0]}, {visited[1]}, ... {visited[-1]}")
    print(f"  {kept:.1%} of the picture expected at the start")

# %% [markdown]
# At its first step Stable Diffusion 1.x is told timestep 951, where a little of a picture should be left, and is given pure noise. During
# training it learned to use that little: it can read the mean colour from it, for one. Pure noise always reads as a medium colour. That is
# why it rarely makes a picture that is almost black or almost white all over (Lin et al. 2023).

# %% [markdown]
# ## On a GPU
#
# ```bash
# python lessons/03_walking_back.py --model v1-5-pruned-emaonly.safetensors --device cuda
# ```
#
# Three minutes. Expect DDIM's error to fall along the same line, further from it at few steps: photographs leave more to decide than emoji.
# Then raise `counts` to `(1, ..., 128)` and `many` to 1000. From how many steps on do your eyes see no difference?

# %% [markdown]
# ## What you now know
#
# - A sampler asks the model for one thing at each step: a prediction of the clean latent, `x0_hat`.
# - A step removes all the predicted noise and puts less of it back, at the next lower noise level.
# - DDIM reuses the predicted noise, so one start gives one picture; DDPM renews a share $r$ of its variance, so the start is forgotten.
# - DDIM's error is first order: twice the steps, half the error.
# - The variance of $x_t$ must fit its timestep. Noise that is added needs room.

# %% [markdown]
# ## Your guess
#
# The third answer is right: two different pictures, both clean. The first would be right for two runs of DDIM. The second confuses the
# noise that is added on the way with noise that stays: each later step removes what the earlier ones added.

# %% [markdown]
# ## Quiz
#
# 1. You run DDIM twice with one seed, and DDPM twice with one start but fresh noise each time. Which pairs are equal?
# 2. Your step computes `1 - alpha_bar[then].sqrt()` in place of `(1 - alpha_bar[then]).sqrt()`. Is there too much noise or too little?
# 3. Why is the very first prediction a blur, even from a perfect model?
#
# <details><summary>Answers</summary>
#
# 1. The two runs of DDIM. DDPM's fresh noise replaces the start.
# 2. Too little: $1 - \sqrt{a}$ is smaller than $\sqrt{1 - a}$ for every $a$ between zero and one. The pictures come out too smooth.
# 3. At the first timestep there is only noise, so the best prediction is an average over every picture that fits the prompt.
#
# </details>

# %% [markdown]
# ## Now you
#
# `eta` lies between the two samplers: multiply $r$ by $\eta^2$ in `ddpm_step`. Before you run it, predict for $\eta$ of zero, a half and
# one: how far apart do two runs end that share their start and differ in their fresh noise? Write down three numbers. Then change the step,
# run `ddpm_walk` twice for each $\eta$, print `distance`, and look at the pictures. Is the middle one halfway?

# %% [markdown]
# ## Read next
#
# - `minidiff/samplers.py`: `ddim` is your two lines with a share of fresh noise; `ddpm` is the same step in its authors' form; `levels`
#   decides which noise levels are visited; `sample` is your loop.
# - Song, Meng and Ermon 2021, "Denoising diffusion implicit models", section 4: eq. 12 and eq. 16. Ho et al. 2020, algorithm 2.
# - Lesson 11: the trajectory as a curve, and steps that follow its bends.
# - Lesson 04: inside the U-Net, beginning with attention.
