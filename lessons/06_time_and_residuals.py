# %% [markdown]
# # 06 Time and residuals
#
# **How does one network know how much noise it is looking at?**
#
# - Explains: [minidiff/blocks.py](../minidiff/blocks.py)
# - You change: `timestep_embedding`, `group_norm` and `res_block`, from a number to the block that uses it
# - Minutes: 45
# - Picture: [figures/06-swapped.png](figures/06-swapped.png)
#
# ![The whole pipeline; this lesson is about the residual blocks of the U-Net](figures/pipeline-blocks.svg)
#
# The U-Net is a single network for all timesteps. In this lesson we take out its most common part, the *ResBlock*: two convolutions, a
# place where the timestep enters, and a path around them. A U-Net consists mostly of ResBlocks. Lesson 07 shows how they fit together.

# %% [markdown]
# ## Guess first
#
# The timestep becomes a vector: first cosines, then sines. Much code outside diffusion puts the sines first. These are the same numbers in
# another order, and the next layer is a `Linear`, which can be trained for any order. Now take a network that was trained with cosines first
# and give it the sines first. What do its pictures look like?
#
# 1. The same: all the information is still there.
# 2. They show the right things, but damaged in some way. In which way?
# 3. They show nothing you could recognise.

# %% [markdown]
# ## One network for every amount of noise
#
# At the first timesteps the network should remove a trace of grain; at the last ones it should find a picture where there is hardly any.
# Those are different tasks, so the network is told `t`. Does it listen? We take pictures with the noise of one timestep and tell the network
# another one.

# %%
import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange  # noqa: F401  for your group_norm
from matplotlib import pyplot as plt

from lessons.common import curves, picture_grid, scene_latents, start, x0_converter
from minidiff import blocks
from minidiff.blocks import ResBlock
from minidiff.config import SD1
from minidiff.pictures import to_pixels
from minidiff.scenes.scenes import sample_scene

lesson = start("06_time_and_residuals")
sd = lesson.load()

# %%
T, convert, rng = sd.schedule.config.timesteps, x0_converter(sd), np.random.default_rng(0)
scenes = [sample_scene(rng) for _ in range(2 if lesson.quick else 4)]
x_0, context = scene_latents(sd, scenes), sd.encode_prompts([scene.caption for scene in scenes])
B, C, H, W = x_0.shape
eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(lesson.device)
assert context.shape[0] == B == len(scenes)


def all_at(t):
    return torch.full((B,), t, device=lesson.device)


# %%
@torch.no_grad()
def predict(t, told):
    """x_t of timestep t, and what the U-Net predicts when it is told another one."""
    x_t = sd.schedule.q_sample(x_0, all_at(t), eps)
    return x_t, sd.unet(x_t, all_at(told), context)


def error(t, x_t, prediction):
    """Mean squared error of the x_0 that follows from a prediction at t."""
    return float((convert(x_t, all_at(t), prediction) - x_0).square().mean())


times, tellings = [100, 300, 500, 700, 900], range(0, T, 250 if lesson.quick else 50)
predictions = {(t, told): predict(t, told) for t in times for told in tellings}

# %%
lines = {}
for t in (100, 500, 900):
    off = [error(t, *predictions[t, told]) for told in tellings]
    lines[f"t = {t}"] = tellings, off
    print(f"t = {t}: told so, error {error(t, *predict(t, t)):.2f}; at worst {max(off):.2f}")
fig = curves(lines, "timestep that the network is told", "error of x0_hat", log="y")
lesson.show(fig, "told", "Three valleys: the error is smallest near the timestep that is true.")

# %% [markdown]
# Each curve is lowest near the true timestep. If the network is told too low a timestep, it leaves noise in the picture. If it is told too
# high a one, it mistakes parts of the picture for noise. So the network does listen. The rest of the lesson follows this one number on its
# way in.

