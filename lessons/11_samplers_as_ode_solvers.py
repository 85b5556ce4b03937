# %% [markdown]
# # 11 Samplers as ODE solvers
#
# **Why do some samplers need far fewer calls of the U-Net than others for the same picture?**
#
# - Explains: [minidiff/samplers.py](../minidiff/samplers.py)
# - You change: `karras_sigmas`, `heun_step` and `dpm_step`: where to step, and two better ways to do it
# - Minutes: 50
# - Picture: [figures/11-error.png](figures/11-error.png)
#
# ![The whole pipeline; this lesson is about the denoising loop](figures/pipeline-sampler.svg)
#
# DDIM goes from noise to a picture in steps, and with twice the steps its error is halved (lesson 03). Each step calls the U-Net once, and
# nearly all the time goes into these calls. In this lesson we look at the way from noise to picture as a curve. Then two methods that are
# much older than neural networks follow it with fewer calls. Nothing is trained.

# %% [markdown]
# ## Guess first
#
# Three samplers start from the same noise, and each may call the U-Net sixteen times.
#
# 1. *Euler* takes sixteen steps, each straight ahead.
# 2. *Heun* takes eight steps and looks twice in each, at its beginning and at its end.
# 3. *DPM++ 2M* takes sixteen steps, looks once in each, and remembers what it saw in the step before.
#
# Which one comes closest to the picture that very many steps would reach?

# %% [markdown]
# ## The trajectory is a curve
#
# In lesson 03 both the picture and the noise in $x_t$ were scaled. Divide by $\sqrt{\bar\alpha}$, and the picture keeps its size:
#
# $$x = x_t / \sqrt{\bar\alpha} = x_0 + \sigma \, \epsilon \qquad \sigma = \sqrt{1 - \bar\alpha} \, / \sqrt{\bar\alpha}$$
#
# $\sigma$ (sigma) is the *noise level*, the standard deviation of the noise in $x$. Every timestep has its own $\sigma$, so $\sigma$ tells
# as much as $t$. Most programs write their samplers with $\sigma$. For the model's predictions the first equation reads
# $x_{now} = \hat x_0 + \sigma_{now} \, \hat\epsilon$, and DDIM's two lines become one:
#
# $$x_{then} = \hat x_0 + \sigma_{then} \, \hat\epsilon = x_{now} + (\sigma_{then} - \sigma_{now}) \, \hat\epsilon$$
#
# In words: from $x_{now}$, go straight ahead in the direction $\hat\epsilon$, as far as $\sigma$ falls. With shorter and shorter steps the
# path becomes a curve whose slope is $\hat\epsilon$ at every point (Karras et al. 2022, eq. 1 and 3):
#
# $$\frac{dx}{d\sigma} = \hat\epsilon(x, \sigma)$$
#
# An equation that gives the slope at every point is an *ordinary differential equation*, ODE for short. This one is known as the
# *probability-flow ODE*. Following its curve in steps is called *solving* it. Going straight ahead is the oldest way, Euler's.

# %%
import math  # noqa: F401  for your dpm_step
from itertools import pairwise

import numpy as np
import torch
from matplotlib import pyplot as plt

from lessons.common import curves, distance, picture_grid, start
from minidiff.config import SD1
from minidiff.guidance import guided
from minidiff.pipeline import noise_source, to_images
from minidiff.samplers import Denoiser, Level, ddim, dpmpp_2m, heun, levels
from minidiff.schedule import NoiseSchedule

lesson = start("11_samplers_as_ode_solvers")

# %%
sd = lesson.load()
schedule, T = sd.schedule, sd.schedule.config.timesteps
prompts, seeds = ["a fox on a green background", "a mushroom on a blue background"], [0, 1]
B, C = len(prompts), sd.config.vae.latent_channels
H = W = sd.config.image_size // sd.config.vae.factor
cond, uncond = sd.encode_prompts(prompts), sd.encode_prompts([""] * B)
model = torch.no_grad()(guided(sd.unet, cond, uncond, sd.config.guidance_scale))
denoise = Denoiser(model, schedule.config.prediction, torch.float32)
noise = noise_source(seeds, (C, H, W), lesson.device)()


