# %% [markdown]
# # 14 LoRA
#
# **How small can a change be that teaches a model something new?**
#
# - Explains: [minidiff/adapters/lora.py](../minidiff/adapters/lora.py)
# - You change: `cut_off`, `low_rank` and `first_factors`: a change made small, added, and begun
# - Minutes: 45
# - Picture: [figures/14-ranks.png](figures/14-ranks.png)
#
# ![The whole pipeline; this lesson is about small changes of the weights](figures/pipeline-adapters.svg)
#
# A model that has seen millions of pictures has not seen your cat. To teach it, we train it a little longer on a few pictures, which is
# called *fine-tuning*. That changes the whole model, so a second cat needs a second copy, gigabytes for each. *LoRA*, low-rank adaptation,
# stores only the change, and keeps it small. This lesson measures how small.

# %% [markdown]
# ## Guess first
#
# We are about to fine-tune every matrix in the U-Net's *transformers* on five pictures of one animal. Those are the layers in which the
# cells of the picture look at each other and at the words (lesson 04), with the layers around them. Afterwards each matrix differs from its
# old self by another matrix, the change. Any change of 160 x 160 numbers is a sum of 160 *rank-1 terms*, each a column times a row, sorted
# by strength. How many terms of each matrix do you need before the pictures look like those of the whole change?
#
# 1. One.
# 2. Fewer than ten.
# 3. Most of them.

# %% [markdown]
# ## Five pictures, and a judge
#
# The bundled model was never shown a tiger. It knows lions, so we call the animal "sks lion": `sks` is a rare token that means nothing to
# the model, and `lion` says what kind of thing it is. Lesson 15 is about that name.
#
# A second network, the *judge*, tells us how well it works. It was trained on scenes of all subjects, tigers included, and names what it
# sees. Inside, it describes a picture by a vector of numbers, its *features*, and similar pictures get vectors of similar direction. The
# `likeness` below is the mean cosine between the features of generated pictures and those of the five.

# %%
from dataclasses import replace

import numpy as np
import torch

from lessons.common import curves, picture_grid, start
from lessons.subject import Subject
from minidiff.pipeline import to_images

lesson = start("14_lora")
sd, tuned = lesson.load(), lesson.load()  # one stays as it is, the other one is fine-tuned

# %%
size = sd.config.image_size
tiger = Subject.load("tiger", class_word="lion", lesson=lesson, size=size)
assert tiger.pixels.shape == (5, 3, size, size)

# %%
colours = ("red", "white", "blue", "green")[: 1 if lesson.quick else 4]
prompts = [f"a sks lion on a {colour} background" for colour in colours]
drawing_steps = 3 if lesson.quick else 10
before, verdict_before = tiger.draw(sd, prompts, drawing_steps)
print(f"the five pictures:  {tiger.verdict(tiger.pixels)}")
print(f"generated before:   {verdict_before}")
fig = picture_grid([to_images(tiger.pixels), before], labels=["five\ntigers", "generated\nbefore"])
lesson.show(fig, "five", "Five tigers; below, what the model generates for a sks lion.")

# %% [markdown]
# ## Change everything
#
# First without saving anything: every number of every matrix may move. This is plain training as in lesson 12, on five pictures with one
# caption, "a photo of a sks lion". $W_0$ is a matrix before training, $W$ the same matrix after it, and $\Delta W = W - W_0$ is the change.

# %%
import re

from minidiff.adapters.layers import choose, layers_of
from minidiff.adapters.lora import PATTERNS
from minidiff.trainers.methods.table import METHODS, preset

names = choose(list(layers_of(sd)), PATTERNS["transformer"])
options = preset("fine-tune", "bundled")
settings = replace(options.settings, steps=2 if lesson.quick else 70, batch=4)
weights = tuple(f"^{re.escape(name)}\\.weight$" for name in names)
options = replace(options, settings=settings, weights=weights)
training = METHODS["fine-tune"].build(tuned, [tiger.concept], options)
losses = [float(step.loss) for _, step in training.run(lesson.device)]
after, verdict_after = tiger.draw(tuned, prompts, drawing_steps)
print(f"{len(names)} matrices, {len(losses)} steps of {settings.batch} pictures")
print(f"generated after: {verdict_after}")

# %%
W0, W = layers_of(sd), layers_of(tuned)
with torch.no_grad():
    changes = {name: (W[name].weight - W0[name].weight).flatten(1).cpu() for name in names}
sizes = [float(dW.norm() / W0[name].weight.norm()) for name, dW in changes.items()]
numbers = sum(dW.numel() for dW in changes.values())
print(f"{numbers:,} numbers moved, {4 * numbers / 1e6:.1f} MB in float32")
print(f"a matrix moved by {np.mean(sizes):.1%} of its size on average")

