# %% [markdown]
# # 16 Textual Inversion and pivotal tuning
#
# **Can a model draw a thing that it has never seen, if only the right word is found for it?**
#
# - Explains: [minidiff/adapters/tokens.py](../minidiff/adapters/tokens.py)
# - You change: `embed`, the look-up of words, old ones and new ones
# - Minutes: 30
# - Picture: [figures/16-words.png](figures/16-words.png)
#
# ![The whole pipeline; this lesson is about small changes of the weights](figures/pipeline-adapters.svg)
#
# The text encoder begins by looking up a row of a table for each token (lesson 09). *Textual Inversion* leaves the whole model as it is,
# and adds rows to that table: a new word, whose numbers are found by training. *Pivotal tuning* goes on from there with a LoRA (lesson 14)
# around the word.

# %% [markdown]
# ## Guess first
#
# The U-Net has never seen a tiger, and not one of its weights may move. With five pictures and one new word, what can it draw in the end?
#
# 1. The tiger: somewhere among all vectors there is one that means it.
# 2. Something between: the nearest that it can draw from what it knows.
# 3. Nothing new: it draws a lion, as for "lion".

# %% [markdown]
# ## A word that is not in the table
#
# The bundled model was never shown a tiger. Ours is called `<tiger>`. The word becomes two new tokens, whose numbers go on where the table
# ends, and each has a vector. Both start as copies of the row of "lion", the tiger's class (lesson 15).

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
from minidiff.config import SD1, SD2
from minidiff.pictures import to_pixels
from minidiff.pipeline import to_images
from minidiff.scenes.pictures import subject_scenes
from minidiff.trainers.methods.options import Concept
from minidiff.trainers.methods.table import METHODS, preset
from weights_loader import load_judge

# %%
lesson = start("16_textual_inversion")
sd = lesson.load()
judge = load_judge(device=lesson.device)
size = sd.config.image_size
scenes = subject_scenes("tiger", "fluent", 5, np.random.default_rng(0))
five = F.interpolate(to_pixels(np.stack([scene.image for scene in scenes])), (size, size))
folder = TemporaryDirectory()
for i, image in enumerate(to_images(five)):
    image.save(Path(folder.name) / f"{i}.png")
concept = Concept(images=Path(folder.name), token="<tiger>", class_word="lion")

# %%
options = preset("pivotal-tuning", "bundled")
steps, lora_steps = (2, 1) if lesson.quick else (120, 60)
fast = {"batch": 4, "precision": "bfloat16"}  # as in lesson 15
of_word = replace(options.tokens.settings, steps=steps, **fast)
of_lora = replace(options.lora.settings, steps=lora_steps, **fast)
low_rank = replace(options.lora, settings=of_lora)
options = replace(options, tokens=replace(options.tokens, settings=of_word), lora=low_rank)
method = METHODS["pivotal-tuning"].build(sd, [concept], options)

# %%
table = sd.text_encoder.token_embedding.weight.detach().clone()
size_of_table, D = table.shape
method.tokens.attach(sd)
ids = torch.tensor(sd.tokenizer.encode("a photo of a <tiger>"))
method.tokens.detach()
assert method.tokens.rows["<tiger>"].shape == (2, D)
print(f"the table: {size_of_table} rows of {D} numbers")
print(f"the caption: {ids.tolist()}")

# %% [markdown]
# ## Your turn: embed
#
# Write the look-up. `ids` has shape `[..., L]`, `table` `[T, D]`, and `new` holds the new vectors, `[n, D]`: the id `T` means `new[0]`,
# `T + 1` means `new[1]`. Out comes `[..., L, D]`. Leave the table as it is.


# %%
def embed(ids, table, new):
    """Rows of the table, beyond its end those of new; ids [..., L], table [T, D], new [n, D]."""
    # YOUR CODE, about 1 line


def looked_up(ids, table, new):
    known = table[ids.clamp(max=len(table) - 1)]
    unknown = new[(ids - len(table)).clamp(min=0)]
    return torch.where((ids >= len(table))[..., None], unknown, known)


embed = lesson.check(embed, instead=looked_up)
vectors = embed(ids, table.cpu(), method.tokens.rows["<tiger>"].detach().cpu())
assert vectors.shape == (len(ids), D)

