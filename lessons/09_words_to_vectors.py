# %% [markdown]
# # 09 Words to vectors
#
# **How do the words of a prompt become numbers that a network can look at?**
#
# - Explains: [minidiff/tokenizer.py](../minidiff/tokenizer.py), [minidiff/text_encoder.py](../minidiff/text_encoder.py)
# - You change: `spell`, `causal_weights` and `clip_loss`, from letters to vectors that have a meaning
# - Minutes: 50
# - Picture: [figures/09-neighbours.png](figures/09-neighbours.png)
#
# ![The whole pipeline; this lesson is about the tokenizer and the text encoder](figures/pipeline-words.svg)
#
# The U-Net receives the prompt as `context`, a table with one vector for each token (lesson 04). Two parts make that table. The *tokenizer*
# turns text into integers. It has no weights; its only data is a list of letter pairs. The *text encoder* is a network that turns each
# integer into a vector that also knows the words before it.

# %% [markdown]
# ## Guess first
#
# The text encoder always reads a row of the same length, however short the prompt is. The rest of the row is filled with a token that
# carries no word, the *padding*. Stable Diffusion 1.x fills with one token, Stable Diffusion 2.x with another. What happens to the pictures
# if you fill with the wrong one?
#
# 1. Nothing: the padding carries no word.
# 2. The pictures change, and the model's predictions get a little worse, but there is no error message.
# 3. The pictures fall apart.

# %% [markdown]
# ## A word in pieces
#
# A table with a vector for every word would never be complete. A table of letters is complete, but then the network has to learn spelling.
# *Byte-pair encoding* lies between the two (Sennrich et al. 2016). Take a large text, cut into letters, and count: which two neighbours
# occur together most often? Join that pair into one piece everywhere, and count again. The result is a list of *merges*: pairs of pieces in
# the order in which they were found.
#
# To cut a new word into pieces, start with its letters and replay the list: of all neighbours that are a pair in the list, join the pair
# that was found first, and repeat until no pair is left. The last letter carries the mark `</w>`, so that the `in` at the end of "pin" and
# the `in` at the start of "ink" are different pieces.

# %%
import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib import pyplot as plt

from lessons.common import BLUE, SKY, picture_grid, scene_latents, scene_pixels, start
from minidiff import attention_maps, config
from minidiff.conditioning import TextSide
from minidiff.pipeline import noise_source, to_images
from minidiff.scenes.art import sprite, subject_names
from minidiff.scenes.scenes import sample_scene
from minidiff.scenes.train_bpe import join_pair, train
from minidiff.tokenizer import Tokenizer

lesson = start("09_words_to_vectors")

# %%
sd = lesson.load()
tokenizer = sd.tokenizer
print("merges found in three words:")
print(train(["low", "lower", "slower"]))

pieces = tuple("slow") + ("s</w>",)
print(join_pair(pieces, ("l", "o")))

# %% [markdown]
# ## Your turn: spell
#
# Write this loop. `word` is a string; `merges` is a dict from pairs to their place in the list, so the pair found first has the lowest
# number. Start with a tuple of the letters, the last one with its `</w>`. `zip(pieces, pieces[1:])` gives all pairs of neighbours, and
# `min(pairs, key=merges.get)` the pair with the lowest number. `join_pair(pieces, pair)`, which you have just seen at work, returns the
# tuple with that pair joined wherever it occurs. Return the pieces as a tuple.
#
# A right loop reports how it cuts a word that its merges were not made from.


# %%
def spell(word, merges):
    """Pieces of a word: join the pair with the lowest place, until none is left."""
    # YOUR CODE, about 6 lines


spell = lesson.check(spell)

# %% [markdown]
# Now with the model's own merges, on a word that the model was never taught. To draw the pieces after every merge, we go through the list
# once, from the first pair to the last. That gives the same as your loop, because a merge only creates pairs that come later in the list.

# %%
merges = dict(tokenizer.bpe.bpe_ranks)  # (left, right): its place in the list
word = "mushroomburger"
rows = [(*word[:-1], word[-1] + "</w>")]
for pair, place in sorted(merges.items(), key=lambda item: item[1]):
    if pair in zip(rows[-1], rows[-1][1:]):
        rows.append(join_pair(rows[-1], pair))
        print(f"merge {place:5}: {' + '.join(pair)}")