# %% [markdown]
# ## The spectrum of the change
#
# The singular value decomposition (SVD) writes any matrix as a sum of rank-1 terms:
#
# $$\Delta W = \sum_i s_i \; u_i v_i^\top \qquad s_1 \ge s_2 \ge \dots$$
#
# The columns $u_i$ have length 1 and are orthogonal to each other, and so are the rows $v_i^\top$. The strengths $s_i$ are the *singular
# values*; all of them together are the spectrum. The number of terms with $s_i > 0$ is the *rank* of the matrix. If a few singular values
# are much larger than the rest, a few terms make up nearly the whole change. The energy kept by the first r terms is the sum of their
# squares, $s_1^2 + \dots + s_r^2$, divided by the sum of all squares, which equals the sum of the squares of the matrix's entries. A random
# matrix serves for comparison.

# %%
largest = max(min(dW.shape) for dW in changes.values())  # only matrices of this size
kept_by_change, kept_by_random = [], []
generator = torch.Generator().manual_seed(0)
for dW in changes.values():
    if min(dW.shape) == largest:
        random = torch.randn(dW.shape, generator=generator)
        for matrix, kept in ((dW, kept_by_change), (random, kept_by_random)):
            s = torch.linalg.svdvals(matrix)
            kept.append(s.square().cumsum(0) / s.square().sum())
