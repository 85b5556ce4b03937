# %% [markdown]
# # 14 LoRA
#
# **How small can a change be that teaches a model a new thing?**
#
# - Explains: [minidiff/adapters/lora.py](../minidiff/adapters/lora.py)
# - You change: `low_rank`, the change that is added to a layer's output
# - Minutes: 30
# - Picture: [figures/14-ranks.png](figures/14-ranks.png)
#
# A model that has seen millions of pictures has not seen your cat. To teach it, one goes on training for a few minutes on a few pictures;
# that is called *fine-tuning*. Then the model has changed, and a second cat needs a second copy of it, gigabytes for each. *LoRA*, low-rank
# adaptation, keeps the change alone, and keeps it small. This lesson measures how small.

# %% [markdown]
# ## Guess first
#
# We are going to fine-tune every matrix of the U-Net's *transformers* on five pictures of one animal. Those are the layers in which the
# cells of the picture look at each other and at the words (lesson 04), and what stands around them. Each matrix then differs from what it
# was by another matrix, the change. A change of 160 x 160 numbers is a sum of 160 products of a column with a row, the strongest first. How
# many of these products does each matrix need before the pictures look as they do with all of them?
#
# 1. One.
# 2. Less than ten.
# 3. Most of them.

# %% [markdown]
# ## Five pictures, and a judge
#
# The bundled model was never shown a tiger. It knows lions, so we call the animal "sks lion": `sks` is a rare piece of the vocabulary which
# means nothing to it, `lion` says what kind of thing it is. Lesson 15 is about that name.
#
# To measure, there is a *judge*: a second network, trained on scenes of all subjects, tigers too, that says what stands in a picture. It
# also reads a picture as a row of numbers, its *features*; those of two like pictures point in nearly the same direction. `likeness` is the
# mean cosine between the features of what a model draws and those of the five pictures.

# %%
import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

# %%
from lessons.common import picture_grid, start
from minidiff.adapters.extraction import extract_lora
from minidiff.adapters.layers import choose, layers_of
from minidiff.adapters.lora import PATTERNS, merge_lora
from minidiff.adapters.low_rank import LowRank
from minidiff.config import SD1
from minidiff.evaluation.alignment import image_alignment
from minidiff.pictures import to_pixels
from minidiff.pipeline import to_images
from minidiff.scenes.pictures import subject_scenes
from minidiff.trainers.methods.options import Concept
from minidiff.trainers.methods.table import METHODS, preset
from weights_loader import load_judge

# %%
lesson = start("14_lora")
sd, tuned = lesson.load(), lesson.load()  # one stays as it is, one is going to change
judge = load_judge(device=lesson.device)
size = sd.config.image_size
scenes = subject_scenes("tiger", "fluent", 5, np.random.default_rng(0))
five = F.interpolate(to_pixels(np.stack([scene.image for scene in scenes])), (size, size))
assert five.shape == (5, 3, size, size)

folder = TemporaryDirectory()
for i, image in enumerate(to_images(five)):
    image.save(Path(folder.name) / f"{i}.png")
concept = Concept(images=Path(folder.name), token="sks", class_word="lion")

# %%
prompts = [f"a sks lion on a {colour} background" for colour in ("red", "white", "blue", "green")]
prompts = prompts[:1] if lesson.quick else prompts
drawing_steps = 3 if lesson.quick else 10


@torch.no_grad()
def read(pixels):
    side = judge.config.image_size  # the judge reads pictures of one size only
    return judge.read(F.interpolate(pixels.to(lesson.device), (side, side), mode="area"))


def verdict(pixels):
    """How like the five pictures are, and in how many of them the judge sees a tiger."""
    reading = read(pixels)
    tigers = reading.shares().argmax(dim=1) == judge.config.subjects.index("tiger")
    likeness = image_alignment(reading.features, read(five).features).mean()
    return f"likeness {likeness:.2f}, {int(tigers.sum())} of {len(tigers)} tigers"