def slope(x, level):
    """dx/dsigma [B, C, H, W]: one call of the U-Net, which expects x scaled down to x_t."""
    x0_hat, eps_hat = denoise(x * level.sqrt_alpha_bar, level)
    return eps_hat


# %% [markdown]
# `denoise` from `minidiff/samplers.py` calls the model and converts its prediction, noise or v, to `x0_hat` and `eps_hat`. A `Level` is a
# noise level: `level.t`, `level.sigma`, and `level.sqrt_alpha_bar` for $\sqrt{\bar\alpha}$, which equals $1 / \sqrt{\sigma^2 + 1}$.

# %% [markdown]
# ## Your turn: karras_sigmas
#
# Before a sampler steps, someone has to choose the noise levels it visits. Karras et al. (eq. 5) space them evenly in $\sigma^{1/7}$: far
# apart where there is hardly anything but noise, and close together near the picture, where details form. Write it in two lines: the
# seventh roots of both ends, then `torch.linspace(a, b, steps)` between them, raised to the power of seven. The levels fall from the
# largest to the smallest.
#
# When it is right, you see the levels next to others that are evenly spaced in $\sigma$ itself.


# %%
def karras_sigmas(sigma_min, sigma_max, steps):
    """Noise levels [steps] from sigma_max down to sigma_min, evenly spaced in sigma^(1/7)."""
    # YOUR CODE, about 2 lines


karras_sigmas = lesson.check(karras_sigmas)

# %% [markdown]
# The first level of our samplers is noise alone, the last timestep. The others are yours, between the second and the last level of the
# library's. A timestep between two whole ones is no problem: the U-Net accepts fractions.

# %%
start_level, second, *_, last = levels(schedule, "plms", 20, "trailing")
log_sigma = schedule.snr(torch.arange(T - 1)).rsqrt().log().numpy()  # sigma^2 is 1 / SNR


def visited(steps):
    """steps + 1 levels: noise alone, then evenly in sigma^(1/7) from `second` to `last`."""
    sigmas = karras_sigmas(last.sigma, second.sigma, steps).double().numpy()
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
off = distance(ours, x_t) / float(x_t.std())
assert off < 1e-2
print(f"Euler ends within {off:.0e} of DDIM over the same levels")

# %% [markdown]
# Now we look at the curve. We pick one number of each latent, the one on which few steps and many steps disagree most, and draw it on the
# way from noise (left) to picture (right). The start is far to the left of the figure, because $\sigma$ begins very large. The few steps
# have already made errors there, so their points do not begin on the curve.

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
axis.legend(loc="upper right")
lesson.show(fig, "curve", "Two curves, and Euler's straight pieces next to them.")

# %% [markdown]
# Where the curve is straight, a step can be as long as you like without an error. Where it bends, Euler follows a slope that is no longer
# right. A better step must take the bend into account.

# %% [markdown]
# ## Your turn: heun_step
#
# Heun's step begins like Euler's and then looks at the slope where it has arrived. If that slope differs from the first one, the curve
# bends in between. So take the step again from the same start, with the mean of the two slopes (Karras et al. 2022, algorithm 1):
#
# $$d_{now} = \hat\epsilon(x, \sigma_{now}) \qquad d_{then} = \hat\epsilon\left( x + (\sigma_{then} - \sigma_{now}) \, d_{now}, \; \sigma_{then} \right)$$
#
# $$x_{then} = x + (\sigma_{then} - \sigma_{now}) \, (d_{now} + d_{then}) / 2$$
#
# `slope` is a function like the one above: `slope(x, now)` is $\hat\epsilon(x, \sigma_{now})$. `now` and `then` are levels, so
# $\sigma_{now}$ is `now.sigma`. Three lines, one for each slope and one for the step.
#
# When it is right, you see it follow a circle, next to Euler's step.


# %%
def heun_step(slope, x, now, then):
    """From level now to level then; slope(x, level) and x are [B, C, H, W]."""
    # YOUR CODE, about 3 lines


heun_step = lesson.check(heun_step)

# %% [markdown]
# Heun calls the model twice in a step, so for the same number of calls its steps are twice as long. That must pay off. How fast does its
# error fall? We can test it without a model, on the data of lesson 03: single numbers with standard deviation $s$. There the curve is known
# exactly. $x$ is proportional to $\sqrt{s^2 + \sigma^2}$, and its slope is $x \, \sigma / (s^2 + \sigma^2)$.


