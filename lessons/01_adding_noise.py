# %% [markdown]
# # 01 Adding noise
#
# **How does a picture turn into noise, and how much of it is left on the way?**
#
# - Explains: [minidiff/schedule.py](../minidiff/schedule.py)
# - You change: `q_sample`, the equation that training rests on
# - Minutes: 20
# - Picture: [figures/01-ladder.png](figures/01-ladder.png)
#
# ![The whole pipeline; this lesson is about the noise schedule](figures/pipeline-schedule.svg)
#
# A diffusion model is a network that has been taught to take noise out of a picture. With such a network one can start from nothing but
# noise, take a little of it out again and again, and end at a picture that nobody ever drew. To teach the network, one first puts
# noise *into* pictures, in amounts that are known exactly. That is all this lesson does: nothing is trained here.

# %% [markdown]
# ## Guess first
#
# Stable Diffusion cuts the way from a picture to noise into 1000 timesteps. `t` counts them: a picture at timestep 0 is almost clean, at
# timestep 999 it is noise. Write down two numbers before you go on:
#
# 1. At which `t` is there as much noise as picture?
# 2. At which `t` can you no longer see what the picture shows?

# %% [markdown]
# ## A picture is numbers
#
# The field calls the clean picture $x_0$. It is a tensor of shape B C H W: pictures in a batch, colour channels, height, width.
# Its values lie between -1 and 1 rather than in a file's `0..255`, so that they are about as large as the noise that is going to be added.

# %%
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

from lessons.common import picture_grid, start
from minidiff.config import SD1
from minidiff.pipeline import to_images
from minidiff.scenes.scenes import Item, compose
from minidiff.schedule import NoiseSchedule

lesson = start("01_adding_noise")
sd = lesson.load()  # a whole Stable Diffusion; first only its noise schedule
schedule = sd.schedule
T = schedule.config.timesteps
print(f"{T} timesteps, 0 to {T - 1}")

# %%
scene = compose([Item("pizza", px=52)], background="blue", style="fluent")
pixels = torch.from_numpy(scene.image).permute(2, 0, 1)[None] / 127.5 - 1  # from 0..255
size = sd.config.image_size  # 64, the scene's own; a larger model's picture is enlarged
x_0 = F.interpolate(pixels, size=(size, size), mode="bicubic").clamp(-1, 1)

B, C, H, W = x_0.shape
assert (1, 3, size, size) == (B, C, H, W)
print(f'"{scene.caption}": shape {list(x_0.shape)}')
print(f"values from {x_0.min():.2f} to {x_0.max():.2f}")
assert x_0.min() >= -1 and x_0.max() <= 1

# %% [markdown]
# ## One step, and then all of them
#
# The way into noise is called the forward process. One step of it adds a little noise. The noise $\epsilon$ (`eps`) is a tensor of the picture's shape whose every value is drawn
# from the normal distribution with mean 0 and variance 1. A small number $\beta_t$ says how much of it comes in at step $t$
# (Ho et al. 2020, the DDPM paper, eq. 2):
#
# $$x_t = \sqrt{1 - \beta_t} \; x_{t-1} + \sqrt{\beta_t} \; \epsilon$$
#
# Besides adding noise the step *shrinks* what was there, and by just so much that a variance of 1 stays a variance of 1:
# $(1 - \beta_t) \cdot 1 + \beta_t \cdot 1 = 1$. Adding alone would make the values grow without end.

# %%
shown = [0, 100, 250, 500, 750, T - 1]
generator = torch.Generator().manual_seed(0)
x_t, walked = x_0, {}
for t, beta in enumerate(schedule.betas.tolist()):
    eps = torch.randn(x_0.shape, generator=generator)
    x_t = (1 - beta) ** 0.5 * x_t + beta**0.5 * eps  # DDPM eq. 2
    if t in shown:
        walked[t] = x_t

assert x_t.shape == x_0.shape
print(f"beta runs from {schedule.betas[0]:.5f} to {schedule.betas[-1]:.5f}")
print(f"after {t + 1} steps: mean {x_t.mean():.2f}, variance {x_t.var():.2f}")

