# %% [markdown]
# # 20 Loading real weights and proving it right
#
# **How do you know that code of your own computes what a checkpoint was trained for?**
#
# - Explains: [weights_loader/dialects.py](../weights_loader/dialects.py), [minidiff/compare.py](../minidiff/compare.py)
# - You change: `place_in_ldm`, the rule that finds a block's weights in a Stable Diffusion file
# - Minutes: 35
# - Picture: [figures/20-trail.png](figures/20-trail.png)
#
# ![The whole pipeline; this lesson is about the file of weights](figures/pipeline-weights.svg)
#
# A *checkpoint* is a file of weights. Those of Stable Diffusion were written by other programs, whose modules have other names than minidiff's. This lesson finds each weight its
# place, gives account of every name, and then asks the harder question: all names and shapes fit, and is it right? Five mistakes that have been made again and
# again in public code are planted here on purpose, and found.

# %% [markdown]
# ## Guess first
#
# Each of these five mistakes lets every weight load without complaint. For which would you notice it in a picture?
#
# 1. The small number that a normalisation adds to the variance is `1e-5` where `1e-6` belongs. PyTorch calls it eps too; it is no noise.
# 2. The time embedding has sines before cosines (lesson 06).
# 3. The layer after the attentions, called *feed-forward*, makes twice the numbers it needs: values, and gates that say how much of each
#    value passes. It takes the gates for the values and the values for the gates.
# 4. The text encoder has the exact GELU, a smooth bend much like the SiLU of lesson 06, where an approximation of it belongs.
# 5. Two blocks of equal shape have each other's weights.

# %% [markdown]
# ## A file is a table of names
#
# A `.safetensors` file is a list of names, each with a shape and its numbers; nothing says what they are for. The beginning of a name tells which of the three
# networks it belongs to. Stable Diffusion's first code, by the group CompVis, was called LDM, and single files still use its names. The
# library *diffusers* has names of its own, and minidiff a third kind.

# %%
import copy
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

import weights_loader
from lessons.common import BLUE, RED, picture_grid, start

# %%
from minidiff.blocks import FeedForward, SpatialTransformer
from minidiff.compare import compare_models
from minidiff.config import SD1, SD2, SDXL
from minidiff.text_encoder import quick_gelu
from weights_loader.empty_parts import empty_parts
from weights_loader.families import family_of_shapes, part_names
from weights_loader.load import LoadOptions, load_with_report
from weights_loader.name_table import LAYOUTS, file_shapes, name_table

lesson = start("20_loading_real_weights")

# %%
loaded = load_with_report(lesson.model, LoadOptions(dtype=torch.float32, device=lesson.device))
sd, contents, report = loaded.sd, loaded.contents, loaded.report
for part, tensors in contents.parts.items():
    name = next(iter(tensors))
    print(f"{part}: {len(tensors)} tensors; the first:\n  {name}\n  {list(tensors[name].shape)}")

# %% [markdown]
# Here is one weight under its three names: the matrix that makes keys of words, in the first transformer of the U-Net. What follows the block is nearly the same in
# all three. What differs is how the blocks are counted.

# %%
ours = next(name for name in sd.unet.state_dict() if name.endswith("cross_attention.to_k.weight"))
tables = {layout: name_table(sd.unet, part_names(sd.config, "unet", layout)) for layout in LAYOUTS}
print("ours:\n  " + "\n    .".join(ours.split(".blocks.")))
for layout, table in tables.items():
    print(f"{layout}:\n  " + "\n    .".join(table[ours].name.split(".transformer_blocks.")))

# %% [markdown]
# ## How LDM counts
#
# minidiff and diffusers count levels, and blocks within a level. LDM counts every step on the way down in one row. `input_blocks.0` is the first convolution.
# Then each level has its blocks, one step each, and one step more for halving the resolution. A step is a little list of its own: item 0 is the ResBlock, item
# 1 the *transformer* beside it, which holds the attentions of lesson 04 and the feed-forward layer. On the way up, in `output_blocks`, each level has one block
# more than on the way down, and enlarging the picture is no step of its own: it is the last item of the level's last step.
#
# To see it at full size no weights are needed. PyTorch's device `meta` makes modules that have shapes and no numbers.

# %%
shapes = {}
for name, part in empty_parts(SD1).named().items():
    in_file = file_shapes(part, part_names(SD1, name, "ldm"))
    shapes |= in_file
    numbers = sum(p.numel() for p in part.parameters())
    print(f"{type(part).__name__:11} {len(in_file):4} names {numbers:13,} numbers")
print(f"{'all':11} {len(shapes):4} names")
print(f"by its shapes this is a {family_of_shapes(shapes).name}")

# %%
ldm_names = part_names(SD1, "unet", "ldm")


