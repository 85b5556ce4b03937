# %% [markdown]
# # 17 Custom Diffusion
#
# **Which few weights teach a model a new thing, and how do two things that were learned apart come together?**
#
# - Explains: [minidiff/adapters/custom_diffusion.py](../minidiff/adapters/custom_diffusion.py)
# - You change: `merge`, two concepts into one by a system of equations
# - Minutes: 40
# - Picture: [figures/17-together.png](figures/17-together.png)
#
# ![The whole pipeline; this lesson is about small changes of the weights](figures/pipeline-adapters.svg)
#
# LoRA keeps the change of a model small by making every matrix of it thin (lesson 14). *Custom Diffusion* asks first where a change is
# needed at all, and leaves everything else alone. What it trains is so simple, a map from words to vectors, that two of them can be merged
# by solving equations, without any training.

# %% [markdown]
# ## Guess first
#
# 1. The whole U-Net is fine-tuned on five pictures. Which layers move most, measured by their own size: the attention of cells to words,
#    the attention of cells to cells, or the convolutions and the rest?
# 2. Two things were learned apart, each as a change of the same matrices. Is it enough to add up both changes?

# %%
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

# %%
from lessons.common import picture_grid, start
from minidiff.adapters.custom_diffusion import compress, from_deltas
from minidiff.adapters.merge_concepts import merge_concepts, merge_directions
from minidiff.adapters.tokens import RARE_TOKENS, NewTokens
from minidiff.config import SD1
from minidiff.evaluation.weights import KINDS, kind_of, layer_changes
from minidiff.pictures import to_pixels
from minidiff.pipeline import to_images
from minidiff.scenes.pictures import subject_scenes
from minidiff.scenes.scenes import sample_scene
from minidiff.trainers.methods.options import Concept
from minidiff.trainers.methods.prior_preservation import fill_class_images
from minidiff.trainers.methods.table import METHODS, preset
from minidiff.unet import UNet
from weights_loader import load_judge

# %% [markdown]
# ## Two things that the model does not know
#
# A tiger and a violin, five pictures of each. The bundled model has never been shown either. What it knows are lions and guitars, and these
# are their classes (lesson 15). As in lesson 16 each gets a new word, `<one>` and `<two>`, which stands before the class: "a <one> lion".
#
# The *judge* of the last lessons, a second network trained on scenes of all subjects, says how much of a picture each of them covers. Here
# we count the pictures in which it sees most of the subject asked for; where two are asked for, each counts that is among its first two.

# %%
lesson = start("17_custom_diffusion")
sd = lesson.load()
judge = load_judge(device=lesson.device)
size = sd.config.image_size
root = TemporaryDirectory()
subjects = {"tiger": ("<one>", "lion"), "violin": ("<two>", "guitar")}
backgrounds = ("red", "white", "blue", "green")[: 1 if lesson.quick else 4]
drawing_steps = 3 if lesson.quick else 12

# %%
concepts, five = {}, []
for subject, (token, class_word) in subjects.items():
    folder = Path(root.name) / subject
    folder.mkdir()
    scenes = subject_scenes(subject, "fluent", 5, np.random.default_rng(0))
    pixels = to_pixels(np.stack([scene.image for scene in scenes]))
    five.append(to_images(F.interpolate(pixels, (size, size))))
    for i, image in enumerate(five[-1]):
        image.save(folder / f"{i}.png")
    words = {"token": token, "class_word": class_word}
    near = Path(root.name) / f"scenes like a {class_word}"
    concepts[subject] = Concept(images=folder, class_images=near, **words)


# %%
@torch.no_grad()
def draw(prompts, wanted):
    """The prompts' pictures, and in how many the judge sees most of each wanted subject."""
    *_, last = sd.denoise(prompts, seeds=range(len(prompts)), steps=drawing_steps)
    pixels = sd.decode(last.x_t)
    assert pixels.shape == (len(prompts), 3, size, size)
    side = judge.config.image_size
    shares = judge.read(F.interpolate(pixels, (side, side), mode="area")).shares()
    found = shares.topk(len(wanted)).indices.tolist()
    names = [[judge.config.subjects[i] for i in row] for row in found]
    counts = [f"{one} in {sum(one in row for row in names)}" for one in wanted]
    return to_images(pixels), f"{', '.join(counts)} of {len(prompts)}"


