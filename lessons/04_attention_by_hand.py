# %% [markdown]
# # 04 Attention by hand
#
# **How does each place of a picture find the words that concern it?**
#
# - Explains: [minidiff/attention.py](../minidiff/attention.py)
# - You change: `attend`, attention in six lines
# - Minutes: 30
# - Picture: [figures/04-words.png](figures/04-words.png)
#
# ![The whole pipeline; this lesson is about the attention layers of the U-Net](figures/pipeline-attention.svg)
#
# The network that takes noise out of a latent, the *U-Net*, is told by a caption what to draw. Somewhere inside it every cell of the latent must ask every
# word: do you concern me? The asking is called attention; where cells ask words it is *cross-attention*. The same few lines also let cells ask each other, and
# words ask words: *self-attention* (Vaswani et al. 2017, eq. 1):
#
# $$\mathrm{attention}(q, k, v) = \mathrm{softmax}\left( \frac{q \, k^T}{\sqrt{d}} \right) v$$

# %% [markdown]
# ## Guess first
#
# The formula divides by $\sqrt{d}$, the square root of how many numbers a vector has. It is easily forgotten, and nothing crashes without it. What happens
# to pictures of a model that was trained with it, and is used without?
#
# 1. Nothing to speak of: softmax makes every row add up to 1 in any case.
# 2. The same things, drawn crudely.
# 3. No picture at all.

# %% [markdown]
# ## A lookup that mixes
#
# A Python `dict` finds the one key that equals what you ask for, and gives its value. Attention compares the question, the *query*, with all
# keys, and gives a mixture of all values: much of those whose keys point the same way as the query, little of the others. "The same way" is measured
# by the dot product, and softmax makes shares of the products: positive, and 1 in all.
#
# Here three keys stand in a plane, 120 degrees apart, and their values are colours. The query goes round.

# %%
import math
import time
from itertools import product

import torch
from einops import rearrange
from matplotlib import pyplot as plt

from lessons.common import picture_grid, start
from minidiff.attention import attention, naive_attention
from minidiff.blocks import SpatialTransformer
from minidiff.config import SD1
from minidiff.pipeline import to_images

lesson = start("04_attention_by_hand")


# %%
def towards(degrees):
    radians = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float32))
    return torch.stack([radians.cos(), radians.sin()], dim=-1)


angles = torch.arange(360)
key_angles = [0, 120, 240]
keys = towards(key_angles)  # [3, 2]
colours = torch.tensor([[213, 94, 0], [0, 158, 115], [0, 114, 178]])  # [3, 3]: red, green, blue
strips = []
for length in (1, 4, 16):
    shares = (length * towards(angles) @ keys.T).softmax(dim=-1)
    assert shares.shape == (360, 3) and torch.allclose(shares.sum(dim=-1), torch.ones(360))
    strips.append((shares @ colours.float()).round().to(torch.uint8).expand(60, 360, 3))
    print(f"query of length {length:2}: the largest share is {shares.max():.2f}")
print(f"keys at {key_angles} degrees")

# %%
fig, axes = plt.subplots(3, figsize=(6, 3.2), sharex=True)
for axis, strip, length in zip(axes, strips, (1, 4, 16)):
    axis.imshow(strip, extent=(0, 360, 0, 1), aspect="auto")
    axis.set(yticks=[], ylabel=f"length\n{length}", xticks=[0, 120, 240, 360])
    axis.grid(False)
axes[-1].set_xlabel("where the query points, in degrees")
lesson.show(fig, "lookup", "Soft mixtures for a short query, hard borders for a long one.")

# %% [markdown]
# A short query gets a mixture everywhere. A long one gets one value almost alone, and at a border it jumps from one to the next. So the *size* of the
# products decides between mixing and choosing. Keep that in mind for the $\sqrt{d}$.

# %% [markdown]
# ## Queries of cells, keys of words
#
# Now the real thing. The model draws a picture; a third of the way through we stop, run the U-Net once more, and catch what comes into its last
# cross-attention: `x`, one vector for each cell, and `context`, one vector for each word of the caption (lesson 09 makes them; strictly, for each *token*:
# a word, or a piece of a rare one). Three matrices that were learned turn them into queries, keys and values. D is the width of all these vectors, N counts
# cells, L words.

