# %% [markdown]
# # 05 Fused attention: a kernel you can step through
#
# **How can softmax be taken over thousands of keys without ever storing the weights?**
#
# - Explains: [minidiff/kernels/self_attention.py](../minidiff/kernels/self_attention.py)
# - You change: `running_softmax`, `absorb` and `attend_in_blocks`, from one number at a time to whole blocks of keys
# - Minutes: 45
# - Picture: [figures/05-running.png](figures/05-running.png)
#
# ![The whole pipeline; this lesson is about the attention layers of the U-Net](figures/pipeline-attention.svg)
#
# Attention by hand, as in lesson 04, builds a matrix with one weight for each query and key. In self-attention this matrix is by far the
# largest tensor of the whole network. A fused kernel returns the same answer without storing it. In this lesson you write the algorithm
# behind it, first for plain numbers, then for blocks of keys. Then you look inside minidiff's own GPU kernel, which runs here line by line
# without a GPU. The gradients are left out.

# %% [markdown]
# ## Guess first
#
# A *logit* $s$ is the scaled product of a query with one key. Softmax turns it into a share: $e^s$ divided by the sum of $e^s$ over all
# keys. It seems that all logits must be known before the first share is. A fused kernel goes through the keys once, a few at a time, and
# forgets them again. What must it keep for each query so that the answer is exact at the end?
#
# 1. Every logit, with fewer bits each.
# 2. The answer so far, and two numbers.
# 3. Nothing can make it exact. The result is an estimate.

# %% [markdown]
# ## Softmax in one pass
#
# Begin with the sum of all $e^s$. Nobody computes it as it stands, because exponentials overflow: in float32, $e^{88}$ is still a number
# and $e^{89}$ is not. The remedy is to subtract the largest logit $m$ from all logits first. This divides every term, and so the sum, by
# the same $e^m$, and no share changes.
#
# But $m$ is known only at the end. Therefore we use the largest logit *so far*, and correct the sum whenever a larger one comes (Milakov
# and Gimelshein 2018, algorithm 3). With $l$ for the sum so far, each new logit $s$ gives
#
# $$m' = \max(m, s) \qquad l' = l \, e^{m - m'} + e^{s - m'}$$
#
# All terms in $l$ were divided by $e^m$, and from now on they should be divided by $e^{m'}$. Multiplying $l$ by $e^{m - m'}$ does exactly
# that. We say that the sum is *rescaled*. Where the largest logit stays the same, the factor is one.

# %%
from lessons import interpreter  # noqa: F401  # isort: skip  (before anything that imports Triton)
import math

import numpy as np
import torch
from einops import rearrange
from matplotlib import pyplot as plt

from lessons.common import BLUE, GREEN, ORANGE, picture_grid, start
from minidiff.attention import attention, attention_weights, naive_attention
from minidiff.blocks import TransformerBlock
from minidiff.config import SD1
from minidiff.pipeline import to_images

lesson = start("05_fused_attention")
sd = lesson.load()

# %% [markdown]
# ## Your turn: running_softmax
#
# Write this pass over a list of plain numbers as a generator. At first nothing has been seen: `m = -math.inf` and `l = 0.0`. For each logit
# compute the new largest one with `max`. Rescale `l` and add the new term (`math.exp`), while `m` is still the old one. Then let `m` be the
# new largest, and `yield m, l`. The first step needs no special case, because `math.exp(-math.inf)` is zero.
#
# When it is right, you see the same logits in three different orders.


# %%
def running_softmax(logits):
    """Yield m and l after each of the logits, a list of numbers."""
    # YOUR CODE, about 6 lines


running_softmax = lesson.check(running_softmax)

# %%
print(f"e^88 in float32: {np.exp(np.float32(88)):.1e}")
with np.errstate(over="ignore"):
    print(f"e^89 in float32: {np.exp(np.float32(89))}")

logits = 1.5 * np.random.default_rng(173).standard_normal(48)
path = list(running_softmax(logits.tolist()))
in_one_pass, at_once = path[-1][1], np.exp(logits - logits.max()).sum()
print(f"the sum in one pass {in_one_pass:.6f}, all at once {at_once:.6f}")
assert len(path) == len(logits) and np.isclose(in_one_pass, at_once)

