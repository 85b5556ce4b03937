# %% [markdown]
# # 11 Samplers as ODE solvers
#
# **Why do some samplers come as far with sixteen looks at the picture as others with forty?**
#
# - Explains: [minidiff/samplers.py](../minidiff/samplers.py)
# - You change: `heun_step`, a step that looks at both of its ends
# - Minutes: 35
# - Picture: [figures/11-error.png](figures/11-error.png)
#
# ![The whole pipeline; this lesson is about the denoising loop](figures/pipeline-sampler.svg)
#
# DDIM (lesson 03) goes from noise to a picture in steps, each along a guess of the U-Net, and with twice the steps its error is halved.
# Every look at the picture is one call of the U-Net, and that is where nearly all the time goes. This lesson sees the walk as a curve, and
# finds samplers that follow it with fewer calls. Nothing is trained.

# %% [markdown]
# ## Guess first
#
# Three samplers walk from the same noise. Each may call the U-Net sixteen times.
#
# 1. *Euler* takes sixteen steps, each straight on.
# 2. *Heun* takes eight steps, and looks twice in each, at its beginning and at its end.
# 3. *DPM++ 2M* takes sixteen steps and looks once in each, but remembers what it saw before.
#
# Which ends nearest to the picture that a walk of very many steps ends at? And how much nearer does each come with twice the calls?

# %% [markdown]
# ## The walk is a curve
#
# In lesson 03 both the picture and the noise in $x_t$ were scaled. Divide by $\sqrt{\bar\alpha}$, and the picture keeps its size:
#
# $$x = x_t / \sqrt{\bar\alpha} = x_0 + \sigma \, \epsilon \qquad \sigma = \sqrt{1 - \bar\alpha} \, / \sqrt{\bar\alpha}$$
#
# $\sigma$ (sigma) is the *noise level*. It says the same as `t`: each timestep has its own. Most programs write samplers this way. The
# guesses then make up $x_{now} = \hat x_0 + \sigma_{now} \, \hat\epsilon$, and the two lines of DDIM become one:
#
# $$x_{then} = \hat x_0 + \sigma_{then} \, \hat\epsilon = x_{now} + (\sigma_{then} - \sigma_{now}) \, \hat\epsilon$$
#
# Read it so: from $x_{now}$ go straight on, in the direction $\hat\epsilon$, as far as $\sigma$ falls. With ever shorter steps the path
# becomes a curve, and $\hat\epsilon$ is its slope at every point (Karras et al. 2022, eq. 1 and 3):
#
# $$\frac{dx}{d\sigma} = \hat\epsilon(x, \sigma)$$
#
# An equation that says the slope at every point is an *ordinary differential equation*, ODE for short; this one is known as the
# *probability-flow ODE*. To follow its curve in steps is to *solve* it, and people have found good ways to do that since long before there
# were neural networks. Going straight on is the oldest, by Euler.

# %%
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from matplotlib import pyplot as plt

from lessons.common import picture_grid, start
from minidiff.config import SD1
from minidiff.guidance import guided
from minidiff.pipeline import noise_source, to_images
from minidiff.samplers import Denoiser, Level, ddim, dpmpp_2m, heun, karras_sigmas, levels
from minidiff.schedule import NoiseSchedule

lesson = start("11_samplers_as_ode_solvers")
sd = lesson.load()
schedule, T = sd.schedule, sd.schedule.config.timesteps

# %%
prompts, seeds = ["a fox on a green background", "a mushroom on a blue background"], [0, 1]
B, C = len(prompts), sd.config.vae.latent_channels
H = W = sd.config.image_size // sd.config.vae.factor
cond, uncond = sd.encode_prompts(prompts), sd.encode_prompts([""] * B)
model = torch.no_grad()(guided(sd.unet, cond, uncond, sd.config.guidance_scale))
denoise = Denoiser(model, schedule.config.prediction, torch.float32)
noise = noise_source(seeds, (C, H, W), lesson.device)()


def slope(x, level):
    """dx/dsigma [B, C, H, W]: one call of the U-Net, which wants x scaled down to x_t."""
    x0_hat, eps_hat = denoise(x * level.sqrt_alpha_bar, level)
    return eps_hat