print(f"{len(merges)} merges; {len(word)} letters became {len(rows[-1])} pieces")
assert rows[-1] == spell(word, merges) == tuple(tokenizer.bpe.bpe(word).split(" "))

# %%
fig, axis = plt.subplots(figsize=(6, 4.4))
for i, row in enumerate(rows):
    left = 0
    for piece in row:
        text = piece.removesuffix("</w>")
        colour = BLUE if len(text) > 1 else SKY
        axis.barh(i, len(text), left=left, color=colour, edgecolor="white", linewidth=2)
        middle, centred = left + len(text) / 2, {"ha": "center", "va": "center"}
        axis.text(middle, i, text, color="white", fontsize=11, **centred)
        left += len(text)
axis.set(xticks=[], xlim=(0, left))
axis.set_yticks([0, len(rows) - 1], ["letters", "pieces"])
axis.invert_yaxis()
axis.grid(False)
lesson.show(fig, "pieces", "Row by row, the letters of mushroomburger join into a few pieces.")

# %% [markdown]
# The word was never taught, and yet it can be written, in pieces that the model has met. A word that it was taught is a single piece:

# %%
for word in ("mushroom", "mushrooms", "unbelievable"):
    print(f"{word}: {' | '.join(spell(word, merges))}")

# %% [markdown]
# ## A row of integers
#
# Every piece has a number, its *token*. A row begins with a start token. The prompt's tokens follow, then an end token, then padding up to
# the length L that the text encoder was built for. `words` tells where each word stands in the row, which is how we find the attention map
# of a word (lesson 04).

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
# ## No word sees the words after it
#
# The text encoder looks each token up in a table of learned vectors and adds a second learned vector for its position in the row. Without
# positions, "a cat above a dog" and "a dog above a cat" would be the same set of vectors. Then come blocks of attention (lesson 04) in
# which the words look at each other.
#
# One thing is new. In this attention, position $n$ may look at the positions up to $n$ and at none after it. It is called *causal*
# attention. Language models need it, because they predict the next word and must not see it. CLIP, whose text encoder Stable Diffusion 1.x
# uses, predicts no words, but kept the habit.

# %% [markdown]
# ## Your turn: causal_weights
#
# Turn scores into causal attention weights. `scores` has shape `[..., L, L]`: row $n$ holds the scores $q_n \cdot k_m / \sqrt{d}$ of
# position $n$ with every position $m$. Set the scores of all later positions to $-\infty$. The exponential of $-\infty$ is zero, so the
# softmax gives them no weight, and each row still adds up to one. Two lines. `torch.ones_like(scores).triu(1)` is one above the diagonal,
# where $m > n$, and zero elsewhere; `.bool()` makes True and False of it; `scores.masked_fill(where, value)` returns the scores with
# `value` wherever `where` is True.
#
# When it is right, you see the weights of a row of eight positions.


# %%
def causal_weights(scores):
    """Softmax of each row over the positions up to its own; scores [..., L, L] -> [..., L, L]."""
    # YOUR CODE, about 2 lines


causal_weights = lesson.check(causal_weights)

# %% [markdown]
# With this function we can write out the whole text encoder. Each block has an attention and a small network that treats every position
# alone; each of the two works on a LayerNorm of its input and is added to it, like the blocks of lesson 06.


# %%
def look_back(attention, x):
    """Self-attention of lesson 04, with your causal weights."""
    parts = (attention.to_q(x), attention.to_k(x), attention.to_v(x))
    q, k, v = (rearrange(part, "B L (h d) -> B h L d", h=attention.heads) for part in parts)
    weights = causal_weights(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5)
    return attention.to_out(rearrange(weights @ v, "B h L d -> B L (h d)"))


@torch.no_grad()
def encode(encoder, tokens):
    x = encoder.token_embedding(tokens) + encoder.position_embedding.weight
    for block in encoder.blocks[:-1] if encoder.config.penultimate else encoder.blocks:
        x = x + look_back(block.attention, block.norm_1(x))
        x = x + block.linear_2(block.activation(block.linear_1(block.norm_2(x))))
    return x if encoder.config.penultimate else encoder.norm_out(x)


