# %% [markdown]
# # 05 Fused attention: a kernel you can step through
#
# **How can softmax be taken over thousands of keys without ever writing the weights down?**
#
# - Explains: [minidiff/kernels/self_attention.py](../minidiff/kernels/self_attention.py)
# - You change: `absorb`, the step of the online softmax
# - Minutes: 40
# - Picture: [figures/05-running.png](figures/05-running.png)
#
# ![The whole pipeline; this lesson is about the attention layers of the U-Net](figures/pipeline-attention.svg)
#
# Lesson 04 wrote attention in six lines, which build a matrix with one weight for each query and key. Where cells ask cells it is by far the largest thing in the
# network. The fused kernel gives the same answer without it. This lesson finds out how: first with plain numbers, then in blocks, then in minidiff's own GPU
# kernel, which runs here line by line without a GPU. Its gradients are not treated.

# %% [markdown]
# ## Guess first
#
# A softmax share is $e^{s}$ divided by the sum of all $e^{s}$, where a *logit* $s$ is the scaled product of the query with one key. So it seems that all
# logits must be there before the first share is known. A kernel walks over the keys once, a few at a time, and forgets each block when it goes on. What must
# it keep for each query, to have the exact answer at the end?
#
# 1. Every logit, in fewer bits.
# 2. The answer so far, and two numbers.
# 3. It cannot be exact: the blocks before are an estimate.

# %% [markdown]
# ## Where the kernel runs
#
# A *kernel* is one function that a GPU runs as many copies at once, called *programs*, each with its own part of the work. minidiff's are written in *Triton*, a
# language inside Python. On a GPU Triton compiles them. On a machine without one its *interpreter* runs the same lines as ordinary Python on NumPy arrays: slowly, but
# one can look inside. Triton reads the variable `TRITON_INTERPRET` when a kernel is defined, so it must be set before anything imports Triton, and minidiff's
# attention does. That is why the next cell does it before the other imports.

# %%
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must come before the imports below

# %%
import inspect
import json
import math
import subprocess
import sys

import numpy as np
from einops import rearrange
from matplotlib import pyplot as plt

from lessons.common import BLUE, GREEN, ORANGE, picture_grid, start
from minidiff.attention import attention, attention_weights, naive_attention
from minidiff.blocks import TransformerBlock
from minidiff.config import SD1
from minidiff.kernels import tiles
from minidiff.kernels.self_attention import forward_kernel, fused_self_attention
from minidiff.pipeline import to_images

# %%
lesson = start("05_fused_attention")
has_triton = tiles.triton is not None  # Triton is made for Linux
fused = fused_self_attention if has_triton else attention
print("Triton is here" if has_triton else "no Triton here: PyTorch's kernel instead")
print(f"our kernels run on: {tiles.DEVICE}")

# %% [markdown]
# ## Softmax in one pass
#
# Nobody computes $e^{s}$ as it stands: in float32 it overflows before `s` is 89. One subtracts the largest logit $m$ first, which changes no share, because it divides all of them by the same
# $e^{m}$. But $m$ too is known only at the end. The way out (Milakov and Gimelshein 2018) is to take the largest *so far*, and to mend the sum whenever it
# changes. For each logit $s$ that comes in:
#
# $$m' = \max(m, s) \qquad l' = l \, e^{m - m'} + e^{s - m'}$$
#
# What was summed before is too large by the factor $e^{m' - m}$ if the largest has grown; multiplying by $e^{m - m'}$ mends it exactly.

# %%
print(f"e^88 in float32: {np.exp(np.float32(88)):.1e}")
with np.errstate(over="ignore"):
    print(f"e^89 in float32: {np.exp(np.float32(89))}")

logits = 1.5 * np.random.default_rng(173).standard_normal(48)
m, l, path = -np.inf, 0.0, []
for s in logits:
    m_new = max(m, s)
    l = l * np.exp(m - m_new) + np.exp(s - m_new)
    m = m_new
    path.append((m, l))

at_once = np.exp(logits - logits.max()).sum()
print(f"sum in one pass {l:.6f}, all at once {at_once:.6f}")
assert np.isclose(l, at_once)