# %% [markdown]
# `denoise` of `minidiff/samplers.py` calls the model and reads its answer, noise or v, as `x0_hat` and `eps_hat`. A `Level` is a noise
# level with its timestep: `level.t`, `level.sigma`, and `level.sqrt_alpha_bar` for $\sqrt{\bar\alpha}$, which is $1 / \sqrt{\sigma^2 + 1}$.
#
# Which levels to visit is a choice of its own. Here the first is noise alone. The others lie evenly in $\sigma^{1/7}$, as Karras et al.
# propose (eq. 5): far apart where there is hardly anything but noise, close together at the end. `t` becomes a fraction between two
# timesteps, which the U-Net takes as well.

# %%
# as for the sampler "plms": its levels begin at a finite sigma, and end at timestep 0
start_level, second, *_, last = levels(schedule, "plms", 20, "trailing")
log_sigma = schedule.snr(torch.arange(T - 1)).rsqrt().log().numpy()  # sigma^2 is 1 / SNR


def visited(steps):
    """steps + 1 levels: noise alone, then evenly in sigma^(1/7) from `second` to `last`."""
    sigmas = karras_sigmas(last.sigma, second.sigma, steps)
    t = np.interp(np.log(sigmas), log_sigma, range(T - 1))
    return [start_level, *(Level(float(at), float(1 / (1 + s**2))) for at, s in zip(t, sigmas))]


print(f"sigma: {', '.join(f'{level.sigma:.2f}' for level in visited(8))}")


# %%
def euler_step(slope, x, now, then):
    return x + (then.sigma - now.sigma) * slope(x, now)


def walk(step, steps, slope=slope, first=euler_step):
    """x at each level on the way. The first step is Euler's, whatever `step` is; see below."""
    x = noise / start_level.sqrt_alpha_bar
    on_the_way = [x]
    for i, (now, then) in enumerate(pairwise(visited(steps))):
        x = (step if i > 0 else first)(slope, x, now, then)
        on_the_way.append(x)
    return on_the_way


# %%
counts, many = ((4, 6, 8), 16) if lesson.quick else ((4, 8, 16, 32, 64), 128)
euler = {n: walk(euler_step, n) for n in counts}
x_t = noise
for now, then in pairwise(visited(counts[0])):
    x_t, _ = ddim(denoise, x_t, now, then, 0, None)
ours = euler[counts[0]][-1] * last.sqrt_alpha_bar
assert ours.shape == x_t.shape == (B, C, H, W)


def distance(a, b):
    return float((a - b).square().mean().sqrt())


off = distance(ours, x_t) / float(x_t.std())
assert off < 1e-2
print(f"Euler ends within {off:.0e} of DDIM over the same levels")

# %% [markdown]
# Here is the curve of one number of each latent, the one at which Euler's few steps go most astray. Noise is on the left, the picture on
# the right. The left of the axis is cut off, because $\sigma$ begins at thousands; more of that later. The steps made there have erred
# already, so the points do not begin on their curves.

# %%
few, fine = euler[counts[1]], euler[counts[-1]]
fig, axis = plt.subplots()
for i, colour in enumerate(("C0", "C1")):
    worst = int((few[-1][i] - fine[-1][i]).abs().argmax())
    for points, style in ((fine, "-"), (few, "o--")):
        sigma = [level.sigma for level in visited(len(points) - 1)]
        kept = [(s, float(x[i].flatten()[worst])) for s, x in zip(sigma, points) if s < 6]
        label = f"{prompts[i].split()[1]}, {len(points) - 1} steps"
        axis.plot(*zip(*kept), style, c=colour, label=label)
axis.set(xlabel="noise level sigma", ylabel="one number of x", xlim=(5, -0.1))
axis.legend(loc="lower right")
lesson.show(fig, "curve", "Two curves, and Euler's straight pieces beside them.")

# %% [markdown]
# Where the curve is straight, a step may be as long as one likes and makes no mistake. Where it bends, Euler goes on along a slope that
# is no longer right. A better step has to know of the bend.

# %% [markdown]
# ## Your turn: heun_step
#
# Heun's way (1900): go straight on as Euler does, but look again at the end of the step. If the slope there is another, the curve has bent
# on the way. So go back, and take the step once more, along the mean of both slopes (Karras et al. 2022, algorithm 1):
#
# $$d_{now} = \hat\epsilon(x, \sigma_{now}) \qquad d_{then} = \hat\epsilon\left( x + (\sigma_{then} - \sigma_{now}) \, d_{now}, \; \sigma_{then} \right)$$
#
# $$x_{then} = x + (\sigma_{then} - \sigma_{now}) \, (d_{now} + d_{then}) / 2$$
#
# `slope` is a function, like the one above: `slope(x, now)` is $\hat\epsilon(x, \sigma_{now})$. `now` and `then` are levels, so that
# $\sigma_{now}$ is `now.sigma`.