# %%
def known(x, level):
    return x * level.sigma / (0.25 + level.sigma**2)  # s = 0.5


def known_error(step, n):
    """How far n steps end from the exact end, as a share of it."""
    on_the_way = visited(n)[1:]
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for now, then in pairwise(on_the_way):
        x = step(known, x, now, then)
    exact = ((0.25 + then.sigma**2) / (0.25 + on_the_way[0].sigma ** 2)) ** 0.5
    return abs(float(x) / exact - 1)


for step, label in ((euler_step, "Euler"), (heun_step, "Heun")):
    factor = known_error(step, 64) / known_error(step, 128)
    print(f"{label}: twice the steps, {factor:.1f} times smaller error")

# %% [markdown]
# Solvers are classed by this. *First order*: twice the steps, half the error. *Second order*: twice the steps, a quarter of the error. On
# logarithmic axes, the error of a method of order $p$ falls in a straight line of slope $-p$.

# %% [markdown]
# ## DPM++ 2M: remember the last prediction
#
# There is another way to see Euler's error. Its step mixes $x$ with the prediction of the picture:
#
# $$x_{then} = \frac{\sigma_{then}}{\sigma_{now}} \, x_{now} + \left( 1 - \frac{\sigma_{then}}{\sigma_{now}} \right) \hat x_0$$
#
# If $\hat x_0$ were constant during the step, this would be exact, however long the step is. But the prediction changes on the way.
# DPM-Solver++ (Lu et al. 2022, algorithm 2) therefore uses the prediction *at the middle of the step*, where the middle is meant in
# $\lambda = -\log \sigma$. The sampler has not been there yet. It does know the predictions at the beginning of this step and of the step
# before, and it extrapolates: it draws a straight line through both and reads it off at the middle.
#
# $$\hat x_0^{middle} = \hat x_0 + \frac{1}{2r} \left( \hat x_0 - \hat x_0^{before} \right) \qquad r = \frac{\log(\sigma_{before} / \sigma_{now})}{\log(\sigma_{now} / \sigma_{then})}$$
#
# $r$ is the length of the last step in $\lambda$ divided by the length of this one. If both are equally long, the line continues by half a
# step. The result is of second order and needs no second call. "2M" stands for second order, *multistep*, which means that earlier steps
# are used.

# %% [markdown]
# ## Your turn: dpm_step
#
# Write the step in four lines: `r`, the extrapolated prediction, the fraction $\sigma_{then} / \sigma_{now}$, and the mixture above with
# the extrapolated prediction in place of $\hat x_0$. `before`, `now` and `then` are levels; `math.log` takes the logarithm of a number.
#
# A right step reports how its error falls on data whose curve is known.


# %%
def dpm_step(x, x0_hat, x0_before, before, now, then):
    """From level now to then; x and the predictions at now and before are [B, C, H, W]."""
    # YOUR CODE, about 4 lines


dpm_step = lesson.check(dpm_step)


# %%
def dpm_walk(visited):
    """The final x. The first step has nothing to remember, so it is Euler's."""
    x, x0_before, before = noise / start_level.sqrt_alpha_bar, None, None
    for now, then in pairwise(visited):
        x0_hat, eps_hat = denoise(x * now.sqrt_alpha_bar, now)
        if before is None:
            x = x0_hat + then.sigma * eps_hat
        else:
            x = dpm_step(x, x0_hat, x0_before, before, now, then)
        x0_before, before = x0_hat, now
    return x


# %%
x_t, history = noise, ()
for now, then in pairwise(visited(counts[0])):
    x_t, _, history = dpmpp_2m(denoise, x_t, now, then, history)
off = distance(dpm_walk(visited(counts[0])) * last.sqrt_alpha_bar, x_t) / float(x_t.std())
assert off < 1e-2
print(f"DPM++ 2M ends within {off:.0e} of the library's")

# %% [markdown]
# Is an extrapolated prediction any good? The finest Euler trajectory tells us what $\hat x_0$ really was in the middle of a longer step.