# %%
fig, (above, below) = plt.subplots(2, sharex=True, figsize=(6, 4.2))
above.plot(logits, "o", color=GREEN, markersize=4, label="logit $s$")
above.step(range(48), [m for m, _ in path], where="post", label="largest so far, $m$")
above.set(ylabel="logit")
above.legend(loc="lower right", ncols=2, fontsize=11)
below.step(range(48), [l for _, l in path], where="post", color=ORANGE)
below.set(ylabel="sum $l$", xlabel="keys seen", ylim=(0, None))
lesson.show(fig, "running", "Where the largest logit jumps, the sum falls; else it grows.")

# %% [markdown]
# Where the blue line rises by much the sum falls back: all that was summed before shrinks against the new largest. In between it only grows. Two numbers have been
# kept, whatever the number of keys.

# %% [markdown]
# ## Your turn: absorb
#
# Now for N queries at once, a block of keys at a time, and with the values. Beside $m$ and $l$ each query keeps $O$, the sum so far of $e^{s - m} v$, d numbers;
# it must be mended as $l$ is. In comes `s`, the logits of all N queries with the keys of one block, shape `[N, block]`, and their values `v`, shape `[block, d]`
# (Dao 2023, the second FlashAttention paper, algorithm 1):
#
# $$m' = \max(m, \max_j s_j) \qquad \alpha = e^{m - m'} \qquad p = e^{s - m'}$$
#
# $$l' = \alpha \, l + \textstyle\sum_j p_j \qquad O' = \alpha \, O + p \, v$$
#
# `m` and `l` have shape `[N]`, so they need one axis more, `[:, None]`, where they meet `s` or `o`. Give back all three.


# %%
def absorb(m, l, o, s, v):
    """m', l', O' after one more block of keys; m, l [N], o [N, d], s [N, block], v [block, d]."""
    # YOUR CODE, about 5 lines


def all_before_as_one_key(m, l, o, s, v):
    """The same in another way: what was seen before counts as one key of logit m + log(l)."""
    before = (m + l.log())[:, None]
    total = torch.cat([before, s], dim=1).logsumexp(dim=1, keepdim=True)
    mean = o / l.clamp(min=1e-30)[:, None]
    o = (before - total).exp() * mean + (s - total).exp() @ v
    return total[:, 0], torch.ones_like(l), o


absorb = lesson.check(absorb, instead=all_before_as_one_key)

# %% [markdown]
# ## A walk over the keys
#
# With that step, attention is a loop. At the end $O / l$ is the answer. The kernel keeps one number more for each query, the *log-sum-exp*
# $\mathrm{LSE} = m + \log l$: from it the gradients get back any share they need, $e^{s - \mathrm{LSE}}$, without having stored one.


# %%
def walk(update, q, k, v, block):
    """Attention of one head, q [N, d], and its LSE [N]; `block` keys at a time."""
    d = q.shape[-1]
    m, l, o = torch.full_like(q[:, 0], -torch.inf), torch.zeros_like(q[:, 0]), torch.zeros_like(q)
    for first in range(0, len(k), block):
        s = q @ k[first : first + block].T / math.sqrt(d)
        m, l, o = update(m, l, o, s, v[first : first + block])
    return o / l[:, None], m + l.log()


# %%
generator = torch.Generator().manual_seed(0)
N, d = 64, 40
q, k, v = (torch.randn(N, d, generator=generator) for _ in range(3))
naive = naive_attention(q[None], k[None], v[None], heads=1)[0]
for block in (1, 16, 48):
    o, lse = walk(absorb, q, k, v, block)
    assert o.shape == (N, d) and lse.shape == (N,)
    print(f"blocks of {block:2}: off by at most {(o - naive).abs().max():.0e}")

# %% [markdown]
# Any block size gives the same but for rounding, also one that does not divide the keys. The second guess was right: this is no approximation.

# %% [markdown]
# ## The kernel
#
# `forward_kernel` is this loop. Each program has a block of queries and walks over all keys. These are its lines, read from the file itself; beside yours
# they have three things of the hardware's. Logits are kept in base two, as a GPU has an instruction for $2^x$ and none for $e^x$: the factor $\log_2 e$ is inside
# `scale`. `seen` puts $-\infty$ at keys that do not exist, where the last block is not full. And a head stands in two tiles, `_1` and `_2`, of which more below.