# %%
def heun_step(slope, x, now, then):
    """From level now to level then; slope(x, level) and x are [B, C, H, W]."""
    # YOUR CODE, about 3 lines


def library(slope, x, now, then):
    looks = iter((now, then))

    def model(x_t, t):  # the library's heun calls a model, here one that predicts eps
        level = next(looks)
        return slope(x_t / level.sqrt_alpha_bar, level)

    x_t, _ = heun(Denoiser(model, "eps", x.dtype), x * now.sqrt_alpha_bar, now, then)
    return x_t / then.sqrt_alpha_bar


heun_step = lesson.check(heun_step, instead=library)

# %% [markdown]
# Two calls a step leave half as many steps for the same calls. So a step has to be more than twice as good to be worth it. How the
# error of a walk shrinks with its steps can be seen without a model, on the data of lesson 03: one number of deviation $s$. There the curve
# has a formula, $x$ is proportional to $\sqrt{s^2 + \sigma^2}$. So its slope is $x \, \sigma / (s^2 + \sigma^2)$, and its end is known
# exactly.


# %%
def known(x, level):
    return x * level.sigma / (0.25 + level.sigma**2)  # the data: numbers of deviation 0.5


known_errors = {}
for step, label in ((euler_step, "Euler"), (heun_step, "Heun")):
    for n in (64, 128):
        on_the_way = visited(n)[1:]
        x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        for now, then in pairwise(on_the_way):
            x = step(known, x, now, then)
        exact = ((0.25 + then.sigma**2) / (0.25 + on_the_way[0].sigma ** 2)) ** 0.5
        known_errors[label, n] = abs(float(x) / exact - 1)
    factor = known_errors[label, 64] / known_errors[label, 128]
    print(f"{label}: twice the steps, {factor:.1f} times nearer")

# %% [markdown]
# Solvers are named by this. *First order*: twice the steps, half the error. *Second order*: twice the steps, a quarter of it. On
# logarithmic axes the error of a method of order p is a straight line of slope $-p$.
#
# ## DPM++ 2M: remember the last look
#
# Euler's mistake can also be seen from another side. Its step mixes $x$ with the guess at the picture,
#
# $$x_{then} = \frac{\sigma_{then}}{\sigma_{now}} \, x_{now} + \left( 1 - \frac{\sigma_{then}}{\sigma_{now}} \right) \hat x_0$$
#
# and were $\hat x_0$ the same all along the step, this would be exact, however long the step is. The guess changes, though. DPM-Solver++
# (Lu et al. 2022, algorithm 2) puts in the guess *at the middle of the step*, the middle in $\lambda = -\log \sigma$. The walk has not
# been there yet, but the guesses at the beginning of this step and of the one before are known, and the line through both goes on:
#
# $$\hat x_0^{middle} = \hat x_0 + \frac{1}{2r} \left( \hat x_0 - \hat x_0^{before} \right) \qquad r = h_{before} / h$$
#
# Here $h$ is the length of this step in $\lambda$, $h_{before}$ that of the last. A second order without a second call: "2M" stands for
# second order, *multistep*, which means that earlier steps are used. `dpmpp_2m` in `minidiff/samplers.py` is these two equations.
#
# Is such a guess at a guess any good? The fine walk of Euler says where $\hat x_0$ really was in the middle.

# %%
fine = euler[counts[-1]]
level = visited(counts[-1])
x0_hat = []  # from each step of the fine walk: x - sigma slope
for (x, now), (x_then, then) in pairwise(zip(fine, level)):
    x0_hat.append(x - now.sigma * (x_then - x) / (then.sigma - now.sigma))
x0_hat = torch.stack(x0_hat)
lam = -torch.tensor([one.sigma for one in level[:-1]]).log()


# %%
def guesses(steps):
    """x0_hat at the beginning of steps, extrapolated, and at their middle; three indices."""
    stride = counts[-1] // steps
    looks = torch.arange(stride, len(lam), stride)
    before, now, then = looks[:-2], looks[1:-1], looks[2:]
    middle = (lam - (lam[now] + lam[then])[:, None] / 2).abs().argmin(dim=1)
    r = (lam[now] - lam[before]) / (lam[then] - lam[now])
    extrapolated = x0_hat[now] + (x0_hat[now] - x0_hat[before]) / (2 * r.reshape(-1, 1, 1, 1, 1))
    assert extrapolated.shape == (len(now), B, C, H, W)
    return x0_hat[now], extrapolated, x0_hat[middle], now, then, middle