# %% [markdown]
# ## A number as many clock hands
#
# A network cannot do much with a single number between zero and a thousand. Its first layer can only multiply the number, and then
# neighbouring timesteps look the same. So we write the number with many hands of a clock. The fastest hand goes around once every $2 \pi$
# timesteps and tells neighbours apart. Each hand is slower than the one before, and the slowest does not complete a single round; it only
# says "early" or "late". With $h$ hands, half as many as the vector is wide, the speeds are (Vaswani et al. 2017, section 3.5):
#
# $$\omega_i = 10000^{-i / h}, \quad i = 0 \ldots h - 1$$
#
# A hand is described by two coordinates, so each angle $t \, \omega_i$ becomes a cosine and a sine. Stable Diffusion lists all cosines
# first, then all sines. The vector is called the *time embedding*.

# %% [markdown]
# ## Your turn: timestep_embedding
#
# Write it. `t` has shape B. The result has shape `[B, width]`: the $h$ = `width // 2` cosines of $t \, \omega_i$, fastest first, then the
# sines in the same order. `torch.arange(h)` counts the hands. `t[:, None]` has shape `[B, 1]`; multiplied by the $h$ speeds, it gives all
# angles at once. `torch.cat([...], dim=-1)` joins the two halves. Four lines: h, speeds, angles, result.
#
# When it is right, you see three of the hands go around.


# %%
def timestep_embedding(t, width):
    """cos(t omega_i), then sin(t omega_i), omega_i = 10000^(-i/h); t [B] -> [B, width]."""
    # YOUR CODE, about 4 lines


timestep_embedding = lesson.check(timestep_embedding)