def ldm_steps(config):
    """For each level the steps down, and those up."""
    unet, down, up = empty_parts(config).unet, [], []
    place = {ours: place.name for ours, place in name_table(unet, ldm_names).items()}
    for way, rows in (("down", down), ("up", up)):
        for i in range(len(config.unet.widths)):
            named = [place[n].split(".")[2:4] for n in place if n.startswith(f"{way}.{i}.")]
            rows.append(sorted({int(number) for _, number in named}))
    return down, up[::-1]


down, up = ldm_steps(SD1)
for i in range(len(down)):
    print(f"level {i}: input {down[i]}, output {up[i]}")


# %%
def draw_arm(axis, rows, color, end):
    """Draw an arm of the U, a row of numbered boxes for each level. end: its outer end."""
    for i, steps in enumerate(rows):
        for j, step in enumerate(steps):
            x = j + i * 0.45 if end == 0 else end - i * 0.45 - (len(steps) - 1 - j)
            box = {"boxstyle": "square,pad=0.35", "color": color}
            style = {"color": "white", "fontsize": 13, "bbox": box}
            axis.text(x, -i, str(step), ha="center", va="center", **style)


# %%
def draw_steps(axis, config, middle="level {level}"):
    """Draw the steps as a U, and between its arms a text for each level."""
    down, up = ldm_steps(config)
    draw_arm(axis, down, BLUE, end=0)
    draw_arm(axis, up, RED, end=9.4)
    for i, depth in enumerate(config.unet.attention):
        text = middle.format(level=i, depth=int(depth))
        axis.text(4.7, -i, text, ha="center", va="center", fontsize=12)
    axis.text(0, 0.75, "input_blocks", color=BLUE)
    axis.text(9.7, 0.75, "output_blocks", color=RED, ha="right")
    axis.set(xlim=(-0.6, 10), ylim=(-len(down) + 0.4, 1.2))
    axis.axis("off")


# %%
fig, axis = plt.subplots(figsize=(6, 3.6))
draw_steps(axis, SD1)
lesson.show(fig, "steps", "A U of numbered steps: down 1 to 11, up from the deepest level 0 to 11.")

# %% [markdown]
# ## Your turn: place_in_ldm
#
# Write the rule. In comes the place of a block in minidiff's U-Net and the number of ResBlocks a level; out goes its place in an LDM file. With two blocks a level:
#
# | ours | LDM |
# |---|---|
# | `down.0.blocks.1` | `input_blocks.2.0` |
# | `down.1.transformers.0` | `input_blocks.4.1` |
# | `down.1.downsample` | `input_blocks.6.0.op` |
# | `up.1.blocks.2` | `output_blocks.5.0` |
#
# `up.0` is the deepest level in both. Enlarging, `up.1.upsample`, is left out.


# %%
def place_in_ldm(ours, blocks_per_level):
    """down.1.transformers.0 to input_blocks.4.1, and so on; all are strings."""
    # YOUR CODE, about 6 lines


def library(ours, blocks_per_level):
    """Looks it up in the library's table of all weights."""
    config = replace(SD1, unet=replace(SD1.unet, blocks_per_level=blocks_per_level))
    table = name_table(empty_parts(config).unet, ldm_names)
    name = next(table[weight].name for weight in table if weight.startswith(f"{ours}."))
    return re.search(r"(in|out)put_blocks\.\d+\.\d(\.op)?", name)[0]


place_in_ldm = lesson.check(place_in_ldm, instead=library)

# %%
names = ["down.0.blocks.1", "down.1.transformers.0", "down.1.downsample", "up.1.blocks.2"]
for name in names:
    print(f"{name:22} {place_in_ldm(name, SD1.unet.blocks_per_level)}")
    assert place_in_ldm(name, SD1.unet.blocks_per_level) == library(name, SD1.unet.blocks_per_level)

# %% [markdown]
# The rest of `dialects.py` is such rules, for the other blocks and for the layers inside them. A few weights are not only renamed: a matrix may
# stand in the file as a convolution of one pixel, which is the same map, and Stable Diffusion 2.x stacks queries, keys and values in one tensor.

# %% [markdown]
# ## Every name has an account
#
# PyTorch's `load_state_dict(strict=False)` skips what it does not know and leaves the rest as it was drawn. That is how models come to draw noise. minidiff
# sorts every name of the file into used, converted (as those just above), carried along (nothing is computed with it, but saving writes it back) or ignored for
# a stated reason, and refuses the file if one name is left over or one weight without a name. What it says of a file in which a name was misspelt:

