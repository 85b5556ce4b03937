# %% [markdown]
# # 01 Adding noise
#
# **How does a picture turn into noise, and how much of it is left at each step?**
#
# - Explains: [minidiff/schedule.py](../minidiff/schedule.py)
# - You change: `q_sample`, `first_noisier` and `x0_from_eps`: into noise, how far, and back
# - Minutes: 35
# - Picture: [figures/01-ladder.png](figures/01-ladder.png)
#
# ![The whole pipeline; this lesson is about the noise schedule](figures/pipeline-schedule.svg)
#
# A diffusion model is a network that has learned to remove noise from pictures. With such a network you can start from pure noise, remove a
# little of it again and again, and arrive at a picture that nobody has ever drawn. To train the network, we first add noise *to* pictures,
# in amounts that we know exactly. This lesson does only that. Nothing is trained here.

# %% [markdown]
# ## Guess first
#
# Stable Diffusion divides the path from a picture to noise into 1000 timesteps, counted by `t`. At timestep 0 a picture is almost clean; at
# timestep 999 it is noise. Write down two numbers before you read on:
#
# 1. At which `t` is there as much noise as picture?
# 2. At which `t` can you no longer see what the picture shows?

# %% [markdown]
# ## A picture is numbers
#
# The field calls the clean picture $x_0$. It is a tensor of shape B C H W: pictures in the batch, colour channels, height, width. Its values
# lie between $-1$ and $1$, not between `0` and `255` as in a file, so that they are about as large as the noise we are going to add.

# %%
import torch
from torch.nn.functional import mse_loss

from lessons.common import curves, distance, picture_grid, scene_pixels, start, x0_converter
from minidiff.config import SD1
from minidiff.pipeline import to_images
from minidiff.scenes.scenes import Item, compose
from minidiff.schedule import NoiseSchedule

lesson = start("01_adding_noise")
sd = lesson.load()

# %%
schedule, T = sd.schedule, sd.schedule.config.timesteps
scene = compose([Item("pizza", px=52)], background="blue", style="fluent")
x_0 = scene_pixels(sd, [scene])
B, C, H, W = x_0.shape
assert (1, 3, sd.config.image_size, sd.config.image_size) == (B, C, H, W)
assert x_0.min() >= -1 and x_0.max() <= 1
print(f'"{scene.caption}": shape {list(x_0.shape)}')
print(f"values from {x_0.min():.2f} to {x_0.max():.2f}")
print(f"{T} timesteps, 0 to {T - 1}")

# %% [markdown]
# ## One step of noise
#
# Adding noise step by step is called the *forward process*. The noise $\epsilon$ (`eps`) has the picture's shape, and each of its values
# is drawn from a normal distribution with mean zero and variance one. A small number $\beta_t$ sets how much noise enters at step $t$
# (Ho et al. 2020, the DDPM paper, eq. 2):
#
# $$x_t = \sqrt{1 - \beta_t} \; x_{t-1} + \sqrt{\beta_t} \; \epsilon$$
#
# The step also *shrinks* what was there, by exactly as much as is needed to keep a variance of one at one:
# $(1 - \beta_t) \cdot 1 + \beta_t \cdot 1 = 1$. Without shrinking, the values would grow at every step. We take all the steps, one after the
# other, and keep the picture at a few of them.

# %%
shown = [0, 100, 250, 500, 750, T - 1]
generator = torch.Generator().manual_seed(0)
x_t, stepwise = x_0, {}
for t, beta in enumerate(schedule.betas.tolist()):
    eps = torch.randn(x_0.shape, generator=generator)
    x_t = (1 - beta) ** 0.5 * x_t + beta**0.5 * eps  # DDPM eq. 2
    if t in shown:
        stepwise[t] = x_t

assert x_t.shape == x_0.shape
print(f"beta runs from {schedule.betas[0]:.5f} to {schedule.betas[-1]:.5f}")
print(f"after {t + 1} steps: mean {x_t.mean():.2f}, variance {x_t.var():.2f}")

