# %% [markdown]
# # 08 Pixels to latents
#
# **How small can a picture be made before it is mixed with noise, and what does that cost?**
#
# - Explains: [minidiff/vae.py](../minidiff/vae.py)
# - You change: `psnr`, `sample_latent` and `scaling_factor`: how good a copy is, what a latent is, and how large
# - Minutes: 40
# - Picture: [figures/08-wrong.png](figures/08-wrong.png)
#
# ![The whole pipeline; this lesson is about the VAE](figures/pipeline-vae.svg)
#
# Lesson 01 added noise to latents, and lesson 07 sent them through the U-Net. This lesson is about where they come from: an *autoencoder*,
# two networks that were trained together before the U-Net. The *encoder* turns a picture into a small tensor, the latent. The *decoder*
# turns the latent back into a picture. The kind used here is called a *VAE*, a variational autoencoder.

# %% [markdown]
# ## Guess first
#
# Every checkpoint has a number by which latents are multiplied before noise is added. For Stable Diffusion 1.x it is 0.18215, and many
# programs have this number hard-coded. Such a program is given a model that needs another one. What happens?
#
# 1. It stops with an error.
# 2. Nothing that you could see: the norms inside the networks take care of the size.
# 3. Pictures come out, and all of them are damaged.

# %% [markdown]
# ## There and back
#
# Diffusion on pixels works, but it is slow, and most of the work goes into fine grain that nobody looks at. Stable Diffusion leaves the
# grain to the autoencoder, which runs once for each picture. The U-Net, which runs at every step, only works on the latent.
#
# How good is the picture that comes back? The usual measure is the *PSNR*, the peak signal-to-noise ratio: the largest possible squared
# error divided by the mean squared error, in decibels. Pixels lie between $-1$ and $1$, so the largest possible squared error is $2^2$:
#
# $$\mathrm{PSNR} = 10 \, \log_{10} \frac{2^2}{\mathrm{mean}\left( (x - \hat{x})^2 \right)}$$
#
# With ten decibels more, the mean squared error is a tenth.

# %%
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

from lessons.common import curves, picture_grid, scene_pixels, start, x0_converter
from minidiff.config import SD1
from minidiff.pipeline import to_images
from minidiff.scenes.scenes import sample_scene
from minidiff.vae import VAE

lesson = start("08_pixels_to_latents")
sd = lesson.load()

# %% [markdown]
# ## Your turn: psnr
#
# Write it for two tensors of the same shape. The mean goes over everything, pictures and channels and pixels, so the result is a single
# number. PyTorch's logarithm to the base of ten is `torch.log10`. Two lines. When it is right, you see the PSNR of noise of two sizes.


# %%
def psnr(x, x_hat):
    """PSNR in decibels, one number; x and x_hat [B, 3, H, W] with values in [-1, 1]."""
    # YOUR CODE, about 2 lines


psnr = lesson.check(psnr)

# %% [markdown]
# We encode some scenes. For now we only use `mean`; what `logvar` is follows below.

# %%
vae, config, size = sd.vae, sd.config.vae, sd.config.image_size
rng = np.random.default_rng(0)
scenes = [sample_scene(rng) for _ in range(16 if lesson.quick else 64)]
pixels = scene_pixels(sd, scenes)
with torch.no_grad():
    encoded = [vae.encode(part.to(lesson.device)) for part in pixels.split(8)]