# %%
encoder, D = sd.text_encoder, sd.config.text_encoder.width
context = encode(encoder, tokens.to(lesson.device))
assert context.shape == (B, L, D)
assert torch.allclose(context, sd.encode_prompts([prompt]), atol=1e-3)
print(f"{len(encoder.blocks)} blocks: tokens {list(tokens.shape)} to context {list(context.shape)}")

# %% [markdown]
# What does the causal mask mean for a prompt? We replace one token at a time and see which rows of the context change.

# %%
other = tokenizer.encode("frog")[-1]
changed = tokens.repeat(length, 1)
for i in range(length):
    changed[i, 1 + i] = other
off = (encode(encoder, changed.to(lesson.device)) - context).square().mean(dim=-1).sqrt()
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
lesson.show(fig, "causal", "A triangle: the rows left of a replaced word stay dark.")

# %% [markdown]
# Below the diagonal everything is dark: rows before the new word did not change at all. The row of "cat" knows nothing of the blue
# background, but the row of "background" knows of the cat. The end token and the padding come after all words, so each of their rows
# changes with every word. They are not empty: they are summaries of the prompt.

# %% [markdown]
# ## Where the meaning comes from: CLIP
#
# So far the vectors could be random. CLIP gives them a meaning by training two networks together, one for pictures and one for texts, on
# pictures with their captions (Radford et al. 2021, section 2.3). Each network ends in one vector. For a batch of B pairs, compare every
# picture $p_i$ with every text $c_j$ by the cosine of their vectors. That is a matrix of B x B numbers, and on its diagonal are the pairs
# that belong together:
#
# $$s_{ij} = \mathrm{scale} \cdot \frac{p_i \cdot c_j}{\Vert p_i \Vert \, \Vert c_j \Vert}$$
#
# Row $i$ asks: which of these texts belongs to picture $i$? Column $j$ asks: which of these pictures belongs to text $j$? In both cases the
# right answer is on the diagonal. A softmax turns a row into shares that add up to one, and the loss of the row is $-\log$ of the share on
# the diagonal: zero if the network is certain and right. Because all other pairs of the batch serve as wrong answers, this is called
# *contrastive* training.

# %% [markdown]
# ## Your turn: clip_loss
#
# Write the loss for `pictures` and `texts`, both of shape `[B, D]`. `F.normalize(x, dim=-1)` brings every vector to length one, and then a
# matrix product with the transposed texts, `texts.T`, gives all cosines. `F.cross_entropy(scores, own)` takes the softmax of each row and
# returns the mean of the rows' losses; `own` holds the number of the right column of each row, counting up from zero
# (`torch.arange(len(scores), device=scores.device)`). The rows of `scores.T` are the columns. Return the mean of the two losses.
#
# A right loss reports what it makes of pairs that match and of pairs that do not.


# %%
def clip_loss(pictures, texts, scale):
    """Mean cross-entropy of rows and columns; pictures and texts [B, D], scale a number."""
    # YOUR CODE, about 5 lines


clip_loss = lesson.check(clip_loss)

# %% [markdown]
# Let us train such a pair in a few seconds. The picture side is a small convolutional network, trained from scratch. The text side is the
# context's row at the end token, the summary, times one trained matrix; the text encoder itself stays frozen. We keep some scenes for the
# test, which the training never shows.

# %%
rng = np.random.default_rng(0)
many, test = (256, 32) if lesson.quick else (3000, 64)
scenes = [sample_scene(rng) for _ in range(many + test)]
captions = [scene.caption for scene in scenes]
ends = [len(tokenizer.encode(caption)) + 1 for caption in captions]
parts = [captions[i : i + 64] for i in range(0, len(captions), 64)]
summary = torch.cat([sd.encode_prompts(part) for part in parts])[range(len(ends)), ends].detach()
pixels = F.adaptive_avg_pool2d(scene_pixels(sd, scenes), 32).to(lesson.device)
assert (*pixels.shape, *summary.shape) == (many + test, 3, 32, 32, many + test, D)

# %%
torch.manual_seed(0)
picture_side = torch.nn.Sequential(
    *(torch.nn.Conv2d(3, 32, 4, stride=4), torch.nn.SiLU()),
    *(torch.nn.Conv2d(32, 64, 3, stride=2, padding=1), torch.nn.SiLU()),
    *(torch.nn.Flatten(), torch.nn.Linear(64 * 4 * 4, 64)),
).to(lesson.device)
text_side = torch.nn.Linear(D, 64).to(lesson.device)
weights = [*picture_side.parameters(), *text_side.parameters()]
optimizer = torch.optim.Adam(weights, lr=2e-3)