# %% [markdown]
# ## All steps in one jump
#
# Training needs pictures at random timesteps, and hundreds of steps for each of them would take far too long. We can skip them. Shrinking
# twice is the same as shrinking once by the product of the factors. The sum of two independent normal noises is again normal noise, and its
# variance is the sum of theirs. So all steps up to $t$ collapse into one, the *closed-form forward process* (DDPM eq. 4), with the product
# $\bar\alpha_t = (1 - \beta_0)(1 - \beta_1) \cdots (1 - \beta_t)$:
#
# $$x_t = \sqrt{\bar\alpha_t} \; x_0 + \sqrt{1 - \bar\alpha_t} \; \epsilon$$
#
# The code stores $\bar\alpha$ in a table with one entry for each timestep, `alpha_bar`. It is close to one at $t = 0$ and falls with every
# step.

# %%
alpha_bar = torch.cumprod(1 - schedule.betas, dim=0).float()
assert alpha_bar.shape == (T,)
for t in shown:
    a = alpha_bar[t]
    print(f"t = {t:3}: x_0 is multiplied by {a.sqrt():.2f}, eps by {(1 - a).sqrt():.2f}")

# %% [markdown]
# ## Your turn: q_sample
#
# Write the jump, which the field calls `q_sample`. `x_0` and `eps` have shape B C H W. `t` has shape B, because every picture of the batch
# has its own timestep, so `alpha_bar[t]` has shape B too. Reshape it to `[B, 1, 1, 1]`, so that each entry multiplies a whole picture, and
# then apply the equation: two lines.
#
# When it is right, you see a disk that your function turns into noise, and the variance that it keeps.


# %%
def q_sample(alpha_bar, x_0, t, eps):
    """DDPM eq. 4; alpha_bar [T], x_0 and eps [B, C, H, W], t [B]."""
    # YOUR CODE, about 2 lines


q_sample = lesson.check(q_sample)

# %% [markdown]
# Does the jump agree with the steps? The noise is different, so the pictures differ in every pixel. What must agree is how much of $x_0$ is
# left in them. We measure it with the least-squares factor: the number $a$ for which $a$ times $x_0$ comes closest to $x_t$.

# %%
t = torch.tensor(shown)
eps = torch.randn((len(shown), C, H, W), generator=generator)
jumped = q_sample(alpha_bar, x_0.expand(len(shown), C, H, W), t, eps)
assert jumped.shape == (len(shown), C, H, W)

print("left of x_0:\n   t   steps   jump   sqrt(alpha_bar)")
for i, now in enumerate(shown):
    s, j = (abs((x * x_0).sum() / (x_0 * x_0).sum()) for x in (stepwise[now], jumped[i]))
    print(f"{now:4}   {s:5.2f}   {j:4.2f}   {alpha_bar[now].sqrt():15.2f}")

# %%
columns = [f"t = {now}" for now in shown]
rows = [to_images(torch.cat(list(stepwise.values()))), to_images(jumped)]
fig = picture_grid(rows, columns, ["step by\nstep", "in one\njump"])
lesson.show(fig, "ladder", "A pizza turns into noise, step by step and in one jump: they agree.")

# %% [markdown]
# ## How much is left: signal and noise
#
# The picture is multiplied by $\sqrt{\bar\alpha_t}$ and the noise by $\sqrt{1 - \bar\alpha_t}$. The squares of these factors always add up
# to one. Their ratio is the *signal-to-noise ratio*, or SNR:
#
# $$\mathrm{SNR}(t) = \bar\alpha_t / (1 - \bar\alpha_t)$$
#
# Where it is above one there is more picture than noise; where it is below one there is more noise.

# %% [markdown]
# ## Your turn: first_noisier
#
# Return the first timestep with more noise than picture, as a plain number. Two lines: compute the ratio for the whole table at once, then
# count the timesteps at which it is above one. Timesteps count from zero and the ratio only falls, so that count *is* the first timestep
# after them. A tensor comparison gives one True or False for each entry, `.sum()` counts the True ones, and `int()` makes a number of it.
#
# When it is right, it tells you the answer for Stable Diffusion 1.x. Compare it with your guess.


# %%
def first_noisier(alpha_bar):
    """The first t whose signal-to-noise ratio is not above 1; alpha_bar [T] falls."""
    # YOUR CODE, about 2 lines


first_noisier = lesson.check(first_noisier)