# %%
sd = lesson.load()
prompt = "a frog on a pink background"
steps = list(sd.denoise(prompt, steps=9 if lesson.quick else 24, seeds=[2]))
now = len(steps) // 3
print(f"stopped after {now + 1} of {len(steps)} steps")

# %%
context = sd.encode_prompts([prompt])
transformers = [m for m in sd.unet.modules() if isinstance(m, SpatialTransformer)]
layer = transformers[-1].blocks[0].cross_attention


@torch.no_grad()
def answer():
    t = torch.tensor([steps[now + 1].t], device=lesson.device)
    return sd.unet(steps[now].x_t, t, context)


caught = {}
hook = layer.register_forward_hook(lambda module, args, output: caught.update(x=args[0]))
answer()
hook.remove()
print(f"x {list(caught['x'].shape)}, context {list(context.shape)}")

# %%
with torch.no_grad():
    q, k, v = layer.to_q(caught["x"]), layer.to_k(context), layer.to_v(context)
B, N, D = q.shape
L = k.shape[1]
rows, columns = steps[now].x_t.shape[2:]
assert k.shape == v.shape == (B, L, D) and rows * columns == N
print(f"N = {N} queries, one for each of {rows} x {columns} cells; L = {L} keys; D = {D}")

# %% [markdown]
# ## Heads: several lookups side by side
#
# One lookup can ask one question. So the D numbers are cut into h *heads* of d numbers, and each head looks things up for itself, with a query and
# keys of its own: one may ask for the thing, another for its background. The axes are split by name (`einops.rearrange`), and the heads stand beside the batch, so that matrix
# products do them all at once.
#
# Each row of `weights` belongs to a cell, and holds the share of every word.

# %%
h = layer.heads
d = D // h
q_heads, k_heads = (rearrange(x, "B N (h d) -> B h N d", h=h) for x in (q, k))
logits = q_heads @ k_heads.transpose(-1, -2) / math.sqrt(d)  # every query with every key
weights = logits.softmax(dim=-1)

assert weights.shape == (B, h, N, L)
assert torch.allclose(weights.sum(dim=-1), torch.ones(B, h, N, device=lesson.device))
print(f"h = {h} heads of d = {d}: weights {list(weights.shape)}")

# %%
words = dict(sd.tokenizer.words(prompt))  # each word, and where its tokens stand among the L
picture = to_images(sd.decode(steps[-1].x_t))[0]
asked, heads_shown = ("frog", "pink", "background"), range(min(h, 2))
maps = {}
for head, word in product(heads_shown, asked):
    shares = weights[0, head, :, words[word]].sum(-1)
    maps[head, word] = rearrange(shares, "(H W) -> H W", H=rows)
    print(f"head {head}, {word}: {shares.mean():.2f} on average, {shares.max():.2f} at most")

# %%
grid = [[maps[head, word].cpu() for word in asked] for head in heads_shown]
grid = [[None if head else picture, *row] for head, row in zip(heads_shown, grid)]
fig = picture_grid(grid, ["picture", *asked], [f"head {head}" for head in heads_shown])
lesson.show(fig, "words", "A frog, and where two heads look at frog, pink and background.")

# %% [markdown]
# Bright is much, each map on a scale of its own. Nobody told the network which cells are frog: these maps fell out of learning to remove noise from captioned
# pictures. The heads have divided the work, which is why there are several.
#
# What remains is one line: `weights @ v` mixes the words' values for each cell, and the heads' answers are put side by side again.

# %% [markdown]
# ## Your turn: attend
#
# Write the whole formula. In come `q` of shape B N D and `k`, `v` of shape B L D; out goes B N D. Split the heads, compare, scale, softmax,
# mix, and merge the heads. `rearrange`, `math` and `torch` are at hand.


# %%
def attend(q, k, v, heads):
    """softmax(q k^T / sqrt(d)) v in each head; q [B, N, D], k and v [B, L, D], D = heads * d."""
    # YOUR CODE, about 6 lines


attend = lesson.check(attend, instead=naive_attention)
mixed = attend(q, k, v, h)
assert mixed.shape == (B, N, D)