# %%
lines = inspect.getsource(getattr(forward_kernel, "fn", forward_kernel)).splitlines()
begin = next(i for i, line in enumerate(lines) if "# S = q k^T" in line)
end = next(i for i, line in enumerate(lines) if line.strip() == "m = m_new")
for line in lines[begin : end + 1]:
    print(line.strip().removesuffix("  # noqa: E741"))

# %% [markdown]
# In the interpreter these lines are Python, so whatever looks into Python looks into the kernel. A debugger stops at a `breakpoint()` written into it. Here
# Python's own hook for debuggers, `sys.settrace`, notes $m$ and $l$ of the first query each time the loop comes round.

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
assert out.shape == (N, d) and torch.allclose(out, naive, atol=1e-5)
print(f"the kernel is off by at most {(out - naive).abs().max():.0e}")
for first, (m, l) in noted.items():
    print(f"after the keys from {first:2} on: m = {m:.3f}, l = {l:.3f}")
if noted:
    kept = (m + math.log2(l)) * math.log(2)  # from base 2
    print(f"LSE of the kernel {kept:.5f}, of the walk {lse[0]:.5f}")
    assert abs(kept - lse[0]) < 1e-4

# %% [markdown]
# ## Memory and error
#
# What does an attention leave in memory beside its answer? By hand, N x N weights a head. The kernel leaves its LSE, N numbers a head; its blocks of weights live in
# registers, next to the arithmetic, and never reach the GPU's memory.
#
# The error is measured against the same in float64, relative to the size of the answer.

# %%
sizes = (32, 128) if lesson.quick else (32, 64, 128, 256, 512)
left = {"by hand": [], "kernel": []}
errors = {"by hand": [], "walk": [], "kernel": []}
for n in sizes:
    q, k, v = (torch.randn(1, n, d, generator=generator) for _ in range(3))
    exact = naive_attention(q.double(), k.double(), v.double(), 1)
    answers = (naive_attention(q, k, v, 1), walk(absorb, q[0], k[0], v[0], 32)[0][None])
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
lesson.show(fig, "cost", "Bytes: by hand grows as the square. Errors of all three are alike.")

# %% [markdown]
# Four times the tokens are sixteen times the bytes by hand, and four times in the kernel. The errors are those of float32, for all three.

# %% [markdown]
# ## The head-dim trap: 40 = 32 + 16
#
# Blocks in Triton have sides that are powers of two, and its matrix product wants at least 16 numbers a side. A head of Stable Diffusion 1.x has 40, 80 or 160
# numbers. Rounded up to a power of two, a good part of the work would be products with zero. So minidiff cuts a head in two, $q k^T = q_1 k_1^T + q_2 k_2^T$,
# and rounds up the rest only: of 40 numbers 32 stand in the first tile, and the other 8 in a second one of 16.

# %%
print("   d   power of two   two tiles   less work")
for head in (8, 32, 40, 64, 80, 160):
    first, rest = tiles.head_tiles(head)
    power = max(16, 1 << (head - 1).bit_length())
    print(f"{head:4}   {power:12}   {f'{first} + {rest}':>9}   {1 - (first + rest) / power:9.1%}")

# %% [markdown]
# The trap is another one, and no test of results can see it. Numbers lie in memory head after head, so each row of a head begins `d` numbers after the head
# before. A GPU loads 16 bytes, eight numbers of float16, in one go only if the compiler *knows* that they begin at a multiple of 16. If `d` is an argument
# like any other, it might be odd, so every single number is loaded by itself. Declared `tl.constexpr`, `d` is part of the program, and 40 is seen to be a
# multiple of 8.
#
# The compiler can be asked. It needs no GPU: below Triton compiles our kernel for an H100, a large GPU, in three ways, and the *PTX*, the GPU's assembler
# text, is searched for loads of two and of 16 bytes (Triton's `cp.async` copies in the background) and for matrix products. A process of its own does it, as
# this one has the interpreter on.