# %%
print(f"used {len(report.used)}, converted {len(report.converted)}")
print(f"carried {len(report.extra)}, ignored {len(report.ignored)}")
print(f"missing {len(report.missing)}, unexpected {len(report.unexpected)}")

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "misspelt.safetensors"
    weights_loader.save(sd, path)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"middle_block.1.proj_in.w", b"middle_block.1.porj_in.w"))
    try:
        weights_loader.load(path)
        raise AssertionError("it was loaded all the same")
    except ValueError as error:
        for line in str(error).replace(str(path), path.name).splitlines():
            print("\n   ".join(line.replace(" (", "\n(").splitlines()))

# %% [markdown]
# ## The same answer, layer by layer
#
# Names that fit prove nothing about the code. The proof is numbers: run two models on the same inputs and hold every layer's output of one against the other's, in the order
# in which they run. `compare_models` does it with *hooks*, functions that PyTorch calls when a module is done (lesson 04).
#
# How equal is equal? The same weights in float64 show it: what differs then is rounding alone. Differences are given relative to the largest value of the layer.


# %%
def in_float64(sd):
    sd = copy.deepcopy(sd)
    for part in (sd.text_encoder, sd.unet, sd.vae):
        part.double()
    return sd


exact = in_float64(sd)
rounding = compare_models(sd, exact, "a cat", t=500, seed=0)
assert {one.layer.split(".")[0] for one in rounding} == set(contents.parts)
largest = max(one.relative for one in rounding)
print(f"{len(rounding)} layers; float32 to float64 differs by {largest:.0e} at most")
assert largest < 1e-4

# %% [markdown]
# Anything well above that is no rounding. A first use: save the model in diffusers' names, load it again, and compare. The weights come back bit for bit.