mean, logvar = (torch.cat([getattr(part, of) for part in encoded]) for of in ("mean", "logvar"))
B, C, H, W = mean.shape
assert (config.latent_channels, size // config.factor, size // config.factor) == (C, H, W)
print(f"picture {list(pixels.shape[1:])}, latent {[C, H, W]}")
print(f"{pixels[0].numel() / mean[0].numel():.0f} times fewer numbers")


# %%
@torch.no_grad()
def decoded(z):
    """Pixels from unscaled latents, a few at a time."""
    return torch.cat([vae.decode(part) for part in z.split(8)]).clamp(-1, 1).cpu()


few = pixels[: 8 if lesson.quick else 16]
back = decoded(mean[: len(few)])
assert back.shape == few.shape
print(f"PSNR of {len(few)} pictures: {psnr(few, back):.1f} dB")
levels = 127.5 * (few - back).square().mean().sqrt()
print(f"a pixel is off by about {levels:.1f} of 255")

# %%
shown = [0, 2, 5, 6]
error = (few - back).square().mean(dim=1).sqrt()
rows = [[to_images(pictures)[i] for i in shown] for pictures in (few, back)]
rows.append([error[i] for i in shown])
fig = picture_grid(rows, labels=["picture", "there\nand back", "error"])
lesson.show(fig, "back", "Scenes, their copies from the latents, and maps of the errors.")

# %% [markdown]
# ## Where the errors are
#
# Every scene comes with a mask that says which pixels are background, so the errors can be sorted. Before you run the next cell: where do
# you expect the largest ones, in the background, inside the things, or at their borders? Pixels count as border where the mask changes
# within two pixels.

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
axis.set(ylabel="mean squared error")
lesson.show(fig, "regions", "A pixel's error in the background, inside things, and at borders.")

# %% [markdown]
# A plain background is a single colour, which a few numbers can hold. Nearly all of the error is where things are, and the inside of these
# drawings is full of outlines as well. Nothing that is lost here can be brought back by a U-Net, so the autoencoder sets a limit to all
# pictures that the model generates. Stable Diffusion loses small text and distant faces here.

# %% [markdown]
# ## A latent is a cloud
#
# The encoder does not return a single latent. For each number of the latent it returns a normal distribution, as a mean and a variance. In
# training, the decoder is given a random sample of it (Kingma and Welling 2014, section 2.4):
#
# $$z = \mathrm{mean} + \mathrm{std} \cdot \epsilon$$
#
# So the decoder learns to decode everything near the mean: not a point, but a cloud.
#
# Left to itself, training would make the clouds as narrow as possible, because noise harms the picture. A second loss works against that.
# It pulls each distribution towards the standard normal one, and measures how far away it is with the *KL divergence*:
#
# $$\mathrm{KL} = \frac{1}{2} \left( \mathrm{mean}^2 + \mathrm{std}^2 - 1 - \log \mathrm{std}^2 \right)$$
#
# It is zero for the standard normal distribution, and it grows with what the latent tells about the picture. Its unit is the *nat*, which
# is to the natural logarithm what the bit is to the logarithm of base two. This loss has a tiny weight in training, since otherwise the
# pictures would blur.

# %% [markdown]
# ## Your turn: sample_latent
#
# The encoder returns `logvar`, the logarithm of the variance, $\log \mathrm{std}^2$. A network can output any number, while a variance must
# be positive; the exponential of any number is. The standard deviation is therefore $e^{\mathrm{logvar} / 2}$.
#
# Write the sample. `mean`, `logvar` and `eps` have the same shape, and `eps` is unit normal noise. Two lines. When it is right, you see
# that many samples have the mean and the standard deviation that were asked for.


# %%
def sample_latent(mean, logvar, eps):
    """A sample of N(mean, exp(logvar)); all [B, C, H, W]."""
    # YOUR CODE, about 2 lines


sample_latent = lesson.check(sample_latent)

# %%
generator = torch.Generator().manual_seed(0)
n = len(few)
eps = torch.randn((n, C, H, W), generator=generator).to(lesson.device)
sample = sample_latent(mean[:n], logvar[:n], eps)
assert sample.shape == eps.shape == (n, C, H, W)
print(f"PSNR of the means {psnr(few, back):.1f} dB, of samples {psnr(few, decoded(sample)):.1f} dB")

std = (0.5 * logvar).exp()
by_hand = 0.5 * (mean**2 + std**2 - 1 - logvar)
kl = torch.cat([part.kl() for part in encoded])
assert torch.allclose(by_hand.sum(dim=(1, 2, 3)), kl, rtol=1e-4)
print(f"KL {kl.mean() / mean[0].numel():.1f} nats for each number of the latent")
print(f"standard deviation of the means {mean.std():.2f}, of a cloud {std.mean():.3f}")

# %% [markdown]
# How much noise can a latent take before its picture suffers? We add more and more of it, of the same size to all numbers.

# %%
shares = [0.02, 0.05, 0.1, 0.2, 0.4, 0.8]
quality = [float(psnr(few, decoded(mean[:n] + share * mean.std() * eps))) for share in shares]
own = float(std.mean() / mean.std())
axes = {"xlabel": "noise, as a share of the latents' size", "ylabel": "PSNR in dB"}
lines = {"noise added": (shares, quality)}
lines["size of a cloud"] = [own, own], [min(quality), max(quality)]
fig = curves(lines, **axes, log="x", xticks=shares, dashed=["size of a cloud"])
lesson.show(fig, "noise", "PSNR against the noise in the latent; dashed, the size of a cloud.")

# %% [markdown]
# Left of the dashed line the noise does little harm, because the decoder was trained with as much. To the right, the picture gets worse and
# worse. This is why the U-Net may be slightly wrong: errors smaller than a cloud hardly show in the picture.

# %% [markdown]
# ## The scaling factor
#
# The means do not have variance one: the weight of the KL divergence is too small for that. But the forward process of lesson 01 mixes
# $\sqrt{\bar\alpha_t} \, x_0$ with noise of variance one, and $x_t$ has variance one only if $x_0$ has it. Therefore latents are multiplied
# by a number $s$, the same for all of them. A variance $\sigma^2$ becomes $s^2 \sigma^2$, and this should be one:
#
# $$s^2 \sigma^2 = 1 \quad \Rightarrow \quad s = \frac{1}{\sigma}$$
#
# Here $\sigma$ is the standard deviation over all pictures, channels and cells (Rombach et al. 2022, appendix G). It is measured once,
# after the autoencoder has been trained, and the *scaling factor* $s$ belongs to the checkpoint from then on.

# %% [markdown]
# ## Your turn: scaling_factor
#
# Write it. It takes latents of shape `[B, C, H, W]` and returns one number, a tensor without axes. The standard deviation is that of all
# numbers together. Their mean need not be zero; `.std()` subtracts it. Two lines. When it is right, you see what the factor does to latents
# as large as Stable Diffusion's.


# %%
def scaling_factor(latents):
    """1 / sigma, one number for all latents [B, C, H, W]."""
    # YOUR CODE, about 2 lines


scaling_factor = lesson.check(scaling_factor)

# %%
assert scaling_factor(mean).shape == ()
counts = [1, 2, 4, 8, 16] + ([] if lesson.quick else [32, 64])
orders = [np.random.default_rng(i).permutation(B) for i in range(8)]
print("pictures   lowest and highest of eight estimates")
fig, axis = plt.subplots()
for count in counts:
    found = [float(scaling_factor(mean[order[:count]])) for order in orders]
    axis.plot([count] * len(found), found, "o", color="C0", alpha=0.6)
    print(f"{count:8}   {min(found):.3f}, {max(found):.3f}")
axis.axhline(config.scaling_factor, color="black", linewidth=1, linestyle="--")
axis.set(xscale="log", xticks=counts, xticklabels=counts, xlabel="pictures", ylabel="1 / sigma")
axis.minorticks_off()
lesson.show(fig, "factor", "Estimates from few pictures differ; those from many agree.")
print(f"the model's own: {config.scaling_factor:.3f}")

# %% [markdown]
# An estimate from one picture can be far off, and estimates from many pictures agree. The dashed line is the factor in the checkpoint,
# measured over many more pictures. A few per cent more or less do no harm. The factor belongs to this autoencoder: after training the
# autoencoder again, the U-Net has to be trained again too.

# %% [markdown]
# ## Break it: somebody else's factor
#
# A program with the wrong number uses it in two places. After the denoising loop it divides by the number, so the *decoder* gets latents of
# the wrong size. Before it adds noise to a picture of yours, as in lesson 13, it multiplies by the number, so the *U-Net* gets latents of
# the wrong size. First the decoder.

# %%
right = config.scaling_factor
other = 1.0 if abs(right - 0.18215) < 1e-4 else 0.18215  # none at all for a model that has 0.18215
print(f"right: {right:.5f}, wrong: {other}")
print(f"divided by the wrong one, latents are {right / other:.1f} times their size")
prompts = ["a rocket on a red background", "a house on a green background"]
prompts += ["a camera on a purple background", "a cat on a white background"]
*_, last = sd.denoise(prompts, steps=4 if lesson.quick else 15, seeds=[1])
generated = {
    "divided by\nthe right": to_images(decoded(last.x_t / right)),
    "divided by\nthe wrong": to_images(decoded(last.x_t / other)),
}
fig = picture_grid(list(generated.values()), labels=list(generated))
lesson.show(fig, "wrong", "Four pictures; below, the same latents divided by the wrong number.")

# %% [markdown]
# Next the U-Net. We multiply the latents of scenes by several numbers, where one is the right size, add noise, and ask for $x_0$.
# Afterwards we divide by the same number, so that all errors are measured at the right size.

# %%
z = mean[:8] * right
context = sd.encode_prompts([scene.caption for scene in scenes[: len(z)]])
noise = torch.randn(z.shape, generator=generator).to(lesson.device)
convert = x0_converter(sd)


@torch.no_grad()
def x0_hat(times, timestep):
    """The U-Net's prediction for latents that are `times` too large, divided by it again."""
    t = torch.full((len(z),), timestep, device=lesson.device)
    x_t = sd.schedule.q_sample(times * z, t, noise)
    return convert(x_t, t, sd.unet(x_t, t, context)) / times


# %%
sizes = [0.25, 0.5, 1, 2, 4] if lesson.quick else [0.25, 0.35, 0.5, 0.71, 1, 1.41, 2, 2.83, 4]
lines = {}
for t in (300, 500, 700):
    off = [float((x0_hat(times, t) - z).square().mean()) for times in sizes]
    lines[f"t = {t}"] = sizes, off
    right_size = off[sizes.index(1)]
    print(f"t = {t}: error {right_size:.2f}, at a quarter {off[0]:.2f}, at 4 times {off[-1]:.2f}")
axes = {"xlabel": "size of the latents, right is 1", "ylabel": "error of x0_hat"}
fig = curves(lines, **axes, log="xy", xticks=[0.25, 0.5, 1, 2, 4])
lesson.show(fig, "valley", "The error against the size of the latents, at three timesteps.")

# %%
seen = [x0_hat(times, 500)[:4] / right for times in (1, other / right)]
rows = [to_images(decoded(latents)) for latents in seen]
fig = picture_grid(rows, labels=["scenes,\nx0_hat", "multiplied\nby the wrong"])
lesson.show(fig, "guessed", "Scenes predicted from noise; below, from latents of the wrong size.")

# %% [markdown]
# Nothing crashes in either place, and every picture is worse. Look at the row with the wrong number in both figures. The decoder was given
# latents of a size that it never met in training. The U-Net is told a timestep and trusts it. Latents that are too small drown in noise
# earlier than the timestep says, so the network makes up more of the picture than it should have to. Latents that are too large do less
# harm, because the noise covers less of them.
#
# In minidiff the number is part of the checkpoint (`VAEConfig`). The VAE itself works on unscaled latents. Code that adds noise multiplies by
# the model's own number, and `StableDiffusion.decode` divides by it.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/08_pixels_to_latents.py --model v1-5-pruned-emaonly.safetensors` measures a checkpoint of yours. The autoencoder of
# Stable Diffusion 1.x and 2.x makes latents with 48 times fewer numbers than the picture has. Their standard deviation is 5.49, hence the
# factor 0.18215.

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
# Three minutes. The wrong factor is no factor at all here. The estimates come out near 0.18215, but not at it: it was measured on
# photographs, and these are drawings.

# %% [markdown]
# ## What you now know
#
# - The autoencoder makes pictures small once, so that the U-Net can work on small tensors at every step.
# - What the autoencoder loses, mostly where things are, no U-Net can bring back.
# - A latent is a cloud, a mean and a variance for each number; noise as large as the cloud hardly shows in the picture.
# - The scaling factor, one over the standard deviation of all latents, gives $x_0$ the variance that the noise schedule expects.
# - The factor belongs to its checkpoint. A wrong one stops nothing and harms every picture.

# %% [markdown]
# ## Your guess
#
# The third answer is right, as the pictures of "Break it" show. The second would be right if a norm came first. But the noise is mixed in
# before any norm: what counts is the size of the latent beside that of the noise, and no norm can tell the two apart.

# %% [markdown]
# ## Quiz
#
# 1. Somebody multiplies by twice the right factor before adding noise. What is the variance of $x_0$, and does the U-Net see too much noise
#    or too little for its timestep?
# 2. What would happen if the KL divergence had a large weight in the autoencoder's training?
# 3. The letters on a sign come back from the autoencoder unreadable. Does it help to fine-tune the U-Net on pictures of signs?
#
# <details><summary>Answers</summary>
#
# 1. Four. There is too little noise for the timestep, because the noise has kept its size.
# 2. The clouds would grow as wide as the means are apart. Different pictures would get overlapping clouds, and the decoder could only
#    return blurred averages.
# 3. No. The decoder cannot draw these letters from any latent that the encoder makes of them, so the autoencoder has to change.
#
# </details>

# %% [markdown]
# ## Now you
#
# Blend two scenes half and half, once in pixels and once in latents: decode the mean of two rows of `mean`. Predict whether the two results
# look the same. Then show both blends next to each other with `picture_grid`, for several pairs. Where do they differ, and does the blend
# of the latents look like a picture of one thing?

# %% [markdown]
# ## Read next
#
# - `minidiff/vae.py`: `DiagonalGaussian.sample` is your `sample_latent`, and `Encoder` and `Decoder` are ResBlocks without time.
#   `StableDiffusion.decode` in `minidiff/pipeline.py` divides by the factor.
# - Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models", section 3.1 and appendix G; Kingma and Welling
#   2014, "Auto-encoding variational Bayes".
# - Lesson 09: the other input of the U-Net, words.