# %%
COMPILE = """
import json, math, re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from minidiff.kernels.self_attention import forward_kernel as kernel

at = {name: i for i, name in enumerate(kernel.arg_names)}
types = dict.fromkeys(("q", "k", "v", "out"), "*fp16") | {"lse": "*fp32"}
for D_1, D_2, is_known in ((32, 16, True), (64, 0, True), (32, 16, False)):
    known = dict(scale=math.log2(math.e) / math.sqrt(40), D_1=D_1, D_2=D_2, CAUSAL=False)
    known |= dict(EVEN=True, BLOCK_N=128, BLOCK_L=64) | ({"d": 40} if is_known else {})
    signature = {n: "constexpr" if n in known else types.get(n, "i32") for n in at}
    even = {(i,): [["tt.divisibility", 16]] for n, i in at.items() if n not in known and n != "d"}
"""

# %%
COMPILE += r"""
    source = ASTSource(kernel, signature, {(at[n],): known[n] for n in known}, even)
    options = dict(num_warps=8, num_stages=3, enable_fp_fusion=True)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = built.asm["ptx"]
    two = len(re.findall(r"ld\.global\S*\.[bu]16\b", ptx))
    sixteen = len(re.findall(r"ld\.global\S*\.v4\.|cp\.async\S*\.global .*(?:0x10|\b16)\b", ptx))
    shapes = re.findall(r"wgmma\.mma_async\S*\.m(\d+)n(\d+)k(\d+)\.", ptx)
    products = sum(math.prod(map(int, shape)) for shape in shapes)
    print(json.dumps([two, sixteen, products]))
"""
env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

# %%
command, said = [sys.executable, "-c", COMPILE], None
if has_triton:
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
ways = ("32 + 16,\nd known", "64,\nd known", "32 + 16,\nd an argument")
if said:
    counted = [json.loads(line) for line in said.stdout.splitlines()]
    for way, (two, sixteen, products) in zip(ways, counted):
        share = products / counted[1][2]
        print(f"{' '.join(way.split())}: products {share:.0%} of those with 64")
        print(f"    loads of 2 bytes: {two}, of 16 bytes: {sixteen}")
    assert counted[0][0] == 0 < counted[0][1] and counted[2][0] > 0 == counted[2][1]
    assert counted[0][2] < counted[1][2]
else:
    counted = [(0, 0, 0)] * 3

# %%
fig, axis = plt.subplots()
for i, (size, color, hatch) in enumerate((("2 bytes", ORANGE, "//"), ("16 bytes", BLUE, ""))):
    places = np.arange(3) + (i - 0.5) * 0.36
    heights = [each[i] for each in counted]
    bars = axis.bar(places, heights, 0.36, color=color, hatch=hatch, label=size)
    axis.bar_label(bars)
axis.set(xticks=range(3), xticklabels=ways, ylabel="loads in the PTX")
axis.grid(False)
axis.legend(title="each of")
lesson.show(fig, "trap", "Known, d is loaded 16 bytes at a time; as an argument, 2 at a time.")

# %% [markdown]
# Same results, same tests, and the third kernel asks memory for every number singly. `tests/kernels/test_compiled.py` counts like this for every shape of
# Stable Diffusion, so that nobody without a GPU can bring the trap back.

# %% [markdown]
# ## Break it: forget to mend
#
# The classic slip is to take the new largest logit and forget $\alpha$. The sums before then count too much, by $e^{m' - m}$. Both sums do, so every answer is
# still a mixture of values and nothing looks impossible. With one block it is even right.


# %%
def forgets(m, l, o, s, v):
    m_new = torch.maximum(m, s.amax(dim=1))
    p = (s - m_new[:, None]).exp()
    return m_new, l + p.sum(dim=1), o + p @ v


q, k, v = (torch.randn(256, d, generator=generator) for _ in range(3))
for length in (1, 4):  # longer queries: larger logits
    exact = naive_attention(length * q[None], k[None], v[None], 1)[0]
    for block in (256, 64, 16):
        off = (walk(forgets, length * q, k, v, block)[0] - exact).norm() / exact.norm()
        print(f"queries times {length}, {256 // block:2} blocks of {block:3}: off by {off:.0%}")

# %% [markdown]
# The smaller the blocks and the larger the logits, the worse. Now the bundled model: all of its self-attention layers, where cells ask cells, walk over their
# keys in sixteenths, mended and not.

