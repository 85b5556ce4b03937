# %% [markdown]
# # 07 The U-Net is a table of shapes
#
# **What becomes of a latent on its way through the U-Net, and where are all the parameters?**
#
# - Explains: [minidiff/unet.py](../minidiff/unet.py)
# - You change: `u_net`, `skip_shapes` and `conv_cost`, from the path through the network to its size
# - Minutes: 45
# - Picture: [figures/07-cut.png](figures/07-cut.png)
#
# ![The whole pipeline; this lesson is about the U-Net](figures/pipeline-unet.svg)
#
# A U-Net is made of the ResBlocks of lesson 06 and the attention of lesson 04. There is no further idea in its layers, only in their order:
# which tensor has which shape, and which layers are connected. If you can write down this table of shapes, you have understood the network,
# and you can load anybody's weights into it.

# %% [markdown]
# ## Guess first
#
# Down the U-Net the picture gets smaller and smaller. On the way up, each block receives a copy of a tensor from the way down, a *skip*.
# Suppose one skip is replaced by zeros. Which one does the network miss most?
#
# 1. The one from the bottom, with the smallest picture. It has passed through most of the layers.
# 2. The one from the top, with the largest picture. It has passed through hardly any layers.
# 3. All are missed about equally.

# %% [markdown]
# ## Down, and up again
#
# To see that two ears belong to one cat, a cell must know about cells far away, but a convolution of `3 x 3` sees only its neighbours. So
# the U-Net works at several sizes, its *levels*. On the way down, a level has some ResBlocks, each followed by attention where the level
# has attention. It ends in a convolution that keeps only every second cell in each direction, so that neighbours at the next level are
# twice as far apart. The *middle* works on the smallest picture. On the way up, the levels come in reverse order, and each ends with
# doubling the cells and a convolution that smooths them. At the end there is one number for each number of the latent.
#
# The function `parts` lists the layers in this order. A hook notes the shape of what leaves each of them.

# %%
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

from lessons.common import curves, picture_grid, scene_latents, start, x0_converter
from minidiff.blocks import ResBlock, TransformerBlock
from minidiff.config import SD1
from minidiff.scenes.scenes import sample_scene
from minidiff.unet import UNet

lesson = start("07_unet_is_a_table_of_shapes")
sd = lesson.load()


# %%
def parts(unet):
    """The layers that a latent passes, in order: (name, module)."""
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
    """[(name, channels, side)] of what leaves each layer, for one latent."""
    table = []
    note = lambda name: lambda module, args, out: table.append((name, *out.shape[1:3]))
    hooks = [module.register_forward_hook(note(name)) for name, module in parts(unet)]
    x_t = torch.zeros(1, unet.config.in_channels, side, side, device=device)
    context = torch.zeros(1, 4, unet.config.context_width, device=device)
    prediction = unet(x_t, torch.zeros(1, device=device), context)
    for hook in hooks:
        hook.remove()
    assert prediction.shape == (1, unet.config.out_channels, side, side)
    return table


# %%
unet, config = sd.unet, sd.config.unet
side = sd.config.image_size // sd.config.vae.factor
table = watch(unet, side, lesson.device)
for name, channels, across in table:
    print(f"{name:15} {channels:4} channels of {across:2} x {across}")

# %%
fig, axis = plt.subplots()
at, widest = 0.0, max(channels for _, channels, _ in table)
for name, channels, across in table:
    colour = {"d": "C0", "m": "C2", "u": "C1"}.get(name[0], "gray")
    wide = 0.3 + channels / widest
    axis.add_patch(plt.Rectangle((at, -across / 2), wide, across, facecolor=colour))
    at += wide + 0.25
axis.set(xlim=(-0.3, at), ylim=(-side * 0.55, side * 0.55), xticks=[], yticks=[])
axis.set(ylabel="cells per side", xlabel="down (blue), middle (green), up (orange)")
axis.grid(False)
lesson.show(fig, "hourglass", "Tall narrow bars, then short wide ones, then tall ones again.")