# %% [markdown]
# ## Against the fused kernel
#
# The library itself uses these lines only to record maps. To make pictures it calls a *fused kernel*, one function on the processor that goes through the
# keys in blocks and never writes the N x L weights down (lesson 05 takes one apart). The answer is the same but for rounding. What differs is memory, and
# with it time: by hand the weights grow as N x L, and where cells ask cells L is N.


# %%
def milliseconds(function, *arguments):
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        function(*arguments)
        if lesson.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    return min(times)


assert torch.allclose(attend(q, k, v, h), attention(q, k, v, h), atol=1e-4)
print(f"largest difference: {(attend(q, k, v, h) - attention(q, k, v, h)).abs().max():.0e}")

# %%
heads, width = 8, 320  # of the first level of Stable Diffusion 1.x
sizes = [64, 256] if lesson.quick else [64, 128, 256, 512, 1024, 2048]
sizes += [4096, 8192] if lesson.device.type == "cuda" else []
generator = torch.Generator().manual_seed(0)
taken = {"by hand": [], "fused": []}
print("    N   by hand    fused   weights by hand")
for n in sizes:
    one = [torch.randn(1, n, width, generator=generator).to(lesson.device) for _ in range(3)]
    taken["by hand"].append(milliseconds(attend, *one, heads))
    taken["fused"].append(milliseconds(attention, *one, heads))
    naive, fused = taken["by hand"][-1], taken["fused"][-1]
    print(f"{n:5} {naive:6.1f} ms {fused:5.1f} ms {heads * n * n * 4 / 1e6:10.1f} MB")

# %%
fig, axis = plt.subplots()
for (label, ms), marker in zip(taken.items(), "os"):
    axis.loglog(sizes, ms, marker=marker, label=label)
axis.set(xlabel="cells N", ylabel="milliseconds", xticks=sizes, xticklabels=sizes)
axis.minorticks_off()
axis.legend()
lesson.show(fig, "fused", "Milliseconds against cells: by hand takes longer.")

# %% [markdown]
# ## Break it: forget the scale
#
# First with numbers that are drawn, not learned. The product of two vectors of d unit normals is a sum of d terms of variance 1, so its variance is d
# and its size about $\sqrt{d}$. Divided by $\sqrt{d}$ it has size 1 whatever d is. Without that, more numbers a head mean longer queries, and the strips above show
# what that does.

# %%
keys_asked, widths = 77, (8, 16, 40, 80, 160)  # 77 tokens: every caption of Stable Diffusion
largest = {"with the scale": [], "without": []}
for d_head in widths:
    one, other = (torch.randn(keys_asked, d_head, generator=generator) for _ in range(2))
    products = one @ other.T
    largest["with the scale"].append(float((products / d_head**0.5).softmax(-1).amax(-1).mean()))
    largest["without"].append(float(products.softmax(-1).amax(-1).mean()))
    size = products.std()
    print(f"d = {d_head}: products have size {size:.1f}, scaled {size / d_head**0.5:.1f}")

# %%
fig, axis = plt.subplots()
for (label, shares), marker in zip(largest.items(), "os"):
    axis.plot(widths, shares, marker=marker, label=label)
    print(f"{label}: largest of {keys_asked} shares {shares[0]:.2f} to {shares[-1]:.2f}")
axis.set(xlabel="numbers in a head, d", ylabel=f"largest of {keys_asked} shares")
axis.set(ylim=(0, 1), xticks=widths)
axis.legend()
lesson.show(fig, "scale", "Without the scale the largest share grows with d.")

# %% [markdown]
# With the scale a query mixes many words however wide the heads are. Without it, it takes one word and drops all others; softmax is then flat almost
# everywhere, and a network could hardly learn through it.
#
# Now the bundled model, which was trained with the scale. To leave it out is the same as making every query $\sqrt{d}$ times longer, so a hook
# on each `to_q` does it, and is taken away again.

# %%
prompts = [prompt, "a burger on a white background", "a cactus on an orange background"]
count = 8 if lesson.quick else 20
drawn = {"right": sd.generate(prompts, steps=count, seed=2)}
right = answer()