# %%
sd = lesson.load()
layers = [m.self_attention for m in sd.unet.modules() if isinstance(m, TransformerBlock)]
prompts = ["a frog on a pink background", "a burger on a white background"]
steps = 6 if lesson.quick else 16


# %%
def drawn_with(update):
    def instead(layer, args, output):
        projected = (project(args[0]) for project in (layer.to_q, layer.to_k, layer.to_v))
        q, k, v = (rearrange(x, "B N (h d) -> (B h) N d", h=layer.heads) for x in projected)
        block = max(1, k.shape[1] // 16)
        o = torch.stack([walk(update, *head, block)[0] for head in zip(q, k, v)])
        return layer.to_out(rearrange(o, "(B h) N d -> B N (h d)", h=layer.heads))

    hooks = [layer.register_forward_hook(instead) for layer in layers]
    *_, last = sd.denoise(prompts, steps=steps, seeds=[2, 2])
    for hook in hooks:
        hook.remove()
    return last.x_t


# %%
*_, last = sd.denoise(prompts, steps=steps, seeds=[2, 2])
latents = {"fused": last.x_t, "walk": drawn_with(absorb), "not\nmended": drawn_with(forgets)}
for name, latent in latents.items():
    assert latent.shape == last.x_t.shape
    off = (latent - last.x_t).norm() / last.x_t.norm()
    print(f"{' '.join(name.split())}: the last latent is off by {off:.1%}")
assert (latents["walk"] - last.x_t).norm() < 0.01 * last.x_t.norm()

# %%
pictures = [to_images(sd.decode(latent)) for latent in latents.values()]
fig = picture_grid(pictures, ["frog", "burger"], list(latents))
lesson.show(fig, "forgotten", "Fused and walked pictures are alike; without mending they differ.")

# %% [markdown]
# The first two rows are the same pictures: a walk over the keys, and PyTorch's fused kernel. Below, cells look too much at the top of the picture, whose keys come
# first, and too little at the rest: the things are there, paler and out of shape. A picture alone would not have said what is wrong. The comparison with
# attention by hand, on small inputs and with several blocks, says it at once, and that is what the tests of the kernels are.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/05_fused_attention.py --model v1-5-pruned-emaonly.safetensors` repeats the pictures on a checkpoint that you have; the walk is slow there, so take
# `--quick` on a processor. What the kernel saves needs no weights. Per picture, in float16, one layer at 512 x 512:

# %%
unet = SD1.unet
side = SD1.image_size // SD1.vae.factor
print(f"at {SD1.image_size} x {SD1.image_size}:\n  cells     d   tiles      by hand       LSE")
for width, heads, has in zip(unet.widths, unet.heads, unet.attention):
    cells, head = side * side, width // heads
    first, rest = tiles.head_tiles(head)
    if has:
        naive, lse = heads * cells**2 * 2 / 1e6, heads * cells * 4 / 1e6
        print(f"{cells:7} {head:5} {f'{first} + {rest}':>9} {naive:8.1f} MB {lse:6.3f} MB")
    side = (side + 1) // 2

# %% [markdown]
# The LSE is kept for the gradients alone; it is a thousandth and less of the weights.

# %% [markdown]
# ## On a GPU
#
# ```bash
# python -m minidiff bench attention --device cuda --sizes 512 --models sd1
# ```
#
# 10 minutes. It runs our kernels beside PyTorch's own at every shape of a U-Net step, checks each against float64 first, and then lets them take turns. Expect "by hand" to be
# far behind at 4096 tokens and to fill the memory, and the fused ones to be close to each other. This lesson itself runs with `--device cuda` too; the
# kernel is compiled then, and there is nothing to step through.

# %% [markdown]
# ## Read next
#
# - `minidiff/kernels/self_attention.py`: `forward_kernel` is the walk, `load_head` the two tiles; `dk_dv_kernel` and `dq_kernel` compute the shares again from the LSE.
#   `cross_attention.py` beside it has so few keys that one block holds them all: no walk at all.
# - `tests/kernels/test_compiled.py`: the loads of every shape, counted.
# - Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3; Dao et al. 2022, "FlashAttention"; Dao 2023, "FlashAttention-2", algorithm 1.
# - Lesson 06: the other half of the U-Net, residual blocks and the time.