# %% [markdown]
# Each bar is one tensor. Its height is the number of cells per side, its width the number of channels. The picture gets smaller towards the
# middle, and the channels become more. Ronneberger et al. (2015) drew the way down from top to bottom and the way up beside it: a U. (In
# the table the levels are numbered in the order in which the latent passes them, so `up 0` is the lowest one.)

# %% [markdown]
# ## Skips
#
# In the middle the picture has only a few cells, and where exactly an edge was cannot be told from those. So each output of the way down,
# that of `conv_in` included, is also put on a stack. Each ResBlock of the way up takes the topmost tensor off the stack and appends its
# channels to the input (`torch.cat`). These tensors are the *skips*. The last one in is the first one out, so the smallest are used first.

# %% [markdown]
# ## Your turn: u_net
#
# Write the path through the network. The layers come as functions of `x`: `down` and `up` are lists, `middle` is a single function. Call
# the functions of `down` one after the other, and append each result to a list, the stack. Call `middle`. For each function of `up`, take
# the last tensor off the stack with `pop()`, append its channels to those of `x` with `torch.cat([x, skip], dim=1)`, and call the function.
#
# When it is right, you see what becomes of a ring in a small U-Net without weights. Its way up uses the skips the first time, and ignores
# them the second time.


# %%
def u_net(down, middle, up, x):
    """The output for x [B, C, H, W]; the results of down are the skips for up."""
    # YOUR CODE, about 8 lines


u_net = lesson.check(u_net)

# %% [markdown]
# Your function can run the real network. We only have to pass its layers as functions of `x`: the context and the vector of the timestep
# (lesson 06) are the same for all of them.


# %%
def block_of(level, j, time, context):
    """A ResBlock of a level, with its attention if there is any."""
    block, attention = level.blocks[j], level.transformers[j : j + 1]
    return lambda x: attention[0](block(x, time), context) if attention else block(x, time)


def and_doubled(layer, smooth):
    return lambda x: smooth(F.interpolate(layer(x), scale_factor=2, mode="nearest"))


# %%
def layers_of(unet, time, context):
    """down, middle and up for u_net."""
    down, up = [unet.conv_in], []
    for level in unet.down:
        down += [block_of(level, j, time, context) for j in range(len(level.blocks))]
        down += [level.downsample] if level.downsample is not None else []
    for level in unet.up:
        up += [block_of(level, j, time, context) for j in range(len(level.blocks))]
        if level.upsample is not None:
            up[-1] = and_doubled(up[-1], level.upsample)
    return down, lambda x: unet.middle(x, time, context), up


# %%
generator = torch.Generator().manual_seed(0)
x_t = torch.randn(1, config.in_channels, side, side, generator=generator).to(lesson.device)
t, context = torch.tensor([500], device=lesson.device), sd.encode_prompts(["a house"])
with torch.no_grad():
    down, middle, up = layers_of(unet, unet.time_embedding(t), context)
    x = u_net(down, middle, up, x_t)
    prediction, expected = unet.conv_out(F.silu(unet.norm_out(x))), unet(x_t, t, context)
assert prediction.shape == expected.shape == x_t.shape
assert torch.allclose(prediction, expected, atol=1e-4)
print(f"{len(down)} skips for {len(up)} blocks of the way up")
print(f"u_net and the library's U-Net differ by {(prediction - expected).abs().max():.0e}")

# %% [markdown]
# ## Your turn: skip_shapes
#
# Now the same path as a table, without any tensor. Find the shapes of the skips from the configuration alone: `widths` are the channels of
# each level, `blocks_per_level` is the number of ResBlocks of a level on the way down, and `side` is the number of cells per side of the
# latent. Return a list of tuples `(channels, side)` in the order in which they are put on the stack.
#
# - `conv_in` makes `widths[0]` channels.
# - Each block of level `i` makes `widths[i]` channels.
# - Every level but the last one ends with halving. It keeps the channels and rounds up, `(side + 1) // 2`: `5` cells become `3`.
#
# When it is right, you see the skips of a U-Net with four levels.


