# %% [markdown]
# # 04 Attention by hand
#
# **How does each place in a picture find the words that concern it?**
#
# - Explains: [minidiff/attention.py](../minidiff/attention.py)
# - You change: `soft_lookup`, `attention_weights` and `mix_values`, attention from the idea to the heads
# - Minutes: 45
# - Picture: [figures/04-words.png](figures/04-words.png)
#
# ![The whole pipeline; this lesson is about the attention layers of the U-Net](figures/pipeline-attention.svg)
#
# The network that removes noise from a latent, the *U-Net*, is told what to draw by a caption. Somewhere inside it, every cell of the latent
# has to ask every word: do you concern me? This is called *attention*. Where cells ask words it is *cross-attention*. The same few lines
# also let cells ask each other, and words ask words; that is *self-attention* (Vaswani et al. 2017, eq. 1):
#
# $$\mathrm{attention}(q, k, v) = \mathrm{softmax}\left( \frac{q \, k^T}{\sqrt{d}} \right) v$$

# %% [markdown]
# ## Guess first
#
# The formula divides by $\sqrt{d}$, the square root of the length of the vectors. The division is easily forgotten, and nothing crashes
# without it. Take a model that was trained with it and leave it out. What happens to its pictures?
#
# 1. Very little: softmax makes every row add up to one in any case.
# 2. They show the same things, crudely drawn.
# 3. There is no picture at all.

# %% [markdown]
# ## A lookup that mixes
#
# A Python `dict` finds the one key that equals what you ask for and returns its value. Attention compares the question, called the *query*,
# with all the keys and returns a mixture of all the values: a large share of those whose keys point the same way as the query, and little
# of the others. The dot product measures how far two vectors point the same way. Softmax turns the products into shares, which are positive
# and add up to one.

# %%
from itertools import product

import torch
from einops import rearrange
from matplotlib import pyplot as plt

from lessons.common import curves, milliseconds, picture_grid, start
from minidiff.attention import attention
from minidiff.blocks import SpatialTransformer
from minidiff.config import SD1
from minidiff.pipeline import to_images

lesson = start("04_attention_by_hand")
sd = lesson.load()

# %% [markdown]
# ## Your turn: soft_lookup
#
# Write such a lookup for several queries at once. `query @ keys.T` holds the product of each query with each key, one row per query. Apply
# softmax to each row (`.softmax(dim=-1)`), which gives the shares, and let them mix the values: another matrix product. There is no scale
# yet. When it is right, you see a mixture of two values while the query turns from one key to the other.


# %%
def soft_lookup(query, keys, values):
    """Mix the values for each query; query [N, d], keys [L, d], values [L, C] -> [N, C]."""
    # YOUR CODE, about 2 lines


soft_lookup = lesson.check(soft_lookup)

# %% [markdown]
# We place three keys in a plane, a third of a circle apart. Their values are colours. The query goes around the circle.


# %%
def towards(degrees):
    radians = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float32))
    return torch.stack([radians.cos(), radians.sin()], dim=-1)


around, keys = towards(torch.arange(360)), towards([0, 120, 240])  # [360, 2] and [3, 2]
colours = torch.tensor([[213, 94, 0], [0, 158, 115], [0, 114, 178]])  # [3, 3]: red, green, blue
strips = []
for length in (1, 4, 16):
    shares = soft_lookup(length * around, keys, torch.eye(3))  # of each value
    assert shares.shape == (360, 3) and torch.allclose(shares.sum(dim=-1), torch.ones(360))
    mixed = soft_lookup(length * around, keys, colours.float())
    strips.append(mixed.round().to(torch.uint8).expand(60, 360, 3))
    print(f"query of length {length:2}: the largest share is {shares.max():.2f}")

# %%
fig, axes = plt.subplots(3, figsize=(6, 3.2), sharex=True)
for axis, strip, length in zip(axes, strips, (1, 4, 16)):
    axis.imshow(strip, extent=(0, 360, 0, 1), aspect="auto")
    axis.set(yticks=[], ylabel=f"length\n{length}", xticks=[0, 120, 240, 360])
    axis.grid(False)
axes[-1].set_xlabel("where the query points, in degrees")
lesson.show(fig, "lookup", "Soft mixtures for a short query, hard borders for a long one.")

# %% [markdown]
# A short query gets a mixture everywhere. A long query gets almost a single value, and at a border it jumps from one to the next. So the
# *size* of the products decides between mixing and choosing. Keep this in mind for the $\sqrt{d}$.