@torch.no_grad()
def cosines(i):
    """Of all pictures with all texts of the scenes i."""
    sides = picture_side(pixels[i]), text_side(summary[i])
    return (F.normalize(sides[0], dim=-1) @ F.normalize(sides[1], dim=-1).T).cpu()


# %%
unseen = list(range(many, many + test))
before, loss, steps = cosines(unseen), torch.zeros(()), 50 if lesson.quick else 800
for _ in range(steps):
    i = torch.randperm(many)[:64]
    loss = clip_loss(picture_side(pixels[i]), text_side(summary[i]), 20.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
after = cosines(unseen)
for label, matrix in (("before", before), ("after", after)):
    found = (matrix.argmax(dim=1) == torch.arange(test)).float().mean()
    print(f"{label}: of {test} unseen texts the right one is found for {found:.0%} of the pictures")
print(f"by chance: {1 / test:.0%}")

# %%
fig, axes = plt.subplots(1, 2, figsize=(6, 3.2))
for axis, matrix, title in zip(axes, (before, after), ("before", "after")):
    axis.imshow(matrix[:16, :16], vmin=-1, vmax=1)
    axis.set(title=title, xlabel="text", ylabel="picture", xticks=[], yticks=[])
    axis.grid(False)
lesson.show(fig, "contrast", "Cosines of unseen pictures and texts: after training, a diagonal.")

# %% [markdown]
# The diagonal appears for scenes that neither side has seen. Large values elsewhere belong to scenes that have something in common, such as
# the background. CLIP was trained in the same way on hundreds of millions of pairs, with two large networks, both of them trained.

# %% [markdown]
# ## What the vectors have learned
#
# The bundled model's text encoder was trained in another way: together with the U-Net, by the loss of lesson 02. It had to tell the U-Net
# what to generate, and nothing else. We take the vector of each subject in "a ...", subtract the mean of all of them, and ask which other
# vectors point in the same direction.

# %%
names = subject_names(held_out=False)
places = [tokenizer.words(f"a {name}")[-1][1][-1] for name in names]
vectors = sd.encode_prompts([f"a {name}" for name in names])[range(len(names)), places].cpu()
assert vectors.shape == (len(names), D)
vectors = F.normalize(vectors - vectors.mean(dim=0), dim=-1)
alike = vectors @ vectors.T  # the cosine of each two
nearest = alike.topk(4).indices  # the first is the word itself
asked = ("strawberry", "broccoli", "panda", "banana")
for name in asked:
    i = names.index(name)
    print(f"{name}: " + ", ".join(f"{names[j]} {alike[i, j]:.2f}" for j in nearest[i, 1:]))


# %%
def picture(name):
    rgba = np.asarray(sprite(name, "noto", None).resize((64, 64))).astype(np.float32)
    return (rgba[..., :3] + 255 - rgba[..., 3:]).clip(0, 255).astype(np.uint8)  # on white


rows = [[picture(names[j]) for j in nearest[names.index(name)]] for name in asked]
fig = picture_grid(rows, ["word", "nearest", "second", "third"], list(asked))
lesson.show(fig, "neighbours", "Four emoji, each followed by those of its three nearest words.")

# %% [markdown]
# A dictionary would sort the subjects by kind: fruit, animals, tools. Here the nearest words seem to be those whose *pictures* look alike.
# Four examples prove little, so we measure it: how far apart are the mean colours of the emoji, for nearest words and for any two words?

# %%
colour = torch.stack([torch.from_numpy(picture(name)).float().mean(dim=(0, 1)) for name in names])
apart = torch.cdist(colour, colour)
of_nearest = apart.gather(1, nearest[:, 1:2]).mean()
of_any = apart.sum() / (len(names) * (len(names) - 1))
print(f"distance in colour: nearest words {of_nearest:.0f}, any two words {of_any:.0f}")
assert lesson.model != "tiny" or of_nearest < 0.9 * of_any

# %% [markdown]
# Words with similar pictures have similar vectors. The text encoder learned this from pictures alone, because that is what it was trained
# for. The text encoders of Stable Diffusion 1.x and 2.x come from CLIP, finished before there was a U-Net, and were never changed since.

# %% [markdown]
# ## Break it: the wrong padding
#
# Does the U-Net look at the padding at all? We record where its cells look in all cross-attention layers at the first step, where $x_t$ is
# pure noise.

# %%
side = sd.config.image_size // sd.config.vae.factor
shape = (sd.config.vae.latent_channels, side, side)
first = torch.tensor([sd.schedule.config.timesteps - 1], device=lesson.device)
with torch.no_grad(), attention_maps.record_cross_attention(sd.unet) as maps:
    sd.unet(noise_source([0], shape, lesson.device)(), first, context)
share = torch.stack([layer.mean(dim=(0, 1, 2)) for layer in maps.values()]).mean(dim=0).cpu()
assert share.shape == (L,)
parts = {"start": share[:1], "words": share[1 : 1 + length], "end and padding": share[1 + length :]}
for name, values in parts.items():
    print(f"{name}: {values.sum():.0%} of the attention")

# %% [markdown]
# It does. The padding was there during training, and it has read the whole prompt, so the U-Net learned to use it. Stable Diffusion 1.x
# repeats the end token, Stable Diffusion 2.x fills with token 0. The bundled model does as Stable Diffusion 1.x. We build a tokenizer that
# pads in the other way, and a text side that uses it.

# %%
padding = {"end": "zero", "zero": "end"}[sd.config.tokenizer.padding]
theirs = Tokenizer(dataclasses.replace(sd.config.tokenizer, padding=padding))
wrong_side = TextSide({"text_encoder": theirs}, {"text_encoder": encoder})
print("as trained:   ", tokenizer([prompt])[0, -3:].tolist())
print("other family: ", theirs([prompt])[0, -3:].tolist())

some = scenes[: 8 if lesson.quick else 48]
captions = [scene.caption for scene in some]
x_0 = scene_latents(sd, some)
t = torch.linspace(500, 950, len(some)).long().to(lesson.device)
eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)).to(lesson.device)
x_t, target = sd.schedule.q_sample(x_0, t, eps), sd.schedule.target(x_0, t, eps)