# %% [markdown]
# ## All steps in one jump
#
# To train, one wants pictures at a random `t`, and hundreds of steps for each would be a waste. They are not needed: shrinking twice is shrinking
# once by the product, and the sum of two normal noises is one normal noise whose variance is the sum. So all steps up to $t$ are one
# (DDPM eq. 4), with the product $\bar\alpha_t = (1 - \beta_0)(1 - \beta_1) \cdots (1 - \beta_t)$:
#
# $$x_t = \sqrt{\bar\alpha_t} \; x_0 + \sqrt{1 - \bar\alpha_t} \; \epsilon$$
#
# The code calls $\bar\alpha$ `alpha_bar`, a table with one number a timestep. The field calls the whole line `q_sample`.
#
# Is it the same thing? The noise is another one, so the pictures differ in every pixel. What must agree is how much of $x_0$ is still in
# them. It can be measured: the factor that brings $x_0$ nearest to $x_t$.

# %%
alpha_bar = torch.cumprod(1 - schedule.betas, dim=0).float()
assert alpha_bar.shape == (T,)

t = torch.tensor(shown)
eps = torch.randn((len(shown), C, H, W), generator=generator)
jumped = schedule.q_sample(x_0.expand(len(shown), C, H, W), t, eps)
assert jumped.shape == (len(shown), C, H, W)

print("left of x_0:\n   t   walked   jumped   sqrt(alpha_bar)")
for i, one in enumerate(shown):
    w, j = (abs((x * x_0).sum() / (x_0 * x_0).sum()) for x in (walked[one], jumped[i]))
    print(f"{one:4}   {w:6.2f}   {j:6.2f}   {alpha_bar[one].sqrt():15.2f}")

# %%
columns = [f"t = {one}" for one in shown]
rows = [to_images(torch.cat(list(walked.values()))), to_images(jumped)]
fig = picture_grid(rows, columns, ["walked", "in one\njump"])
lesson.show(fig, "ladder", "A pizza sinks into noise, walked and in one jump: the rows look alike.")

# %% [markdown]
# ## How much is left: signal and noise
#
# $\sqrt{\bar\alpha_t}$ multiplies the picture, $\sqrt{1 - \bar\alpha_t}$ the noise. Their squares add up to 1, always. The ratio of the squares is the
# *signal-to-noise ratio*, SNR for short: above 1 there is more picture, below 1 more noise. Compare it with your first guess.

# %%
snr = schedule.snr(torch.arange(T))
assert snr.shape == (T,)
equal = int((snr > 1).sum())  # the first timestep with more noise than picture
print(f"as much noise as picture: from t = {equal} on, after {equal / T:.0%} of the way")

fig, axis = plt.subplots()
axis.plot(alpha_bar.sqrt(), label=r"picture, $\sqrt{\bar\alpha_t}$")
axis.plot((1 - alpha_bar).sqrt(), label=r"noise, $\sqrt{1 - \bar\alpha_t}$")
axis.axvline(equal, color="black", linewidth=1, linestyle="--")
axis.annotate(f"equal at t = {equal}", (equal + 15, 0.05))
axis.set(xlabel="timestep t", ylabel="factor", ylim=(0, 1.05))
axis.legend(loc="center right")
lesson.show(fig, "signal", "The picture's factor falls to zero, the noise's rises to one.")

# %% [markdown]
# The second guess has no formula. Most people still see the pizza in the ladder where the noise is already the larger part: eyes average over
# neighbouring pixels, and noise averages out where a shape does not.

# %% [markdown]
# ## Your turn: q_sample
#
# Write the jump. `x_0` and `eps` have shape B C H W, and `t` has shape B: every picture of the batch has its own timestep.
# `alpha_bar[t]` then has shape B too, and has to be brought to `[B, 1, 1, 1]` before it can multiply a picture.


# %%
def q_sample(alpha_bar, x_0, t, eps):
    """DDPM eq. 4; alpha_bar [T], x_0 and eps [B, C, H, W], t [B]."""
    # YOUR CODE, about 2 lines


def library(alpha_bar, x_0, t, eps):
    return schedule.q_sample(x_0, t, eps)


q_sample = lesson.check(q_sample, instead=library)

# %% [markdown]
# ## The way back, if one knew the noise
#
# The jump has three parties: $x_0$, $x_t$ and $\epsilon$. Whoever knows two of them knows the third (DDPM, eq. 15):
#
# $$x_0 = \left( x_t - \sqrt{1 - \bar\alpha_t} \; \epsilon \right) / \sqrt{\bar\alpha_t}$$
#
# This is why a network that looks at $x_t$ and answers "the noise in it is this" can make pictures. But its answer is never exact.
# Below it is off by a tenth: one part in ten of it is some other noise.