def on_backgrounds(words):
    return [f"{words} on a {colour} background" for colour in backgrounds]


# %%
before = {}
for subject, (_, class_word) in subjects.items():
    before[subject], found = draw(on_backgrounds(f"a {class_word}"), [subject])
    print(f'"a {class_word}": {found}')
fig = picture_grid(five, labels=list(subjects))
lesson.show(fig, "five", "Five tigers and five violins, each on another background.")

# %% [markdown]
# ## Which weights move most
#
# The authors fine-tuned a whole U-Net and looked how far each layer had gone (Kumari et al. 2023, section 3.2 and figure 3), measured by
# its own size:
#
# $$\lVert W' - W \rVert \, / \, \lVert W \rVert$$
#
# Here the same: a few steps on the tiger, with everything free, in a second copy of the model.

# %%
tuned = lesson.load()
options = preset("fine-tune", "bundled")
settings = replace(options.settings, steps=1 if lesson.quick else 25, batch=4)
options = replace(options, settings=settings)
training = METHODS["fine-tune"].build(tuned, [concepts["tiger"]], options)
for _ in training.run(lesson.device):
    pass
old, new = (dict(one.unet.named_parameters()) for one in (sd, tuned))
changes = layer_changes(old, new)
by_kind = {kind: [c for name, c in changes.items() if kind_of(name) == kind] for kind in KINDS}
for kind, values in by_kind.items():
    share = sum(old[name].numel() for name in changes if kind_of(name) == kind)
    share /= sum(old[name].numel() for name in changes)
    print(f"{kind}: moved {np.mean(values):.2%}, {share:.0%} of the weights")

# %%
fig, axis = plt.subplots()
generator = np.random.default_rng(0)
for i, ((kind, values), marker) in enumerate(zip(by_kind.items(), "os^")):
    beside = i + generator.uniform(-0.25, 0.25, len(values))
    axis.plot(beside, [100 * value for value in values], marker, alpha=0.6)
    axis.hlines(100 * np.mean(values), i - 0.35, i + 0.35, color="black")
axis.set(ylabel="change in % of the layer", xticks=range(len(KINDS)), xticklabels=KINDS)
lesson.show(fig, "moved", "Change of each layer in three groups, a line at each mean.")

# %% [markdown]
# In the paper cross-attention goes furthest by far, with a twentieth of all weights. In this small model no kind stands out: AdamW moves
# every number about equally far in so few steps, so that the layers of small weights move most by their own size, wherever they are. A
# measurement on one model need not hold for another. The paper's choice has a second reason, and that one holds here too.

# %% [markdown]
# ## Keys and values only
#
# In cross-attention the cells ask, and the words answer: $K = W_k \, c$ and $V = W_v \, c$, where c is what the text encoder makes of a
# word (lesson 04). These two matrices are the only ones through which words come into the U-Net. To learn a new word is to let other keys
# and values come in for it. So Custom Diffusion trains $W_k$ and $W_v$ of every cross-attention, and the new word's row, as lesson 16 did;
# nothing else. The row starts as a copy of a rare word's: what kind of thing it is, the class word behind it says already.
#
# Against forgetting, each sample brings along another picture with its own caption. In lesson 15 the model drew it; here it is a real one,
# a scene whose caption is near to "a photo of a lion". The numbers are the library's own for this model, its *preset*, but for a rate that
# falls to zero, so that the weights come to rest (lesson 12).

# %%
options = preset("custom-diffusion", "bundled")
count = 1 if lesson.quick else 150
fast = {"batch": 2, "precision": "bfloat16", "schedule": "linear"}
settings = replace(options.settings, steps=count, **fast)
prior = replace(options.prior, count=4 if lesson.quick else 40)
options = replace(options, settings=settings, prior=prior)
for concept in concepts.values():
    for _ in fill_class_images(sd, concept, options):
        pass


def learn(chosen, starts, steps):
    now = replace(options, start=starts, settings=replace(settings, steps=steps))
    method = METHODS["custom-diffusion"].build(sd, chosen, now)
    for _ in method.run(lesson.device):
        pass
    return method.custom_diffusion