@torch.no_grad()
def error(context, i=slice(None)):
    return float((sd.unet(x_t[i], t[i], context) - target[i]).square().mean())


# %% [markdown]
# Now we measure the U-Net's error on scenes with their captions padded in three ways: as trained, as in the other family, and with the
# padding cut off, as one might do in the belief that it is empty. Two wrong contexts give the scale: another scene's caption, and none.

# %%
errors = {
    "as trained": error(sd.encode_prompts(captions)),
    "other family's": error(wrong_side(captions).context),
    "cut off": 0.0,
    "another caption": error(sd.encode_prompts(captions[1:] + captions[:1])),
    "no caption": error(sd.encode_prompts([""] * len(captions))),
}
for i, caption in enumerate(captions):
    end = 2 + len(tokenizer.encode(caption))  # the row after the end token
    cut = error(sd.encode_prompts([caption])[:, :end], slice(i, i + 1))
    errors["cut off"] += cut / len(captions)
best = errors["as trained"]
for name, value in errors.items():
    print(f"{name:16} {value:.3f}: {value / best - 1:+.1%}")

# %%
fig, axis = plt.subplots()
above = [100 * (value / best - 1) for value in errors.values()]
axis.barh(list(errors), above, color=[BLUE] * 3 + [SKY] * 2)
axis.set(xlabel="error, % above the trained padding")
axis.invert_yaxis()
lesson.show(fig, "padding", "Bars: wrong padding costs something, a wrong caption far more.")

# %% [markdown]
# And the pictures? We use the same seeds, with the wrong padding in the prompt and in the empty prompt of guidance (lesson 10).

# %%
prompts = ["a burger on a green background", "a frog left of a rose on a white background"]
prompts += ["a trophy above a cat on a blue background"]
rows = []
for text in (None, wrong_side):
    count = 8 if lesson.quick else 16
    *_, last = sd.denoise(prompts, seeds=[1] * len(prompts), steps=count, text=text)
    rows.append(to_images(sd.decode(last.x_t)))
change = np.abs(np.float32(rows[0]) - np.float32(rows[1])).mean()
print(f"the pictures differ by {change:.0f} of 255 on average")
columns = ["burger", "frog, rose", "trophy, cat"]
fig = picture_grid(rows, columns, ["as\ntrained", "other\nfamily's"])
lesson.show(fig, "wrong-padding", "Three pictures; below, the same seeds with the wrong padding.")