print("x0_hat at the middle of a step, off by")
for n in counts[1:-1]:
    at_begin, extrapolated, true, *_ = guesses(n)
    off = distance(at_begin, true), distance(extrapolated, true)
    print(f"{n:3} steps: begin {off[0]:.3f}, DPM++ 2M {off[1]:.3f}")

# %%
at = (..., *(int(i) for i in torch.unravel_index(x0_hat.var(dim=0).argmax(), x0_hat.shape[1:])))
at_begin, extrapolated, _, now, then, middle = guesses(counts[-3])
sigma = (-lam).exp()
fig, axis = plt.subplots()
axis.plot(sigma, x0_hat[at].cpu(), color="black", label="as it is")
axis.hlines(at_begin[at].cpu(), sigma[then], sigma[now], color="C1", label="Euler's")
axis.plot(sigma[middle], extrapolated[at].cpu(), "^", color="C0", label="DPM++ 2M's")
axis.set(xscale="log", xlim=(40, 0.1), xlabel="noise level sigma", ylabel="one number of x0_hat")
axis.legend()
lesson.show(fig, "middle", "x0_hat along the walk; stairs, and points near their middles.")

# %% [markdown]
# Euler's stairs are late wherever the guess changes. The triangles follow it, except where it changes its ways: where the fall begins they
# are late too, and where it ends they go past it. So with few steps the extrapolation is no better than the stairs. Compare in the table
# how both errors fall with twice the steps.

# %% [markdown]
# ## Error against calls
#
# Now all three with the model, and the distance of their ends to that of a walk with very many steps. Calls are what costs, so they are
# what is counted.


# %%
def dpm_walk(visited):
    x_t, history = noise, ()
    for now, then in pairwise(visited):
        x_t, _, history = dpmpp_2m(denoise, x_t, now, then, history)
    return x_t