# %%
level, x0_hat = visited(counts[-1]), []  # of each step: x - sigma slope
for (x, now), (x_then, then) in pairwise(zip(euler[counts[-1]], level)):
    x0_hat.append(x - now.sigma * (x_then - x) / (then.sigma - now.sigma))
x0_hat = torch.stack(x0_hat)
lam = -torch.tensor([one.sigma for one in level[:-1]]).log()


# %%
def predictions(steps):
    """x0_hat at the beginning of steps, extrapolated, and at their middle; three indices."""
    stride = counts[-1] // steps
    looks = torch.arange(stride, len(lam), stride)
    before, now, then = looks[:-2], looks[1:-1], looks[2:]
    middle = (lam - (lam[now] + lam[then])[:, None] / 2).abs().argmin(dim=1)
    r = (lam[now] - lam[before]) / (lam[then] - lam[now])
    r = r.to(x0_hat)[:, None, None, None, None]
    line = x0_hat[now] + (x0_hat[now] - x0_hat[before]) / (2 * r)
    assert line.shape == (len(now), B, C, H, W)
    return x0_hat[now], line, x0_hat[middle], now, then, middle


# %%
print("x0_hat at the middle of a step, off by")
for n in counts[1:-1]:
    at_begin, line, true, *_ = predictions(n)
    off = distance(at_begin, true), distance(line, true)
    print(f"{n:3} steps: begin {off[0]:.3f}, DPM++ 2M {off[1]:.3f}")

at = (..., *(int(i) for i in torch.unravel_index(x0_hat.var(dim=0).argmax(), x0_hat.shape[1:])))
at_begin, line, _, now, then, middle = predictions(counts[-3])
sigma = (-lam).exp()
fig, axis = plt.subplots()
axis.plot(sigma, x0_hat[at].cpu(), color="black", label="true")
axis.hlines(at_begin[at].cpu(), sigma[then], sigma[now], color="C1", label="Euler")
axis.plot(sigma[middle], line[at].cpu(), "^", color="C0", label="DPM++ 2M")
axis.set(xscale="log", xlim=(40, 0.1), xlabel="noise level sigma", ylabel="one number of x0_hat")
axis.legend()
lesson.show(fig, "middle", "x0_hat along the trajectory; stairs, and points near their middles.")

# %% [markdown]
# Euler's stairs lag behind whenever the prediction changes. The triangles follow it, except where its direction changes: there they
# overshoot. In the table, compare how both errors fall when the number of steps doubles.

# %% [markdown]
# ## Error against calls
#
# Now all three with the model. The error is the distance between where they end and where a trajectory of very many steps ends. Calls cost
# time, so we count calls.