# %%
with tempfile.TemporaryDirectory() as folder:
    weights_loader.save(sd, Path(folder) / "model", layout="diffusers")
    again = weights_loader.load(Path(folder) / "model", dtype=torch.float32, device=lesson.device)
    weights = zip(sd.unet.state_dict().values(), again.unet.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    worst = max(one.relative for one in compare_models(sd, again, "a cat", t=500, seed=0))
print(f"through diffusers' names and back: {worst:.0e} at most")
assert worst < 1e-4

# %% [markdown]
# ## Break it: five bugs of the field
#
# Each function makes one of the five mistakes in a copy of the model. Three do it by moving weights, because that has the same effect as the wrong line of code and
# can be undone by throwing the copy away.


# %%
def wrong_eps(sd):
    for module in sd.unet.modules():
        if isinstance(module, SpatialTransformer):
            module.norm.eps = 1e-5  # its neighbours' number; it wants 1e-6


def sine_first(sd):
    weight = sd.unet.time_embedding.linear_1.weight
    weight.copy_(weight.roll(weight.shape[1] // 2, dims=1))


def gate_first(sd):
    for module in sd.unet.modules():
        if isinstance(module, FeedForward):
            for p in module.proj_in.parameters():
                p.copy_(p.roll(len(p) // 2, dims=0))


# %%
def other_gelu(sd):
    for block in sd.text_encoder.blocks:
        block.activation = F.gelu if block.activation is quick_gelu else quick_gelu


def swapped_blocks(sd):
    level = next(level for level in sd.unet.up if len(level.transformers) > 1)
    one, other, *_ = level.transformers
    level.transformers[0], level.transformers[1] = other, one


bugs = {"wrong eps": wrong_eps, "sine first": sine_first, "gate first": gate_first}
bugs |= {"other GELU": other_gelu, "swapped blocks": swapped_blocks}

# %% [markdown]
# For each, all layers are compared with the exact model's, in float64, where rounding is too small to hide anything. The bug is in the first layer that
# differs, or right before it. That is all there is to finding it.

# %%
prompts = ["a frog on a pink background"]
prompts += [] if lesson.quick else ["a burger on a white background"]
steps = 6 if lesson.quick else 16
drawn = {"right": sd.generate(prompts, steps=steps, seed=2)}
trails = {}
for name, plant in bugs.items():
    broken = copy.deepcopy(sd)
    with torch.no_grad():
        plant(broken)
    drawn[name] = broken.generate(prompts, steps=steps, seed=2)
    trails[name] = compare_models(exact, in_float64(broken), "a cat", t=500, seed=0)

# %%
expected = {"wrong eps": "transformers", "sine first": "time_embedding", "gate first": "proj_in"}
expected |= {"other GELU": "text_encoder", "swapped blocks": "unet.up"}
for name, trail in trails.items():
    first = next(one for one in trail if one.relative > 1e-7)
    assert expected[name] in first.layer
    print(f"{name}: up to {max(one.relative for one in trail):.0e}, first in\n   {first.layer}")

# %%
fig, axis = plt.subplots(figsize=(6, 4.4))
axis.semilogy([one.relative for one in rounding], color="#999999", linewidth=1, label="float32")
for (name, trail), marker in zip(trails.items(), "os^vD"):
    at = [i for i, one in enumerate(trail) if one.relative > 1e-7]
    sizes = [trail[i].relative for i in at]
    axis.semilogy(at, sizes, marker=marker, markevery=12, markersize=5, linewidth=1.3, label=name)
parts = [one.layer.split(".")[0] for one in rounding]
for i in range(1, len(parts)):
    if parts[i] != parts[i - 1]:
        axis.axvline(i, color="black", linewidth=1, linestyle=":")
axis.set(xlabel="layers in the order they run: text, U-Net, VAE", ylim=(1e-8, 500))
axis.set(ylabel="relative difference")
axis.legend(fontsize=11, ncols=2, loc="center", bbox_to_anchor=(0.62, 0.45))
lesson.show(fig, "trail", "Each bug's difference begins at its layer; one is lost in the rounding.")

# %% [markdown]
# Grey is what float32 alone does. Four of the lines lie far above it. The wrong eps does not: in float32 it would drown, and only the comparison in float64 sees it.
# The GELU's line ends with the text encoder, because both U-Nets are given the same context: each part is judged by itself. Dotted lines part
# text encoder, U-Net and VAE.

# %%
columns = [name.replace(" ", "\n") for name in drawn]
rows = [[pictures[i] for pictures in drawn.values()] for i in range(len(prompts))]
fig = picture_grid(rows, columns)
lesson.show(fig, "bugs", "Wrong eps and other GELU cannot be told from right; the rest is spoilt.")

# %% [markdown]
# For this model and these prompts two of the five cannot be seen at all, and one draws the right thing with blemishes, which anybody would blame on a
# model that is not good enough. The other two are plain, but a ruined picture says nothing about where. Looking at pictures is no test. Looking at numbers, layer by layer, finds
# all five, and each in seconds.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/20_loading_real_weights.py --model v1-5-pruned-emaonly.safetensors` does all of it with a checkpoint that you have; it keeps some copies of the model, which
# wants a good deal of memory. `minidiff inspect FILE` gives the account of any file, and `minidiff compare ONE OTHER` the layers in which two differ. Which family a file is
# of follows from its shapes alone, and those need no weights:

# %%
for config in (SD1, SD2, SDXL):
    shapes = {}
    for name, part in empty_parts(config).named().items():
        shapes |= file_shapes(part, part_names(config, name, "ldm"))
    key = next(name for name in shapes if name.endswith("attn2.to_k.weight"))
    print(f"{family_of_shapes(shapes).name}: {len(shapes)} names, to_k {list(shapes[key])}")
    assert shapes[key][1] == config.unet.context_width

# %% [markdown]
# The map of Stable Diffusion XL is drawn by the same rules from another row of numbers: three levels instead of four, no transformer in the first one, and
# *deep* ones below, with several attentions and feed-forward layers one behind the other. So it has fewer steps, and far more names.

# %%
fig, axes = plt.subplots(2, 1, figsize=(6, 6.4), height_ratios=(4.8, 3.8))
for axis, config, name in zip(axes, (SD1, SDXL), ("1", "XL"), strict=True):
    draw_steps(axis, config, middle="{depth} deep")
    axis.set_title(f"Stable Diffusion {name}")
lesson.show(fig, "maps", "Two models by the same rules; in the middle how deep transformers are.")

# %% [markdown]
# What else it changes is in [minidiff/two_encoders.py](../minidiff/two_encoders.py): a second text encoder, whose vectors are put beside the first one's (2048 numbers a token),
# and one vector of the whole prompt and six numbers of the picture's size, which are added to the time.

# %% [markdown]
# Whether it predicts the noise or the velocity (lesson 12) no shape can tell. minidiff asks the model: at the highest noise the answer of one that predicts noise looks
# like its input.

# %% [markdown]
# ## On a GPU
#
# ```bash
# python -m minidiff compare v1-5-pruned-emaonly.safetensors v1-5-pruned-emaonly.safetensors --dtype-b bfloat16 --tolerance 1e-3
# ```
#
# Two minutes, also without a GPU, and a file of Stable Diffusion 1.5 is needed. Expect nearly every layer to be listed: bfloat16 keeps about three digits, so differences are
# around a hundredth, growing slowly from layer to layer and without a jump. A bug is a jump.

# %% [markdown]
# ## Read next
#
# - `weights_loader/dialects.py`: all rules, each with its reason; `families/` which model has which; `report.py` the account.
# - `minidiff/compare.py`: `compare_models`, a hundred lines.
# - `tests/parity/test_traps.py`: more mistakes of the field, each made on purpose against the originals' code.
# - Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models", and the code published with it, whose names these are.
# - This is the last lesson of the path "I want to understand". The other path goes on with lesson 14: changing weights that you have loaded.