# %% [markdown]
# ## Train the word, and nothing else
#
# The loss is that of all training. Its gradient goes back through the whole U-Net and the text encoder, and stops at the two rows:
# everything else stands still (Gal et al. 2022, eq. 2). The captions are templates with a hole, "a photo of a {}" and the like, so that the
# word takes up what the pictures share and not what a caption says anyway.
#
# We look as in lesson 15: how much of all that the judge sees is tiger, and how much is lion?

# %%
backgrounds = ("red", "white", "blue", "green")[: 2 if lesson.quick else 4]
drawing_steps = 3 if lesson.quick else 10


@torch.no_grad()
def draw(word):
    """Four pictures with the word; how much of all that the judge sees is tiger, and is lion."""
    prompts = [f"a {word} on a {colour} background" for colour in backgrounds]
    *_, last = sd.denoise(prompts, seeds=range(len(prompts)), steps=drawing_steps)
    pixels = sd.decode(last.x_t)
    side = judge.config.image_size  # the judge reads pictures of one size only
    shares = judge.read(F.interpolate(pixels, (side, side), mode="area")).shares().sum(dim=0)
    tiger, lion = (shares[judge.config.subjects.index(name)] for name in ("tiger", "lion"))
    return to_images(pixels), float(tiger / shares.sum()), float(lion / shares.sum())


# %%
lions_before, *seen = draw("lion")
print(f'"a lion", before: {seen[0]:.0%} tiger, {seen[1]:.0%} lion')
unet_before = [p.clone() for p in sd.unet.parameters()]
words, results = [], {}
training = method.run(lesson.device)
for phase, step in training:
    words.append(method.tokens.rows["<tiger>"].detach().cpu().clone())
    if step.done == steps:  # the word is learned; what follows is the LoRA
        results["word"] = draw("<tiger>"), draw("lion")
        break

# %%
same_rows = (sd.text_encoder.token_embedding.weight == table).all(dim=1)
same_unet = [torch.equal(old, new) for old, new in zip(unet_before, sd.unet.parameters())]
assert same_rows.shape == (size_of_table,) and same_rows.all() and all(same_unet)
lions_now = results["word"][1][0]
same_lions = [old.tobytes() == new.tobytes() for old, new in zip(lions_before, lions_now)]
print(f"{words[-1].numel()} numbers were learned")
print(f"{int(same_rows.sum())} of {size_of_table} rows are what they were, bit for bit")
print(f"{sum(same_unet)} of {len(same_unet)} tensors of the U-Net too")
print(f"and {sum(same_lions)} of {len(same_lions)} pictures of a lion")

# %%
fig, axis = plt.subplots()
moved = torch.stack(words)  # [steps, 2, D]
start_row = table[sd.tokenizer.encode("lion")].cpu()
for i, style in enumerate(("-", "--")):
    cosines = F.cosine_similarity(moved[:, i], start_row[:1], dim=-1)
    axis.plot(range(1, len(moved) + 1), cosines, style, label=f"vector {i + 1}")
axis.set(xlabel="step", ylabel='cosine with "lion"', ylim=(0, 1.05))
axis.legend()
lesson.show(fig, "away", "Two vectors leave the lion's, at first as one, then apart.")

# %% [markdown]
# The two begin as the same row and go the same way for a while; what parts them is their place in the caption. And the lion is what it was:
# nothing that it is made from has moved.

# %% [markdown]
# ## Pivotal tuning: a LoRA around the word
#
# A word can only choose among what the model draws already. *Pivotal tuning* (after Roich et al. 2021) has two phases: first the word as
# above, which brings the model as near as words can; then, while the word stays, a LoRA learns what is still missing. The training goes on
# where it stopped.

# %%
for phase, step in training:
    if step.done == lora_steps:
        results["both"] = draw("<tiger>"), draw("lion")
assert torch.equal(method.tokens.rows["<tiger>"].detach().cpu(), words[-1])
assert torch.equal(sd.text_encoder.token_embedding.weight, table)

# %% [markdown]
# And beside it the same LoRA, as many steps of it, without a new word, as in lesson 14: "a sks lion".

# %%
sks = replace(concept, token="sks")
alone = METHODS["lora"].build(sd, [sks], low_rank)
for _, step in alone.run(lesson.device):
    if step.done == lora_steps:
        results["LoRA"] = draw("sks lion"), draw("lion")

# %%
print('        tiger for the name, lion for "lion"')
for label, ((_, tiger, _), (_, _, lion)) in results.items():
    print(f"{label:6} {tiger:15.0%} {lion:18.0%}")