# %%
width = sd.unet.time_embedding.width
half = width // 2
waves = timestep_embedding(torch.arange(T), width)
assert waves.shape == (T, width)
for i in (0, half // 2, half - 1):
    print(f"hand {i:3} of {half}: one round in {2 * math.pi * 10000 ** (i / half):8.1f} timesteps")

fig, axis = plt.subplots()
axis.imshow(waves.T.numpy(), aspect="auto", interpolation="nearest")
axis.axhline(half - 0.5, color="white", linewidth=1.5)
axis.set(xlabel="timestep t", ylabel="sines         cosines", yticks=[0, half, width - 1])
axis.grid(False)
lesson.show(fig, "waves", "Above cosines, below sines: fast waves first, the last nearly constant.")

# %% [markdown]
# Each column is the vector of one timestep. In the last rows of each half are the slow hands: there the cosines stay near $1$ and the sines
# near $0$ for all timesteps. Remember this for the guess.
#
# Why a cosine *and* a sine? Because $\cos a \cos b + \sin a \sin b = \cos(a - b)$: the product of two timesteps' vectors depends only on how
# far apart they are.

# %%
products = waves @ waves.T
later = products.diagonal(offset=40)  # t and t + 40, for all t
assert torch.allclose(products.diagonal(), torch.full((T,), float(half)), atol=1e-3)
assert torch.allclose(later, later[0].expand(T - 40), atol=0.05)
lines = {f"with t = {t}": (range(T), products[t] / half) for t in (200, 600)}
fig = curves(lines, "timestep t", "product, as a share of h")
lesson.show(fig, "products", "Two equal peaks, each where the timesteps are the same.")

# %% [markdown]
# Neighbouring timesteps are alike and distant ones are not, and this holds everywhere: the second curve is the first one, shifted.
#
# Two Linear layers with a SiLU in between turn the embedding into a vector four times as wide, the same for the whole network
# (`TimeEmbedding`). *SiLU* is $x$ times its sigmoid, a smooth relative of ReLU.

# %% [markdown]
# ## Your turn: group_norm
#
# The other ingredient of a ResBlock is a norm. *GroupNorm* cuts the channels of a picture into groups of neighbours and brings each group to
# mean zero and variance one, so that the layer after it always gets numbers of the same size:
#
# $$y = (x - \mathrm{mean}) / \sqrt{\mathrm{variance} + \mathrm{eps}}$$
#
# Mean and variance are taken over all channels and cells of the group, in each picture separately; the variance is the plain mean of the
# squared differences. `rearrange(x, "B (g c) H W -> B g (c H W)", g=groups)` puts each group into one row, and `keepdim=True` keeps the axis
# that a mean is taken over. `.reshape(x.shape)` restores the shape at the end. Four lines. A right function reports what it makes of a
# tensor that is too large.


# %%
def group_norm(x, groups, eps):
    """Each group of channels of each picture at mean 0 and variance 1; x [B, C, H, W]."""
    # YOUR CODE, about 4 lines


group_norm = lesson.check(group_norm)

# %% [markdown]
# The library's layer also multiplies each channel by a learned factor and adds a learned offset, so that the network can undo the norm
# where that helps. Here is your function next to a layer of the model:

# %%
every = [module for module in sd.unet.modules() if isinstance(module, ResBlock)]
block = every[0]
caught = {}
hook = block.register_forward_hook(lambda module, args, out: caught.update(args=args, out=out))
predict(500, 500)
hook.remove()

x, embedded = caught["args"]
norm = block.norm_1
normed = group_norm(x, norm.num_groups, norm.eps)
scaled = normed * norm.weight[:, None, None] + norm.bias[:, None, None]
assert scaled.shape == x.shape and torch.allclose(scaled, norm(x), atol=1e-4)
print(f"{norm.num_groups} groups of {norm.num_channels // norm.num_groups} channels")

# %% [markdown]
# ## Your turn: res_block
#
# A ResBlock normalises its input, applies SiLU, and convolves; adds the time; does the same once more; and adds its input (Ho et al. 2020,
# appendix B):
#
# $$h = \mathrm{conv}_1(\mathrm{silu}(\mathrm{norm}_1(x))) + W \, \mathrm{time}$$
#
# $$\mathrm{out} = \mathrm{skip}(x) + \mathrm{conv}_2(\mathrm{silu}(\mathrm{norm}_2(h)))$$
#
# $W$ turns the time into one number for each channel, which is added to every cell of the channel. Where the number of channels changes,
# `skip` is a convolution of `1 x 1`; elsewhere it returns $x$ unchanged.
#
# Write it for a given block, whose layers are called `norm_1`, `conv_1`, `time_projection` (the $W$), `norm_2`, `conv_2` and `skip`. SiLU is
# `F.silu`. `block.time_projection(time)` has shape `[B, C]`; add two axes with `[:, :, None, None]`. Four lines.


# %%
def res_block(block, x, time):
    """What the block returns; x [B, C, H, W], time [B, D_time] -> [B, C_out, H, W]."""
    # YOUR CODE, about 4 lines


res_block = lesson.check(res_block)

# %%
with torch.no_grad():
    out = res_block(block, x, embedded)
assert out.shape == caught["out"].shape and torch.allclose(out, caught["out"], atol=1e-4)
print(f"x {list(x.shape)}, time {list(embedded.shape)}, out {list(out.shape)}")
print(f"{len(every)} ResBlocks in this U-Net")

# %% [markdown]
# ## What the time does to a block
#
# For this block we compute $W$ times the time, at every timestep: what is added to each channel.

# %%
with torch.no_grad():
    every_time = sd.unet.time_embedding(torch.arange(T, device=lesson.device))
    added = block.time_projection(every_time).cpu()
assert added.shape == (T, block.conv_1.out_channels)
rise = added[-100:].mean(dim=0) - added[:100].mean(dim=0)
added = added[:, rise.argsort()]  # falling ones first

fig, axis = plt.subplots()
image = axis.imshow(added.T.numpy(), aspect="auto", interpolation="nearest")
axis.set(xlabel="timestep t", ylabel="channel, sorted")
axis.grid(False)
fig.colorbar(image, label="added to the channel")
lesson.show(fig, "channels", "A map: what each channel is given falls, rises or stays over time.")

# %% [markdown]
# Some channels are raised at early timesteps, where little noise is left, and others are lowered there. SiLU passes large numbers and
# suppresses negative ones. So the time selects which channels take part: one set of convolutions acts as many networks.

# %% [markdown]
# ## Why the input is added
#
# The sum says: keep $x$ and learn only what to change, the *residual* (He et al. 2016). You see what this is good for when many blocks follow
# one another. Here a row of untrained ResBlocks learns to predict the noise in small pictures, once as it is, and once with a hook that
# subtracts $x$ again.


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
    """x_t, t and the noise in x_t, for small scenes, eight at a time."""
    generator, rng = torch.Generator().manual_seed(1), np.random.default_rng(1)
    for _ in range(steps):
        images = to_pixels(np.stack([sample_scene(rng).image for _ in range(8)]))
        clean = F.adaptive_avg_pool2d(images, 16)
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
steps, lines = 20 if lesson.quick else 150, {}
for name in ("with x", "without x"):
    loss = list(train(name == "with x", steps))
    mean = np.convolve(loss, np.ones(10) / 10, mode="valid")
    lines[name] = range(10, steps + 1), mean
    print(f"{name}: loss {mean[-1]:.2f} over the last ten of {steps} steps")
fig = curves(lines, "step", "loss, mean of ten steps", ylim=(0, 1.5))
lesson.show(fig, "residual", "The loss falls fast with x, and hardly at all without.")

# %% [markdown]
# Both rows have equally many parameters and start from the same random weights. With $x$, an untrained block changes its input only a
# little, so the input passes through all sixteen, and so does the gradient on its way back. Without $x$, each block replaces its input by a
# random mixture, and after sixteen of them there is little left to learn from. This is what makes deep networks possible. The U-Net, the
# autoencoder and the text encoder add their inputs everywhere.

# %% [markdown]
# ## Break it: sin before cos
#
# Now the guess. A hook in front of the first Linear layer swaps the two halves of the time embedding.

# %%
linear = sd.unet.time_embedding.linear_1
whole = predict(500, 500)[1]
prompts = ["a rocket on a red background", "a house on a green background"]
prompts += ["a camera on a purple background", "a cat on a white background"]
options = {"steps": 4 if lesson.quick else 20, "seed": 1}
generated = {"cos first": sd.generate(prompts, **options)}

hook = linear.register_forward_pre_hook(lambda module, args: args[0].roll(half, dims=1))
generated["sin first"] = sd.generate(prompts, **options)
swapped = {t: predict(t, t) for t in times}
hook.remove()
assert torch.equal(predict(500, 500)[1], whole)  # as before

# %%
fig = picture_grid(list(generated.values()), ["rocket", "house", "camera", "cat"], list(generated))
lesson.show(fig, "swapped", "Four pictures; below the same four, recognisable and full of grain.")
for name, images in generated.items():
    levels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).float()
    print(f"{name}: neighbouring pixels differ by {levels.diff(dim=2).abs().mean():.1f} of 255")