# %% [markdown]
# Nothing crashed, and no shape was wrong. That is why this mistake is so common: you only notice it next to the right picture, or in a
# number.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/09_words_to_vectors.py --model v1-5-pruned-emaonly.safetensors` runs all of this on a checkpoint of yours. CLIP's merges
# come with its tokenizer, so we can look at its tokens without any weights. Both families have the same merges and rows of 77 positions.
# They clean the text differently, pad differently, and take the context from different blocks: Stable Diffusion 1.x from the last of 12,
# Stable Diffusion 2.x from the last but one, so it runs only 23 of 24.

# %%
for name, family in (("SD 1.x", config.SD1), ("SD 2.x", config.SD2)):
    text, own = family.text_encoder, Tokenizer(family.tokenizer)
    print(f"{name}: {len(own.bpe.bpe_ranks)} merges, {own.vocab_size} tokens")
    in_file = text.layers + (name == "SD 2.x")
    blocks = f"{text.layers} of {in_file} blocks"
    print(f"  {text.context_length} positions, {blocks}, width {text.width}")
    print("  a photo of a cat:", own(["a photo of a cat"])[0, :9].tolist(), "...")
    print("  mushroomburger:", own.decode(own.encode("mushroomburger")[:1]), "| ...")
    print("  &amp; is read as", own.decode(own.encode("&amp;")))

# %% [markdown]
# A prompt that is longer than the row is cut off at its end, and the lost words have no effect at all. minidiff warns and names them.

# %% [markdown]
# ## On a GPU
#
# With a checkpoint, the pictures of "Break it" at 512 x 512:
#
# ```bash
# python lessons/09_words_to_vectors.py --model v1-5-pruned-emaonly.safetensors --device cuda
# ```
#
# Three minutes. Expect most of the attention on the start token, because large models look there when no word concerns them, and nearest
# words that are close in meaning rather than in colour.

# %% [markdown]
# ## What you now know
#
# - The tokenizer cuts words into pieces by replaying a list of merges; each piece is a token, an integer.
# - The text encoder adds a vector for the token and one for its position; then the positions look at each other.
# - Attention is causal: a row of the context knows the words before it, and the rows at the end know them all.
# - CLIP's vectors have a meaning because pictures and captions were trained to find each other in a batch.
# - Padding is read too. Use the kind that the model was trained with.

# %% [markdown]
# ## Your guess
#
# The second answer is right. With the wrong padding the pictures change and the error rises, by much less than with a wrong caption. The
# first answer overlooks that the padding's rows are summaries of the prompt, and that the U-Net looks at them.

# %% [markdown]
# ## Quiz
#
# 1. The list has the merges ("i", "n") and ("p", "in"). Is "pin" one piece?
# 2. You exchange the last word of a prompt. Which rows of the context stay the same?
# 3. A batch of the contrastive training has two pictures with the same caption. What does the loss ask for that cannot be had?
#
# <details><summary>Answers</summary>
#
# 1. No. Its last letter is `n</w>`, so neither pair occurs in it.
# 2. The start token and all words before the exchanged one. That word, the end token and the padding change.
# 3. It treats the other picture's caption as a wrong answer, although it is the same text: for these two, half the share is the best there
#    is.
#
# </details>

# %% [markdown]
# ## Now you
#
# Write three new captions for one scene: its own words in another order, the caption with one colour changed, and a caption of another
# scene. Predict the order of their cosines with the picture, and then print `cosines` for them (encode the captions, take the row at the
# end token, and use `text_side`). Does the order of words matter to your little CLIP? Where would it have learned it?

# %% [markdown]
# ## Read next
#
# - `minidiff/tokenizer.py`: `Tokenizer.__call__` makes the row, `_spell` calls the loop that you wrote; `minidiff/scenes/train_bpe.py` finds
#   the merges.
# - `minidiff/attention.py`: `attention_weights` has your causal mask. `minidiff/text_encoder.py`: `TextBlock` is the block above.
# - Sennrich et al. 2016, "Neural machine translation of rare words with subword units", section 3.2; Radford et al. 2021, "Learning
#   transferable visual models from natural language supervision", section 2.3.
# - Lesson 10: what the U-Net does with the context, step by step.
