# %% [markdown]
# # 09 Words to vectors
#
# **How do the words of a prompt become numbers that a network can look at?**
#
# - Explains: [minidiff/tokenizer.py](../minidiff/tokenizer.py), [minidiff/text_encoder.py](../minidiff/text_encoder.py)
# - You change: `spell`, the loop that cuts a word into known pieces
# - Minutes: 30
# - Picture: [figures/09-neighbours.png](figures/09-neighbours.png)
#
# ![The whole pipeline; this lesson is about the tokenizer and the text encoder](figures/pipeline-words.svg)
#
# The U-Net is given `context`: a table with one vector a word (lesson 04 looked words up in it). Two parts make that table. The *tokenizer* turns text into
# integers; it was never trained by a gradient, it only counts. The *text encoder* turns each integer into a vector that knows the words before it.

# %% [markdown]
# ## Guess first
#
# The text encoder always reads a row of the same length, however short the prompt. The rest of the row is filled with a token that says nothing, the
# *padding*. Stable Diffusion 1.x fills with one token, Stable Diffusion 2.x with another. What happens if you fill with the wrong one?
#
# 1. Nothing: the padding carries no word.
# 2. Another picture, and a slightly worse network, but no error anywhere.
# 3. The picture falls apart.

# %% [markdown]
# ## A word in pieces
#
# A table with a vector for every word would be endless, and would still miss the next new word. A table of letters misses nothing, but makes the network
# learn spelling. *Byte-pair encoding* lies between (Sennrich et al. 2016). Somebody counted, once, in a large text: which two neighbours stand together most often? They
# became one piece, and the count began again. What is left of that is a list of *merges*: pairs, the earliest found first.
#
# To cut a word one starts from its letters and repeats what was done then: of all neighbours that are in the list, join those that come first in the
# list. `</w>` marks the end of a word, so that the `in` of "ink" and the `in` of "pin" are two pieces.

# %%
import dataclasses

import numpy as np
import torch
from matplotlib import pyplot as plt

from lessons.common import BLUE, SKY, picture_grid, start
from minidiff.attention_maps import record_cross_attention
from minidiff.config import SD1, SD2
from minidiff.guidance import guided
from minidiff.pipeline import noise_source, to_images
from minidiff.samplers import sample
from minidiff.scenes.art import sprite, subject_names
from minidiff.scenes.scenes import sample_scene
from minidiff.scenes.train_bpe import join_pair
from minidiff.tokenizer import Tokenizer

lesson = start("09_words_to_vectors")

# %%
sd = lesson.load()
tokenizer = sd.tokenizer
merges = dict(tokenizer.bpe.bpe_ranks)  # (left, right): its place in the list
word = "mushroomburger"
pieces = (*word[:-1], word[-1] + "</w>")
steps = [pieces]
while known := [pair for pair in zip(pieces, pieces[1:]) if pair in merges]:
    first = min(known, key=merges.get)
    pieces = join_pair(pieces, first)
    steps.append(pieces)
    print(f"merge {merges[first]:5}: {' + '.join(first)}")
print(f"{len(merges)} merges; {len(word)} letters became {len(pieces)} pieces: {pieces}")

# %%
fig, axis = plt.subplots(figsize=(6, 4.4))
for i, row in enumerate(steps):
    left = 0
    for piece in row:
        text = piece.removesuffix("</w>")
        letters = len(text)
        colour = BLUE if letters > 1 else SKY
        axis.barh(i, letters, left=left, color=colour, edgecolor="white", linewidth=2)
        axis.text(left + letters / 2, i, text, color="white", fontsize=11, ha="center", va="center")
        left += letters
axis.set(xticks=[], xlim=(0, left))
axis.set_yticks([0, len(steps) - 1], ["letters", "pieces"])
axis.invert_yaxis()
axis.grid(False)
lesson.show(fig, "pieces", "Row by row the letters of mushroomburger join to a few pieces.")

# %% [markdown]
# Nobody has taught the model this word. It can be written all the same, in pieces that it has met. A word that it was taught stands in the list whole: "mushroom" does, with its
# `m</w>` at the end. Inside our longer word the letter is a plain `m`, and so stays by itself.

# %% [markdown]
# ## Your turn: spell
#
# Write that loop. `word` is a string, and `merges` a dict from pairs to their place in the list. The last letter gets its `</w>` first. `join_pair(pieces, pair)`
# joins a pair wherever it stands. Give back the pieces as a tuple.


# %%
def spell(word, merges):
    """Pieces of a word: join the pair with the lowest place, until none is left."""
    # YOUR CODE, about 6 lines


def library(word, merges):
    return tuple(tokenizer.bpe.bpe(word).split(" "))