# %%
fig, (above, below) = plt.subplots(2, sharex=True, figsize=(6, 4.2))
above.plot(logits, "o", color=GREEN, markersize=4, label="logit $s$")
above.step(range(48), [m for m, _ in path], where="post", label="largest so far, $m$")
above.set(ylabel="logit")
above.legend(loc="lower right", ncols=2, fontsize=11)
below.step(range(48), [l for _, l in path], where="post", color=ORANGE)
below.set(ylabel="sum $l$", xlabel="keys seen", ylim=(0, None))
lesson.show(fig, "running", "The sum grows key by key; it falls where the maximum jumps far.")

# %% [markdown]
# Where the blue line makes a large jump, the sum falls: compared with the new largest logit, everything before it has become small. Where
# the line is flat, the sum only grows. At each moment two numbers are enough, however many keys there are.

# %% [markdown]
# ## Your turn: absorb
#
# Attention does not return the sum but a mixture of the values $v_j$: $\sum_j e^{s_j - m} \, v_j$ divided by $l$. The numerator is a
# running sum as well, so we keep it too, under the name $O$, and rescale it like $l$. A GPU is best at products of matrices. Therefore it
# takes N queries at once, and the keys in blocks.
#
# Write one step, which takes in one block of keys. `s` holds the logits of the N queries with these keys, shape `[N, block]`, and `v` the
# values of the keys, shape `[block, d]`. Each query has its own $m$, $l$ and row of $O$ (Dao 2023, algorithm 1):
#
# $$m' = \max(m, \max_j s_j) \qquad \alpha = e^{m - m'} \qquad p = e^{s - m'}$$
#
# $$l' = \alpha \, l + \textstyle\sum_j p_j \qquad O' = \alpha \, O + p \, v$$
#
# `s.amax(dim=1)` is the largest logit of each row, and `torch.maximum` compares two tensors entry by entry. `m` and `l` have shape `[N]`,
# so they need another axis, `[:, None]`, where they meet `s` or `o`. Return all three.


# %%
def absorb(m, l, o, s, v):
    """m', l', O' after a block of keys; m, l [N], o [N, d], s [N, block], v [block, d]."""
    # YOUR CODE, about 4 lines


absorb = lesson.check(absorb)

# %% [markdown]
# ## Your turn: attend_in_blocks
#
# With that step, attention is a loop. Write it for one head. Before the first block, `m` is $-\infty$ for each query, which
# `torch.full_like(q[:, 0], -torch.inf)` gives, and `l` and `o` are zero (`torch.zeros_like`). Let `first` go through
# `range(0, len(k), block)`. The keys of a block are `k[first : first + block]`, and its values the same rows of `v`; the last block may be
# shorter. Compute the logits of the block, $q k^T / \sqrt d$, and call `step`, which is `absorb` or another function like it. After the
# last block the answer is $O / l$.
#
# Return a second tensor as well, the *log-sum-exp* of each query, $\mathrm{LSE} = m + \log l$. With it, any share can be restored later, as
# $e^{s - \mathrm{LSE}}$. The computation of the gradients does so, and no share has to be stored for it. Six lines.


# %%
def attend_in_blocks(step, q, k, v, block):
    """Attention of one head and its LSE; q [N, d], k and v [L, d] -> [N, d] and [N]."""
    # YOUR CODE, about 6 lines


attend_in_blocks = lesson.check(attend_in_blocks)

# %%
generator = torch.Generator().manual_seed(0)
N, d = 64, 40
q, k, v = (torch.randn(N, d, generator=generator) for _ in range(3))
by_hand = naive_attention(q[None], k[None], v[None], heads=1)[0]  # lesson 04's
for block in (1, 16, 48):
    o, lse = attend_in_blocks(absorb, q, k, v, block)
    assert o.shape == by_hand.shape == (N, d) and lse.shape == (N,)
    print(f"blocks of {block:2} keys: off by at most {(o - by_hand).abs().max():.0e}")

# %% [markdown]
# The size of the blocks does not matter, even if the last block is not full. What is left is rounding. This is not an approximation.