of_change, of_random = (torch.stack(kept).mean(dim=0) for kept in (kept_by_change, kept_by_random))
assert of_change.shape == of_random.shape == (largest,)
for r in (1, 4, 16, largest // 2):
    compared = f"{of_random[r - 1]:4.0%} of a random matrix"
    print(f"first {r:3} of {largest}: {of_change[r - 1]:4.0%} of the change, {compared}")

# %%
ranks = range(1, largest + 1)
lines = {"the change": (ranks, 100 * of_change), "a random matrix": (ranks, 100 * of_random)}
fig = curves(lines, f"terms kept, of {largest}", "% of the energy", log="x", ylim=(0, 102))
lesson.show(fig, "spectrum", "The change's curve rises far earlier than a random matrix's.")

# %% [markdown]
# ## Your turn: cut_off
#
# Keep the first r terms. This is the closest that any matrix of rank r can come to the change (the theorem of Eckart and Young), and it is
# cheap to store: the rows $v_i^\top$ as `down`, shape `[r, in]`, and the columns $s_i u_i$ as `up`, shape `[out, r]`. Their product `up @
# down` is the sum of the r terms. `torch.linalg.svd(change, full_matrices=False)` returns three tensors: `u`, whose columns are the $u_i$;
# `s`, the singular values in falling order; and `v`, whose *rows* are the $v_i^\top$ already. `u[:, :r]` are the first r columns.
#
# When it is right, it takes a matrix apart whose rank is three, and reports what is missing after one, two and three terms.


# %%
def cut_off(change, r):
    """down [r, in] and up [out, r] of the strongest r rank-1 terms of change [out, in]."""
    # YOUR CODE, about 2 lines


cut_off = lesson.check(cut_off)

# %%
dW = next(dW for dW in changes.values() if min(dW.shape) == largest)
for r in (1, 4, 16, largest):
    down, up = cut_off(dW, r)
    assert down.shape == (r, dW.shape[1]) and up.shape == (dW.shape[0], r)
    share = (dW - up @ down).norm() / dW.norm()
    count = down.numel() + up.numel()
    print(f"rank {r:3}: {share:4.0%} of one matrix is missing, {count:6,} numbers")
print(f"the change itself: {dW.numel():,} numbers")

# %% [markdown]
# ## How many terms the model needs
#
# `extract_lora` does the same for every matrix. How close is the model with r terms to the fine-tuned one? We give both the same noisy
# tigers and compare their predictions. With none of the terms, the model predicts what it did before training: all of the difference is
# missing.

# %%
from minidiff.adapters.extraction import extract_lora

with torch.no_grad():
    x_0 = sd.vae.encode(tiger.pixels.to(lesson.device)).mean * sd.config.vae.scaling_factor
t = torch.tensor([100, 300, 500, 700, 900], device=lesson.device)
x_t = sd.schedule.q_sample(x_0, t, torch.randn(x_0.shape, generator=generator).to(lesson.device))
context = sd.encode_prompts(["a photo of a sks lion"] * len(t))


@torch.no_grad()
def predict(model):
    return model.unet(x_t, t, context)


untouched, goal = predict(sd), predict(tuned)
assert untouched.shape == goal.shape == x_t.shape
print(f"the predictions differ by {(goal - untouched).norm() / untouched.norm():.1%} of their size")

# %%
missing, megabytes, generated = {}, {}, {}
for r in (1, 2, 4, 8, 16, 32):
    lora = extract_lora(sd, tuned, PATTERNS["transformer"], rank=r)
    lora.attach(sd)
    missing[r] = 100 * float((predict(sd) - goal).norm() / (untouched - goal).norm())
    if r <= 16:
        generated[r] = tiger.draw(sd, prompts, drawing_steps)
    lora.detach()
    megabytes[r] = 4e-6 * sum(p.numel() for p in lora.parameters())
assert torch.equal(predict(sd), untouched)  # nothing is left behind
print("rank   missing of the difference      file")
for r in missing:
    print(f"{r:4} {missing[r]:25.0f}% {megabytes[r]:9.2f} MB")

# %%
lines = {"missing": (list(missing), list(missing.values()))}
axes = {"xlabel": "rank", "ylabel": "% of the difference missing"}
fig = curves(lines, **axes, log="x", xticks=list(missing), ylim=(0, 100))
lesson.show(fig, "missing", "The share that is missing falls steadily as the rank grows.")

# %%
results = {"before": (before, verdict_before)}
results |= {f"rank {r}": result for r, result in generated.items()}
results["all of it"] = after, verdict_after
for label, (_, verdict) in results.items():
    print(f"{label:10} {verdict}")
close = verdict_after.likeness - 0.02
near = [r for r, (_, verdict) in generated.items() if verdict.likeness > close]
print(f"lowest rank within 0.02 of the whole change's likeness: {min(near, default=None)}")
shown = ("before", "rank 1", "rank 4", "rank 16", "all of it")
fig = picture_grid([results[label][0] for label in shown], labels=shown)
lesson.show(fig, "ranks", "Before training, with more and more terms, and with all of them.")

# %% [markdown]
# The last line above answers the guess for this model and this subject: from that rank on the judge rates the pictures like those of the
# whole change, although part of the prediction is still missing. After so few steps even the whole change has not learned all of the tiger;
# look for the stripes.

# %% [markdown]
# ## Train the small matrices themselves
#
# LoRA turns this around (Hu et al. 2021, section 4.1). If the change may have rank r in the end, train two small matrices from the start,
# A of shape `[r, in]` and B of shape `[out, r]`, and leave $W_0$ frozen:
#
# $$y = W_0 \, x + \frac{\alpha}{r} \, B A \, x$$
#
# The constant $\alpha$ keeps the strength of the change the same when you try another r; with $\alpha = r$ the factor is one. The library
# calls A `down`, because it goes from the layer's width down to r numbers, and B `up`. The layer itself stays in place. A *hook*, a function
# that PyTorch calls after the layer, computes the change and adds it to the layer's output.

# %% [markdown]
# ## Your turn: low_rank
#
# Write what the hook adds, $\frac{\alpha}{r} B A x$, without forming the product $B A$. The vectors x are rows here: `x` has shape `[...,
# in]`, `down` is A, `up` is B, and the result has shape `[..., out]`. A matrix that multiplies rows is transposed: `x @ down.T`. The rank is
# the length of the first axis of `down`, `down.shape[0]`. When it is right, you see how much work the two factors save.


# %%
def low_rank(x, down, up, alpha):
    """(alpha / r) up down x; x [..., in], down [r, in], up [out, r], r from down's shape."""
    # YOUR CODE, about 2 lines


low_rank = lesson.check(low_rank)

# %%
out, inn = W0[names[-1]].weight.flatten(1).shape
x, down, up = (torch.randn(*shape, generator=generator) for shape in ((7, inn), (4, inn), (out, 4)))
beside, inside = low_rank(x, down, up, 4.0), x @ (up @ down).T
assert beside.shape == inside.shape == (7, out)
assert torch.allclose(beside, inside, rtol=1e-3, atol=1e-3)
print(f"multiplications per row, with the product: {out * inn:,}")
print(f"with the factors: {4 * (out + inn):,}")

# %% [markdown]
# ## Your turn: first_factors
#
# Where do the two matrices start? The model must be unchanged before the first step, so $B A$ has to be zero. At the same time, training
# must be able to move them. The gradient of B contains A as a factor, and the gradient of A contains B. So one of the two starts at zero and
# the other one does not. LoRA starts with `up` at zero and `down` random: normal numbers divided by r, from the `generator` that is given
# (`torch.randn(..., generator=generator)`). When it is right, you see both gradients before the first step.


# %%
def first_factors(out, inn, r, generator):
    """down [r, inn], random with standard deviation 1 / r, and up [out, r], zero."""
    # YOUR CODE, about 3 lines


first_factors = lesson.check(first_factors)
down, up = first_factors(out, inn, 4, generator)
assert down.shape == (4, inn) and up.shape == (out, 4)
print(f"the change at the start: {(up @ down).abs().max():.0f}")

# %% [markdown]
# ## Rank against likeness
#
# Now train two such LoRAs, the smallest possible and a usual size. The learning rate is higher than before, because fewer numbers move, and
# the steps are fewer.

# %%
options = preset("lora", "bundled")
settings = replace(options.settings, steps=1 if lesson.quick else 50, batch=4)
trained = {}
for r in (8,) if lesson.quick else (1, 8):
    of_rank = replace(options, settings=settings, low_rank=replace(options.low_rank, rank=r))
    method = METHODS["lora"].build(sd, [tiger.concept], of_rank)
    for _ in method.run(lesson.device):
        pass
    method.lora.attach(sd)
    trained[r] = method.lora, *tiger.draw(sd, prompts, drawing_steps)
    method.lora.detach()
    megabytes_r = 4e-6 * sum(p.numel() for p in method.lora.parameters())
    print(f"LoRA of rank {r}, {megabytes_r:.2f} MB: {trained[r][2]}")
print(f"the whole change, {4 * numbers / 1e6:.2f} MB: {verdict_after}")

# %%
rows = [*(trained[r][1] for r in trained), after]
fig = picture_grid(rows, labels=[*(f"LoRA of\nrank {r}" for r in trained), "all of it"])
lesson.show(fig, "trained", "From LoRAs of two ranks, and from the model that was trained whole.")

# %% [markdown]
# Compare these verdicts with those on the terms that were cut out of the whole change, at the same rank: how alike are the pictures to the
# five, and in how many does the judge see a tiger? Cutting off keeps the largest terms of a change that was free to use all of them.
# Training a LoRA puts what lowers the loss most into the few terms that there are.

# %% [markdown]
# ## Merge and undo
#
# An attached LoRA costs a little time at every step. To keep it for good, add the product to the weights: $W = W_0 + \frac{\alpha}{r} B A$.
# The prediction is the same except for rounding. To undo it, one might subtract the same product. Watch what happens to the bits.

# %%
from minidiff.adapters.lora import merge_lora

lora = trained[8][0]
lora.attach(sd)
attached = predict(sd)
lora.detach()
undo = merge_lora(sd, lora)
merged = predict(sd)
off = (merged - attached).abs().max() / attached.abs().max()
undo()
assert off < 1e-3 and torch.equal(predict(sd), untouched)
print(f"attached and merged differ by {off:.0e}")
print(f"after undo() the prediction is off by {(predict(sd) - untouched).norm():.0f}")

# %%
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    total, same = 0, 0
    for name, low in lora.layers.items():
        base, change = W0[name].weight.detach().to(dtype), low.delta().detach()
        again = ((base.float() + change).to(dtype).float() - change).to(dtype)
        total, same = total + base.numel(), same + int((again == base).sum())
    print(f"in {dtype}: {1 - same / total:.1%} of the weights have not come back")

# %% [markdown]
# Adding something to a weight of limited precision can lose its last digits, and subtracting does not bring them back. In each of the three
# number formats some weights stay off. That is why `merge_lora` keeps the old weights and `undo` puts those very weights back. An attached
# LoRA never touches them.

# %% [markdown]
# ## Break it: start with both at zero, or both random
#
# What happens without exactly one zero? We try three starts on the real model, each before its first step, and count how many of the small
# matrices get a gradient.

# %%
task = METHODS["lora"].build(sd, [tiger.concept], replace(options, settings=settings)).phases[0]
(adapter,) = task.adapters

# %%
starts = {"up zero": (1, 0), "both zero": (0, 0), "both random": (1, 1)}  # of down, of up
for label, (of_down, of_up) in starts.items():
    with torch.no_grad():
        for low in adapter.layers.values():
            a, b = low.down.weight, low.up.weight
            a.copy_(of_down * torch.randn(a.shape, generator=generator) / low.rank)
            b.copy_(of_up * torch.randn(b.shape, generator=generator))
    with task:
        task.loss(0, range(4)).backward()
        gradients = [p.grad.norm() for p in adapter.parameters()]
        off = (predict(sd) - untouched).norm() / untouched.norm()
        ruined = tiger.draw(sd, prompts, drawing_steps) if label == "both random" else None
    moving = f"{sum(bool(g > 0) for g in gradients)} of {len(gradients)}"
    print(f"{label}: prediction off by {off:.0%}, {moving} get a gradient")

# %%
print(f"before the first step, both random: {ruined[1]}")
fig = picture_grid([before, ruined[0]], labels=["up zero", "both\nrandom"])
lesson.show(fig, "beginnings", "Untrained: unchanged with up at zero, ruined if both are random.")

# %% [markdown]
# With `up` at zero, half of the matrices get a gradient at the first step: `up` moves, and from the second step on `down` learns too. With
# both at zero nothing ever moves, and training runs to its end without a word. With both random everything learns, and the first thing it
# has to learn is to undo the damage.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/14_lora.py --model v1-5-pruned-emaonly.safetensors --device cuda` fine-tunes and extracts on a checkpoint of yours, whose
# pictures are scaled down for the judge. The file size of a LoRA on its attention layers can be computed without loading any weights. It
# depends on the widths of the U-Net's levels. Each level has two blocks on the way down and three on the way up, and there is one more in
# the middle. Every block has eight matrices, two of which read the caption.

# %%
from minidiff.config import SD1

unet = SD1.unet
levels = [(width, 5) for width, has in zip(unet.widths, unet.attention) if has]
levels += [(unet.widths[-1], 1)]
every = sum(n * (6 * width**2 + 2 * width * unet.context_width) for width, n in levels)
print(f"all attention layers of Stable Diffusion 1.x: {every / 1e6:.0f} million numbers")
for r in (1, 4, 16, 64):
    small = sum(n * r * (12 * width + 2 * (width + unet.context_width)) for width, n in levels)
    print(f"rank {r:2}: {small / 1e6:5.2f} million, {4e-6 * small:5.1f} MB in float32")

# %% [markdown]
# Rank 4 is the file of 3 MB that people share, for a model of several gigabytes.

# %% [markdown]
# ## On a GPU
#
# ```bash
# minidiff train lora --model v1-5-pruned-emaonly.safetensors --images my-cat --token sks --class-word cat --out runs/lora
# ```
#
# With five to ten pictures of your own cat: about 10 minutes. Expect a file of a few megabytes, and a cat that can be recognised. Try rank 1
# and rank 16, and look whether you see a difference.

# %% [markdown]
# ## What you now know
#
# - The change that fine-tuning makes is close to a matrix of low rank, much closer than a random matrix is.
# - The SVD finds the closest matrix of rank r; stored as two factors, it takes r (in + out) numbers.
# - LoRA trains the two factors directly and leaves the model's own weights frozen.
# - `up` starts at zero and `down` random: the model is unchanged at first, and can still learn.
# - A LoRA can be merged into the weights. Undoing a merge takes the old weights, since subtraction rounds.

# %% [markdown]
# ## Your guess
#
# The section "How many terms the model needs" prints the lowest rank whose pictures the judge rates like those of the whole change, and the
# figure lets you judge for yourself. Compare it with the number of terms that a matrix has, the largest rank in the section before: it is a
# small part of them.

# %% [markdown]
# ## Quiz
#
# 1. You double r and keep $\alpha$. What happens to the factor in front of $B A x$, and to the size of the file?
# 2. Two LoRAs of rank 4 are attached to the same layer. What is the largest rank that their sum can have?
# 3. A training run ends with the loss unchanged and the pictures bit for bit those of the base model. Which slip of this lesson is it?
#
# <details><summary>Answers</summary>
#
# 1. The factor $\alpha / r$ halves, and the file doubles.
# 2. Eight: each is a sum of four rank-1 terms, and together they are a sum of eight.
# 3. Both factors started at zero. Neither has a gradient, and nothing complains.
#
# </details>

# %% [markdown]
# ## Now you
#
# Fine-tuning moved the matrices of self-attention, of cross-attention and of the feed-forward layers. Which of them needs the highest rank?
# Predict an order. Then take the names in `changes` apart (`self_attention`, `cross_attention`, the rest), find for each matrix the lowest
# r whose first terms hold nine tenths of the energy, print the mean for each kind, and look whether you were right.

# %% [markdown]
# ## Read next
#
# - `minidiff/adapters/low_rank.py`: `LowRank.forward` is your `low_rank`. `extract_lora` in `extraction.py` is your `cut_off` for a whole
#   model, `create_lora` in `lora.py` your `first_factors`, and `merge_lora` keeps the old weights for its `undo`.
# - Hu et al. 2021, "LoRA: low-rank adaptation of large language models", section 4.1, and section 7 on how low the rank may be.
# - Lesson 15: what the model forgets while it learns, and how to prevent it.