# %% [markdown]
# ## Queries from cells, keys from words
#
# Now the real thing. The model draws a picture. A third of the way through we stop, run the U-Net once more, and catch the input of its
# last cross-attention layer: `x`, one vector for each cell, and `context`, one vector for each token of the caption. A *token* is a word or
# a piece of a rare one (lesson 09).

# %%
prompt = "a frog on a pink background"
steps = list(sd.denoise(prompt, steps=9 if lesson.quick else 24, seeds=[2]))
now = len(steps) // 3
context = sd.encode_prompts([prompt])
transformers = [m for m in sd.unet.modules() if isinstance(m, SpatialTransformer)]
layer = transformers[-1].blocks[0].cross_attention
print(f"stopped after {now + 1} of {len(steps)} steps")


# %%
@torch.no_grad()
def predict():
    t = torch.tensor([steps[now + 1].t], device=lesson.device)
    return sd.unet(steps[now].x_t, t, context)


caught = {}
hook = layer.register_forward_hook(lambda module, args, output: caught.update(x=args[0]))
predict()
hook.remove()
print(f"x {list(caught['x'].shape)}, context {list(context.shape)}")

# %% [markdown]
# Three learned matrices turn these vectors into queries, keys and values. D is the width of all three, N the number of cells, and L the
# number of tokens.

# %%
with torch.no_grad():
    q, k, v = layer.to_q(caught["x"]), layer.to_k(context), layer.to_v(context)
(B, N, D), L = q.shape, k.shape[1]
h, (rows, columns) = layer.heads, steps[now].x_t.shape[2:]
assert k.shape == v.shape == (B, L, D) and rows * columns == N
print(f"N = {N} queries, one for each of {rows} x {columns} cells; L = {L} keys; D = {D}")
print(f"h = {h} heads of d = {D // h}")

# %% [markdown]
# ## Heads: several lookups at once
#
# A single lookup asks a single question. So the D numbers are cut into h *heads* of d numbers each, and every head looks things up for
# itself, with its own queries and keys. One head may ask about the subject, another about its background. `rearrange` splits the axis by
# name. In `"B N (h d) -> B h N d"` the last axis is read as h groups of d numbers, and the heads move next to the batch axis, so that one
# matrix product computes all of them.

# %% [markdown]
# ## Your turn: attention_weights
#
# Write the left half of the formula, the *attention weights*: for each head, how much each query takes of each key. Three lines. Split `q`
# and `k` into heads with `rearrange(x, "B N (h d) -> B h N d", h=heads)`. Multiply every query with every key and divide by
# `d**0.5`; `k.transpose(-1, -2)` swaps the last two axes, as `.T` does for a matrix, and d is the last axis of the split `q`. Apply
# softmax so that each query's shares add up to one.
#
# When it is right, you see what the scale does for heads of different widths.


# %%
def attention_weights(q, k, heads):
    """softmax(q k^T / sqrt(d)) in each head; q [B, N, D], k [B, L, D] -> [B, h, N, L]."""
    # YOUR CODE, about 3 lines


attention_weights = lesson.check(attention_weights)

# %%
weights = attention_weights(q, k, h)
assert weights.shape == (B, h, N, L)
assert torch.allclose(weights.sum(dim=-1), torch.ones(B, h, N, device=lesson.device))
print(f"weights {list(weights.shape)}: heads, cells, tokens")

# %%
words = dict(sd.tokenizer.words(prompt))  # each word with the places of its tokens among the L
picture = to_images(sd.decode(steps[-1].x_t))[0]
asked, shown_heads = ("frog", "pink", "background"), range(min(h, 2))
maps = {}
for head, word in product(shown_heads, asked):
    shares = weights[0, head, :, words[word]].sum(-1)
    maps[head, word] = rearrange(shares, "(H W) -> H W", H=rows)
    print(f"head {head}, {word}: {shares.mean():.2f} on average, {shares.max():.2f} at most")

# %%
grid = [[maps[head, word].cpu() for word in asked] for head in shown_heads]
grid = [[None if head else picture, *row] for head, row in zip(shown_heads, grid)]
fig = picture_grid(grid, ["picture", *asked], [f"head {head}" for head in shown_heads])
lesson.show(fig, "words", "A frog, and where two heads look at frog, pink and background.")

# %% [markdown]
# Brighter means more attention to the word. Each map is scaled separately; the shares printed above say how strong it is. Nobody told the
# network which cells are frog: the maps are a by-product of learning to remove noise from captioned pictures. Compare the two heads. They
# look at the same word in different places, which is why there are several.