# %% [markdown]
# ## A kernel in Triton
#
# A *kernel* is a function that a GPU runs in many copies at once, called *programs*, each on its own part of the data. The kernels of
# minidiff are written in *Triton*, a language inside Python. On a GPU, Triton compiles them. Without a GPU, its *interpreter* runs the same
# lines as ordinary Python on NumPy arrays: slowly, but you can look inside. The interpreter has to be turned on before Triton is imported,
# which the first line of the set-up did.
#
# `forward_kernel` is your loop. Each program holds a block of queries and goes through all the keys. The next cell prints its lines from
# the file itself.

# %%
import inspect
import sys

from minidiff.kernels import tiles
from minidiff.kernels.self_attention import forward_kernel, fused_self_attention

# %%
has_triton = tiles.triton is not None  # Triton is made for Linux
fused = fused_self_attention if has_triton else attention
print("Triton is here" if has_triton else "no Triton here: PyTorch's kernel instead")
print(f"our kernels run on: {tiles.DEVICE}")

lines = inspect.getsource(getattr(forward_kernel, "fn", forward_kernel)).splitlines()
begin = next(i for i, line in enumerate(lines) if "# S = q k^T" in line)
end = next(i for i, line in enumerate(lines) if line.strip() == "m = m_new")
for line in lines[begin : end + 1]:
    print(line.strip())

# %% [markdown]
# These are the lines of `absorb`, with three additions for the hardware. A GPU has an instruction for $2^x$ and none for $e^x$, so logits
# are kept in base two: `scale` is $\log_2 e / \sqrt d$. It is multiplied in after the maximum, which it does not move. `seen` puts
# $-\infty$ in place of keys that do not exist, because every block has its full size here. And each head is cut into two parts, `_1` and
# `_2`; more on these below.
#
# In the interpreter, a kernel is Python, so any tool that looks into Python looks into the kernel. You could write `breakpoint()` between
# these lines. We use `sys.settrace`, through which debuggers work: Python calls our function `look` at each line, and `look` notes $m$ and
# $l$ of the first query.

# %%
where = torch.device(tiles.DEVICE) if has_triton else torch.device("cpu")
noted = {}


def look(frame, event, arg):
    names = frame.f_locals
    if "alpha" in names and int(names["start"].handle.data[0]) == 0:  # the first program's
        m, l, keys = (names[name].handle.data for name in ("m", "l", "keys"))
        noted[int(keys[0])] = float(m[0]), float(l[0])
    return look


if has_triton and where.type == "cpu":
    is_kernel = lambda frame: frame.f_code.co_name == "forward_kernel"
    sys.settrace(lambda frame, event, arg: look if is_kernel(frame) else None)
out = fused(q[None].to(where), k[None].to(where), v[None].to(where), 1)[0].cpu()
sys.settrace(None)

# %%
assert out.shape == (N, d) and torch.allclose(out, by_hand, atol=1e-5)
print(f"the kernel is off by at most {(out - by_hand).abs().max():.0e}")
for first, (m, l) in noted.items():
    print(f"after the keys from {first:2} on: m = {m:.3f}, l = {l:.3f}")
if noted:
    natural = (m + math.log2(l)) * math.log(2)  # from base 2
    print(f"LSE of the kernel {natural:.5f}, of your loop {lse[0]:.5f}")
    assert abs(natural - lse[0]) < 1e-4

# %% [markdown]
# ## Memory and error
#
# What does attention leave in memory besides its answer? By hand, it leaves N x N weights in each head. The kernel leaves its LSE, N
# numbers in each head. Its blocks of weights live in registers, right next to the arithmetic, and never reach the GPU's memory.
#
# We measure the error of each way against the same computation in float64, relative to the size of the answer.

