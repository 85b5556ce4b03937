# %% [markdown]
# # 06 Time and residuals
#
# **How does one network know how much noise it is looking at?**
#
# - Explains: [minidiff/blocks.py](../minidiff/blocks.py)
# - You change: `timestep_embedding`, the timestep as a vector of waves
# - Minutes: 30
# - Picture: [figures/06-swapped.png](figures/06-swapped.png)
#
# ![The whole pipeline; this lesson is about the residual blocks of the U-Net](figures/pipeline-blocks.svg)
#
# The U-Net of the lessons before is one network for all timesteps. This lesson takes its commonest part out, the *ResBlock*: two
# convolutions, a place where the timestep comes in, and a way around it all. A U-Net is mostly ResBlocks; how they are put together is
# lesson 07.

# %% [markdown]
# ## Guess first
#
# The timestep becomes a vector: first cosines, then sines. Much code of other fields has the sines first. It is the same numbers in
# another order, and the next layer is a `Linear`, which does not care about order when it is trained. Now a network that was trained with
# cosines first is given the sines first. What do its pictures look like?
#
# 1. The same: all the information is still there.
# 2. The right things, but spoilt in some way. In which?
# 3. Nothing to be recognised.

# %% [markdown]
# ## One network for every amount of noise
#
# At the first timesteps the network should take out a trace of grain, at the last it should see a picture where there is hardly one.
# Those are different tasks. So the network is told `t`. Does it listen? Take pictures with the noise of one timestep, and tell it another
# one.

# %%
import math

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

from lessons.common import picture_grid, start
from minidiff import blocks
from minidiff.blocks import ResBlock
from minidiff.config import SD1
from minidiff.pictures import to_pixels
from minidiff.scenes.scenes import sample_scene

lesson = start("06_time_and_residuals")
sd = lesson.load()
T = sd.schedule.config.timesteps

# %%
rng, size = np.random.default_rng(0), sd.config.image_size
scenes = [sample_scene(rng) for _ in range(2 if lesson.quick else 4)]
small = to_pixels(np.stack([scene.image for scene in scenes]))
pixels = F.interpolate(small, size=(size, size), mode="bicubic").clamp(-1, 1).to(lesson.device)
with torch.no_grad():
    x_0 = sd.vae.encode(pixels).mean * sd.config.vae.scaling_factor
context = sd.encode_prompts([scene.caption for scene in scenes])
B, C, H, W = x_0.shape
eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(lesson.device)
assert context.shape[0] == B and pixels.shape == (B, 3, size, size)


def all_at(t):
    return torch.full((B,), t, device=lesson.device)


# %%
@torch.no_grad()
def answer(t, told):
    """x_t of timestep t, and what the U-Net says when it is told another one."""
    x_t = sd.schedule.q_sample(x_0, all_at(t), eps)
    return x_t, sd.unet(x_t, all_at(told), context)


predicts_eps = sd.schedule.config.prediction == "eps"
x0_from = sd.schedule.x0_from_eps if predicts_eps else sd.schedule.x0_from_v


def error(t, x_t, prediction):
    return float((x0_from(x_t, all_at(t), prediction) - x_0).square().mean())


# %%
times, tellings = [100, 300, 500, 700, 900], range(0, T, 250 if lesson.quick else 50)
answers = {(t, told): answer(t, told) for t in times for told in tellings}

fig, axis = plt.subplots()
for t, marker in zip((100, 500, 900), "os^"):
    off = [error(t, *answers[t, told]) for told in tellings]
    axis.semilogy(tellings, off, marker=marker, label=f"t = {t}")
    truth, worst = error(t, *answer(t, t)), max(off)
    print(f"t = {t}: told so, error {truth:.2f}; at worst {worst:.2f}")
axis.set(xlabel="timestep that the network is told", ylabel="error of x0_hat")
axis.legend()
lesson.show(fig, "told", "Three valleys: the error is smallest near the timestep that is true.")

# %% [markdown]
# The error is the mean square of what the network takes $x_0$ for, less the true one. Each curve is lowest near the truth. Told too
# little the network leaves noise in the picture, told too much it takes the picture for noise. So what it is told matters, and the rest
# of the lesson follows that one number on its way in.

# %% [markdown]
# ## A number as many clocks
#
# A network does badly with one number between none and a thousand. Its first layer can only multiply it, and then neighbours look the
# same. So the number is written with many hands of a clock. The fastest goes round every $2 \pi$ timesteps and tells neighbours apart;
# each is slower than the one before; the slowest does not finish one round, and says only "early" or "late". With half as many hands $h$
# as the vector is wide (Vaswani et al. 2017, section 3.5):
#
# $$\omega_i = 10000^{-i / h}, \quad i = 0 \ldots h - 1$$
#
# A hand is given by its two coordinates, so each angle $t \, \omega_i$ becomes a cosine and a sine. Stable Diffusion writes all cosines,
# then all sines. The vector is called the *time embedding*.