# %% [markdown]
# The same things appear in the same places, with noise left all over them; the difference between neighbouring pixels confirms it. Why
# noise? We ask which timestep the network seems to see: among its predictions for all the timesteps we told it above, which one is closest
# to the prediction it makes now?


# %%
def believed(t, prediction):
    off = {told: (predictions[t, told][1] - prediction).square().mean() for told in tellings}
    return min(off, key=off.get)


seems = [believed(t, swapped[t][1]) for t in times]
print("   t   error right   swapped   taken for")
for t, seen in zip(times, seems):
    right, wrong = error(t, *predict(t, t)), error(t, *swapped[t])
    print(f"{t:4} {right:13.2f} {wrong:9.2f} {seen:11}")
lines = {"the truth": (times, times), "sin first": (times, seems)}
axes = {"ylim": (-30, T), "dashed": ["the truth"]}
fig = curves(lines, "timestep t", "taken for timestep", **axes)
lesson.show(fig, "taken-for", "The timestep that the network seems to see, against the true one.")

# %% [markdown]
# The curve is much flatter than the truth. The slow hands, which say "early" or "late", have cosines near $1$ and sines near $0$. Swapped,
# they seem to point a quarter of a round further at every timestep, so the network takes most timesteps for about the same one. At small `t`,
# where it should remove the last grain, it works as it would at a later one, and grain is left. Compare the two errors at the smallest `t` and
# at the largest.
#
# No shape was wrong, nothing crashed, and the pictures still show what was asked for. A test that only looks for the subject would pass.
# That is why the tests of minidiff compare numbers with the original implementations.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/06_time_and_residuals.py --model v1-5-pruned-emaonly.safetensors` asks the same of a checkpoint of yours. Its ResBlocks are
# the same, only wider: the time embedding has 320 numbers, and the vector that all blocks receive has 1280.
#
# Half precision holds a trap. The fastest angle is the timestep itself, and `bfloat16`, with eight binary digits, can only represent every
# fourth of the last timesteps. So minidiff, like the original, computes the embedding in float32 whatever the type of the weights.