# %%
equal = first_noisier(alpha_bar)
assert torch.allclose(schedule.snr(torch.tensor([equal])), torch.ones(1), atol=0.05)
print(f"this model: more noise than picture from t = {equal} on, {equal / T:.0%} of the way")

lines = {r"picture, $\sqrt{\bar\alpha_t}$": (range(T), alpha_bar.sqrt())}
lines[r"noise, $\sqrt{1 - \bar\alpha_t}$"] = range(T), (1 - alpha_bar).sqrt()
lines[f"equal at t = {equal}"] = [equal, equal], [0, 1]
fig = curves(lines, "timestep t", "factor", dashed=[f"equal at t = {equal}"], ylim=(0, 1.05))
lesson.show(fig, "signal", "The picture factor falls to zero and the noise factor rises to one.")

# %% [markdown]
# There is no formula for the second guess. Most people still recognise the pizza in the ladder where the noise is already the larger part.
# The eye averages over neighbouring pixels, and averaging cancels noise while it keeps a shape.

# %% [markdown]
# ## The way back, if you knew the noise
#
# The jump connects $x_0$, $x_t$ and $\epsilon$: if you know two of them, you know the third. Solved for the clean picture (DDPM eq. 15), it
# reads:
#
# $$x_0 = \left( x_t - \sqrt{1 - \bar\alpha_t} \; \epsilon \right) / \sqrt{\bar\alpha_t}$$
#
# This is why a network that looks at $x_t$ and predicts the noise in it can make pictures.

# %% [markdown]
# ## Your turn: x0_from_eps
#
# Write the way back. The shapes are those of `q_sample`, and the first of the two lines is the same. When it is right, the disk returns from
# its noise.


# %%
def x0_from_eps(alpha_bar, x_t, t, eps):
    """DDPM eq. 15; alpha_bar [T], x_t and eps [B, C, H, W], t [B]."""
    # YOUR CODE, about 2 lines


x0_from_eps = lesson.check(x0_from_eps)

# %% [markdown]
# A network's prediction is never exact. We mix one tenth of other noise into the true noise, so that the variance stays one, and look at
# what the same small error does at different timesteps.

# %%
t = torch.tensor([100, 250, 500, 750, 900])
batch = x_0.expand(len(t), C, H, W)
eps, other = (torch.randn(batch.shape, generator=generator) for _ in range(2))
x_t = q_sample(alpha_bar, batch, t, eps)
exact = x0_from_eps(alpha_bar, x_t, t, eps)
nearly = 0.99**0.5 * eps + 0.1 * other  # variance 0.99 + 0.01 = 1
predicted = x0_from_eps(alpha_bar, x_t, t, nearly)

assert exact.shape == batch.shape and torch.allclose(exact, batch, atol=1e-3)
print(f"with the true noise x_0 returns to within {(exact - batch).abs().max():.0e}")
for now, picture in zip(t.tolist(), predicted):
    print(f"t = {now}: with 0.1 of other noise x_0 is off by {distance(picture, x_0[0]):.2f}")

# %%
rows = [to_images(x_t), to_images(predicted)]
fig = picture_grid(rows, [f"t = {now}" for now in t], ["$x_t$", "$x_0$ from\na guess"])
lesson.show(fig, "back", "A pizza in more and more noise; below, x_0 from nearly the right noise.")

# %% [markdown]
# The same error is harmless where there is little noise and ruins the picture where little of the picture is left, because it is multiplied
# by $\sqrt{(1 - \bar\alpha_t) / \bar\alpha_t}$. That is why nobody goes back in one jump. We take a small step, ask the network again, and
# take the next step. A rule for these steps is called a *sampler*; lesson 03 is about samplers.

# %% [markdown]
# ## Stable Diffusion adds its noise to latents
#
# Stable Diffusion does not add noise to pixels. It adds noise to a smaller tensor, the *latent*, which an autoencoder makes from the
# picture and can turn back into one (lesson 08). The equation stays the same. But it only keeps a variance of one if the variance was one
# before. So we multiply the latents by a fixed number, the model's `scaling_factor`, chosen to give them a variance of one over many
# pictures. A single picture can have a little more or less.

# %%
vae = sd.config.vae
with torch.no_grad():
    latent = sd.vae.encode(x_0.to(lesson.device)).mean.cpu() * vae.scaling_factor