# %%
width = sd.unet.time_embedding.width
half = width // 2
waves = blocks.timestep_embedding(torch.arange(T), width)
assert waves.shape == (T, width)
for i in (0, half // 2, half - 1):
    print(f"hand {i:3} of {half}: once round in {2 * math.pi * 10000 ** (i / half):8.1f} timesteps")

fig, axis = plt.subplots()
axis.imshow(waves.T.numpy(), aspect="auto", interpolation="nearest")
axis.axhline(half - 0.5, color="white", linewidth=1.5)
axis.set(xlabel="timestep t", ylabel="cosines         sines", yticks=[0, half, width - 1])
axis.yaxis.label.set_rotation(-90)
axis.yaxis.set_label_coords(-0.12, 0.5)
axis.grid(False)
lesson.show(fig, "waves", "Above cosines, below sines: fast waves first, the last nearly constant.")

# %% [markdown]
# Each column is one timestep's vector. In the last rows of each half, the slow hands, the cosines stay near $1$ and the sines near $0$
# for all timesteps. Remember this for the guess.
#
# Why a cosine *and* a sine? Because $\cos a \cos b + \sin a \sin b = \cos(a - b)$: the product of two timesteps' vectors depends only on
# how far apart they are.

# %%
products = waves @ waves.T
later = products.diagonal(offset=40)  # t and t + 40, for all t
assert torch.allclose(products.diagonal(), torch.full((T,), float(half)), atol=1e-3)
assert torch.allclose(later, later[0].expand(T - 40), atol=0.05)

fig, axis = plt.subplots()
for t, marker in zip((200, 600), "os"):
    axis.plot(products[t] / half, label=f"with t = {t}", marker=marker, markevery=[t])
axis.set(xlabel="timestep t", ylabel="product, as a share of h")
axis.legend()
lesson.show(fig, "products", "Two equal peaks, each where the timesteps are the same.")

# %% [markdown]
# Neighbours are alike, distant timesteps are not, and it is the same everywhere: two equal curves, one shifted.

# %% [markdown]
# ## Your turn: timestep_embedding
#
# Write it. `t` has shape B; what comes out has shape `[B, width]`, in float32: the $h$ = `width // 2` cosines of $t \, \omega_i$, fastest
# first, then the sines in the same order. `t[:, None]` has shape `[B, 1]`, and multiplied by the frequencies of shape `[h]` it gives
# `[B, h]`.


# %%
def timestep_embedding(t, width):
    """cos(t omega_i), then sin(t omega_i), omega_i = 10000^(-i/h); t [B] -> [B, width]."""
    # YOUR CODE, about 4 lines


timestep_embedding = lesson.check(timestep_embedding, instead=blocks.timestep_embedding)
assert timestep_embedding(torch.arange(T), width).shape == (T, width)

# %% [markdown]
# Two Linears with a SiLU between them make of it a vector four times as wide, the same for the whole network (`TimeEmbedding`). *SiLU* is
# $x$ times its sigmoid: a smooth relative of ReLU.

# %% [markdown]
# ## The ResBlock
#
# A ResBlock normalises its input, bends it with SiLU, and sends it through a convolution; adds the time; does the same again; and adds
# what came in (Ho et al. 2020, appendix B):
#
# $$h = \mathrm{conv}_1(\mathrm{silu}(\mathrm{norm}_1(x))) + W \, \mathrm{time}$$
#
# $$\mathrm{out} = x + \mathrm{conv}_2(\mathrm{silu}(\mathrm{norm}_2(h)))$$
#
# The norm is GroupNorm: channels are cut into groups, and each group of each picture is brought to mean $0$ and variance $1$. $W$ makes
# of the time one number for each channel, and that number is added to every cell of the channel. Where the number of channels changes, a
# convolution of `1 x 1` stands in for $x$ (`skip`). Here is a block at work.

# %%
every = [module for module in sd.unet.modules() if isinstance(module, ResBlock)]
block = every[0]
caught = {}
hook = block.register_forward_hook(lambda module, args, out: caught.update(args=args, out=out))
answer(500, 500)
hook.remove()

x, time = caught["args"]
with torch.no_grad():
    h = block.conv_1(F.silu(block.norm_1(x)))
    h = h + block.time_projection(time)[:, :, None, None]  # one number a channel
    h = block.conv_2(F.silu(block.norm_2(h)))
    out = block.skip(x) + h
assert out.shape == h.shape and torch.allclose(out, caught["out"], atol=1e-4)
print(f"x {list(x.shape)}, time {list(time.shape)}, out {list(out.shape)}")
print(f"{len(every)} ResBlocks in this U-Net")

# %%
with torch.no_grad():
    every_time = sd.unet.time_embedding(torch.arange(T, device=lesson.device))
    added = block.time_projection(every_time).cpu()
assert added.shape == (T, block.conv_1.out_channels)
rise = added[-100:].mean(dim=0) - added[:100].mean(dim=0)
added = added[:, rise.argsort()]  # falling ones first

fig, axis = plt.subplots()
shown = axis.imshow(added.T.numpy(), aspect="auto", interpolation="nearest")
axis.set(xlabel="timestep t", ylabel="channel, sorted")
axis.grid(False)
fig.colorbar(shown, label="added to the channel")
lesson.show(fig, "channels", "A map: what each channel is given falls, rises or stays over time.")

# %% [markdown]
# Some channels are lifted at early timesteps, where little noise is left, others are pressed down there; at late ones most are given
# less. The norm and the SiLU that follow pass what is lifted and block what is pressed down. So the time chooses which channels take part:
# one set of convolutions, and many networks in it.

# %% [markdown]
# ## Why the input is added
#
# The sum says: keep $x$, and learn only what to change, the *residual* (He et al. 2016). What that is good for shows when many blocks
# stand in a row. Here a row of freshly drawn ResBlocks learns to find the noise in small pictures, once as it is, and once with a hook
# that takes $x$ away again.


# %%
class Row(torch.nn.Module):
    """ResBlocks in a row, from x_t to the noise in it."""

    def __init__(self, channels, many):
        super().__init__()
        self.time = blocks.TimeEmbedding(channels)
        self.conv_in = torch.nn.Conv2d(3, channels, 3, padding=1)
        row = (ResBlock(channels, channels, 4, 1e-5, 4 * channels) for _ in range(many))
        self.blocks = torch.nn.ModuleList(row)
        self.conv_out = torch.nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x_t, t):
        x, time = self.conv_in(x_t), self.time(t)
        for block in self.blocks:
            x = block(x, time)
        return self.conv_out(x)