# %%
def skip_shapes(widths, blocks_per_level, side):
    """[(channels, side), ...] of the skips, in the order in which they are made."""
    # YOUR CODE, about 7 lines


skip_shapes = lesson.check(skip_shapes)

# %%
skips = skip_shapes(config.widths, config.blocks_per_level, side)
assert skips == [row[1:] for row in table if row[0].startswith(("conv_in", "down"))]

# %% [markdown]
# With these shapes the way up is known as well: the input of each block has the channels from below plus those of its skip.

# %%
stack, below = list(skips), config.widths[-1]
blocks_up = [block for level in unet.up for block in level.blocks]
for i, level in enumerate(unet.up):
    for j, block in enumerate(level.blocks):
        (channels, across), makes = stack.pop(), block.conv_1.out_channels
        print(f"up {i}, block {j}: {below:3} + {channels:3} -> {makes:3}, {across:2} x {across}")
        assert block.norm_1.num_channels == below + channels
        below = makes
assert not stack

# %% [markdown]
# These sums are where a U-Net written from memory usually fails first: the blocks of the way up differ in their number of input channels.

# %% [markdown]
# ## Your turn: conv_cost
#
# Most of a U-Net's work is done by convolutions. How many parameters does one have, and how much work does it do? A convolution of `k x k`
# from $C_{in}$ to $C_{out}$ channels has one weight for each pair of an input and an output channel and each of the `k * k` places, and one
# bias for each output channel. We count work as multiplications. Each weight, but no bias, is multiplied once for each cell of the output,
# which has `side * side` cells.
#
# Return both numbers, first the parameters, then the multiplications. When they are right, you see what twice the channels on half the side
# cost.


# %%
def conv_cost(c_in, c_out, k, side):
    """(parameters, multiplications) of a convolution k x k; its output has side x side cells."""
    # YOUR CODE, about 2 lines


conv_cost = lesson.check(conv_cost)

# %%
for block in blocks_up:
    layer = block.conv_1
    counted = conv_cost(layer.in_channels, layer.out_channels, 3, side)[0]
    assert counted == sum(p.numel() for p in layer.parameters())

across = SD1.image_size // SD1.vae.factor
print("one convolution of 3 x 3 at each level of Stable Diffusion 1.x:")
for i, width in enumerate(SD1.unet.widths):
    weights, products = conv_cost(width, width, 3, across)
    size = f"{width:4} channels of {across:2} x {across:2}"
    print(f"level {i}, {size}: {weights / 1e6:5.1f} M parameters, {products / 1e9:4.1f} G products")
    across = (across + 1) // 2

# %% [markdown]
# Twice the channels make four times as many pairs of channels, and half the side leaves a quarter of the cells. So the work is the same,
# and the parameters become four times as many. Only the last level has no more channels than the one above it, so its work is a quarter.

# %% [markdown]
# ## Where the parameters are, and where the work is
#
# Now count both for the whole U-Net of Stable Diffusion 1.x. This needs no weights: on PyTorch's device `meta`, tensors have shapes and no
# numbers, and cost neither memory nor time. (The products of queries and keys have no parameters and are left out.)
#
# We begin with the kinds of layers. A *feed-forward* network follows each pair of self-attention and cross-attention: Linear layers that work
# on each cell by itself.

# %%
KINDS = ("self_attention", "cross_attention", "feed_forward")


def parameters(unet):
    """Parameters of each kind of layer."""
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
with torch.device("meta"):
    real = UNet(SD1.unet)
for label, network in (("Stable Diffusion 1.x", real), ("this model", unet)):
    found = parameters(network)
    print(f"{label}: {sum(found.values()):,} parameters")
    for kind, count in found.most_common():
        print(f"    {kind:15} {count / sum(found.values()):5.1%}")

# %% [markdown]
# Most parameters are in ResBlocks, that is, in convolutions. Cross-attention, through which all of the text enters, has few. Next we
# count by level, the way down and the way up together.