# %%
def draw(model):
    *_, last = model.denoise(prompts, seeds=range(len(prompts)), steps=drawing_steps)
    pixels = model.decode(last.x_t)
    assert pixels.shape == (len(prompts), 3, size, size)
    return to_images(pixels), verdict(pixels)


before, verdict_before = draw(sd)
print(f"the five pictures:   {verdict(five)}")
print(f"drawn before:        {verdict_before}")

# %%
fig = picture_grid([to_images(five), before], labels=["five\ntigers", "drawn\nbefore"])
lesson.show(fig, "five", "Five tigers; below, the lions that the model draws instead.")

# %% [markdown]
# ## Change everything
#
# First without any thrift: every number of every matrix may move. This is plain training as in lesson 12, on five pictures with one
# caption, "a photo of a sks lion". $W_0$ is a matrix before, $W$ the same after, and $\Delta W = W - W_0$ is the change.

# %%
names = choose(list(layers_of(sd)), PATTERNS["transformer"])
options = preset("fine-tune", "bundled")
settings = replace(options.settings, steps=2 if lesson.quick else 70, batch=4)
options = replace(options, settings=settings, weights=tuple(f"^{re.escape(name)}\\.weight$" for name in names))
training = METHODS["fine-tune"].build(tuned, [concept], options)
losses = [float(step.loss) for _, step in training.run(lesson.device)]
after, verdict_after = draw(tuned)
print(f"{len(names)} matrices, {len(losses)} steps of {settings.batch} pictures")
print(f"drawn before: {verdict_before}")
print(f"drawn after:  {verdict_after}")

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
# Every matrix is a sum of products of a column with a row, each with a strength (the singular value decomposition, SVD):
#
# $$\Delta W = \sum_i s_i \; u_i v_i^\top \qquad s_1 \ge s_2 \ge \dots$$
#
# The columns $u_i$ stand at right angles to each other and have length 1, and so have the rows $v_i$. The number of products with $s_i > 0$
# is the matrix' *rank*. The strengths $s_i$ are its *singular values*, and all together its spectrum. If a few are much larger than the
# rest, a few products are nearly the whole change. What the first r of them hold is counted in squares: $s_1^2 + \dots + s_r^2$ as a share
# of all of them, which is also the share of the matrix' own numbers, squared. For comparison: a matrix of drawn numbers.

# %%
largest = max(min(dW.shape) for dW in changes.values())  # only matrices of this size
spectra, drawn_spectra = [], []
generator = torch.Generator().manual_seed(0)
for dW in changes.values():
    if min(dW.shape) == largest:
        chance = torch.randn(dW.shape, generator=generator)
        for matrix, rows in ((dW, spectra), (chance, drawn_spectra)):
            s = torch.linalg.svdvals(matrix)
            rows.append(s.square().cumsum(0) / s.square().sum())