# %%
is_clip = sd.tokenizer.vocab_size > max(RARE_TOKENS)
rare = RARE_TOKENS[:2] if is_clip else ("ktn", "pll")  # from which the new words start
starts = {"tiger": rare[:1], "violin": rare[1:]}
apart = {subject: learn([one], starts[subject], count) for subject, one in concepts.items()}
numbers = sum(W.numel() for W in apart["tiger"].layers.values())
everything = sum(p.numel() for p in sd.unet.parameters())
print(f"{len(apart['tiger'].layers)} matrices, {numbers:,} numbers of the U-Net's {everything:,}")
print(f"that is {numbers / everything:.1%}")

# %%
after = {}
for subject, concept in concepts.items():
    apart[subject].attach(sd)
    after[subject], found = draw(on_backgrounds(f"a {concept.subject_phrase}"), [subject])
    print(f'"a {concept.subject_phrase}": {found}')
    apart[subject].detach()
rows = [pictures for subject in subjects for pictures in (before[subject], after[subject])]
labels = ["a lion", "a <one>\nlion", "a guitar", "a <two>\nguitar"]
fig = picture_grid(rows, labels=labels)
lesson.show(fig, "apart", "Lions, tigers for the new word, guitars, violins for the other.")

# %% [markdown]
# So few weights turn the lion into an orange head without a mane, and the red guitar into a brown one with a narrow body. The judge takes
# most of them for tigers and violins. Stripes and strings are still to come.

# %% [markdown]
# ## Two at once: joint training
#
# To have both in one picture they can be learned together: one set of matrices, two words, and twice as many steps. Each picture of the
# training still shows one thing alone.
#
# Two things at once are hard for the bundled model, even two that it knows (lesson 10). So that we know what can be expected, the model as
# it was draws a lion and a guitar first.


# %%
def of_two(a, b):
    pairs = [f"{b} left of {a}", f"{a} left of {b}", f"{a} above {b}", f"{b} above {a}"]
    return [f"{text} on a white background" for text in pairs[: 1 if lesson.quick else 4]]


class_words = [concept.class_word for concept in concepts.values()]
together = {}
together["a lion,\na guitar"], found = draw(of_two("a lion", "a guitar"), class_words)
print(f"two that it knows: {found}")

# %%
joint = learn(list(concepts.values()), rare, 2 * count)
a, b = (f"a {concept.subject_phrase}" for concept in concepts.values())
both = of_two(a, b)
joint.attach(sd)
together["joint\ntraining"], found = draw(both, list(subjects))
joint.detach()
print(f"joint training: {found}")

# %% [markdown]
# ## Two learned apart: a system of equations
#
# Training together needs both sets of pictures in one place, and time for every pair. But $W_k$ and $W_v$ are maps of words and nothing
# more. What each concept learned can be written down as what it does to its own words. Let C hold the words' vectors as rows, shape `[s,
# D]`, and V what the concepts give for them, `[s, out]`. And $C_{reg}$ holds the vectors of many other captions, which shall be treated as
# before. Then the merged matrix is wanted for which (Kumari et al. 2023, eq. 4)
#
# $$\min_W \; \lVert W C_{reg}^\top - W_0 C_{reg}^\top \rVert \quad \text{such that} \quad W C^\top = V^\top$$
#
# It is least squares with constraints: what is asked for exactly, and of all ways to do so the one that moves other words least. Lagrange's
# multipliers give the answer in closed form (eq. 5):
#
# $$d = C \, (C_{reg}^\top C_{reg})^{-1} \qquad v = (d \, C^\top)^{-1} (V - C W_0^\top) \qquad W = W_0 + v^\top d$$
#
# In words: $V - C W_0^\top$ is what is asked for beyond what is there. A direction in which other captions have much is expensive, so the
# inverse turns each word of C into d, away from them.

# %% [markdown]
# ## Your turn: merge
#
# Write the three equations. `torch.linalg.solve(A, X)` is $A^{-1} X$. In come `W0` of shape `[out, D]`, `C` `[s, D]`, `V` `[s, out]`,
# `C_reg` `[n, D]`; out goes W, `[out, D]`. The inverse of $C_{reg}^\top C_{reg}$ is symmetric, so d is the transposed of the solution for
# $C^\top$.


# %%
def merge(W0, C, V, C_reg):
    """Eq. 4 and 5; W0 [out, D], C [s, D], V [s, out], C_reg [n, D]; W [out, D] with W C^T = V^T."""
    # YOUR CODE, about 3 lines