# %%
sizes = (32, 128) if lesson.quick else (32, 64, 128, 256, 512)
left = {"by hand": [], "kernel": []}
errors = {"by hand": [], "in blocks": [], "kernel": []}
for n in sizes:
    q, k, v = (torch.randn(1, n, d, generator=generator) for _ in range(3))
    exact = naive_attention(q.double(), k.double(), v.double(), 1)
    answers = (naive_attention(q, k, v, 1), attend_in_blocks(absorb, q[0], k[0], v[0], 32)[0][None])
    answers += (fused(q.to(where), k.to(where), v.to(where), 1).cpu(),)
    for name, answer in zip(errors, answers):
        errors[name].append(float((answer - exact).norm() / exact.norm()))
    left["by hand"].append(attention_weights(q, k, 1).nbytes)
    left["kernel"].append(4 * n)  # LSE, float32
    print(f"N = {n:3}: by hand {left['by hand'][-1]:9,} bytes, kernel {left['kernel'][-1]:5,}")
assert max(map(max, errors.values())) < 1e-5

# %%
fig, (memory, error) = plt.subplots(1, 2, figsize=(6, 3.4))
for name, marker, color in (("by hand", "o", BLUE), ("kernel", "s", ORANGE)):
    memory.loglog(sizes, left[name], marker=marker, color=color, label=name)
for (name, values), marker, color in zip(errors.items(), "o^s", (BLUE, GREEN, ORANGE)):
    error.loglog(sizes, values, marker=marker, color=color, label=name)
for axis in (memory, error):
    axis.set(xlabel="tokens N", xticks=sizes[::2], xticklabels=sizes[::2])
    axis.minorticks_off()
    axis.legend(fontsize=11)
memory.set(ylabel="bytes left in memory")
error.set(ylabel="relative error", ylim=(1e-8, 1e-5))
lesson.show(fig, "cost", "By hand, memory grows with the square of N. The errors are alike.")

# %% [markdown]
# Four times as many tokens take sixteen times the bytes by hand, and four times the bytes in the kernel. All three errors are of the size
# of float32's rounding.

# %% [markdown]
# ## The head-dim trap: 40 = 32 + 16
#
# The blocks of Triton have sides that are powers of two, and its matrix product needs at least 16 numbers on each side. The heads of
# Stable Diffusion 1.x are 40, 80 or 160 numbers wide. If we rounded the width up to a power of two, much of the work would be multiplying
# by zero. Instead, minidiff cuts a head into two *tiles*, $q k^T = q_1 k_1^T + q_2 k_2^T$, and rounds up only the second. Of 40 numbers, 32
# go into the first tile and the other 8 into a second tile of 16.

# %%
print("   d   power of two   two tiles   less work")
for head in (8, 32, 40, 64, 80, 160):
    first, rest = tiles.head_tiles(head)
    power = max(16, 1 << (head - 1).bit_length())
    print(f"{head:4}   {power:12}   {f'{first} + {rest}':>9}   {1 - (first + rest) / power:9.1%}")

# %% [markdown]
# There is a trap behind this, and no test of results can find it. The heads of a token lie in memory one after the other, so each head
# begins `d` numbers after the head before. A GPU can load 16 bytes, eight numbers of float16, with one instruction, but only if the
# compiler *knows* that the address is a multiple of 16. If `d` is an ordinary argument of the kernel, it might be odd, and every number has
# to be loaded by itself. Declared as `tl.constexpr`, `d` is part of the program, and the compiler sees that 40 is a multiple of 8.
#
# We can ask the compiler, and this needs no GPU. `lessons/ptx.py` lets Triton compile our kernel for a large GPU, an H100, in three ways,
# and searches the *PTX*, the GPU's assembler text, for loads of two bytes, loads of 16 bytes, and matrix products.

# %%
from lessons.ptx import Counted, count_instructions

ways = ("32 + 16,\nd known", "64,\nd known", "32 + 16,\nd an argument")
found = count_instructions() if has_triton else [Counted(0, 0, 0)] * 3
if has_triton:
    for way, counted in zip(ways, found):
        share = counted.products / found[1].products
        print(f"{' '.join(way.split())}: products {share:.0%} of those with 64")
        print(f"    loads of 2 bytes: {counted.loads_of_2}, of 16 bytes: {counted.loads_of_16}")
    assert found[0].loads_of_2 == 0 < found[0].loads_of_16
    assert found[2].loads_of_16 == 0 < found[2].loads_of_2
    assert found[0].products < found[1].products

