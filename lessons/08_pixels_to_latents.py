# %% [markdown]
# # 08 Pixels to latents
#
# **How small can a picture be made before it is taken apart into noise, and what does that cost?**
#
# - Explains: [minidiff/vae.py](../minidiff/vae.py)
# - You change: `scaling_factor`, the number that every checkpoint carries along
# - Minutes: 30
# - Picture: [figures/08-wrong.png](figures/08-wrong.png)
#
# ![The whole pipeline; this lesson is about the VAE](figures/pipeline-vae.svg)
#
# Lesson 01 put noise into latents, and lesson 07 sent them through the U-Net. Here is where they come from: an *autoencoder*, two
# networks that were trained together before the U-Net was. The *encoder* makes a small tensor of a picture, the *decoder* makes a picture
# of it again. The kind used here is called a *VAE*, a variational autoencoder.

# %% [markdown]
# ## Guess first
#
# 1. The bundled model's latent has twelve times fewer numbers than its picture. What comes back worst: plain background, the inside of
#    things, or their borders?
# 2. Every checkpoint has a number by which latents are multiplied before noise comes in; for Stable Diffusion it is 0.18215, and it
#    stands hard-coded in many a program. What happens to pictures if a program with this number is given a model that has another?

# %% [markdown]
# ## There and back
#
# Diffusion in pixels works, and is slow: most of what it computes is grain that no one looks at. So Stable Diffusion leaves the grain to
# the autoencoder, once a picture, and runs the U-Net, many times a picture, on what is left.
#
# How well it comes back is measured by the *PSNR*, the peak signal-to-noise ratio: the largest possible squared error over the mean
# squared error, on a scale of decibels. Ten more are ten times less error. Pixels lie between $-1$ and $1$, so the largest squared error
# is $2^2$:
#
# $$\mathrm{PSNR} = 10 \, \log_{10} \frac{2^2}{\mathrm{mean}\left( (x - \hat{x})^2 \right)}$$

# %%
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

from lessons.common import picture_grid, start
from minidiff.config import SD1
from minidiff.pictures import to_pixels
from minidiff.pipeline import to_images
from minidiff.scenes.scenes import sample_scene
from minidiff.vae import VAE

lesson = start("08_pixels_to_latents")
sd = lesson.load()
vae, config, size = sd.vae, sd.config.vae, sd.config.image_size

# %%
rng = np.random.default_rng(0)
scenes = [sample_scene(rng) for _ in range(16 if lesson.quick else 64)]


def enlarged(pictures):
    """To the model's own size, which for the bundled one is the scenes'."""
    return F.interpolate(pictures, size=(size, size), mode="bicubic").clamp(-1, 1)


pixels = enlarged(to_pixels(np.stack([scene.image for scene in scenes])))
with torch.no_grad():
    encoded = [vae.encode(part.to(lesson.device)) for part in pixels.split(8)]