spell = lesson.check(spell, instead=library)
for word in ("mushroom", "mushrooms", "unbelievable"):
    print(f"{word}: {' | '.join(spell(word, merges))}")
    assert spell(word, merges) == library(word, merges)

# %% [markdown]
# ## A row of integers
#
# Each piece has a number, its *token*. A row begins with a start token, then come the prompt's tokens, then an end token, and then padding up to the length L that
# the text encoder was built for. `words` says where each word stands: that is how an attention map is found for a word.

# %%
prompt = "a small red cat on a blue background"
tokens = tokenizer([prompt])
B, L = tokens.shape
assert (1, sd.config.text_encoder.context_length) == (B, L)
length = len(tokenizer.encode(prompt))
print(f"L = {L}: start, {length} tokens, end, {L - length - 2} of padding")
print(tokens[0, : length + 4].tolist(), "...")
for text, positions in tokenizer.words(prompt):
    print(f"{text:10} at {positions}, tokens {tokens[0, positions].tolist()}")

# %% [markdown]
# ## Integers to vectors
#
# The text encoder looks each token up in a table of vectors that were learned, and adds a second vector for its place in the row: without that "a cat above
# a dog" and "a dog above a cat" would hold the same things. Then come blocks of attention (lesson 04), in which the words ask each other, each followed by a
# small network for every word by itself. This is the text half of CLIP, two networks, one for pictures and one for texts, that were taught together which text
# belongs to which picture (Radford et al. 2021, section 2.4). Written out:

# %%
encoder = sd.text_encoder
tokens = tokens.to(lesson.device)
D = sd.config.text_encoder.width
with torch.no_grad():
    x = encoder.token_embedding(tokens) + encoder.position_embedding.weight[:L]
    for block in encoder.blocks:
        x = x + block.attention(block.norm_1(x), causal=True)
        x = x + block.linear_2(block.activation(block.linear_1(block.norm_2(x))))
    context = encoder.norm_out(x)

assert context.shape == (B, L, D)
assert torch.allclose(context, sd.encode_prompts([prompt]), atol=1e-4)
print(f"{len(encoder.blocks)} blocks: tokens {list(tokens.shape)} to context {list(context.shape)}")

# %% [markdown]
# ## No word sees the words after it
#
# `causal=True` stands for a mask: place n of the row may look at places up to n, not at later ones. It is a habit of models that are to guess the next word. CLIP kept it, though it guesses none.
# What does it mean for a prompt? Replace one token at a time by another one, and see which rows of the context change.

# %%
other = tokenizer.encode("frog")[-1]
changed = tokens.repeat(length, 1)
for i in range(length):
    changed[i, 1 + i] = other
with torch.no_grad():
    off = (encoder(changed) - context).square().mean(dim=-1).sqrt()
shown = length + 6  # rows: start, the prompt, end, and four of padding
off = off[:, :shown].cpu()
assert off.shape == (length, shown)

before = torch.stack([off[i, : 1 + i].max() for i in range(length)])
after = torch.stack([off[i, 2 + i :].mean() for i in range(length)])
print(f"rows before the new word: changed by {before.max():.3f} at most")
print(f"rows after it: changed by {after.mean():.3f} on average")
assert before.max() < 1e-4

# %%
fig, axis = plt.subplots(figsize=(6, 4.2))
axis.imshow(off)
labels = [text for text, positions in tokenizer.words(prompt) for _ in positions]
axis.set(xlabel="row of the context", ylabel="word replaced")
axis.set_xticks(range(shown), ["start", *labels, "end", *["pad"] * 4], rotation=90)
axis.set_yticks(range(length), labels)
axis.grid(False)
lesson.show(fig, "causal", "A triangle: rows to the left of a new word stay dark.")

# %% [markdown]
# Below the diagonal all is dark: those rows stand before the new word, and did not change at all. So "cat" does not know of the blue background; "background" knows of the cat. The
# end token and every row of padding come after all words, so they change with each. They are not empty: they are summaries.

# %% [markdown]
# ## What the vectors have learned
#
# The text encoder of the bundled model learned only through pictures: its gradient came from a U-Net that wanted to know what to draw. Take the vector of each
# subject in "a ...", remove what all have in common (their mean), and ask which others point the same way.

# %%
names = subject_names(held_out=False)
places = [tokenizer.words(f"a {name}")[-1][1][-1] for name in names]
vectors = sd.encode_prompts([f"a {name}" for name in names])[range(len(names)), places].cpu()
assert vectors.shape == (len(names), D)
vectors = vectors - vectors.mean(dim=0)
vectors = vectors / vectors.norm(dim=1, keepdim=True)
alike = vectors @ vectors.T  # the cosine of each two
nearest = alike.topk(4).indices  # the first is the word itself
asked = ("strawberry", "broccoli", "panda", "banana")
for name in asked:
    i = names.index(name)
    print(f"{name}: " + ", ".join(f"{names[j]} {alike[i, j]:.2f}" for j in nearest[i, 1:]))