rows = [to_images(five)[: len(backgrounds)], *(named for (named, *_), _ in results.values())]
fig = picture_grid(rows, labels=["tigers", *results])
lesson.show(fig, "words", "Tigers; drawn for the new word, for word and LoRA, for a LoRA alone.")

# %%
numbers = sum(p.numel() for p in method.lora.parameters())
print(f"the word: {4e-3 * words[-1].numel():.0f} kB; the LoRA: {4e-3 * numbers:.0f} kB")
fig = picture_grid([lions for _, (lions, *_) in results.values()], labels=list(results))
lesson.show(fig, "lions", "Lions: whole with the word, mostly with both, gone with the LoRA.")

# %% [markdown]
# The new word draws an orange head with a pale muzzle and no mane, and it has no stripes: among all that this model can draw no word found
# any. So the second of the three answers is right here, something between. In return the lions are untouched. The LoRA alone goes further
# towards the tiger, with dark patches around its face, and takes the lion along: nothing kept it (lesson 15). Word and LoRA together have
# dark patches too, beside the face, where the word alone has hardly any. And as their captions say `<tiger>` and never "lion", most of the
# lion stays.
#
# What is left behind differs as much. The word's file is tiny, and harms nothing. The LoRA's is far larger, and reaches every prompt.

# %% [markdown]
# ## Break it: train the whole table
#
# It is tempting to make the table itself trainable, with the new rows at its end: only rows that occur get a gradient, so should not the
# rest stand still? But AdamW also shrinks every weight a little at each step, gradient or not, which is called *weight decay*.

# %%
whole = torch.nn.Parameter(torch.cat([table, vectors[-2:].to(table)]))
rate, decay = of_word.learning_rate, 0.01  # AdamW's own
optimizer = torch.optim.AdamW([whole], lr=rate, weight_decay=decay)
for _ in range(20):
    whole.grad = torch.zeros_like(whole)
    whole.grad[-2:] = 1.0  # only the new rows
    optimizer.step()
same_rows = int((whole[:size_of_table] == table).all(dim=1).sum())
print(f"{same_rows} of {size_of_table} rows are what they were after 20 steps")

# %% [markdown]
# Without a gradient a row is multiplied by the same number each step, one less the product of learning rate and decay. So what becomes of
# it in a longer training needs no training:

# %%
left = 1 - rate * decay
assert torch.allclose(whole[:size_of_table], left**20 * table, rtol=1e-4, atol=1e-6)
rows = {"before": draw("frog")[0]}
for many in (400, 5000, 10000):
    print(f"after {many:5} steps: {1 - left**many:.0%} shorter")
    with torch.no_grad():
        sd.text_encoder.token_embedding.weight.copy_(left**many * table)
    rows[f"{many}\nsteps"] = draw("frog")[0]
with torch.no_grad():
    sd.text_encoder.token_embedding.weight.copy_(table)
fig = picture_grid(list(rows.values()), labels=list(rows))
lesson.show(fig, "shrunk", "Frogs fade with the words of the table, and their backgrounds too.")

# %% [markdown]
# At first nothing is to be seen, which makes it a bad mistake: every word that there is has changed, and nobody notices until the words
# begin to fail. Some programs copy the old rows back after each step. minidiff keeps the new rows beside the table, where no optimizer
# reaches the others.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/16_textual_inversion.py --model v1-5-pruned-emaonly.safetensors --device cuda` does all of it on a checkpoint of yours. It
# knows tigers already, so put pictures of your own in the folder. What a vector weighs there needs no weights:

# %%
for name, config in (("1.x", SD1), ("2.x", SD2)):
    D = config.text_encoder.width
    print(f"Stable Diffusion {name}: a vector has {D} numbers, {4 * D / 1e3:.1f} kB in float32")

# %% [markdown]
# ## On a GPU
#
# ```bash
# minidiff train textual-inversion --model v1-5-pruned-emaonly.safetensors --images my-cat --token "<my-cat>" --class-word cat --out runs/word
# ```
#
# 60 minutes for the 5000 steps of the preset. Expect a file of a few kilobytes, and a cat that is like yours, though seldom yours.

# %% [markdown]
# ## Read next
#
# - `minidiff/adapters/tokens.py`: the rows are parameters of their own; `TextEncoder` looks them up as your line does.
# - Gal et al. 2022, "An image is worth one word", eq. 2.
# - Lesson 17: a word, and the few weights that hear it.