# %%
t = torch.tensor([100, 250, 500, 750, 900])
batch = x_0.expand(len(t), C, H, W)
eps, other = (torch.randn(batch.shape, generator=generator) for _ in range(2))
x_t = q_sample(alpha_bar, batch, t, eps)
exact = schedule.x0_from_eps(x_t, t, eps)
nearly = 0.99**0.5 * eps + 0.1 * other  # variance 0.99 + 0.01 = 1
guessed = schedule.x0_from_eps(x_t, t, nearly)

assert torch.allclose(exact, batch, atol=1e-3)
print(f"with the true noise x_0 comes back to within {(exact - batch).abs().max():.0e}")
for one, picture in zip(t.tolist(), guessed):
    off = (picture - x_0[0]).square().mean().sqrt()
    print(f"t = {one}: with 0.1 of other noise x_0 is off by {off:.2f}")

# %%
rows = [to_images(x_t), to_images(guessed)]
fig = picture_grid(rows, [f"t = {one}" for one in t], ["$x_t$", "$x_0$ from\na guess"])
lesson.show(fig, "back", "Above a pizza in more and more noise, below x_0 from a guess.")

# %% [markdown]
# The same mistake is harmless where little noise came in, and ruins the picture where little of the picture is left: it is multiplied by
# $\sqrt{(1 - \bar\alpha_t) / \bar\alpha_t}$. So nobody goes back in one jump. One takes a small step, asks the network again, takes another, and so on: that is a *sampler*, and lesson 03.

# %% [markdown]
# ## Stable Diffusion adds its noise to latents
#
# Noise goes not into the pixels but into a smaller tensor, the *latent*, which an autoencoder makes of the picture and turns back into one
# (lesson 08 is about it). The equation stays as it is. But it keeps the variance at 1 only if it was 1 before, so the latents
# are multiplied by a fixed number, the model's `scaling_factor`. It makes their variance 1 over many pictures; one picture has a little more or less.

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
lesson.show(fig, "latents", "Noise in pixels is fine grain, noise in latents coloured patches.")

# %% [markdown]
# Each number of the latent stands for a patch of pixels, so its noise comes out as patches.

# %% [markdown]
# ## Break it: forget the square roots
#
# The classic slip is to mix with $\bar\alpha_t$ and $1 - \bar\alpha_t$ themselves: they add up to 1, which looks right. But noises add by their variances, not by
# their sizes. Where both are a half the variance is $0.5^2 + 0.5^2 = 0.5$ instead of 1.


# %%
def q_sample_without_roots(alpha_bar, x_0, t, eps):
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    return a * x_0 + (1 - a) * eps


t = torch.arange(0, T, 20)
x = torch.randn((len(t), 1, 64, 64), generator=generator)  # a clean "picture" of variance 1
eps = torch.randn(x.shape, generator=generator)
fig, axis = plt.subplots()
for function, label in ((q_sample, "with the roots"), (q_sample_without_roots, "without")):
    variance = function(alpha_bar, x, t, eps).var(dim=(1, 2, 3))
    axis.plot(t, variance, label=label)
    print(f"{label}: variance between {variance.min():.1f} and {variance.max():.1f}")
axis.set(xlabel="timestep t", ylabel="variance of $x_t$", ylim=(0, 1.2))
axis.legend()
lesson.show(fig, "without-roots", "Without the roots the variance dips to a half.")

# %% [markdown]
# What does it cost? Ask a network that was taught with the right equation. That of Stable Diffusion, called the *U-Net*, is given $x_t$, `t`, and the
# picture's caption as a tensor `context` (lesson 09 makes it). From its answer follows what it takes $x_0$ for, `x0_hat`. The bundled model's answer is not
# the noise itself but a mixture of noise and picture, called v, from which `x0_hat` follows as well; lesson 12 comes back to it.
#
# The error is the mean square over the latent, whose variance is about 1.

# %%
t = torch.tensor([250, 500, 750])
batch = latent.expand(len(t), c, h, w)
eps = torch.randn(batch.shape, generator=generator)
context = sd.encode_prompts([scene.caption] * len(t))
predicts_eps = schedule.config.prediction == "eps"
x0_from = schedule.x0_from_eps if predicts_eps else schedule.x0_from_v


@torch.no_grad()
def look(x_t):
    x_t, at = x_t.to(lesson.device), t.to(lesson.device)
    return x0_from(x_t, at, sd.unet(x_t, at, context))


# %%
rows = []
for function, label in ((q_sample, "right"), (q_sample_without_roots, "without the roots")):
    x0_hat = look(function(alpha_bar, batch, t, eps))
    assert x0_hat.shape == batch.shape
    rows.append([*to_images(x_0), *to_images(sd.decode(x0_hat))])
    for one, off in zip(t.tolist(), (x0_hat.cpu() - batch).square().mean(dim=(1, 2, 3))):
        print(f"{label}, t = {one}: error of x0_hat {off:.2f}")