# %%
white = [255, 255, 255]


def picture(name):
    rgba = np.asarray(sprite(name, "noto", None).resize((64, 64))).astype(np.float32)
    return (rgba[..., :3] + (255 - rgba[..., 3:]) / 255 * white).clip(0, 255).astype(np.uint8)


rows = [[picture(names[j]) for j in nearest[names.index(name)]] for name in asked]
fig = picture_grid(rows, ["word", "nearest", "second", "third"], list(asked))
lesson.show(fig, "neighbours", "Four emoji, and beside each those of its nearest words: alike.")

# %% [markdown]
# A dictionary would put the strawberry beside the banana. Here words are near whose *pictures* look alike. Is that so, or were four good examples chosen? Compare the mean colour of
# the emoji: how far apart is it for nearest words, and for any two words?

# %%
colour = torch.stack([torch.from_numpy(picture(name)).float().mean(dim=(0, 1)) for name in names])
apart = torch.cdist(colour, colour)
of_nearest = apart.gather(1, nearest[:, 1:2]).mean()
of_any = apart.sum() / (len(names) * (len(names) - 1))
print("mean distance in colour, of 0 to 441:")
print(f"nearest words {of_nearest:.0f}, any two words {of_any:.0f}")
assert lesson.model != "tiny" or of_nearest < 0.9 * of_any

# %% [markdown]
# The text encoder of Stable Diffusion is CLIP's own. It learned from captions of every kind of picture, before there was a U-Net, and was never changed since.

# %% [markdown]
# ## Break it: the wrong padding
#
# First: does the U-Net look at the padding at all? Record where its cells look, in all layers, at the first step, where $x_t$ is noise.

# %%
side = sd.config.image_size // sd.config.vae.factor
shape = (sd.config.vae.latent_channels, side, side)
first = torch.tensor([sd.schedule.config.timesteps - 1], device=lesson.device)
with torch.no_grad(), record_cross_attention(sd.unet) as maps:
    sd.unet(noise_source([0], shape, lesson.device)(), first, context)
share = torch.stack([layer.mean(dim=(0, 1, 2)) for layer in maps.values()]).mean(dim=0).cpu()
assert share.shape == (L,)
parts = {"start": share[:1], "words": share[1 : 1 + length], "padding": share[1 + length :]}
for name, values in parts.items():
    print(f"{name}{' and end' if name == 'padding' else ''}: {values.sum():.0%} of all looks")

# %% [markdown]
# It does, and a good deal: the padding was there in training, it has read the whole prompt, and there is much of it. So what it is made of matters. Stable Diffusion 1.x
# repeats the end token, Stable Diffusion 2.x takes token 0. The bundled model is of the first kind. Give it captions padded in the other way, or with the padding cut off, as
# one would for a network that has no use for it, and measure the error of its answer on scenes that it could have been trained on. Two captions that are wrong
# altogether make the scale.

# %%
padding = {"end": "zero", "zero": "end"}[sd.config.tokenizer.padding]
theirs = Tokenizer(dataclasses.replace(sd.config.tokenizer, padding=padding), tokenizer.added)
print("as trained:   ", tokenizer([prompt])[0, -3:].tolist())
print("other family: ", theirs([prompt])[0, -3:].tolist())


rng = np.random.default_rng(0)
scenes = [sample_scene(rng, split="train") for _ in range(8 if lesson.quick else 48)]
captions = [scene.caption for scene in scenes]


@torch.no_grad()
def encode(texts, reader):
    return encoder(reader(texts).to(lesson.device))


assert encode(captions, tokenizer).shape == encode(captions, theirs).shape == (len(scenes), L, D)

# %%
pixels = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2)
size = (sd.config.image_size, sd.config.image_size)
pixels = torch.nn.functional.interpolate(pixels / 127.5 - 1, size=size, mode="bicubic")
pixels = pixels.to(lesson.device)
t = torch.linspace(500, 950, len(scenes)).long().to(lesson.device)
with torch.no_grad():
    x_0 = sd.vae.encode(pixels).mean * sd.config.vae.scaling_factor
eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(lesson.device)
x_t, target = sd.schedule.q_sample(x_0, t, eps), sd.schedule.target(x_0, t, eps)


@torch.no_grad()
def error(context, i=slice(None)):
    return float((sd.unet(x_t[i], t[i], context) - target[i]).square().mean())