# %%
heuns = {n: walk(heun_step, n // 2)[-1] for n in counts}  # n - 1 calls
dpms = {n: dpm_walk(visited(n)) for n in counts}
goal = dpm_walk(visited(many))
ends = {"Euler": {n: euler[n][-1] for n in counts}, "Heun": heuns, "DPM++ 2M": dpms}
errors = {label: [distance(x[n], goal) for n in counts] for label, x in ends.items()}
print("calls   " + "   ".join(errors))
for n, *off in zip(counts, *errors.values()):
    print(f"{n:5}   {off[0]:5.3f}  {off[1]:5.3f}  {off[2]:9.3f}")
for label, off in errors.items():
    slopes = (torch.tensor(off[1:]) / torch.tensor(off[:-1])).log2()
    print(f"{label}: slopes {', '.join(f'{one:.1f}' for one in slopes)}")
if lesson.model == "tiny" and not lesson.quick:
    assert errors["DPM++ 2M"][2] < errors["Euler"][2] and errors["Heun"][4] < errors["Euler"][4]

# %%
lines = {label: ([n - (label == "Heun") for n in counts], off) for label, off in errors.items()}
for power in (1, 2):
    law = [errors["Euler"][1] * (counts[1] / n) ** power for n in counts]
    lines[f"slope -{power}"] = counts, law
dashed, axes = ["slope -1", "slope -2"], {"xlabel": "calls of the U-Net", "ylabel": "error"}
fig = curves(lines, **axes, log="xy", dashed=dashed, xticks=counts)
lesson.show(fig, "error", "Euler's error falls evenly; DPM++ 2M's falls faster, and Heun's late.")

# %%
n = counts[1]
finals = [*(x[n] for x in ends.values()), goal]
row = [to_images(sd.decode(x * last.sqrt_alpha_bar))[0] for x in finals]
fig = picture_grid([row], [*ends, "goal"], [f"{n - 1} or {n}\ncalls"])
lesson.show(fig, "calls", "A fox by three samplers with few calls, and the picture they aim at.")

# %% [markdown]
# Start at the right end of the figure, with many calls: Euler's line is nearly parallel to the flatter dashed one, and the two methods of
# second order fall at least as steeply as the steeper one. At the left end, with few calls, the three rank differently. A method's order is
# a promise about short steps only. While steps are too long for the bends of the curve, a clever step is misled by what it has seen: DPM++
# 2M overshoots, as the triangles did, and Heun asks for slopes at points far away from the curve. Note at which number of calls each line
# crosses Euler's. (The lowest points are less reliable: the goal is itself the end of a finite number of steps.)

# %%
dpm_as_far = np.interp(np.log(errors["DPM++ 2M"][2]), np.log(errors["Euler"][::-1]), counts[::-1])
print(f"Euler needs about {dpm_as_far:.0f} calls for the error of DPM++ 2M with {counts[2]}")

# %% [markdown]
# ## Does the spacing matter?
#
# Most samplers of the library visit timesteps that are evenly spaced in `t`, as in lesson 03. Near the picture, $\sigma$ then falls by
# large factors. Here is DPM++ 2M with the same numbers of calls over such levels:


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
# Compare the two columns: where a sampler looks can matter as much as how it steps.

# %% [markdown]
# ## The first step, where sigma is infinite
#
# This model's last timestep is pure noise (lesson 01). There $\bar\alpha$ is zero and $\sigma$ infinite. The library uses the $\sigma$ of
# the smallest $\bar\alpha$ that half precision can represent, which is in the thousands. Heun's correction in the first step is the
# difference of two nearly equal slopes times half of this immense step. Written with predictions of the picture, it is
#
# $$\frac{\sigma_{now} - \sigma_{then}}{2 \, \sigma_{then}} \left( \hat x_0^{then} - \hat x_0^{now} \right)$$
#
# The fraction is small in a short step. It grows with the factor by which $\sigma$ falls, without limit:

# %%
now, then = start_level, second
fraction = (now.sigma - then.sigma) / (2 * then.sigma)
print(f"sigma {now.sigma:.0f} to {then.sigma:.0f}: the fraction is {fraction:.0f}")
for n in (4, 16, 64):
    fraction = [(now.sigma - then.sigma) / (2 * then.sigma) for now, then in pairwise(visited(n))]
    print(f"{n:2} steps, the others: {min(fraction[1:]):.1f} to {max(fraction[1:]):.1f}")

# %% [markdown]
# The curve itself is almost straight at its beginning; only the coordinates are bad. Divide by $\sigma$, and everything is finite: pure
# noise is at $1 / \sigma = 0$, and the slope is the prediction of the picture.
#
# $$\frac{d(x / \sigma)}{d(1 / \sigma)} = \hat x_0$$
#
# In these coordinates Heun's fraction becomes $(1 - \sigma_{then} / \sigma_{now}) / 2$, which is never more than a half. The library's
# `heun` takes its first step this way and all others in $\sigma$. Our trajectories above begin with Euler's step. How far from theirs do we
# end if we begin in the other two ways?


# %%
def library_first(slope, x, now, then):
    x_t, _ = heun(denoise, x * now.sqrt_alpha_bar, now, then)
    return x_t / then.sqrt_alpha_bar


n = counts[2]
for label, first in (("your heun_step", heun_step), ("the library's heun", library_first)):
    other = walk(heun_step, n // 2, first=first)
    size = (other[1] * second.sqrt_alpha_bar).std()
    print(f"first step by {label}: standard deviation of x_t {size:.2f}")
    print(f"  ends {distance(other[-1], heuns[n]):.2f} from where Euler's leads")

# %% [markdown]
# Here $x_t$ is almost pure noise and should have a standard deviation of about one. With Heun's plain step it is too large, like the noise
# without room in lesson 03. The library's first step leads nearly to the same end as Euler's.

# %% [markdown]
# ## Break it: leave the input unscaled
#
# A sampler written in $\sigma$ must scale $x$ by $1 / \sqrt{\sigma^2 + 1}$ before the U-Net sees it, because the U-Net was trained on
# $x_t$. Forgetting this is the classic mistake when someone copies a sampler from a paper. Near the picture the factor is almost one, and
# nothing crashes anywhere.


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
lesson.show(fig, "unscaled", "Two pictures, each next to what it becomes with unscaled inputs.")

# %% [markdown]
# A network predicts something for any input, even for one it was never trained on. Its norms bring the values inside it back to their usual
# size (lesson 06), which hides part of the error. The table shows where the rest is: the error is large where $\sigma$ is large, where the
# shapes are decided. It vanishes on nearly clean pictures, which is where a quick test would look.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/11_samplers_as_ode_solvers.py --model v1-5-pruned-emaonly.safetensors` draws the same figures for a checkpoint of yours.
# Its $\sigma$ begins at 14.6, so its first step needs no special care. A sampler with "Karras" in its name spaces *all* its steps evenly in
# $\sigma^{1/7}$, from the largest $\sigma$ on.

# %%
for name, one in (("Stable Diffusion 1.x", NoiseSchedule(SD1.schedule)), ("this model", schedule)):
    *karras, _ = levels(one, "dpmpp_2m_karras", 20, "trailing")
    above = sum(level.sigma > 15 for level in karras)
    print(f"{name}: sigma {karras[0].sigma:.1f} to {karras[-1].sigma:.3f}")
    print(f"  {above} of {len(karras)} Karras levels above 15")

# %% [markdown]
# With a model that begins at pure noise, many of these levels lie where there is nothing to see yet. That is why `visited` begins its even
# levels after the first step.

# %% [markdown]
# ## On a GPU
#
# ```bash
# python lessons/11_samplers_as_ode_solvers.py --model v1-5-pruned-emaonly.safetensors --device cuda
# ```
#
# Four minutes. Expect larger errors, because at a higher guidance scale the curve bends more. Then write 1 for the guidance scale in the
# call of `guided`, and see how much straighter the curve becomes.

# %% [markdown]
# ## What you now know
#
# - Divided by $\sqrt{\bar\alpha}$, the latent follows a curve whose slope is the predicted noise; a sampler follows it in steps.
# - Euler's step, which is DDIM's, is of first order: twice the steps, half the error.
# - Heun's step takes the mean of the slopes at both ends: second order, two calls.
# - DPM++ 2M extrapolates the prediction from the step before: second order, one call.
# - An order holds for short steps only, and the choice of noise levels can matter as much as the method.

# %% [markdown]
# ## Your guess
#
# For the bundled model it is DPM++ 2M, as the table shows: it has Euler's short steps and a better prediction in each. Heun has only half
# as many steps. Its second order pays off later, where the lines cross.

# %% [markdown]
# ## Quiz
#
# 1. A method of second order has an error of one tenth with twenty steps. What do you expect with forty?
# 2. In which case is Euler's step exact, however long it is?
# 3. Why does DPM++ 2M have no use for its memory in the first step, and what does it do there?
#
# <details><summary>Answers</summary>
#
# 1. A quarter of it, one fortieth, provided that the steps are short enough for the law to hold.
# 2. If the prediction $\hat x_0$ is constant during the step; equivalently, if the curve is straight there.
# 3. There is no earlier prediction to draw a line through, so it takes Euler's step.
#
# </details>

# %% [markdown]
# ## Now you
#
# The seven in `karras_sigmas` is a choice. Predict what happens to the error with sixteen calls if you replace it by one, by three and by
# twenty: which ends of the trajectory get more levels? Then run DPM++ 2M with each and compare. If you want more to beat: mix two methods,
# for example DPM++ 2M at first and Heun at the end, and see whether any mixture with sixteen calls wins.

# %% [markdown]
# ## Read next
#
# - `minidiff/samplers.py`: `dpmpp_2m` is your `dpm_step` in $x_t$; `euler`, `heun`, and `levels`, which chooses where they look.
# - Karras et al. 2022, "Elucidating the design space of diffusion-based generative models", sections 2 and 3; Lu et al. 2022,
#   "DPM-Solver++", algorithm 2.
# - Lesson 12: the whole model is trained.