# %% [markdown]
# ## Your turn: mix_values
#
# One half of the formula is left: the weights mix the values. Split `v` into heads as you split `k`; the number of heads is the second axis
# of `weights`. Multiply, and merge the heads with the reverse pattern, `"B h N d -> B N (h d)"`. Two lines. When it is right, weights that
# choose a single key return its value.


# %%
def mix_values(weights, v):
    """weights v in each head, heads merged; weights [B, h, N, L], v [B, L, D] -> [B, N, D]."""
    # YOUR CODE, about 2 lines


mix_values = lesson.check(mix_values)

# %% [markdown]
# ## Against the fused kernel
#
# Your functions together are the whole formula. The library uses such lines only when it records maps. To generate pictures it calls a
# *fused kernel*, a single function that goes through the keys in blocks and never stores the N x L weights (lesson 05). The results agree
# except for rounding.


# %%
def attend(q, k, v, heads):
    return mix_values(attention_weights(q, k, heads), v)


by_hand, fused = attend(q, k, v, h), attention(q, k, v, h)
assert by_hand.shape == (B, N, D) and torch.allclose(by_hand, fused, atol=1e-4)
print(f"largest difference: {(by_hand - fused).abs().max():.0e}")

# %% [markdown]
# What differs is memory, and with it time. By hand, the weights grow as N x L, and in self-attention L equals N.

# %%
heads, width = 8, 320  # of the first level of Stable Diffusion 1.x
sizes = [64, 256] if lesson.quick else [64, 128, 256, 512, 1024, 2048]
sizes += [4096, 8192] if lesson.device.type == "cuda" else []
generator = torch.Generator().manual_seed(0)
taken = {"by hand": [], "fused": []}
print("    N   by hand    fused   weights by hand")
for n in sizes:
    inputs = [torch.randn(1, n, width, generator=generator).to(lesson.device) for _ in range(3)]
    for label, function in (("by hand", attend), ("fused", attention)):
        taken[label].append(milliseconds(function, *inputs, heads))
    times = f"{taken['by hand'][-1]:6.1f} ms {taken['fused'][-1]:5.1f} ms"
    print(f"{n:5} {times} {heads * n * n * 4 / 1e6:10.1f} MB")

# %%
lines = {label: (sizes, times) for label, times in taken.items()}
fig = curves(lines, "cells N", "milliseconds", log="xy", xticks=sizes)
lesson.show(fig, "fused", "Milliseconds against the number of cells, by hand and fused.")

# %% [markdown]
# ## Break it: forget the scale
#
# We begin with random numbers instead of learned ones. The product of two vectors of d unit normal numbers is a sum of d terms of variance
# one. Its variance is therefore d, and its size about $\sqrt{d}$. Divided by $\sqrt{d}$, it has size one for any d. Without the division,
# wider heads mean longer queries, and the strips above show what longer queries do.

# %%
tokens, widths = 77, (8, 16, 40, 80, 160)  # 77 tokens: every caption of Stable Diffusion
largest = {"with the scale": [], "without": []}
for d in widths:
    queries, keys = (torch.randn(tokens, d, generator=generator) for _ in range(2))
    products = queries @ keys.T
    largest["with the scale"].append(float((products / d**0.5).softmax(-1).amax(-1).mean()))
    largest["without"].append(float(products.softmax(-1).amax(-1).mean()))
    size = products.std()
    print(f"d = {d}: products have size {size:.1f}, scaled {size / d**0.5:.1f}")

# %%
for label, shares in largest.items():
    print(f"{label}: largest of {tokens} shares {shares[0]:.2f} to {shares[-1]:.2f}")
lines = {label: (widths, shares) for label, shares in largest.items()}
axes = {"xlabel": "width of a head, d", "ylabel": f"largest of {tokens} shares"}
fig = curves(lines, **axes, xticks=widths, ylim=(0, 1))
lesson.show(fig, "scale", "Without the scale the largest share grows with d.")

# %% [markdown]
# With the scale, a query mixes many words however wide the heads are. Without it, the query chooses a single word and drops all others.
# Softmax is then flat almost everywhere, so its gradient is close to zero, and a network could hardly learn through it.
#
# Next, the bundled model, which was trained with the scale. Leaving the scale out is the same as making every query $\sqrt{d}$ times longer.
# A hook on each `to_q` does that, and we remove the hooks afterwards.

