# %% [markdown]
# # 07 The U-Net is a table of shapes
#
# **What becomes of a latent on its way through the U-Net, and where do all the parameters sit?**
#
# - Explains: [minidiff/unet.py](../minidiff/unet.py)
# - You change: `skip_shapes`, the shapes of all that the way down hands to the way up
# - Minutes: 30
# - Picture: [figures/07-cut.png](figures/07-cut.png)
#
# ![The whole pipeline; this lesson is about the U-Net](figures/pipeline-unet.svg)
#
# A U-Net is made of the ResBlocks of lesson 06 and the attention of lesson 04. There is no further idea in its layers, only in their
# order: what is how large, and who is joined to whom. Whoever can write down its table of shapes has understood it, and can load
# anybody's weights into it.

# %% [markdown]
# ## Guess first
#
# 1. Down the U-Net the picture gets smaller and the channels become more. Where are most of the parameters: at the top, where the picture
#    is large, or at the bottom? And where is most of the work?
# 2. The way up is handed copies from the way down, the *skips*. If one of them is replaced by zeros, which one does most harm: the one
#    with the smallest picture, or the one with the largest?

# %% [markdown]
# ## Down, and up again
#
# To see that two ears belong to one cat, a cell must know about cells far away; a convolution of `3 x 3` sees only its neighbours. So the
# U-Net goes down in *levels*. Each has some ResBlocks, with attention after each where the level has attention, and ends in a convolution
# that takes only every second cell, so that the next level's neighbours are twice as far apart. The *middle* has the smallest picture.
# Then it goes up again: the levels in reverse, each ending in cells that are doubled and a convolution that smooths them. At the end
# there are as many numbers as at the start: one answer for each number of the latent.
#
# Hooks write down what leaves each part.

# %%
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

from lessons.common import BLUE, GREEN, ORANGE, picture_grid, start
from minidiff.blocks import ResBlock, TransformerBlock
from minidiff.config import SD1
from minidiff.pictures import to_pixels
from minidiff.scenes.scenes import sample_scene
from minidiff.unet import UNet

lesson = start("07_unet_is_a_table_of_shapes")

# %%
sd = lesson.load()
unet, config = sd.unet, sd.config.unet


# %%
def parts(unet):
    """What the latent passes, in order: (name, module)."""
    yield "conv_in", unet.conv_in
    for i, level in enumerate(unet.down):
        for j, block in enumerate(level.blocks):
            yield f"down {i}, block {j}", level.transformers[j] if level.transformers else block
        if level.downsample is not None:
            yield f"down {i}, halve", level.downsample
    yield "middle", unet.middle
    for i, level in enumerate(unet.up):
        for j, block in enumerate(level.blocks):
            yield f"up {i}, block {j}", level.transformers[j] if level.transformers else block
        if level.upsample is not None:
            yield f"up {i}, double", level.upsample
    yield "conv_out", unet.conv_out


# %%
@torch.no_grad()
def watch(unet, side, device):
    """[(name, channels, side)] of what leaves each part, for one latent."""
    table = []
    note = lambda name: lambda module, args, out: table.append((name, *out.shape[1:3]))
    hooks = [module.register_forward_hook(note(name)) for name, module in parts(unet)]
    x_t = torch.zeros(1, unet.config.in_channels, side, side, device=device)
    context = torch.zeros(1, 4, unet.config.context_width, device=device)
    answer = unet(x_t, torch.zeros(1, device=device), context)
    for hook in hooks:
        hook.remove()
    assert answer.shape == (1, unet.config.out_channels, side, side)
    return table


# %%
side = sd.config.image_size // sd.config.vae.factor
table = watch(unet, side, lesson.device)
for name, channels, across in table:
    print(f"{name:15} {channels:4} channels of {across:2} x {across}")

# %%
fig, axis = plt.subplots()
at, widest = 0.0, max(channels for _, channels, _ in table)
for name, channels, across in table:
    colour = {"d": BLUE, "m": GREEN, "u": ORANGE}.get(name[0], "gray")
    wide = 0.3 + channels / widest
    axis.add_patch(plt.Rectangle((at, -across / 2), wide, across, facecolor=colour))
    at += wide + 0.25
axis.set(xlim=(-0.3, at), ylim=(-side * 0.55, side * 0.55), xticks=[], yticks=[])
axis.set(ylabel="cells a side", xlabel="down (blue), middle (green), up (orange)")
axis.grid(False)
lesson.show(fig, "hourglass", "Tall bars, then short wide ones, then tall again: an hourglass.")