# %%
def batches(steps):
    """x_t, t and the noise in x_t, for scenes of 16 x 16 pixels, eight at a time."""
    generator, rng = torch.Generator().manual_seed(1), np.random.default_rng(1)
    for _ in range(steps):
        images = np.stack([sample_scene(rng).image for _ in range(8)])
        clean = F.avg_pool2d(to_pixels(images), 4)
        t = torch.randint(T, (8,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        yield sd.schedule.q_sample(clean, t, noise), t, noise


# %%
def train(skips, steps, many=16):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        row = Row(16, many)
    for block in row.blocks if not skips else []:
        block.register_forward_hook(lambda module, args, out: out - args[0])
    optimizer = torch.optim.Adam(row.parameters(), lr=2e-3)
    for x_t, t, noise in batches(steps):
        loss = (row(x_t, t) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield float(loss.detach())


# %%
steps = 20 if lesson.quick else 150
losses = {name: list(train(name == "with x", steps)) for name in ("with x", "without x")}

fig, axis = plt.subplots()
for (name, loss), style in zip(losses.items(), ("-", "--")):
    mean = np.convolve(loss, np.ones(10) / 10, mode="valid")
    axis.plot(np.arange(10, steps + 1), mean, style, label=name)
    print(f"{name}: loss {mean[-1]:.2f} over the last ten of {steps} steps")
axis.set(xlabel="step", ylabel="loss, mean of ten steps", ylim=(0, 1.5))
axis.legend()
lesson.show(fig, "residual", "The loss falls fast with x, and hardly at all without.")

# %% [markdown]
# Both rows have the same numbers of parameters and start from the same draw. With $x$ a new block changes its input a little, so the
# noise comes through all sixteen nearly as it was, and so does the gradient on its way back. Without it, each block replaces its input
# by a random mixture, and after sixteen of them little can be learned from. This is the reason that networks can be deep at all; U-Net,
# autoencoder and text encoder add their inputs everywhere.

# %% [markdown]
# ## Break it: sin before cos
#
# Now the guess. A hook before the first Linear of the time exchanges the halves of the vector.

# %%
embedded = sd.unet.time_embedding.linear_1
whole = answer(500, 500)[1]
prompts = ["a rocket on a red background", "a house on a green background"]
prompts += ["a camera on a purple background", "a cat on a white background"]
drawing = {"steps": 4 if lesson.quick else 20, "seed": 1}
drawn = {"cos first": sd.generate(prompts, **drawing)}

hook = embedded.register_forward_pre_hook(lambda module, args: args[0].roll(half, dims=1))
drawn["sin first"] = sd.generate(prompts, **drawing)
swapped = {t: answer(t, t) for t in times}
hook.remove()
assert torch.equal(answer(500, 500)[1], whole)  # whole again

# %%
fig = picture_grid(list(drawn.values()), ["rocket", "house", "camera", "cat"], list(drawn))
lesson.show(fig, "swapped", "Four pictures; below the same four, recognisable and full of grain.")
for name, images in drawn.items():
    levels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).float()
    print(f"{name}: neighbouring pixels differ by {levels.diff(dim=2).abs().mean():.1f} of 255")

# %% [markdown]
# For the bundled model the second guess is right: the right things in the right place, and noise left all over them. Why noise? Let us
# find out for how late the network takes each timestep: among its answers to all that we told it above, which one is nearest to the
# answer it gives now?


# %%
def believed(t, prediction):
    off = {told: (answers[t, told][1] - prediction).square().mean() for told in tellings}
    return min(off, key=off.get)


seems = [believed(t, swapped[t][1]) for t in times]
print("   t   error right   swapped   taken for")
for t, late in zip(times, seems):
    right, wrong = error(t, *answer(t, t)), error(t, *swapped[t])
    print(f"{t:4} {right:13.2f} {wrong:9.2f} {late:11}")

# %%
fig, axis = plt.subplots()
axis.plot(times, times, linestyle="--", color="black", linewidth=1, label="the truth")
axis.plot(times, seems, marker="o", label="sin first")
axis.set(xlabel="timestep t", ylabel="taken for timestep", ylim=(-30, T))
axis.legend()
lesson.show(fig, "taken-for", "The timestep that the network seems to see, against the true one.")

# %% [markdown]
# The curve is much flatter than the truth. The slow hands, which say "early" or "late", have cosines near $1$ and sines near $0$.
# Exchanged, they seem to stand a quarter of a round further at every timestep, and the network always takes it for somewhere past the
# middle. There it hardly matters, look at the errors. At small `t`, where the last grain should be taken out, it works as it would in the
# middle, and grain is left.
#
# No shape was wrong, nothing crashed, and what is drawn is still what was asked for: a test that only looks for the subject would be
# content. That is why minidiff compares numbers with the originals, and why `timestep_embedding` says in its first sentence which comes
# first.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/06_time_and_residuals.py --model v1-5-pruned-emaonly.safetensors` asks the same of a checkpoint that you have. Its
# ResBlocks are these, only wider: the vector of waves has 320 numbers, the vector that all blocks are given 1280.
#
# One trap comes with half precision. The fastest angle is the timestep itself, and `bfloat16`, with eight binary digits, knows only every
# fourth of the last ones. So minidiff and the original work out the embedding in float32 whatever the weights are.

# %%
real = SD1.unet
print(f"Stable Diffusion 1.x: waves {real.widths[0]}, time {4 * real.widths[0]}")
late = torch.arange(990, 1000)
for kind in (torch.float32, torch.float16, torch.bfloat16):
    print(f"{kind}: {late.to(kind).long().tolist()[-5:]}")
one = torch.tensor([995])
right = blocks.timestep_embedding(one, real.widths[0])
rounded = blocks.timestep_embedding(one.bfloat16(), real.widths[0])
assert right.shape == (1, real.widths[0])
off = (right - rounded).abs().max()
print(f"t = 995 in bfloat16 is {int(one.bfloat16())}: waves off by {off:.2f}")

# %% [markdown]
# ## On a GPU
#
# ```bash
# python lessons/06_time_and_residuals.py --model v1-5-pruned-emaonly.safetensors --device cuda
# ```
#
# Two minutes. Expect the valleys of the first picture again, at 512 x 512, though these scenes are strange to the checkpoint. Look
# whether the pictures with the sines first are spoilt by grain there too: how a network takes a vector it has never seen is its own
# affair.

# %% [markdown]
# ## Read next
#
# - `minidiff/blocks.py`: `timestep_embedding`, `TimeEmbedding` and `ResBlock`; the U-Net's `SpatialTransformer` stands there too, the
#   attention of lesson 04 with what is around it.
# - Ho, Jain and Abbeel 2020, "Denoising diffusion probabilistic models", appendix B; He et al. 2016, "Deep residual learning for image
#   recognition"; Vaswani et al. 2017, section 3.5, where sines come first.
# - Lesson 07: many such blocks, and how they fit together.