# %%
prompts = [prompt, "a burger on a white background", "a cactus on an orange background"]
count = 8 if lesson.quick else 20
generated = {"right": sd.generate(prompts, steps=count, seed=2)}
right, hooks = predict(), []
for transformer in transformers:
    for asking in (transformer.blocks[0].self_attention, transformer.blocks[0].cross_attention):
        root_d = (asking.to_q.out_features // asking.heads) ** 0.5
        longer = lambda module, args, out, root_d=root_d: out * root_d
        hooks.append(asking.to_q.register_forward_hook(longer))
generated["without\nthe scale"] = sd.generate(prompts, steps=count, seed=2)
broken = predict()
for hook in hooks:
    hook.remove()

# %%
assert torch.equal(predict(), right)  # as before
off = (broken - right).norm() / right.norm()
print(f"the U-Net's prediction after {now + 1} steps is off by {off:.0%} of its size")
fig = picture_grid(list(generated.values()), ["frog", "burger", "cactus"], list(generated))
lesson.show(fig, "forgotten", "A frog, a burger, a cactus; below, crude ones without the scale.")

# %% [markdown]
# Every lookup still finds something, but it takes that one thing far too strongly. A mistake like this is hard to see in a single picture
# and easy to see in a number. That is why the tests of minidiff compare every layer with the original implementations.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/04_attention_by_hand.py --model v1-5-pruned-emaonly.safetensors` draws the maps for a checkpoint of yours. Its last
# cross-attention has 64 x 64 cells and 8 heads, and the maps are seldom as tidy as those above. What its sizes mean for memory can be
# computed without any weights:

# %%
unet = SD1.unet
side = SD1.image_size // SD1.vae.factor
print("self-attention at 512 x 512, weights in\nfloat16 if they were stored:")
for width, heads, has in zip(unet.widths, unet.heads, unet.attention):
    cells = side * side
    if has:
        megabytes = heads * cells**2 * 2 / 1e6
        print(f"{side:3} x {side}, {heads} heads of {width // heads:3}: {megabytes:6.1f} MB")
    side = (side + 1) // 2

# %% [markdown]
# The rows are the sizes of the latent inside the U-Net, its *levels* (lesson 07). Each layer of the first level would write 268 MB for
# each picture and read it again, and guidance doubles that. At twice the side length it is 16 times as much. That is why Stable Diffusion
# runs on fused attention today.

# %% [markdown]
# ## On a GPU
#
# ```bash
# python lessons/04_attention_by_hand.py --device cuda
# ```
#
# One minute. The curves continue to 8192 cells. Expect both to be flat at first, where starting a kernel costs more than its work, and the
# gap at the end to be wider than on a processor. A GPU computes faster than it can write, and by hand nearly all the time goes into writing
# and reading weights.

# %% [markdown]
# ## What you now know
#
# - Attention compares a query with all keys and returns a mixture of the values, weighted by a softmax.
# - In cross-attention the cells of the picture ask the words; in self-attention cells ask cells.
# - Heads are several lookups at once, each with its own d of the D numbers.
# - The division by $\sqrt{d}$ keeps the products at size one, so that the softmax still mixes.
# - A fused kernel returns the same numbers and never stores the attention weights.

# %% [markdown]
# ## Your guess
#
# For the bundled model the second answer is right, as the last figure of "Break it" shows. Without the scale each lookup chooses almost a
# single thing, so the subjects can be recognised but are drawn crudely. Nothing crashes, which makes this mistake hard to find.

# %% [markdown]
# ## Quiz
#
# 1. You double the number of cells. By how much does the memory for the weights of self-attention grow by hand?
# 2. Why do all rows of the attention weights add up to one even with the wrong scale?
# 3. Where do query, key and value come from in cross-attention?
#
# <details><summary>Answers</summary>
#
# 1. By a factor of four: every cell asks every cell.
# 2. Because of the softmax. It hides the mistake: only how evenly the weights are spread changes.
# 3. The query comes from a cell of the picture, key and value from the words.
#
# </details>

# %% [markdown]
# ## Now you
#
# The hooks of "Break it" multiply every query by $\sqrt{d}$. Multiply by two instead, then by a half. Predict for each whether the
# attention maps become sharper or flatter, and which of the two harms the pictures more. Then run it and look.

# %% [markdown]
# ## Read next
#
# - `minidiff/attention.py`: `attention_weights` is yours with a mask for the text encoder, in which words look only at the words before
#   them (lesson 09). `naive_attention` is your `attend`, and `attention` chooses the kernel.
# - `minidiff/attention_maps.py` records the maps of all layers; lesson 10 follows them over the steps.
# - Vaswani et al. 2017, "Attention is all you need", section 3.2, with the reason for the scale in a footnote.
# - Lesson 05: the fused kernel, step by step.