# %%
hooks = []
for transformer in transformers:
    for asking in (transformer.blocks[0].self_attention, transformer.blocks[0].cross_attention):
        root_d = (asking.to_q.out_features // asking.heads) ** 0.5
        longer = lambda module, args, out, root_d=root_d: out * root_d
        hooks.append(asking.to_q.register_forward_hook(longer))
drawn["without\nthe scale"] = sd.generate(prompts, steps=count, seed=2)
broken = answer()
for hook in hooks:
    hook.remove()

assert torch.equal(answer(), right)  # whole again
off = (broken - right).square().mean().sqrt() / right.square().mean().sqrt()
print(f"the U-Net's answer after {now + 1} steps is off by {off:.0%} of its size")

# %%
fig = picture_grid(list(drawn.values()), ["frog", "burger", "cactus"], list(drawn))
lesson.show(fig, "forgotten", "A frog, a burger, a cactus; below, crude ones without the scale.")

# %% [markdown]
# The second guess was right, for this model and these pictures: no lookup finds nothing, but each finds one thing too loudly. A mistake of this kind is
# hard to see in a picture and easy to see in a number, which is why minidiff compares every layer with the originals.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/04_attention_by_hand.py --model v1-5-pruned-emaonly.safetensors` draws the maps for a checkpoint that you have; its last cross-attention has
# 64 x 64 cells and 8 heads, whose maps are seldom as tidy as here. What its sizes mean for memory needs no weights:

# %%
unet = SD1.unet
side = SD1.image_size // SD1.vae.factor
print("cells asking cells at 512 x 512, weights in\nfloat16 if they were written down:")
for width, heads, has in zip(unet.widths, unet.heads, unet.attention):
    cells = side * side
    if has:
        megabytes = heads * cells**2 * 2 / 1e6
        print(f"{side:3} x {side}, {heads} heads of {width // heads:3}: {megabytes:6.1f} MB")
    side = (side + 1) // 2

# %% [markdown]
# The rows are the sizes that the latent has inside the U-Net, its *levels* (lesson 07). Each layer of the first one would write 268 MB for each picture, and
# read it again, and guidance doubles that. At twice the side it is 16 times as much. That is why every Stable Diffusion of today runs on fused attention.

# %% [markdown]
# ## On a GPU
#
# ```bash
# python lessons/04_attention_by_hand.py --device cuda
# ```
#
# One minute. The curves go on to 8192 cells. Expect both to be flat at first, where starting a kernel costs more than its work, and the gap to be wider at
# the end than on a processor: a GPU computes faster than it can write, and by hand nearly all time is spent on writing and reading weights.

# %% [markdown]
# ## What you now know
#
# - Attention compares a query with all keys and returns a mixture of the values, weighted by a softmax.
# - Cross-attention lets the cells of the picture ask the words; self-attention lets cells ask cells.
# - Heads are several lookups next to each other, each with d of the D numbers.
# - The division by $\sqrt{d}$ keeps the products at size one, so that the softmax still mixes.
# - A fused kernel returns the same numbers and never stores the attention weights.

# %% [markdown]
# ## Your guess
#
# The second answer is right for the bundled model: without the scale each lookup chooses one thing almost alone, so the pictures show the
# same subjects, drawn crudely. Nothing crashes, which makes this mistake hard to find.

# %% [markdown]
# ## Quiz
#
# 1. You double the number of tokens. By how much does the memory for the weights of self-attention grow by hand?
# 2. Why do all rows of the attention weights add up to one even with the wrong scale?
# 3. What is the query, and what are key and value, in cross-attention?
#
# <details><summary>Answers</summary>
#
# 1. By a factor of four: every token asks every token.
# 2. Because of the softmax. It hides the mistake: only how evenly the weights are spread changes.
# 3. Queries come from the cells of the picture, keys and values from the words.
#
# </details>

# %% [markdown]
# ## Now you
#
# The scale is one over the root of d. Multiply it by two, then by a half, with the hooks of the "Break it" section. Predict for each
# whether the attention maps become sharper or flatter and whether the pictures suffer more in the one direction or the other. Then look.

# %% [markdown]
# ## Read next
#
# - `minidiff/attention.py`: `attention_weights` and `naive_attention` are your six lines, with a mask for the text encoder, whose words look only at words before them
#   (lesson 09); `attention` chooses the kernel.
# - `minidiff/attention_maps.py` records the maps of all layers; lesson 10 follows them over the steps.
# - Vaswani et al. 2017, "Attention is all you need", section 3.2, with the reason for the scale in a footnote.
# - Lesson 05: the fused kernel, step by step.