heuns = {n: walk(heun_step, n // 2) for n in counts}  # n - 1 calls
dpms = {n: dpm_walk(visited(n)) for n in counts}
goal = dpm_walk(visited(many))
errors = {
    "Euler": [distance(euler[n][-1] * last.sqrt_alpha_bar, goal) for n in counts],
    "Heun": [distance(heuns[n][-1] * last.sqrt_alpha_bar, goal) for n in counts],
    "DPM++ 2M": [distance(dpms[n], goal) for n in counts],
}

# %%
print("calls   " + "   ".join(errors))
for n, *off in zip(counts, *errors.values()):
    print(f"{n:5}   {off[0]:5.3f}  {off[1]:5.3f}  {off[2]:9.3f}")
for label, off in errors.items():
    slopes = (torch.tensor(off[1:]) / torch.tensor(off[:-1])).log2()
    print(f"{label}: slopes {', '.join(f'{one:.1f}' for one in slopes)}")

# %%
fig, axis = plt.subplots()
for (label, off), marker in zip(errors.items(), "os^"):
    calls = [n - 1 if label == "Heun" else n for n in counts]
    axis.loglog(calls, off, marker=marker, label=label)
for power in (1, 2):
    law = [errors["Euler"][1] * (counts[1] / n) ** power for n in counts]
    axis.loglog(counts, law, "k:", linewidth=1)
axis.set(xlabel="calls of the U-Net", ylabel="distance to the end")
axis.set(xticks=counts, xticklabels=counts)
axis.minorticks_off()
axis.legend()
lesson.show(fig, "error", "Euler's error falls evenly; DPM++ 2M crosses it early, Heun late.")

# %%
n = counts[1]
ends = (euler[n][-1] * last.sqrt_alpha_bar, heuns[n][-1] * last.sqrt_alpha_bar, dpms[n], goal)
pictures = [to_images(sd.decode(x_t))[0] for x_t in ends]
fig = picture_grid([pictures], ["Euler", "Heun", "DPM++ 2M", "the end"], [f"{n - 1} or {n}\ncalls"])
lesson.show(fig, "calls", "Three samplers: a fox, colours without a shape, and a fox; the end.")

# %% [markdown]
# Dotted lines have slopes $-1$ and $-2$. Euler's line is nearly the first. With sixteen calls DPM++ 2M is nearest to the end and Heun
# farthest; with the fewest calls Euler is better than both. An order is a promise about short steps only. While steps are too long for the
# bends of the curve, a clever step is led astray by what it has seen: DPM++ 2M goes past the mark, as the triangles did, and Heun asks for
# slopes at points that the curve does not come by. Once they are short enough, the second order pays: with twice the calls Euler's error is
# about halved, and those of the other two fall to less than a quarter. Look where their lines cross Euler's. At the lower end beware: the
# goal is itself only a walk, and has an error of its own.

# %%
if lesson.model == "tiny" and not lesson.quick:
    few, sixteen = ([off[i] for off in errors.values()] for i in (0, 2))
    assert min(few) == few[0] and sixteen[2] < sixteen[0] < sixteen[1]
dpm_as_far = np.interp(np.log(errors["DPM++ 2M"][2]), np.log(errors["Euler"][::-1]), counts[::-1])
print(f"Euler comes as far as DPM++ 2M with {counts[2]} calls after about {dpm_as_far:.0f}")

# %% [markdown]
# ## Where the steps lie
#
# Most samplers of the library visit timesteps that are even in `t`, as in lesson 03. Near the picture $\sigma$ then falls by large
# factors: of sixteen steps the last goes from 0.26 to 0.03. Here is DPM++ 2M with as many calls, over such levels:


# %%
def even_in_t(steps):
    return levels(schedule, "plms", steps, "trailing")


for label, some in (("sigma^(1/7)", visited(16)), ("t", even_in_t(16))):
    print(f"even in {label}: ... {', '.join(f'{level.sigma:.2f}' for level in some[-4:])}")

print("calls   even in sigma^(1/7)   even in t")
for i, n in list(enumerate(counts))[1:4]:
    off = distance(dpm_walk(even_in_t(n)), goal)
    print(f"{n:5}   {errors['DPM++ 2M'][i]:19.3f}   {off:9.3f}")

# %% [markdown]
# Even in $\sigma^{1/7}$ is nearer each time, and the more so the more calls there are. Where a sampler looks matters as much as what it
# makes of it.

# %% [markdown]
# ## The first step, where sigma is infinite
#
# This model's last timestep is noise alone (lesson 01). There $\bar\alpha$ is 0 and $\sigma$ infinite. Instead of infinity the library
# takes the $\sigma$ of the smallest $\bar\alpha$ that half precision can write: 4096. The next level here is at 40.
#
# Heun's correction is the difference of two slopes, times half the width of the step. The slopes differ by little: both are almost the
# noise that one started from. But the width is immense. Worked out, the correction is
#
# $$\frac{\sigma_{now} - \sigma_{then}}{2 \, \sigma_{then}} \left( \hat x_0^{then} - \hat x_0^{now} \right)$$
#
# In a short step the fraction is small. But the more $\sigma$ falls within a step the larger it is, and nothing holds it. With few steps
# it is large everywhere, which is what became of Heun's fox:

# %%
now, then = start_level, second
fraction = (now.sigma - then.sigma) / (2 * then.sigma)
print(f"sigma {now.sigma:.0f} to {then.sigma:.0f}: the fraction is {fraction:.0f}")
for n in (4, 16, 64):
    fraction = [(now.sigma - then.sigma) / (2 * then.sigma) for now, then in pairwise(visited(n))]
    print(f"{n:2} steps, the others: {min(fraction[1:]):.1f} to {max(fraction[1:]):.1f}")


def plain_heun(slope, x, now, then):
    beside = replace(now, alpha_bar=1.0001 * now.alpha_bar)  # at exactly 4096 it goes another way
    return library(slope, x, beside, then)


# %% [markdown]
# The curve is not to blame: it is nearly straight at its beginning. It is only seen in the wrong coordinates. Divide by $\sigma$, and
# everything is finite: the noise is at $1 / \sigma = 0$, and the slope is the guess at the picture.
#
# $$\frac{d(x / \sigma)}{d(1 / \sigma)} = \hat x_0$$
#
# Here the fraction becomes $(1 - \sigma_{then} / \sigma_{now}) / 2$, never more than a half. The library's `heun` takes its first step so,
# and all others in $\sigma$. The walks above take Euler's step at first. How far from theirs do walks end that begin in the other two ways?

# %%
n = counts[2]
usual = heuns[n]
for label, first in (("Heun", plain_heun), ("the library's heun", library)):
    other = walk(heun_step, n // 2, first=first)
    print(f"first step by {label}: x_t of deviation {(other[1] * second.sqrt_alpha_bar).std():.2f}")
    print(f"  ends {distance(other[-1], usual[-1]):.2f} from where Euler's leads")

# %% [markdown]
# Noise alone should have deviation 1 here. Heun's own first step makes it too large, like the noise without room in lesson 03, and all
# that follows goes astray. The library's leads to nearly the same end as Euler's.

# %% [markdown]
# ## Break it: the input left as it is
#
# Programs that write samplers in $\sigma$ have to scale $x$ by $1 / \sqrt{\sigma^2 + 1}$ before the U-Net sees it, because the U-Net was
# trained on $x_t$. To forget that is the classic slip when a sampler is carried over from a paper: at the end of the walk the factor is
# nearly $1$, and nothing crashes anywhere.


# %%
def unscaled(x, level):
    raw = denoise.model_output(x, level)  # x * level.sqrt_alpha_bar is right
    return denoise.to_x0_eps(raw, x * level.sqrt_alpha_bar, level)[1]


every, steps = counts[-1] // 4, counts[-1]
for x, level in list(zip(euler[steps], visited(steps)))[every:steps:every]:
    off = distance(slope(x, level), unscaled(x, level)) * level.sigma
    factor = 1 / level.sqrt_alpha_bar
    print(f"sigma {level.sigma:.2f}: input {factor:.2f} times too large, x0_hat off by {off:.2f}")

# %%
n = counts[2]
wrong = walk(euler_step, n, slope=unscaled)[-1] * last.sqrt_alpha_bar
right = euler[n][-1] * last.sqrt_alpha_bar
print(f"{n} steps: the ends are {distance(right, wrong):.2f} apart")
columns = [to_images(sd.decode(x_t)) for x_t in (right, wrong)]
row = [picture for pair in zip(*columns) for picture in pair]
fig = picture_grid([row], ["right", "unscaled"] * B, [f"{n} steps"])
lesson.show(fig, "unscaled", "Fox and mushroom, each beside what comes of an input left unscaled.")

# %% [markdown]
# A network that was never shown such an input answers something all the same. Each of its blocks brings the numbers that come in to
# variance $1$ (`GroupNorm`, lesson 06), and that hides the factor in part: a fox is there, and a mushroom, and both have gone out of
# shape. The error is large where $\sigma$ is, where the shape is decided, and vanishes where a test on a nearly clean picture would look
# for it.
#
# ## On real Stable Diffusion
#
# `python lessons/11_samplers_as_ode_solvers.py --model v1-5-pruned-emaonly.safetensors` draws the same figures for a checkpoint that you
# have. Its $\sigma$ begins at 14.6, so that its first step needs no care. A sampler with "Karras" in its name spaces all its steps evenly
# in $\sigma^{1/7}$, from the largest $\sigma$ on.

# %%
for name, one in (("Stable Diffusion 1.x", NoiseSchedule(SD1.schedule)), ("this model", schedule)):
    *karras, _ = levels(one, "dpmpp_2m_karras", 20, "trailing")
    above = sum(level.sigma > 15 for level in karras)
    print(f"{name}: sigma {karras[0].sigma:.1f} to {karras[-1].sigma:.3f}")
    print(f"  {above} of {len(karras)} Karras levels above 15")

# %% [markdown]
# From 4096 on that is a waste: 13 of 20 levels lie above 15, where there is hardly anything but noise to look at. So the walks above
# begin their even levels only after the first step.

# %% [markdown]
# ## On a GPU
#
# ```bash
# python lessons/11_samplers_as_ode_solvers.py --model v1-5-pruned-emaonly.safetensors --device cuda
# ```
#
# Four minutes. Expect the same order of the three lines with larger errors: at a guidance scale of 7.5 the curve bends more than at 4. Then
# write 1 for the guidance scale in the call of `guided`, and see how much straighter the curve becomes.

# %% [markdown]
# ## Read next
#
# - `minidiff/samplers.py`: `euler`, `heun` and `dpmpp_2m` are the three steps, `levels` the noise levels, `sample` the walk.
# - Karras, Aittala, Aila and Laine 2022, "Elucidating the design space of diffusion-based generative models", section 3 and algorithm 1.
# - Lu et al. 2022, "DPM-Solver++: fast solver for guided sampling of diffusion probabilistic models", algorithm 2.
# - Lesson 12: how the model that answers all these calls is trained.