mean, logvar = (torch.cat([getattr(part, of) for part in encoded]) for of in ("mean", "logvar"))
B, C, H, W = mean.shape
assert (config.latent_channels, size // config.factor, size // config.factor) == (C, H, W)
print(f"picture {list(pixels.shape[1:])}, latent {[C, H, W]}")
print(f"{pixels[0].numel() / mean[0].numel():.0f} times fewer numbers")


# %%
def psnr(x, x_hat):
    return float(10 * torch.log10(2**2 / (x - x_hat).square().mean()))


@torch.no_grad()
def decoded(z):
    """Unscaled latents to pixels, some at a time."""
    return torch.cat([vae.decode(part) for part in z.split(8)]).clamp(-1, 1).cpu()


few = pixels[: 8 if lesson.quick else 16]
back = decoded(mean[: len(few)])
assert back.shape == few.shape
print(f"PSNR of {len(few)} pictures: {psnr(few, back):.1f} dB")
levels = 127.5 * (few - back).square().mean().sqrt()
print(f"a pixel is off by about {levels:.1f} of 255")

# %%
shown = [0, 2, 5, 6]
wrong = (few - back).square().mean(dim=1).sqrt()
rows = [[to_images(one)[i] for i in shown] for one in (few, back)] + [[wrong[i] for i in shown]]
fig = picture_grid(rows, labels=["picture", "there\nand back", "error"])
lesson.show(fig, "back", "Scenes, the same from their latents, and maps of the errors.")

# %% [markdown]
# ## Where it errs
#
# The scenes know which pixel is background, so the errors can be sorted. A strip around each outline counts as border: where the mask is
# not the same within two pixels.

# %%
mask = torch.from_numpy(np.stack([scene.mask for scene in scenes[: len(few)]]))[:, None]
largest, smallest = F.max_pool2d(mask, 5, 1, 2), -F.max_pool2d(-mask, 5, 1, 2)
border = largest - smallest > 0.5
inside = mask >= 0.5
regions = {"background": ~border & ~inside, "inside": ~border & inside, "border": border}
squared = (few - back).square().mean(dim=1, keepdim=True)
errors = {}
for name, region in regions.items():
    region = F.interpolate(region.float(), size=(size, size))
    errors[name] = float((squared * region).sum() / region.sum())
    share = float((squared * region).sum() / squared.sum())
    print(f"{name:10} {region.mean():4.0%} of pixels, {share:4.0%} of the error")

# %%
fig, axis = plt.subplots()
axis.bar(list(errors), list(errors.values()), width=0.6)
axis.set(ylabel="mean squared error", yscale="log")
lesson.show(fig, "regions", "Bars of error: small for background, large for inside and border.")

# %% [markdown]
# A plain background is one colour, and a few numbers hold it; nearly all of the error is where things are. The inside of these drawings
# is full of outlines too, so look whether it is any better than the border. What the autoencoder loses no U-Net can bring back: this is
# the ceiling of everything that the model draws. Small text and distant faces are what Stable Diffusion loses here.

# %% [markdown]
# ## A latent is a cloud
#
# The encoder does not give one latent but a normal distribution for each number, a mean and a variance, and in training the decoder is
# given a draw from it (Kingma and Welling 2014):
#
# $$z = \mathrm{mean} + \mathrm{std} \cdot \epsilon$$
#
# So the decoder learns that nearby latents are nearby pictures. And a second loss pulls every distribution towards the standard normal
# one, by the *KL divergence* between the two:
#
# $$\mathrm{KL} = \frac{1}{2} \left( \mathrm{mean}^2 + \mathrm{std}^2 - 1 - \log \mathrm{std}^2 \right)$$
#
# It is zero for the standard normal and grows with every bit that the latent tells about the picture. (It is counted in *nats*, bits of the
# natural logarithm. `logvar` below is $\log \mathrm{std}^2$, which is what the encoder gives.) Its weight in training is tiny, or the
# pictures would blur.

# %%
std = (0.5 * logvar).exp()
naive = 0.5 * (mean**2 + std**2 - 1 - logvar)
kl = torch.cat([part.kl() for part in encoded])
assert torch.allclose(naive.sum(dim=(1, 2, 3)), kl, rtol=1e-4)
print(f"KL {kl.mean() / mean[0].numel():.1f} nats a number")
print(f"the means spread by {mean.std():.2f}, each cloud by {std.mean():.3f}")

# %%
generator = torch.Generator().manual_seed(0)
eps = torch.randn((len(few), C, H, W), generator=generator).to(lesson.device)
shares = [0.02, 0.05, 0.1, 0.2, 0.4, 0.8]
quality = [psnr(few, decoded(mean[: len(few)] + share * mean.std() * eps)) for share in shares]
own = float(std.mean() / mean.std())

fig, axis = plt.subplots()
axis.semilogx(shares, quality, marker="o")
axis.axvline(own, color="black", linewidth=1, linestyle="--")
axis.annotate(" spread of the clouds", (own, min(quality)))
axis.set(xlabel="noise in the latent, as a share of its size", ylabel="PSNR in dB")
axis.set(xticks=shares, xticklabels=shares)
axis.minorticks_off()
lesson.show(fig, "noise", "PSNR stays at first, and falls beyond the spread of the clouds.")

# %% [markdown]
# Noise within the clouds does no harm; the decoder has been trained with it. This is what lets a U-Net be a little wrong: its last errors
# vanish in the decoder.

# %% [markdown]
# ## The scaling factor
#
# The clouds are narrow and the means are not at variance 1: with so small a weight the KL could not bring them there. But `q_sample` of
# lesson 01 mixes $\sqrt{\bar\alpha_t} \, x_0$ with noise of variance 1, and it promises that the variance stays 1. That holds only if
# $x_0$ has variance 1. So multiply the latents by a number $s$, the same for all. A variance $\sigma^2$ becomes $s^2 \sigma^2$, and it is
# to be 1:
#
# $$s^2 \sigma^2 = 1 \quad \Rightarrow \quad s = \frac{1}{\sigma}$$
#
# $\sigma$ is the standard deviation over pictures, channels and places together (Rombach et al. 2022, appendix G). It is measured once,
# after the autoencoder is trained, and goes with the checkpoint from then on.

# %% [markdown]
# ## Your turn: scaling_factor
#
# Write it: from latents of shape B C H W one number, as a tensor without axes. The standard deviation is measured from the mean of all
# the numbers, which need not be zero.


# %%
def scaling_factor(latents):
    """1 / sigma, one number for all of the latents [B, C, H, W]."""
    # YOUR CODE, about 1 lines


def one_over_sigma(latents):
    return 1 / latents.std()


scaling_factor = lesson.check(scaling_factor, instead=one_over_sigma)
assert scaling_factor(mean).shape == ()

# %%
counts = [1, 2, 4, 8, 16] + ([] if lesson.quick else [32, 64])
orders = [np.random.default_rng(i).permutation(B) for i in range(8)]
print("pictures   estimates from different pictures")
fig, axis = plt.subplots()
for count in counts:
    found = [float(scaling_factor(mean[order[:count]])) for order in orders]
    axis.plot([count] * len(found), found, "o", color="C0", alpha=0.6)
    print(f"{count:8}   {min(found):.3f} to {max(found):.3f}")
axis.axhline(config.scaling_factor, color="black", linewidth=1, linestyle="--")
axis.set(xscale="log", xticks=counts, xticklabels=counts, xlabel="pictures", ylabel="1 / sigma")
axis.minorticks_off()
lesson.show(fig, "factor", "Estimates spread for one picture and close in on one number.")
print(f"the model's own: {config.scaling_factor:.3f}")

# %% [markdown]
# One picture gives almost any number, many give nearly one. The dashed line is what the checkpoint carries, measured over many more
# pictures than these; a few percent do no harm. It belongs to this autoencoder: if that is trained again, so must the U-Net be.

# %% [markdown]
# ## Break it: somebody else's factor
#
# A program with the wrong number hard-coded makes the mistake in two places. After drawing it divides by it, and the decoder is given
# latents of the wrong size. Before noise is added to a picture of one's own, as in lesson 13, it multiplies by it, and the U-Net sees
# latents of the wrong size. First the decoder.

# %%
right = config.scaling_factor
other = 1.0 if abs(right - 0.18215) < 1e-4 else 0.18215  # for a model that has it, none at all
print(f"right: {right:.5f}, wrong: {other}")
prompts = ["a rocket on a red background", "a house on a green background"]
prompts += ["a camera on a purple background", "a cat on a white background"]
*_, last = sd.denoise(prompts, steps=4 if lesson.quick else 15, seeds=[1])
drawn = {
    "right": to_images(decoded(last.x_t / right)),
    "divided by\nthe wrong": to_images(decoded(last.x_t / other)),
}

# %% [markdown]
# Now the U-Net: it is asked for $x_0$ of scenes whose latents have some multiple of the right size, and the error is measured in the
# right size.

# %%
z = mean[:8] * right
context = sd.encode_prompts([scene.caption for scene in scenes[: len(z)]])
noise = torch.randn(z.shape, generator=generator).to(lesson.device)
predicts_eps = sd.schedule.config.prediction == "eps"
x0_from = sd.schedule.x0_from_eps if predicts_eps else sd.schedule.x0_from_v


@torch.no_grad()
def x0_hat(times, one):
    """What the U-Net takes x_0 for, if the latents are `times` too large; divided by it again."""
    t = torch.full((len(z),), one, device=lesson.device)
    x_t = sd.schedule.q_sample(times * z, t, noise)
    return x0_from(x_t, t, sd.unet(x_t, t, context)) / times


# %%
sizes = [0.25, 0.5, 1, 2, 4] if lesson.quick else [0.25, 0.35, 0.5, 0.71, 1, 1.41, 2, 2.83, 4]
fig, axis = plt.subplots()
for one, marker in zip((300, 500, 700), "os^"):
    off = [float((x0_hat(times, one) - z).square().mean()) for times in sizes]
    axis.loglog(sizes, off, marker=marker, label=f"t = {one}")
    at = sizes.index(1)
    print(f"t = {one}: error {off[at]:.2f}, at a quarter {off[0]:.2f}, at 4 times {off[-1]:.2f}")
axis.set(xlabel="size of the latents, right is 1", ylabel="error of x0_hat")
axis.set(xticks=[0.25, 0.5, 1, 2, 4], xticklabels=[0.25, 0.5, 1, 2, 4])
axis.minorticks_off()
axis.legend()
lesson.show(fig, "valley", "The error is least near size one and grows on both sides.")

# %%
fig = picture_grid(list(drawn.values()), labels=list(drawn))
lesson.show(fig, "wrong", "Four pictures; below the same, glaring and without shades.")

seen = [x0_hat(times, 500)[:4] / right for times in (1, other / right)]
rows = [to_images(decoded(latents)) for latents in seen]
fig = picture_grid(rows, labels=["scenes,\nx0_hat", "multiplied\nby the wrong"])
lesson.show(fig, "guessed", "Scenes found in noise; below, blurred ones with details lost.")

# %% [markdown]
# That answers the second guess: nothing crashes, and every picture is worse. In the second row of the first one the decoder was given
# latents that it never met: too strong in everything, with colours that run into their ends. In the second row of the other, latents too
# small drowned in noise far earlier than the timestep says, and the U-Net, which trusts the timestep, filled in the rest from its own
# mind. Both programs run without a complaint. So minidiff keeps the number in `VAEConfig`, as part of the checkpoint, and the VAE itself
# never multiplies; the pipeline does, in one place.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/08_pixels_to_latents.py --model v1-5-pruned-emaonly.safetensors` measures a checkpoint that you have.
# Stable Diffusion 1.x and 2.x have the same autoencoder, with 48 times fewer numbers than pixels and the factor 0.18215: its latents
# spread by 5.49.

# %%
real = SD1.vae
cells = SD1.image_size // real.factor
with torch.device("meta"):  # shapes without numbers, as in lesson 07
    parameters = sum(p.numel() for p in VAE(real).parameters())
print(f"picture 3 x {SD1.image_size} x {SD1.image_size}")
print(f"latent {real.latent_channels} x {cells} x {cells}")
print(f"{3 * SD1.image_size**2 / (real.latent_channels * cells**2):.0f} times fewer numbers")
print(f"scaling factor {real.scaling_factor}: sigma {1 / real.scaling_factor:.2f}")
print(f"{parameters:,} parameters; here {sum(p.numel() for p in vae.parameters()):,}")

# %% [markdown]
# ## On a GPU
#
# ```bash
# python lessons/08_pixels_to_latents.py --model v1-5-pruned-emaonly.safetensors --device cuda
# ```
#
# Three minutes. The wrong factor is then none at all. The estimates of the factor come out near 0.18215, not at it: it was measured on
# photographs, and these are drawings.

# %% [markdown]
# ## Read next
#
# - `minidiff/vae.py`: `DiagonalGaussian` is the cloud, `Encoder` and `Decoder` are ResBlocks without time; `StableDiffusion.decode` in
#   `minidiff/pipeline.py` divides by the factor.
# - Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models", section 3.1 and appendix G; Kingma and Welling
#   2014, "Auto-encoding variational Bayes".
# - Lesson 09: the other thing that the U-Net is given, words.