def of_the_library(W0, C, V, C_reg):
    directions, _, _ = merge_directions(C, C_reg)
    return W0 + (V - C @ W0.T).T @ directions


merge = lesson.check(merge, instead=of_the_library)

# %% [markdown]
# ## In small
#
# Words of two numbers and a map to one, so that it can be drawn: words of length one stand in a circle, and for each the map gives one
# number. One word is to get another number than before. The other captions lie around another direction. "Nothing to keep" is the same
# with a $C_{reg}$ of all directions alike.


# %%
def on_the_circle(degrees):
    angles = torch.deg2rad(torch.as_tensor(degrees, dtype=torch.float32))
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


circle = on_the_circle(torch.arange(0, 181))
C, V = on_the_circle([30.0]), torch.tensor([[2.0]])
C_reg = on_the_circle([92.0, 96.0, 100.0, 104.0, 108.0])
W0 = torch.tensor([[1.0, 0.8]])
with_reg, without = merge(W0, C, V, C_reg), merge(W0, C, V, torch.eye(2))
assert with_reg.shape == W0.shape
for label, W in (("before", W0), ("merged", with_reg), ("nothing to keep", without)):
    moved = (C_reg @ (W - W0).T).norm() / (C_reg @ W0.T).norm()
    print(f"{label}: gives {float((C @ W.T).squeeze()):.2f}, others moved by {moved:.0%}")

# %%
fig, axis = plt.subplots()
styles = (("before", W0, ":"), ("merged", with_reg, "-"), ("nothing to keep", without, "--"))
for label, W, style in styles:
    axis.plot(circle @ W.T, style, label=label)
axis.plot([30], [2], "o", color="black")
axis.annotate("asked for", (22, 1.6))
axis.plot(torch.rad2deg(torch.atan2(*C_reg.T.flip(0))), (C_reg @ W0.T), "k|", markersize=18)
axis.annotate("to be kept", (112, 0.75))
axis.set(xlabel="direction of the word, in degrees", ylabel="what the map gives")
axis.legend(loc="lower left")
lesson.show(fig, "small", "Both maps meet the point; one stays with the old map where it must.")

# %% [markdown]
# ## The same for every key and value
#
# `merge_concepts` does this in every cross-attention. C are the vectors of "a photo of a <one> lion" and "a photo of a <two> guitar" from
# the new words on, V what their own matrices make of them. $C_{reg}$ are the words of five hundred captions. The bundled model's captions
# do not fill all directions, so a small `ridge` is added, which makes every direction cost a little.

# %%
scenes = [sample_scene(np.random.default_rng([1, i])) for i in range(500)]
captions = [scene.caption for scene in scenes]
targets = [[f"a photo of a {concept.subject_phrase}"] for concept in concepts.values()]
merged, report = merge_concepts(sd, list(apart.values()), targets, captions, ridge=0.1)
print(f"{report.rows} rows asked for, {report.regularisation_rows} to be kept")
print(f"asked for, missed by {report.residual:.0e}; the others move by {report.drift:.1%}")
merged.attach(sd)
together["merged"], found = draw(both, list(subjects))
merged.detach()
print(f"merged, without a step of training: {found}")

# %% [markdown]
# ## Break it: add both changes up
#
# For two LoRAs it is common to add up what both learned. Here each change was made for its own words, and nothing told it what to do about
# the other's. But every word goes through both.

# %%
deltas = [concept.deltas(sd) for concept in apart.values()]
summed = {name: deltas[0][name] + deltas[1][name] for name in deltas[0]}
rows = {name: row for concept in apart.values() for name, row in concept.tokens.rows.items()}
added = from_deltas(sd, summed, NewTokens(rows))
added.attach(sd)
together["added\nup"], found = draw(both, list(subjects))
context = sd.encode_prompts([target for (target,) in targets])
positions = [dict(sd.tokenizer.words(target)) for (target,) in targets]
added.detach()
print(f"added up: {found}")