# %%
real = SD1.unet
print(f"Stable Diffusion 1.x: waves {real.widths[0]}, time {4 * real.widths[0]}")
last = torch.arange(990, 1000)
for kind in (torch.float32, torch.float16, torch.bfloat16):
    print(f"{kind}: {last.to(kind).long().tolist()[-5:]}")
one = torch.tensor([995])
right = timestep_embedding(one, real.widths[0])
rounded = timestep_embedding(one.bfloat16().float(), real.widths[0])
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
# Two minutes. Expect the valleys of the first figure again, at 512 x 512, although these scenes are unlike the checkpoint's training data.
# Look whether sines first leave grain there too: how a network responds to a vector it has never seen can differ from model to model.

# %% [markdown]
# ## What you now know
#
# - One network serves all noise levels because it is told the timestep, and it uses what it is told.
# - The timestep enters as cosines and sines of many speeds, cosines first in Stable Diffusion.
# - GroupNorm brings each group of channels of a picture to mean zero and variance one.
# - A ResBlock is norm, SiLU and convolution, twice, with the time added in between and the input added at the end.
# - Adding the input lets signal and gradient pass through many blocks, which makes deep networks trainable.

# %% [markdown]
# ## Your guess
#
# For the bundled model the second answer is right. The pictures show the right things with grain left all over them, because the network
# takes the early timesteps for later ones. The first answer would be right only if the Linear layer were trained again.

# %% [markdown]
# ## Quiz
#
# 1. Why are a cosine and a sine needed for each speed, and not the cosine alone?
# 2. A ResBlock's second convolution is all zeros. What does the block return?
# 3. Why does the time enter before the second norm and SiLU, and not at the very end of the block?
#
# <details><summary>Answers</summary>
#
# 1. A cosine alone is the same for two positions of the hand, mirrored. With the sine, the product of two embeddings depends only on the
#    distance of the timesteps.
# 2. `skip(x)` plus the bias of the convolution: where the channels stay the same and the bias is zero, its input. A block can start as doing
#    nothing.
# 3. There it decides which channels the SiLU passes on to the convolution. At the end it would only add a constant to each channel.
#
# </details>

# %% [markdown]
# ## Now you
#
# Remove one hand at a time: set its cosine and its sine to zero with a hook like the one in "Break it". Predict which hand the pictures need
# most, a fast one, one in the middle, or a slow one. Then measure the error of `x0_hat` at each of the five timesteps and look.

# %% [markdown]
# ## Read next
#
# - `minidiff/blocks.py`: `timestep_embedding`, `TimeEmbedding` and `ResBlock`. `SpatialTransformer`, in the same file, is the attention of
#   lesson 04 with what surrounds it.
# - Ho, Jain and Abbeel 2020, "Denoising diffusion probabilistic models", appendix B; He et al. 2016, "Deep residual learning for image
#   recognition"; Vaswani et al. 2017, section 3.5, where sines come first.
# - Lesson 07: many such blocks, and how they fit together.