kept, kept_by_chance = (torch.stack(rows).mean(dim=0) for rows in (spectra, drawn_spectra))
full = len(kept)
assert kept.shape == kept_by_chance.shape == (full,)
for r in (1, 4, 16, full // 2):
    of_chance = f"{kept_by_chance[r - 1]:4.0%} of chance"
    print(f"first {r:3} of {full}: {kept[r - 1]:4.0%} of the change, {of_chance}")

# %%
fig, axis = plt.subplots()
ranks = torch.arange(1, full + 1)
axis.semilogx(ranks, 100 * kept, label="the change")
axis.semilogx(ranks, 100 * kept_by_chance, linestyle="--", label="drawn numbers")
axis.set(xlabel="products kept, of " + str(full), ylabel="% of the squares", ylim=(0, 102))
axis.legend()
lesson.show(fig, "spectrum", "The change's curve rises far earlier than that of drawn numbers.")

# %% [markdown]
# ## Cut off after r products
#
# To keep only the first r products is the nearest that a matrix of rank r can come to the change (the theorem of Eckart and Young). It is
# also cheap to store: columns $B = [u_1 s_1, \dots, u_r s_r]$ of shape `[out, r]` and rows $A$ of shape `[r, in]`, instead of `[out, in]`
# numbers. `extract_lora` makes A and B for every matrix. How near is the model then to the one that was trained? We show both some noisy
# tigers and compare their answers. If everything is missing, the model answers as it did before the training.

# %%
with torch.no_grad():
    x_0 = sd.vae.encode(five.to(lesson.device)).mean * sd.config.vae.scaling_factor
t = torch.tensor([100, 300, 500, 700, 900], device=lesson.device)
x_t = sd.schedule.q_sample(x_0, t, torch.randn(x_0.shape, generator=generator).to(lesson.device))
context = sd.encode_prompts(["a photo of a sks lion"] * len(t))


@torch.no_grad()
def answer(model):
    return model.unet(x_t, t, context)


untouched, wanted = answer(sd), answer(tuned)
assert untouched.shape == wanted.shape == x_t.shape
print(f"the answers differ by {(wanted - untouched).norm() / untouched.norm():.1%} of their size")

# %%
missing, megabytes, drawings = {}, {}, {}
for r in (1, 2, 4, 8, 16, 32):
    lora = extract_lora(sd, tuned, PATTERNS["transformer"], rank=r)
    lora.attach(sd)
    missing[r] = float((answer(sd) - wanted).norm() / (untouched - wanted).norm())
    if r in (1, 4, 16):
        drawings[r] = draw(sd)
    lora.detach()
    megabytes[r] = 4e-6 * sum(p.numel() for p in lora.parameters())
assert torch.equal(answer(sd), untouched)  # nothing is left behind

print("rank   missing of the answer      file")
for r in missing:
    print(f"{r:4} {missing[r]:21.0%} {megabytes[r]:9.2f} MB")

# %%
fig, axis = plt.subplots()
axis.plot(missing.keys(), [100 * value for value in missing.values()], marker="o")
axis.set_xscale("log", base=2)
axis.set(xlabel="rank", ylabel="% of the answer missing", ylim=(0, 100))
axis.set(xticks=list(missing), xticklabels=list(missing))
lesson.show(fig, "missing", "The share that is missing falls steadily with the rank.")

# %%
rows = [before, *(drawings[r][0] for r in drawings), after]
labels = ["before", *(f"rank {r}" for r in drawings), "all of it"]
verdicts = [verdict_before, *(drawings[r][1] for r in drawings), verdict_after]
for label, said in zip(labels, verdicts):
    print(f"{label:10} {said}")
fig = picture_grid(rows, labels=labels)
lesson.show(fig, "ranks", "Lions turn orange and lose their manes up to rank 4, and no further.")

# %% [markdown]
# After so few steps the tiger has its colour, ears and muzzle; the stripes are still to come. But that holds for the whole change as well,
# and this is the answer to the guess: from rank 4 on the pictures hardly change any more. For this model and this subject a few products
# are enough, in a file that is a small part of the full change.

# %% [markdown]
# ## Train the small matrices themselves
#
# LoRA turns this around (Hu et al. 2021, section 4.1). If the change may be of rank r in the end, train A and B from the beginning and
# leave $W_0$ as it is:
#
# $$y = W_0 \, x + \frac{\alpha}{r} \, B A \, x$$
#
# The number $\alpha$ is a strength that stays the same when r is changed; with $\alpha = r$ the factor is one. The library calls A `down`,
# since it goes from the layer's width down to r numbers, and B `up`. B begins as zero and A as drawn numbers, so the model begins
# unchanged. Each layer keeps its place: the change is computed beside it and added to its output by a hook, a function that PyTorch calls
# after the layer.

# %% [markdown]
# ## Your turn: low_rank
#
# Write what is added, $\frac{\alpha}{r} B A x$, without forming the product $B A$. The vectors x are rows here: `x` has shape `[..., in]`,
# `down` is A of shape `[r, in]`, `up` is B of shape `[out, r]`, and out comes `[..., out]`. A matrix that multiplies rows is transposed: `x
# @ down.T`.


# %%
def low_rank(x, down, up, alpha):
    """(alpha / r) up down x; x [..., in], down [r, in], up [out, r], r from down's shape."""
    # YOUR CODE, about 1 line


def of_the_library(x, down, up, alpha):
    return LowRank(down, up, alpha)(x).detach()


low_rank = lesson.check(low_rank, instead=of_the_library)

# %%
layer = W0[names[-1]]
out, inn = layer.weight.flatten(1).shape
x, down, up = (torch.randn(*shape, generator=generator) for shape in ((7, inn), (4, inn), (out, 4)))
beside = low_rank(x, down, up, 4.0)
inside = x @ (up @ down).T
assert beside.shape == (7, out)
assert torch.allclose(beside, inside, rtol=1e-3, atol=1e-3)
print(f"multiplications a row: {out * inn:,} by the product, {4 * (out + inn):,} by the factors")

# %% [markdown]
# ## Rank against accuracy
#
# Now train such LoRAs, as small as they get and a usual size. The learning rate is larger than before, since there is less to move, and the
# steps are fewer.

# %%
options = preset("lora", "bundled")
settings = replace(options.settings, steps=1 if lesson.quick else 50, batch=4)
trained = {}
for r in (8,) if lesson.quick else (1, 8):
    low = replace(options.low_rank, rank=r)
    method = METHODS["lora"].build(sd, [concept], replace(options, settings=settings, low_rank=low))
    for _ in method.run(lesson.device):
        pass
    method.lora.attach(sd)
    trained[r] = method.lora, *draw(sd)
    method.lora.detach()
    size_r = 4e-6 * sum(p.numel() for p in method.lora.parameters())
    print(f"rank {r}, {size_r:.2f} MB: {trained[r][2]}")

# %%
rows = [*(trained[r][1] for r in trained), after]
fig = picture_grid(rows, labels=[*(f"LoRA of\nrank {r}" for r in trained), "all of it"])
lesson.show(fig, "trained", "Tigers by LoRAs of two ranks, and by the model of which all moved.")

# %% [markdown]
# Compare the judge's words with those on the products that were cut out of the large change. For this model and this subject even rank one
# goes most of the way when it is trained as such, with fewer steps than the whole, a larger learning rate, and the few numbers that the
# file says.

# %% [markdown]
# ## Merge, and take back
#
# A LoRA beside the model costs a little time at every step. Where it is to stay, its product is added to the weights: $W = W_0 +
# \frac{\alpha}{r} B A$. The answer is the same but for rounding. To take it back, one may subtract the same product again. Look at the
# bits.

# %%
lora = trained[8][0]
lora.attach(sd)
beside = answer(sd)
lora.detach()
undo = merge_lora(sd, lora)
merged = answer(sd)
off = (merged - beside).abs().max() / beside.abs().max()
undo()
assert off < 1e-3 and torch.equal(answer(sd), untouched)
print(f"beside and merged differ by {off:.0e}")
print(f"after undo() it is off by {(answer(sd) - untouched).norm():.0f}")

# %%
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    there, same = 0, 0
    for name, low in lora.layers.items():
        base, change = W0[name].weight.detach().to(dtype), low.delta().detach()
        again = ((base.float() + change).to(dtype).float() - change).to(dtype)
        there, same = there + base.numel(), same + int((again == base).sum())
    print(f"in {dtype}: {1 - same / there:.1%} of the weights have not come back")

# %% [markdown]
# A weight of limited precision can lose its last digits when something is added to it, and subtracting does not bring them back: in every
# one of the three number formats some weights stay off. So `merge_lora` keeps the old weights and `undo` puts the very same ones back; a
# LoRA that is only attached never touched them.

# %% [markdown]
# ## Break it: begin with both zero, or both drawn
#
# Why is one of the two matrices zero, and not both or neither? The gradient of B is a product with A, and the gradient of A is a product
# with B. Three beginnings, each before its first step. With a zero among the two, the picture is that of the model as it was.

# %%
task = METHODS["lora"].build(sd, [concept], replace(options, settings=settings)).phases[0]
(adapter,) = task.adapters
beginnings = {"B zero": (1, 0), "both zero": (0, 0), "both drawn": (1, 1)}  # of A, of B

# %%
for start_with, (of_a, of_b) in beginnings.items():
    with torch.no_grad():
        for low in adapter.layers.values():
            a, b = low.down.weight, low.up.weight
            a.copy_(of_a * torch.randn(a.shape, generator=generator) / low.rank)
            b.copy_(of_b * torch.randn(b.shape, generator=generator))
    with task:
        task.loss(0, range(4)).backward()
        gradients = [p.grad.norm() for p in adapter.parameters()]
        off = (answer(sd) - untouched).norm() / untouched.norm()
        if start_with == "both drawn":
            ruins, said = draw(sd)
    moving = f"{sum(bool(g > 0) for g in gradients)} of {len(gradients)}"
    print(f"{start_with}: answer off by {off:.0%}, {moving} get a gradient")

# %%
print(f"before the first step, both drawn: {said}")
fig = picture_grid([before, ruins], labels=["B zero", "both\ndrawn"])
lesson.show(fig, "beginnings", "Lions with B zero; ruins with both drawn.")

# %% [markdown]
# With B zero half of the matrices get a gradient at the first step: B moves away from zero, and from the second step on A learns too. With
# both zero nothing will ever move, and training runs to its end without a word. With both drawn everything learns, and the first thing to
# be learned is to undo the damage.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/14_lora.py --model v1-5-pruned-emaonly.safetensors --device cuda` fine-tunes and extracts on a checkpoint of yours, whose
# pictures are made smaller for the judge. What a LoRA of its attentions weighs needs no weights. They are the widths of the U-Net's levels;
# two blocks on the way down, three on the way up, one in the middle, each with eight matrices, of which two read the caption.

# %%
unet = SD1.unet
levels = [(width, 5) for width, has in zip(unet.widths, unet.attention) if has]
levels += [(unet.widths[-1], 1)]
every = sum(n * (6 * width**2 + 2 * width * unet.context_width) for width, n in levels)
print(f"all of Stable Diffusion 1.x' attentions: {every / 1e6:.0f} million numbers")
for r in (1, 4, 16, 64):
    small = sum(n * r * (12 * width + 2 * (width + unet.context_width)) for width, n in levels)
    print(f"rank {r:2}: {small / 1e6:5.2f} million, {4e-6 * small:5.1f} MB in float32")

# %% [markdown]
# At rank 4 it is the file of 3 MB that people trade, beside a model of several gigabytes.

# %% [markdown]
# ## On a GPU
#
# ```bash
# minidiff train lora --model v1-5-pruned-emaonly.safetensors --images my-cat --token sks --class-word cat --out runs/lora
# ```
#
# With five to ten pictures of your own cat: about 10 minutes. Expect a file of a few megabytes, and a cat that can be recognised; with the
# rank at 1 and at 16 look whether you see a difference.

# %% [markdown]
# ## Read next
#
# - `minidiff/adapters/low_rank.py`: `LowRank.forward` is your line. `extract_lora` in `extraction.py` cuts off the spectrum, `merge_lora`
#   in `lora.py` keeps the old weights for its `undo`.
# - Hu et al. 2021, "LoRA: low-rank adaptation of large language models", section 4.1, and section 7 on how low the rank may be.
# - Lesson 15: what the model forgets meanwhile, and how to keep it from that.