# %% [markdown]
# Each bar is one tensor: its height the cells, its width the channels. What is lost in height is partly made good in width. Lying on its
# side it is an hourglass; Ronneberger et al. (2015) drew it as a U.

# %% [markdown]
# ## Skips
#
# On the way down the picture becomes a few cells. Where exactly an edge was cannot come back from those. So every tensor of the way down,
# as soon as it is made, is also put on a pile, and every ResBlock of the way up takes the topmost from the pile and puts its channels
# beside its own (`torch.cat`). These are the *skips*. Last in, first out: the smallest are taken first.
#
# What is put on the pile: what leaves `conv_in`; what leaves each block (after its attention, if it has any); and what leaves each
# halving. It goes up one to one: the way up has one block a level more than the way down.

# %%
on_the_way_down = [row for row in table if row[0].startswith(("conv_in", "down"))]
blocks_up = [block for level in unet.up for block in level.blocks]
assert len(on_the_way_down) == len(blocks_up)
print(f"{len(on_the_way_down)} tensors on the pile, {len(blocks_up)} blocks take them")

# %% [markdown]
# ## Your turn: skip_shapes
#
# Write the pile's shapes down from the configuration alone: `widths` are the channels of each level, `blocks_per_level` the ResBlocks of
# each level on the way down, `side` the cells a side of the latent. Give a list of tuples `(channels, side)` in the order in which they
# are put on the pile.
#
# `conv_in` makes `widths[0]` channels. The blocks of level i have `widths[i]`. The halving keeps the channels, and it rounds up: 5 cells
# become 3. The last level has none.