# %%
fig, axis = plt.subplots()
heights = {"2 bytes": [c.loads_of_2 for c in found], "16 bytes": [c.loads_of_16 for c in found]}
for i, (label, color, hatch) in enumerate((("2 bytes", ORANGE, "//"), ("16 bytes", BLUE, ""))):
    places = np.arange(3) + (i - 0.5) * 0.36
    bars = axis.bar(places, heights[label], 0.36, color=color, hatch=hatch, label=label)
    axis.bar_label(bars)
axis.set(xticks=range(3), xticklabels=ways, ylabel="loads in the PTX")
axis.grid(False)
axis.legend(title="each of")
lesson.show(fig, "trap", "A known d is loaded 16 bytes at a time; an argument, 2 at a time.")

# %% [markdown]
# The third kernel returns the same results, passes the same tests, and loads every number by itself. The test
# `tests/kernels/test_compiled.py` counts loads like this for every shape of Stable Diffusion, so that nobody without a GPU can bring the
# trap back.

# %% [markdown]
# ## Break it: forget to rescale
#
# The classic slip is to take the new largest logit and forget $\alpha$. The terms from before then count too much, by the factor
# $e^{m' - m}$. They count too much in $l$ and in $O$ alike, so every answer is still a mixture of values, and nothing looks impossible.
# With a single block the answer is even right.


# %%
def forgets(m, l, o, s, v):
    m_new = torch.maximum(m, s.amax(dim=1))
    p = (s - m_new[:, None]).exp()
    return m_new, l + p.sum(dim=1), o + p @ v


q, k, v = (torch.randn(256, d, generator=generator) for _ in range(3))
for length in (1, 4):  # longer queries: larger logits
    exact = naive_attention(length * q[None], k[None], v[None], 1)[0]
    for block in (256, 64, 16):
        off = (attend_in_blocks(forgets, length * q, k, v, block)[0] - exact).norm() / exact.norm()
        print(f"queries times {length}, {256 // block:2} blocks of {block:3}: off by {off:.0%}")

# %% [markdown]
# The error grows with the number of blocks and with the size of the logits. Next, the bundled model: we replace all of its self-attention
# layers by your loop, in blocks of a sixteenth of the keys, once with `absorb` and once with the slip.

# %%
layers = [m.self_attention for m in sd.unet.modules() if isinstance(m, TransformerBlock)]
prompts = ["a frog on a pink background", "a burger on a white background"]
steps = 6 if lesson.quick else 16


def last_latents():
    *_, last = sd.denoise(prompts, steps=steps, seeds=[2, 2])
    return last.x_t