# %%
@torch.no_grad()
def by_level(unet, side):
    """{level: [parameters, multiplications]} of a U-Net on the device meta."""
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


counts = by_level(real, SD1.image_size // SD1.vae.factor)
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
# Parameters gather at the bottom, work at the top, as your function says they must. The U-Net keeps most of what it has learned in layers
# that see the picture small, and spends most of its time in layers that see it large.

# %% [markdown]
# ## Break it: cut a skip
#
# Now the guess. We take scenes with the noise of several timesteps, ask for $x_0$, and measure the error, once with the whole U-Net and
# once with a hook that fills the channels of a skip with zeros. The last variant is a mistake that people make: the skips of the highest
# level come in the wrong order. They all have the same shape, so nothing complains.

# %%
rng, convert = np.random.default_rng(0), x0_converter(sd)
scenes = [sample_scene(rng) for _ in range(2 if lesson.quick else 4)]
x_0, context = scene_latents(sd, scenes), sd.encode_prompts([scene.caption for scene in scenes])
eps = torch.randn(x_0.shape, generator=generator).to(lesson.device)


@torch.no_grad()
def errors(times):
    """Mean square of x0_hat - x_0 at each timestep."""
    found = []
    for time in times:
        t = torch.full((len(x_0),), time, device=lesson.device)
        x_t = sd.schedule.q_sample(x_0, t, eps)
        found.append(float((convert(x_t, t, unet(x_t, t, context)) - x_0).square().mean()))
    return found


# %%
def cut(which):
    """A hook before each of these blocks of the way up: zeros for its skip."""

    def zeros(n):  # the last n of the input's channels are the skip's
        return lambda module, args: (F.pad(args[0][:, :-n], (0, 0, 0, 0, 0, n)), args[1])

    return [blocks_up[i].register_forward_pre_hook(zeros(skips[-1 - i][0])) for i in which]


def exchanged():
    """A hook before the highest level of the way up: its skips in the reverse order."""
    other_order = lambda module, args: (args[0], args[1][::-1], *args[2:])
    return [unet.up[-1].register_forward_pre_hook(other_order)]


# %%
times, last = [100, 300, 500, 700, 900], len(blocks_up) - 1
ways = {
    "whole": lambda: [],
    "smallest cut": lambda: cut([0]),
    "largest cut": lambda: cut([last]),
    "all cut": lambda: cut(range(last + 1)),
    "exchanged": exchanged,
}
prompts = ["a rocket on a red background", "a house on a green background"]
prompts += ["a camera on a purple background"]

# %%
off, generated = {}, {}
print("error of x0_hat at t = ", *(f"{t:6}" for t in times))
for name, change in ways.items():
    hooks = change()
    off[name] = errors(times)
    generated[name] = sd.generate(prompts, steps=4 if lesson.quick else 15, seed=1)
    for hook in hooks:
        hook.remove()
    print(f"{name:22}", *(f"{error:6.3f}" for error in off[name]))
assert errors(times) == off["whole"]  # whole again

# %%
times_as_large = {}
for name, error in off.items():
    times_as_large[name] = times, [one / whole for one, whole in zip(error, off["whole"])]
axes = {"xlabel": "timestep t", "ylabel": "error, whole U-Net = 1", "ylim": (0, None)}
fig = curves(times_as_large, **axes, dashed=["whole"], xticks=times)
lesson.show(fig, "cost", "The error of each U-Net, as a multiple of the whole one's.")

# %%
columns = [name.replace(" ", "\n") for name in generated]
rows = [[images[i] for images in generated.values()] for i in range(len(prompts))]
fig = picture_grid(rows, columns, ["rocket", "house", "camera"])
lesson.show(fig, "cut", "Three pictures from the whole U-Net and from each of the others.")

# %% [markdown]
# Compare the second column with the third. The smallest skip is the very tensor that went into the middle, so what it holds arrives from
# there as well. The largest skip carries the latent itself, nearly as it came in, with the noise of every single cell. Without it, the
# U-Net has to guess from coarser tensors where the noise was, and leaves much of it in the picture. So a skip is not there to remember
# *what* the picture shows, but *where*. At the last timestep the difference is smaller: there is little besides noise, and the words decide
# more.
#
# The exchanged skips do great harm as well, and there is no error message. That is why the tests of minidiff compare whole U-Nets with the
# numbers of the original.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/07_unet_is_a_table_of_shapes.py --model v1-5-pruned-emaonly.safetensors` prints the table of a checkpoint of yours and
# cuts its skips. The shapes need no weights. Stable Diffusion 1.x and 2.x have the same widths and therefore the same skips; they differ in
# the number of heads and in the width of the text.

# %%
stack = skip_shapes(SD1.unet.widths, SD1.unet.blocks_per_level, SD1.image_size // SD1.vae.factor)
for (channels, across), many in Counter(stack).items():
    print(f"{many} x {channels:4} channels of {across:2} x {across}")
numbers = sum(channels * across**2 for channels, across in stack)
total = sum(p.numel() for p in real.parameters())
print(f"{len(stack)} skips, {numbers * 2 / 1e6:.1f} MB in float16")
print(f"{total:,} parameters, {total * 2 / 1e9:.2f} GB in float16")

# %% [markdown]
# ## On a GPU
#
# ```bash
# python lessons/07_unet_is_a_table_of_shapes.py --model v1-5-pruned-emaonly.safetensors --device cuda
# ```
#
# Three minutes. Expect the same order at 512 x 512: the smallest skip is hardly missed, and without the largest the pictures are ruined.
# There are twelve skips at four levels, so there is more to find in between; put other numbers into `cut([...])`.

# %% [markdown]
# ## What you now know
#
# - A U-Net goes down through levels of fewer cells and more channels, through the middle, and up again.
# - Every output of the way down is a skip for one block of the way up; the last one made is the first one used.
# - The input of a block on the way up has the channels from below plus those of its skip.
# - Twice the channels are four times the parameters; half the side is a quarter of the work for each of them.
# - The largest skips tell the network where things are. In the wrong order they fit, and ruin the pictures.

# %% [markdown]
# ## Your guess
#
# For the bundled model the second answer is right, as the pictures of "Break it" show. The smallest skip has passed through most layers,
# but the way up begins with the output of the same layers, so it brings little that is new. The largest skip brings what nothing else has.

# %% [markdown]
# ## Quiz
#
# 1. Why does each level have one block more on the way up than on the way down?
# 2. You generate at twice the side length. What happens to the number of parameters, and to the work of the convolutions?
# 3. Somebody takes the skips first in, first out. At which block does this stop with an error, and why not earlier?
#
# <details><summary>Answers</summary>
#
# 1. Besides the blocks, `conv_in` and all halvings leave a skip. That is one more for each level, and each skip needs a block that takes
#    it.
# 2. The parameters stay the same. The work becomes four times as much, because there are four times as many cells.
# 3. At the very first one: `torch.cat` cannot join the smallest picture with the largest. Nothing can come earlier, because the way down
#    only puts skips on the stack.
#
# </details>

# %% [markdown]
# ## Now you
#
# Instead of cutting a skip, turn it down or up: multiply its channels by a half, and then by two. (FreeU, Si et al. 2023,
# improves pictures of finished models with factors of this kind.) Predict which factor harms more, and whether the largest skip or one from
# the middle of the list is more sensitive. Change `zeros` in `cut`, print the errors, and look at the pictures.

# %% [markdown]
# ## Read next
#
# - `minidiff/unet.py`: `UNet.__init__` fills the table, with the channels of the skips as `c_skips`. `UNetEncoder.encode` is the first half
#   of your `u_net`, and `UNet.forward` the second.
# - Ronneberger, Fischer and Brox 2015, "U-Net: convolutional networks for biomedical image segmentation", figure 1.
# - Lesson 08: what comes before and after the U-Net, the autoencoder.