# %%
print([(cells, (cells + 1) // 2) for cells in (4, 5, 6)])


def skip_shapes(widths, blocks_per_level, side):
    """[(channels, side), ...] of the skips, first made first."""
    # YOUR CODE, about 7 lines


# %% [markdown]
# The library has no such function; its U-Net is the table. So what stands in for yours, until it is right, builds a U-Net on the device
# `meta`, where tensors have shapes and no numbers, and watches it. This costs neither memory nor time even for Stable Diffusion's.


# %%
def empty_unet(config):
    with torch.device("meta"):
        return UNet(config)


def watched(widths, blocks_per_level, side):
    n = len(widths)
    levels = {"widths": widths, "attention": (False,) * n, "heads": (1,) * n}
    other = empty_unet(replace(config, **levels, blocks_per_level=blocks_per_level))
    down = ("conv_in", "down")
    return [row[1:] for row in watch(other, side, "meta") if row[0].startswith(down)]


skip_shapes = lesson.check(skip_shapes, instead=watched)
skips = skip_shapes(config.widths, config.blocks_per_level, side)
assert skips == [row[1:] for row in on_the_way_down]

# %% [markdown]
# With the pile the way up can be written down too: each block's input has the channels that come from below and those of its skip.

# %%
pile, coming = list(skips), config.widths[-1]
for i, level in enumerate(unet.up):
    for j, block in enumerate(level.blocks):
        channels, across = pile.pop()
        taken, makes = block.norm_1.num_channels, block.conv_1.out_channels
        print(f"up {i}, block {j}: {coming:3} + {channels:3} -> {makes:3}, {across:2} x {across}")
        assert taken == coming + channels
        coming = makes
assert not pile

# %% [markdown]
# These sums are where a U-Net that somebody writes from memory first fails: every block of the way up has its own number of channels
# coming in.

# %% [markdown]
# ## Where the parameters are, and where the work is
#
# Count both for Stable Diffusion 1.x, which needs no weights on the device `meta`. For the work, count multiplications: a convolution or
# a Linear uses each of its weights once for each cell that it makes. (The products of queries and keys have no weights and are left out.)
# Each row is a level, the way down and the way up together.
#
# The attention of a level stands in a block of three parts: self-attention, cross-attention, and a *feed-forward* network, Linears that work
# on each cell by itself.

# %%
KINDS = ("self_attention", "cross_attention", "feed_forward")


def parameters(unet):
    """Parameters of each kind of part; the rest is what stands between them."""
    found = Counter()
    for module in unet.modules():
        if isinstance(module, ResBlock):
            found["ResBlocks"] += sum(p.numel() for p in module.parameters())
        if isinstance(module, TransformerBlock):
            for kind in KINDS:
                found[kind] += sum(p.numel() for p in getattr(module, kind).parameters())
    found["the rest"] = sum(p.numel() for p in unet.parameters()) - sum(found.values())
    return found


# %%
real = empty_unet(SD1.unet)
for label, network in (("Stable Diffusion 1.x", real), ("this model", unet)):
    found = parameters(network)
    print(f"{label}: {sum(found.values()):,} parameters")
    for kind, count in found.most_common():
        print(f"    {kind:15} {count / sum(found.values()):5.1%}")


# %%
@torch.no_grad()
def by_level(unet, side):
    """{level: (parameters, multiplications)} for a U-Net on the device meta."""
    last = len(unet.config.widths) - 1
    groups = {f"level {i}": [unet.down[i], unet.up[last - i]] for i in range(last + 1)}
    counts = {}
    for name, group in {**groups, "middle": [unet.middle]}.items():
        group = torch.nn.ModuleList(group)
        counts[name] = [sum(p.numel() for p in group.parameters()), 0]
        for layer in group.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
                layer.register_forward_hook(counting(counts[name]))
    watch(unet, side, "meta")
    return counts


# %%
def counting(count):
    """A hook that adds the layer's multiplications to count[1]."""

    def add(layer, args, out):
        channels = out.shape[1] if isinstance(layer, torch.nn.Conv2d) else out.shape[-1]
        count[1] += layer.weight.numel() * (out.numel() // channels)

    return add


counts = by_level(empty_unet(SD1.unet), SD1.image_size // SD1.vae.factor)
totals = np.array(list(counts.values())).sum(axis=0)
for name, (weights, products) in counts.items():
    print(f"{name}: {weights / totals[0]:4.0%} of parameters, {products / totals[1]:4.0%} of work")

# %%
fig, axis = plt.subplots()
places = np.arange(len(counts))
for i, (label, hatch) in enumerate((("parameters", ""), ("multiplications", "//"))):
    shares = [100 * count[i] / totals[i] for count in counts.values()]
    at = places + (i - 0.5) * 0.38
    axis.barh(at, shares, height=0.36, label=label, hatch=hatch, edgecolor="white")
axis.set(yticks=places, yticklabels=list(counts), xlabel="share in percent")
axis.invert_yaxis()
axis.legend()
lesson.show(fig, "levels", "Most parameters are at level 2 and below, most work at 0 to 2.")

# %% [markdown]
# The two go opposite ways. A convolution of `3 x 3` from C to C channels has $9 C^2$ weights, so twice as wide is four times as many. But
# half the side is a quarter of the cells, and each weight is used once a cell. So a U-Net keeps what it knows in its lower half, and
# spends its time in its upper half. And most of its parameters are in ResBlocks, which are convolutions; cross-attention, through which
# all of the text comes in, has few.

# %% [markdown]
# ## Break it: cut a skip
#
# Now the second guess. A hook before a block of the way up fills the skip's channels with zeros. How well does the U-Net still find
# $x_0$, for scenes with the noise of several timesteps? The mistake that people make is a quieter one, and is the last line: the pile of
# the highest level in the wrong order. All its skips have the same shape, so nothing complains.

# %%
rng, size = np.random.default_rng(0), sd.config.image_size
scenes = [sample_scene(rng) for _ in range(2 if lesson.quick else 4)]
pixels = to_pixels(np.stack([scene.image for scene in scenes]))
pixels = F.interpolate(pixels, size=(size, size), mode="bicubic").clamp(-1, 1).to(lesson.device)
context = sd.encode_prompts([scene.caption for scene in scenes])
generator = torch.Generator().manual_seed(0)
with torch.no_grad():
    x_0 = sd.vae.encode(pixels).mean * sd.config.vae.scaling_factor
eps = torch.randn(x_0.shape, generator=generator).to(lesson.device)
predicts_eps = sd.schedule.config.prediction == "eps"
x0_from = sd.schedule.x0_from_eps if predicts_eps else sd.schedule.x0_from_v


# %%
@torch.no_grad()
def errors(times):
    """Mean square of x0_hat - x_0 at each timestep."""
    found = []
    for one in times:
        t = torch.full((len(x_0),), one, device=lesson.device)
        x_t = sd.schedule.q_sample(x_0, t, eps)
        found.append(float((x0_from(x_t, t, unet(x_t, t, context)) - x_0).square().mean()))
    return found


def cut(which):
    """A hook before each of these blocks of the way up: zeros for its skip."""

    def zeros(n):
        return lambda module, args: (F.pad(args[0][:, :-n], (0, 0, 0, 0, 0, n)), args[1])

    return [blocks_up[i].register_forward_pre_hook(zeros(skips[-1 - i][0])) for i in which]


# %%
def exchanged():
    """A hook before the highest level of the way up: its skips in the reverse order."""
    level = unet.up[-1]
    return [level.register_forward_pre_hook(lambda m, args: (args[0], args[1][::-1], *args[2:]))]


times = [100, 500, 900] if lesson.quick else [100, 300, 500, 700, 900]
last = len(blocks_up) - 1
ways = {
    "whole": lambda: [],
    "smallest cut": lambda: cut([0]),
    "largest cut": lambda: cut([last]),
    "all cut": lambda: cut(range(len(blocks_up))),
    "exchanged": exchanged,
}
prompts = ["a rocket on a red background", "a house on a green background"]
prompts += ["a camera on a purple background"]

# %%
off, drawn = {}, {}
for name, change in ways.items():
    hooks = change()
    off[name] = errors(times)
    drawn[name] = sd.generate(prompts, steps=4 if lesson.quick else 15, seed=1)
    for hook in hooks:
        hook.remove()
    print(f"{name:13}", *(f"{error:6.3f}" for error in off[name]))
assert errors(times) == off["whole"]  # whole again

fig, axis = plt.subplots()
for (name, error), marker in zip(off.items(), "osD^v"):
    axis.semilogy(times, error, marker=marker, label=name)
axis.set(xlabel="timestep t", ylabel="error of x0_hat", xticks=times)
axis.legend(ncols=2)
lesson.show(fig, "cost", "Cut the smallest skip: no change. Cut the largest: far larger errors.")

# %%
columns = [name.replace(" ", "\n") for name in drawn]
rows = [[images[i] for images in drawn.values()] for i in range(len(prompts))]
fig = picture_grid(rows, columns, ["rocket", "house", "camera"])
lesson.show(fig, "cut", "The same without the smallest skip, ruined without the largest.")

# %% [markdown]
# For the bundled model the smallest skip can go and nobody sees it: what it holds comes up from the middle anyway. The largest carries
# the latent itself, nearly as it came in, with the noise in every single cell; without it the U-Net has to guess from coarser copies
# where the noise was, and leaves much of it behind. So a skip is not there to remember what the picture shows. It is there to remember
# *where*. Look at the first column of numbers, where the noise is finest, and at the last, where all is noise and little depends on it.
#
# The exchanged pile costs nearly as much, without any error message. minidiff takes its skips from the end of a list, and its tests
# compare whole U-Nets with the original's numbers.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/07_unet_is_a_table_of_shapes.py --model v1-5-pruned-emaonly.safetensors` prints this table for a checkpoint that you
# have, and cuts its skips. The shapes alone need no weights. Stable Diffusion 1.x and 2.x have the same widths and so the same pile; what
# differs is how many heads, and how wide the text is.

# %%
pile = skip_shapes(SD1.unet.widths, SD1.unet.blocks_per_level, SD1.image_size // SD1.vae.factor)
for shape, many in Counter(pile).items():
    print(f"{many} x {shape[0]:4} channels of {shape[1]:2} x {shape[1]}")
numbers = sum(channels * across**2 for channels, across in pile)
total = sum(p.numel() for p in real.parameters())
print(f"{len(pile)} skips, {numbers * 2 / 1e6:.1f} MB in float16")
print(f"{total:,} parameters, {total * 2 / 1e9:.2f} GB in float16")

# %% [markdown]
# ## On a GPU
#
# ```bash
# python lessons/07_unet_is_a_table_of_shapes.py --model v1-5-pruned-emaonly.safetensors --device cuda
# ```
#
# Three minutes. Expect the same order at 512 x 512: next to nothing from the smallest skip, ruin from the largest. There are twelve skips
# and four levels, so more lies between; put other numbers into `cut([...])`.

# %% [markdown]
# ## Read next
#
# - `minidiff/unet.py`: `UNet.__init__` fills the table, with the pile as `c_skips`; `UNet.forward` is the way down and up in nine lines.
# - Ronneberger, Fischer and Brox 2015, "U-Net: convolutional networks for biomedical image segmentation", figure 1.
# - Lesson 08: what stands before and behind the U-Net, the autoencoder.