# %%
def in_blocks(step):
    """A hook that computes a self-attention layer again, in blocks of its keys."""

    def instead(layer, args, output):
        projected = (project(args[0]) for project in (layer.to_q, layer.to_k, layer.to_v))
        q, k, v = (rearrange(x, "B N (h d) -> (B h) N d", h=layer.heads) for x in projected)
        block = max(1, k.shape[1] // 16)
        o = torch.stack([attend_in_blocks(step, *head, block)[0] for head in zip(q, k, v)])
        return layer.to_out(rearrange(o, "(B h) N d -> B N (h d)", h=layer.heads))

    return instead


latents = {"fused": last_latents()}
for name, step in (("in blocks", absorb), ("not\nrescaled", forgets)):
    hooks = [layer.register_forward_hook(in_blocks(step)) for layer in layers]
    latents[name] = last_latents()
    for hook in hooks:
        hook.remove()

# %%
right = latents["fused"]
for name, latent in latents.items():
    assert latent.shape == right.shape
    off = (latent - right).norm() / right.norm()
    print(f"{' '.join(name.split())}: the last latent is off by {off:.1%}")
assert (latents["in blocks"] - right).norm() < 0.01 * right.norm()

pictures = [to_images(sd.decode(latent)) for latent in latents.values()]
fig = picture_grid(pictures, ["frog", "burger"], list(latents))
lesson.show(fig, "forgotten", "Fused and in blocks, the same pictures; not rescaled, damaged ones.")

# %% [markdown]
# The first two rows are the same pictures: one from PyTorch's fused kernel, one from your loop. In the last row every cell looks too much
# at the top of the picture, whose keys come first, and too little at the rest. Nothing crashed, and from a picture alone nobody could tell
# what is wrong. A comparison with attention by hand tells it at once, on small inputs and with more than one block. That is how the kernels
# of minidiff are tested.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/05_fused_attention.py --model v1-5-pruned-emaonly.safetensors` repeats the pictures with a checkpoint of yours. A loop in
# Python is slow there, so add `--quick` on a processor. What the kernel saves can be computed without any weights. In float16, for each
# layer and each picture of 512 x 512:

# %%
unet = SD1.unet
side = SD1.image_size // SD1.vae.factor
print(f"at {SD1.image_size} x {SD1.image_size}:\n  cells     d   tiles      by hand       LSE")
for width, heads, has in zip(unet.widths, unet.heads, unet.attention):
    cells, head = side * side, width // heads
    first, rest = tiles.head_tiles(head)
    if has:
        by_hand, lse = heads * cells**2 * 2 / 1e6, heads * cells * 4 / 1e6
        print(f"{cells:7} {head:5} {f'{first} + {rest}':>9} {by_hand:8.1f} MB {lse:6.3f} MB")
    side = (side + 1) // 2

# %% [markdown]
# Only training needs the LSE. At the largest size it takes less than a thousandth of the bytes of the weights.

# %% [markdown]
# ## On a GPU
#
# ```bash
# python -m minidiff bench attention --device cuda --sizes 512 --models sd1
# ```
#
# 10 minutes. This compares our kernels with PyTorch's own at every shape of a U-Net step: it checks each against float64 first, and then
# measures them in turns. Expect "by hand" to be far behind at 4096 tokens and to fill the memory, and the fused ones to be close to each
# other. The lesson itself runs with `--device cuda` too. The kernel is then compiled, and there is nothing to step through.

# %% [markdown]
# ## What you now know
#
# - Softmax can be computed in one pass over the keys: keep the largest logit so far and the sum so far.
# - When the largest logit grows, multiply what was summed before by $e^{m - m'}$. The result is exact.
# - Fused attention does this for blocks of keys and for the sum of the values too, so the N x N weights are never stored.
# - The log-sum-exp, one number for each query, is enough to restore any share for the gradients.
# - Equal results do not mean equal speed: what a compiler knows about a width decides how it loads.

# %% [markdown]
# ## Your guess
#
# The second answer is right: the answer so far, before it is divided, and the two numbers $m$ and $l$. The third describes what you get if
# you forget to rescale, as in "Break it".

# %% [markdown]
# ## Quiz
#
# 1. The logits come in rising order. How often is the sum rescaled? And in falling order?
# 2. Why does forgetting $\alpha$ do no harm when all keys fit into one block?
# 3. Two halves of the keys were processed apart, each with its own $m$, $l$ and $O$. How do you combine them?
#
# <details><summary>Answers</summary>
#
# 1. In rising order at every key. In falling order never after the first one: the largest logit comes first.
# 2. Before the first block $l$ and $O$ are zero, so there is nothing to rescale.
# 3. Take the larger $m$ as $m'$, multiply $l$ and $O$ of each half by $e^{m - m'}$ with its own $m$, and add. Long sequences can be split
#    among programs in this way.
#
# </details>

# %% [markdown]
# ## Now you
#
# Write a step that subtracts no maximum: let its $m'$ be zero every time, so that nothing has to be rescaled. Predict how large the logits
# must become before the answer stops being a number. Then pass the step to `attend_in_blocks`, make the queries of "Break it" longer and
# longer, and find the first length at which the answer is not finite. Compare the largest logit at that length with the overflow at
# the beginning of this lesson.

# %% [markdown]
# ## Read next
#
# - `minidiff/kernels/self_attention.py`: `forward_kernel` is your loop, and `load_head` cuts a head into its tiles. `dk_dv_kernel` and
#   `dq_kernel` compute the shares again from the LSE. `cross_attention.py`, in the same folder, has so few keys that a single block holds
#   them all.
# - `tests/kernels/test_compiled.py`: the loads of every shape, counted.
# - Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3; Dao et al. 2022, "FlashAttention"; Dao 2023,
#   "FlashAttention-2", algorithm 1.
# - Lesson 06: the other half of the U-Net, residual blocks and the time.