c, h, w = latent.shape[1:]
assert (c, h, w) == (vae.latent_channels, H // vae.factor, W // vae.factor)
print(f"pixels {[C, H, W]}, latent {[c, h, w]}: {C * H * W / (c * h * w):.0f} times fewer numbers")
print(f"variance of this latent: {latent.var():.2f}")

# %%
batch = latent.expand(len(shown), c, h, w)
eps = torch.randn(batch.shape, generator=generator)
noisy = q_sample(alpha_bar, batch, torch.tensor(shown), eps)
decoded = sd.decode(noisy.to(lesson.device))
assert decoded.shape == (len(shown), 3, H, W)
rows = [to_images(jumped), to_images(decoded)]
fig = picture_grid(rows, columns, ["noise in\npixels", "noise in\nlatents"])
lesson.show(fig, "latents", "Noise in pixels is fine grain, noise in latents patches of colour.")

# %% [markdown]
# Each number of the latent describes a patch of pixels, so its noise shows up as patches.

# %% [markdown]
# ## Break it: forget the square roots
#
# The classic mistake is to mix with $\bar\alpha_t$ and $1 - \bar\alpha_t$ themselves. They add up to one, which looks right. But
# independent noises add by their variances, and a factor enters the variance squared. Where both factors are a half, the variance is
# $0.5^2 + 0.5^2 = 0.5$ instead of one.


# %%
def q_sample_without_roots(alpha_bar, x_0, t, eps):
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    return a * x_0 + (1 - a) * eps


t = torch.arange(0, T, 20)
x = torch.randn((len(t), 1, 64, 64), generator=generator)  # a clean "picture" of variance 1
eps = torch.randn(x.shape, generator=generator)
lines = {}
for function, label in ((q_sample, "with the roots"), (q_sample_without_roots, "without")):
    variance = function(alpha_bar, x, t, eps).var(dim=(1, 2, 3))
    lines[label] = t, variance
    print(f"{label}: variance between {variance.min():.1f} and {variance.max():.1f}")
fig = curves(lines, "timestep t", "variance of $x_t$", ylim=(0, 1.2))
lesson.show(fig, "without-roots", "Without the roots the variance dips to a half.")

# %% [markdown]
# What does the mistake cost? We ask a network that was trained with the right equation. Stable Diffusion's network is called the *U-Net*.
# It takes $x_t$, `t`, and the picture's caption as a tensor, `context` (lesson 09). Its output gives a prediction of the clean latent,
# which the code calls `x0_hat`. Many models output the predicted noise. The bundled one outputs a mixture of noise and picture, called v,
# from which `x0_hat` follows as well (lesson 12); `x0_converter` knows both.
#
# The error below is the mean squared error over the latent, whose variance is about one.

# %%
t = torch.tensor([250, 500, 750])
batch = latent.expand(len(t), c, h, w)
eps = torch.randn(batch.shape, generator=generator)
context = sd.encode_prompts([scene.caption] * len(t))
convert = x0_converter(sd)


@torch.no_grad()
def predict_x0(x_t):
    x_t, at = x_t.to(lesson.device), t.to(lesson.device)
    return convert(x_t, at, sd.unet(x_t, at, context)).cpu()


# %%
rows = []
for function, label in ((q_sample, "right"), (q_sample_without_roots, "without the roots")):
    x0_hat = predict_x0(function(alpha_bar, batch, t, eps))
    assert x0_hat.shape == batch.shape
    rows.append([*to_images(x_0), *to_images(sd.decode(x0_hat.to(lesson.device)))])
    for now, one in zip(t.tolist(), x0_hat):
        print(f"{label}, t = {now}: error of x0_hat {mse_loss(one, latent[0]):.2f}")

# %%
fig = picture_grid(rows, ["$x_0$", *(f"t = {now}" for now in t)], ["right", "without\nthe roots"])
lesson.show(fig, "cost", "The clean picture and predictions of it, with and without the roots.")

# %% [markdown]
# The two rows and the errors printed above show what the mistake costs at each timestep. The U-Net is told `t` and expects the amount of
# noise that belongs to it. If it had been *trained* with the mistake, its loss would have fallen all the same, and no check of shapes would
# have noticed.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/01_adding_noise.py --model v1-5-pruned-emaonly.safetensors` runs all of the above on a checkpoint of yours. The noise
# schedule alone needs no file: three numbers define it. Stable Diffusion 1.x and 2.x stop a little short of pure noise. At the last
# timestep the picture is still multiplied by 6.8 %, so during training the network never sees pure noise, yet generation starts from
# it. The bundled model was trained on a repaired schedule that ends in pure noise (Lin et al. 2023).

# %%
sd1 = NoiseSchedule(SD1.schedule)
config = SD1.schedule
print(f"betas from {config.beta_start} to {config.beta_end}, {config.timesteps} timesteps")
print(f"factor of the picture at the last one: {sd1.alpha_bar[-1].sqrt():.1%}")
print(f"and in this model: {schedule.alpha_bar[-1].sqrt():.1%}")

lines = {"Stable Diffusion 1.x": (range(T), sd1.snr(torch.arange(T)))}
lines["this model"] = range(T), schedule.snr(torch.arange(T))
lines["as much noise as picture"] = [0, T], [1, 1]
axes = {"xlabel": "timestep t", "ylabel": "signal-to-noise ratio", "ylim": (1e-4, 2e3)}
fig = curves(lines, log="y", dashed=["as much noise as picture"], **axes)
lesson.show(fig, "real", "Both ratios fall alike; at the end this model's falls to zero.")

# %% [markdown]
# ## On a GPU
#
# With a checkpoint, the last figure of "Break it" is worth seeing at 512 x 512:
#
# ```bash
# python lessons/01_adding_noise.py --model v1-5-pruned-emaonly.safetensors --device cuda
# ```
#
# One minute. Expect the same ladder with finer grain, and latents with 48 times fewer numbers than pixels. The checkpoint has never seen
# this drawing. Look whether it finds the pizza in the noise all the same.

# %% [markdown]
# ## What you now know
#
# - The forward process adds noise in small steps. Each step shrinks what is there, so that the variance stays at one.
# - All steps up to t are one jump: $x_t = \sqrt{\bar\alpha_t} \, x_0 + \sqrt{1 - \bar\alpha_t} \, \epsilon$, in the code `q_sample`.
# - The signal-to-noise ratio falls with t. Where it is one, picture and noise have the same variance.
# - Two of $x_0$, $x_t$ and $\epsilon$ give the third, but at late timesteps a small error in the noise is a large error in $x_0$.
# - Stable Diffusion adds its noise to latents that are scaled to a variance of about one.

# %% [markdown]
# ## Your guess
#
# Your `first_noisier` gives the first number: it comes well before the middle, because the picture's factor falls fast. The second number
# has no formula. Most people still recognise the picture where the noise is already the larger part, because the eye averages over
# neighbouring pixels.

# %% [markdown]
# ## Quiz
#
# 1. Why does a step of the forward process multiply the old picture by a number below one?
# 2. You noise one picture twice, at the same t but with different noise. Which of mean, variance and pixels agree?
# 3. You mix with $\bar\alpha_t$ and $1 - \bar\alpha_t$ without the roots. Where is the error of the variance largest?
#
# <details><summary>Answers</summary>
#
# 1. Because variances add: without shrinking, the variance would grow with every step.
# 2. Mean and variance, approximately. The pixels do not.
# 3. Where both are a half: the variance there is half of what it should be.
#
# </details>

# %% [markdown]
# ## Now you
#
# Make a noise schedule of your own: an `alpha_bar` that falls along a straight line from one to zero. Predict at which t picture and noise
# are equal, and whether your eyes lose the picture earlier or later than before. Then ask `first_noisier`, draw the ladder with your table,
# and compare.

# %% [markdown]
# ## Read next
#
# - `minidiff/schedule.py`: `q_sample` and `x0_from_eps` are your functions for tensors of any shape, and `snr` is the ratio. `velocity` is
#   the mixture called v, and `zero_terminal_snr` is the repair.
# - Ho, Jain and Abbeel 2020, "Denoising diffusion probabilistic models", section 2: eq. 2 and eq. 4.
# - Lesson 02: a network of sixty lines learns to predict this noise.