# %%
fig = picture_grid(rows, ["$x_0$", *(f"t = {one}" for one in t)], ["right", "without\nthe roots"])
lesson.show(fig, "cost", "x0_hat: a slice of pizza, and one with frayed edges without the roots.")

# %% [markdown]
# The pizza survives, because one look at one picture forgives much; its edges fray, and the errors above say by how much it got worse. Had the network been
# *trained* with the slip, its loss would have fallen all the same and no test of shapes would have told.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/01_adding_noise.py --model v1-5-pruned-emaonly.safetensors` runs all of the above on a checkpoint that you have. Its noise schedule
# needs no file: it is three numbers. Stable Diffusion 1.x and 2.x stop a little short: at the last timestep 6.8 % of the
# picture's size is still there, so the network never sees pure noise while it is trained, yet starts from pure noise when it is used. The bundled model was
# trained with the repair, a schedule that ends in noise alone (Lin et al. 2023).

# %%
sd1 = NoiseSchedule(SD1.schedule)
config = SD1.schedule
print(f"betas from {config.beta_start} to {config.beta_end}, {config.timesteps} timesteps")
print(f"left of the picture at the last one: {sd1.alpha_bar[-1].sqrt():.1%}")
print(f"and of this model's: {schedule.alpha_bar[-1].sqrt():.1%}")

fig, axis = plt.subplots()
axis.semilogy(sd1.snr(torch.arange(T)), label="Stable Diffusion 1.x")
axis.semilogy(snr, linestyle="--", label="this model")
axis.axhline(1, color="black", linewidth=1)
axis.set(xlabel="timestep t", ylabel="signal-to-noise ratio", ylim=(1e-4, 2e3))
axis.legend()
lesson.show(fig, "real", "Both ratios fall alike; at the end this model's falls to zero.")

# %% [markdown]
# ## On a GPU
#
# With a checkpoint, the last picture of "Break it" is worth seeing at 512 x 512:
#
# ```bash
# python lessons/01_adding_noise.py --model v1-5-pruned-emaonly.safetensors --device cuda
# ```
#
# One minute. Expect the same ladder in finer grain, and latents with 48 times fewer numbers than pixels. The checkpoint has never seen this very drawing, and
# still finds it in the noise.

# %% [markdown]
# ## What you now know
#
# - The forward process adds noise in small steps; each one shrinks what is there, so that the variance stays at one.
# - All steps up to t are one jump: $x_t = \sqrt{\bar\alpha_t} \, x_0 + \sqrt{1 - \bar\alpha_t} \, \epsilon$, in the code `q_sample`.
# - The signal-to-noise ratio falls with t; where it is one, picture and noise have the same variance.
# - Two of $x_0$, $x_t$ and $\epsilon$ give the third, but a small error in the noise is a large error in $x_0$ at late timesteps.
# - Stable Diffusion adds its noise to latents that are scaled to a variance of about one.

# %% [markdown]
# ## Your guess
#
# The first number is printed in the section "How much is left: signal and noise". The second one has no formula: most people still
# recognise the picture where the noise is already the larger part, because the eye averages over neighbouring pixels.

# %% [markdown]
# ## Quiz
#
# 1. Why does a step of the forward process multiply the old picture by a number below one?
# 2. Two batches have the same t but different noise. Which of mean, variance and pixels agree?
# 3. You mix with $\bar\alpha_t$ and $1 - \bar\alpha_t$ without the roots. Where is the error largest?
#
# <details><summary>Answers</summary>
#
# 1. Because variances add: without shrinking, the variance would grow with every step.
# 2. Mean and variance, approximately. The pixels do not.
# 3. Where both are a half: the variance there is a half of what it should be.
#
# </details>

# %% [markdown]
# ## Now you
#
# Write a noise schedule of your own, an `alpha_bar` that falls along a straight line from one to zero. Predict at which t picture and noise
# are equal, and whether your eyes lose the picture earlier or later than before. Then draw the ladder with it and compare.

# %% [markdown]
# ## Read next
#
# - `minidiff/schedule.py`: `q_sample` and `x0_from_eps` are the two equations; `velocity` is the mixture called v; `zero_terminal_snr` the repair.
# - Ho, Jain and Abbeel 2020, "Denoising diffusion probabilistic models", section 2: eq. 2 and eq. 4.
# - Lesson 02: a network of sixty lines learns to take this noise out.