# %%
errors = {
    "as trained": error(encode(captions, tokenizer)),
    "other family's": error(encode(captions, theirs)),
    "cut off": 0.0,
    "another caption": error(encode(captions[1:] + captions[:1], tokenizer)),
    "no caption": error(encode([""] * len(captions), tokenizer)),
}
for i, caption in enumerate(captions):
    end = 2 + len(tokenizer.encode(caption))  # the row after the end token
    errors["cut off"] += error(encode([caption], tokenizer)[:, :end], slice(i, i + 1))
errors["cut off"] /= len(captions)
best, worst = errors["as trained"], errors["no caption"]
for name, value in errors.items():
    print(f"{name:16} {value:.3f}: {value / best - 1:+.1%}")
assert lesson.model != "tiny" or lesson.quick or best < errors["other family's"] < worst

# %%
fig, axis = plt.subplots()
above = [100 * (value / best - 1) for value in errors.values()]
axis.barh(list(errors), above, color=[BLUE] * 3 + [SKY] * 2)
axis.set(xlabel="error, % above the trained padding")
axis.invert_yaxis()
lesson.show(fig, "padding", "Bars: wrong padding costs something, a wrong caption much more.")

# %% [markdown]
# And the pictures? The same seeds, with the padding of the other family in the prompt and in the empty prompt of guidance (lesson 10 explains that one).

# %%
prompts = ["a burger on a green background", "a frog left of a rose on a white background"]
prompts += ["a trophy above a cat on a blue background"]
draw = noise_source([1] * len(prompts), shape, lesson.device)
x_T, empty = draw(), [""] * len(prompts)
rows = []
for reader in (tokenizer, theirs):
    cond, uncond = encode(prompts, reader), encode(empty, reader)
    model = guided(sd.unet, cond, uncond, sd.config.guidance_scale)
    with torch.no_grad():
        *_, last = sample(model, x_T, sd.schedule, steps=8 if lesson.quick else 16)
    rows.append(to_images(sd.decode(last.x_t)))
change = np.abs(np.float32(rows[0]) - np.float32(rows[1])).mean()
print(f"the pictures differ by {change:.0f} of 255 on average")

# %%
columns = ["burger", "frog, rose", "trophy, cat"]
fig = picture_grid(rows, columns, ["as\ntrained", "other\nfamily's"])
lesson.show(fig, "wrong-padding", "Three pictures, and below the same with the wrong padding.")

# %% [markdown]
# The second guess was right, for this model and these pictures. Nothing crashed, no shape was wrong, and one can still tell what was asked for. This is what makes the mistake so
# common: it is seen only beside the right picture, or in a number.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/09_words_to_vectors.py --model v1-5-pruned-emaonly.safetensors` runs all of this on a checkpoint that you have. The merges of CLIP come with its
# tokenizer, so its tokens can be looked at without weights. Both families have the same merges and the same 77 places; they clean the text
# differently, pad differently, and take the context from another place: Stable Diffusion 1.x from the last of 12 blocks, Stable Diffusion 2.x from the last but one, so that of
# 24 blocks it runs 23.

# %%
for name, config in (("SD 1.x", SD1), ("SD 2.x", SD2)):
    text, own = config.text_encoder, Tokenizer(config.tokenizer)
    print(f"{name}: {len(own.bpe.bpe_ranks)} merges, {own.vocab_size} tokens")
    in_file = text.layers + (name == "SD 2.x")
    print(f"  {text.context_length} places, {text.layers} of {in_file} blocks, width {text.width}")
    print("  a photo of a cat:", own(["a photo of a cat"])[0, :9].tolist(), "...")
    print("  mushroomburger:", own.decode(own.encode("mushroomburger")[:1]), "| ...")
    print("  &amp; is read as", own.decode(own.encode("&amp;")))

# %% [markdown]
# A prompt that is longer than the row is cut at its end, and the words behind it have no effect at all. minidiff warns and says which words were lost.

# %% [markdown]
# ## On a GPU
#
# With a checkpoint, the pictures of "Break it" at 512 x 512:
#
# ```bash
# python lessons/09_words_to_vectors.py --model v1-5-pruned-emaonly.safetensors --device cuda
# ```
#
# Two minutes. Expect most looks to go to the start token, as large models have learned to look there when no word concerns them, and the nearest words to be near in meaning
# rather than in colour.

# %% [markdown]
# ## Read next
#
# - `minidiff/tokenizer.py`: `Tokenizer.__call__` makes the row, `_spell` calls the loop that you wrote; `minidiff/scenes/train_bpe.py` finds the merges in forty lines.
# - `minidiff/text_encoder.py`: `TextBlock` is the block above; its activation, a GELU in two versions, is there too.
# - Sennrich et al. 2016, "Neural machine translation of rare words with subword units", section 3.2; Radford et al. 2021, the CLIP paper, section 2.4.
# - Lesson 10: what the U-Net does with the context, step by step.