# %%
@torch.no_grad()
def off(changes):
    """How far the new words' keys and values are from those that their own concept gives."""
    wrong, wanted = 0.0, 0.0
    for i, (token, _) in enumerate(subjects.values()):
        first = positions[i][token][0]
        c = context[i, first : first + 3]  # the new word, the class word, the end
        for name, own in deltas[i].items():
            wrong += (c @ (changes[name] - own).T).square().sum()
            wanted += (c @ own.T).square().sum()
    return float((wrong / wanted).sqrt())


# %%
sum_is_off, merge_is_off = off(summed), off(merged.deltas(sd))
print(f"added up: off by {sum_is_off:.0%} of what was learned; merged: by {merge_is_off:.0%}")
assert merge_is_off < sum_is_off
fig = picture_grid(list(together.values()), labels=list(together))
lesson.show(fig, "together", "Lion, guitar; tiger and violin learned together, merged, added up.")

# %% [markdown]
# The merge gives both words exactly the keys and values that they had alone; the sum gives neither what it learned. By these numbers the
# second guess is answered: it is not enough.
#
# The pictures are kinder. The top row says what may be asked of this model: even two things that it knows come out crude. Below, an orange
# face and a dark body with its neck stand where they were asked for, in all three ways. Joint training and the merge are hardly to be told
# apart, and the merge took no step of training. The sum's colours are off: some muzzles are grey or pink, and the violins grey and blue.
# The judge does not mind; it finds tigers in all three rows, most in the last, and no violins at this size. So with two such small changes
# the sum's mistake shows in numbers before the eye sees it.

# %% [markdown]
# ## How little is enough: compression
#
# The change of each matrix has a spectrum (lesson 14), and the first few products are most of it. `compress` keeps the fewest whose
# strengths make up a given share of the sum.

# %%
sizes, drawings = {}, {}
change = apart["tiger"].deltas(sd)
for share in (0.8, 0.3) if lesson.quick else (0.8, 0.3, 0.1):
    small = compress(change, share)
    less = from_deltas(sd, small.deltas(), apart["tiger"].tokens)
    less.attach(sd)
    drawings[share], found = draw(on_backgrounds(a), ["tiger"])
    less.detach()
    kilobytes, part = small.size / 1e3, small.size / small.full_size
    print(f"share {share}: {kilobytes:4.0f} kB, {part:4.0%} of all; {found}")

# %%
rows = [after["tiger"], *drawings.values()]
fig = picture_grid(rows, labels=["all", *(f"{share:.0%}" for share in drawings)])
lesson.show(fig, "compressed", "Tigers from the whole change and from less and less of it.")

# %% [markdown]
# Down to a small part of the size the tigers hardly change; only the smallest share shows. Here too, a few directions hold what was learned.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/17_custom_diffusion.py --model v1-5-pruned-emaonly.safetensors --device cuda` does all of it on a checkpoint of yours;
# tigers and violins it knows already, so put your own pictures in their place. How much of Stable Diffusion 1.x keys and values are needs
# no weights:

# %%
with torch.device("meta"):  # shapes alone
    unet = UNet(SD1.unet)
total = sum(p.numel() for p in unet.parameters())
ends = (".cross_attention.to_k.weight", ".cross_attention.to_v.weight")
some = sum(p.numel() for name, p in unet.named_parameters() if name.endswith(ends))
print(f"{some / 1e6:.0f} of {total / 1e6:.0f} million numbers, {some / total:.1%}")
print(f"{4e-6 * some:.0f} MB in float32")

# %% [markdown]
# The paper's files have this size, and a fraction of it when they are compressed.

# %% [markdown]
# ## On a GPU
#
# ```bash
# minidiff train custom-diffusion --model v1-5-pruned-emaonly.safetensors --images my-cat --token "<cat>" --class-word cat --class-images cats --out runs/cat
# ```
#
# 15 minutes, with five pictures of your cat and a folder of captioned ones of other cats. Then `minidiff merge` puts it together with a
# second one, in seconds. Expect the merged model to draw each of the two alone as before, and both in one picture less often than after
# joint training.

# %% [markdown]
# ## Read next
#
# - `minidiff/adapters/merge_concepts.py`: `merge_directions` is your three lines by two QR decompositions, which lose fewer digits than a
#   matrix that is multiplied with itself.
# - Kumari et al. 2023, "Multi-concept customization of text-to-image diffusion", sections 3.2 and 3.3, eq. 4 and 5.
# - Lesson 20: loading real weights.
