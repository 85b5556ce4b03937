# %% [markdown]
# # 10 Cross-attention and guidance
#
# **When does a picture listen to its words, and how does one make it listen harder?**
#
# - Explains: [minidiff/attention_maps.py](../minidiff/attention_maps.py), [minidiff/guidance.py](../minidiff/guidance.py)
# - You change: `guided_answer`, classifier-free guidance
# - Minutes: 30
# - Picture: [figures/10-maps.png](figures/10-maps.png)
#
# ![The whole pipeline; this lesson is about guidance](figures/pipeline-guidance.svg)
#
# In lesson 04 each cell of the latent asked each word of the prompt: that was *cross-attention*, once. A picture takes many steps. This
# lesson watches the asking over all of them, and then turns up the volume of the words.

# %% [markdown]
# ## Guess first
#
# A picture is drawn in ten steps, and you may change the prompt once on the way, from a burger to a frog. Up to which step can you change
# it, and still get the frog?
#
# 1. Up to the last steps.
# 2. Up to about a third of the way.
# 3. Only before the first step.

# %% [markdown]
# ## Maps over the picture
#
# `with_attention_maps` records which share of its looking each cell gives to each word (lesson 04), in every layer, at every step.
# `word_map` takes the mean over the layers. Four prompts are drawn; the maps of the first one are laid over its picture, light where the
# word's share is large, each map on a scale of its own.

# %%
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt

import weights_loader
from lessons.common import picture_grid, start
from minidiff.attention_maps import with_attention_maps, word_map
from minidiff.config import SD1
from minidiff.guidance import guided
from minidiff.pipeline import noise_source, to_images
from minidiff.samplers import sample
from minidiff.scenes.prompts import fixed_prompts

lesson = start("10_cross_attention_and_guidance")

# %%
sd = lesson.load()
side = sd.config.image_size // sd.config.vae.factor  # of the latent, in cells
prompts = ["a frog left of a rose on a white background", "a burger on a green background"]
prompts += ["a cat above a trophy on a blue background", "a small red cactus"]
B, count = len(prompts), 5 if lesson.quick else 12
steps = list(with_attention_maps(sd.denoise(prompts, steps=count, seeds=range(1, B + 1)), sd.unet))

named, words = ("frog", "rose"), dict(sd.tokenizer.words(prompts[0]))
shown = [0, count // 4, count // 2, 3 * count // 4, count - 1]
maps = {}
for i, word in product(shown, named):
    maps[i, word] = word_map(steps[i].attention_maps, words[word], (side, side))[0].cpu()
assert maps[0, "frog"].shape == (side, side)


# %%
def over(picture, shares):
    """The picture, dark where a word's share is small."""
    light = F.interpolate(shares[None, None], size=picture.size[::-1], mode="bilinear")[0, 0]
    light = (light - light.min()) / (light.max() - light.min() + 1e-6)
    return (np.asarray(picture) * (0.15 + 0.85 * light.numpy()[..., None])).astype(np.uint8)


seen = to_images(sd.decode(torch.cat([steps[i].x0_hat[:1] for i in shown])))
rows = [seen, *([over(p, maps[i, w]) for p, i in zip(seen, shown)] for w in named)]
fig = picture_grid(rows, [f"t = {steps[i].t}" for i in shown], [r"$\hat{x}_0$", *named])
lesson.show(fig, "maps", "A frog and a rose appear; below, where cells look for each word.")

# %% [markdown]
# The top row is `x0_hat`, what the U-Net takes the clean picture for (lesson 00). At the first step that is two blobs, made from pure
# noise, and the two maps have found their places already. Is that so in numbers? For each map, where is its middle between the left edge,
# `0`, and the right one, `1`?


# %%
def middle(shares):
    """The mean place of a map's columns, each weighted by its share above the smallest one."""
    columns = shares.sum(dim=0) - shares.sum(dim=0).min()
    return float((columns * (torch.arange(side) + 0.5) / side).sum() / columns.sum())


for word in named:
    places = [middle(maps[i, word]) for i in shown]
    print(f"{word}: middle at " + ", ".join(f"{place:.2f}" for place in places))
assert lesson.model != "tiny" or middle(maps[0, "frog"]) < middle(maps[0, "rose"])

# %% [markdown]
# From the first step on the one word is asked on the left, the other on the right. A cell that is going to be frog has to ask for the frog
# before there is one.

# %% [markdown]
# ## Late steps look away
#
# A cell's shares add up to one over the whole row of tokens: the start token, the words, and what comes after them, the end token and
# the padding (lesson 09). So a cell that has nothing to ask must look somewhere too. Follow the three over the steps, the end token counted
# as padding, as a mean over all cells, all layers and the four prompts.

# %%
lengths = [len(sd.tokenizer.encode(prompt)) for prompt in prompts]
L = sd.config.text_encoder.context_length
shares = {"words": [], "padding": [], "start": []}
for step in steps:
    looks = torch.stack([m.mean(dim=(1, 2)) for m in step.attention_maps.values()]).mean(dim=0)
    assert looks.shape == (B, L)
    at_words = [float(row[1 : 1 + length].sum()) for row, length in zip(looks, lengths)]
    shares["words"].append(np.mean(at_words))
    shares["start"].append(float(looks[:, 0].mean()))
    shares["padding"].append(1 - shares["words"][-1] - shares["start"][-1])
for name, values in shares.items():
    print(f"{name}: {values[0]:.0%} of all looks at the first step, {values[-1]:.0%} at the last")
assert lesson.model != "tiny" or shares["words"][0] > shares["words"][-1]

# %%
fig, axis = plt.subplots()
for (name, values), marker in zip(shares.items(), "os^"):
    axis.plot([step.t for step in steps], values, marker=marker, label=name)
axis.set(xlabel="timestep t (drawing runs to the right)", ylabel="share of all looks", ylim=(0, 1))
axis.invert_xaxis()
axis.legend()
lesson.show(fig, "looks", "From step to step the words' share falls, and the start token's rises.")

# %% [markdown]
# Step by step the words lose, here mostly to the start token. It stands before all words, so it knows none of them (lesson 09): to look
# there is to look at nothing. The padding, which has read the whole prompt, keeps its share. Late steps have the picture itself to go by.

# %% [markdown]
# ## When is it decided?
#
# Looking is not yet doing. So change the words on the way: begin with a burger, go on with a frog, and ask which of the two is in the
# picture. The answer comes from a *judge*, a small network that was trained to name what is in scenes like these, and that has no part in
# drawing. It says how much of the picture each subject covers. Of the two, the one that covers more counts as being there.

# %%
judge = weights_loader.load_judge(device=lesson.device)
pairs = [("burger", "frog"), ("book", "cactus"), ("heart", "taxi"), ("rose", "bomb")]
shape = (sd.config.vae.latent_channels, side, side)
scale = sd.config.guidance_scale  # this model's own
empty = sd.encode_prompts([""])


def read(pixels):
    size = (judge.config.image_size, judge.config.image_size)
    with torch.no_grad():
        return judge.read(F.interpolate(pixels, size=size, mode="bilinear", antialias=True))


# %%
@torch.no_grad()
def draw(model, seeds, count):
    """The last latents; model(x_t, t) is the U-Net with its words and its guidance."""
    x_T = noise_source(seeds, shape, lesson.device)()
    *_, last = sample(model, x_T, sd.schedule, steps=count)
    return last.x_t


def changed_at(when, count):
    """Pictures that begin with the first words and end with the second ones."""
    texts = [[f"a {name} on a white background" for name in part] for part in zip(*pairs)]
    contexts = [sd.encode_prompts(one) for one in texts]
    models = [guided(sd.unet, c, empty.expand_as(c), scale, True) for c in contexts]
    calls = iter(range(count))
    return draw(lambda x_t, t: models[next(calls) >= when](x_t, t), range(len(pairs)), count)


# %%
count = 3 if lesson.quick else 10
changes = [0, 1, 2, 3] if lesson.quick else [0, 1, 3, 5, 7, 9]
index = [[judge.config.subjects.index(name) for name in pair] for pair in pairs]
second, drawn = [], []
for when in changes:
    pixels = sd.decode(changed_at(when, count))
    covered = read(pixels).shares()
    won = [bool(row[b] > row[a]) for row, (a, b) in zip(covered, index)]
    second.append(np.mean(won))
    drawn.append(to_images(pixels[:3]))
    print(f"changed after {when} of {count} steps: the second in {sum(won)} of {len(won)}")
assert lesson.model != "tiny" or second[0] > second[-1]

# %%
rows = [[pictures[k] for pictures in drawn] for k in range(3)]
fig = picture_grid(rows, [f"after {w}" for w in changes], [f"{a},\n{b}" for a, b in pairs[:3]])
lesson.show(fig, "changed", "The later the change of words, the more the first subject stays.")

# %% [markdown]
# The second guess was the right one, for this model: up to a third of the way the second words take over and nothing is left of the first
# ones. Halfway the two are mixed. After that the new words only tint what is there. The early steps, when words have their greatest share,
# settle what is drawn.

# %% [markdown]
# ## Louder: guidance
#
# Lesson 00 turned a knob called guidance. The model answers twice at each step, with the prompt, $\epsilon_\text{cond}$, and with an empty
# one, $\epsilon_\text{uncond}$: "conditional" and "unconditional". The difference is what the words did. *Classifier-free guidance* goes
# on in that direction, $g$ times as far (Ho and Salimans 2022, eq. 6, whose $w$ is $g - 1$):
#
# $$\hat\epsilon = \epsilon_\text{uncond} + g \; (\epsilon_\text{cond} - \epsilon_\text{uncond})$$
#
# The same line serves models that answer with v (lesson 01), as the bundled one does. A scale $g$ of 0 is no words, 1 the plain model, more
# is louder. For this the model must know what an empty prompt is: in training one caption in ten was left empty. It is "classifier-free"
# because, before, another network did the pushing, a classifier. Both questions are asked in one batch.

# %% [markdown]
# ## Your turn: guided_answer
#
# `model(x_t, t, context)` answers for a batch. Ask it once, with `uncond` for the first half of the batch and `cond` for the second; `x_t`
# and `t` come twice. Cut the answer into halves with `chunk(2)`, and combine them.


# %%
def guided_answer(model, x_t, t, cond, uncond, guidance_scale):
    """uncond + guidance_scale (cond - uncond); x_t [B, C, H, W], t [B], contexts [B, L, D]."""
    # YOUR CODE, about 3 lines


def library(model, x_t, t, cond, uncond, guidance_scale):
    return guided(model, cond, uncond, guidance_scale)(x_t, t)


guided_answer = lesson.check(guided_answer, instead=library)

# %% [markdown]
# ## Accuracy against variety
#
# How loud should it be? Two subjects in one picture are what this model finds hard (one alone it mostly draws right at scale 1
# already). So take prompts for two, drawn by chance, and draw them with the same two seeds at several scales. *Accuracy* is how many of
# the subjects asked for are among the two that the judge sees most of. *Variety* is how far the two pictures of a prompt lie apart in
# their pixels, as a share of how far they lie apart without words. And how many of the pixels' values are at the very ends of their range?

# %%
asked = [prompt for prompt in fixed_prompts() if prompt.group == "two"]
asked = asked[::12] if lesson.quick else asked[::8]
both = [prompt for prompt in asked for _ in range(2)]  # two seeds each
seeds, count = [0, 1] * len(asked), 1 if lesson.quick else 8
cond = sd.encode_prompts([prompt.text for prompt in both])
uncond = empty.expand_as(cond)
wanted = [{judge.config.subjects.index(name) for name in prompt.subjects} for prompt in both]


def accuracy(pixels):
    most = read(pixels).shares().topk(2).indices.tolist()
    return sum(len(set(row) & right) for row, right in zip(most, wanted)) / (2 * len(most))


def pictures(answer, g):
    return sd.decode(draw(lambda x_t, t: answer(sd.unet, x_t, t, cond, uncond, g), seeds, count))


# %%
scales = [0, 1, 4, 8, 16] if lesson.quick else [0, 1, 2, 4, 8, 16]
results, drawn = {"accuracy": [], "variety": []}, {}
for g in scales:
    drawn[g] = pixels = pictures(guided_answer, g)
    assert pixels.shape[0] == len(both)
    results["accuracy"].append(accuracy(pixels))
    results["variety"].append(float((pixels[0::2] - pixels[1::2]).abs().mean()))
results["variety"] = [value / results["variety"][0] for value in results["variety"]]
for g, right, apart in zip(scales, *results.values()):
    burnt = (drawn[g].abs() > 0.99).float().mean()
    print(f"scale {g:2}: accuracy {right:.2f}, variety {apart:.2f}, at the ends {burnt:.0%}")
right = dict(zip(scales, results["accuracy"]))
assert lesson.model != "tiny" or lesson.quick or right[0] < right[1] < right[4]

# %%
fig, axis = plt.subplots()
for (name, values), marker in zip(results.items(), "os"):
    axis.plot(range(len(scales)), values, marker=marker, label=name)
axis.set(xlabel="guidance scale", ylabel="share", ylim=(0, 1.05))
axis.set_xticks(range(len(scales)), scales)
axis.legend()
lesson.show(fig, "scale", "Accuracy rises up to 4 or so; variety falls as words come in.")

# %%
at = (-4, -3, -6)  # two seeds of one prompt, one of another
grid = [[to_images(drawn[g][k][None])[0] for g in scales] for k in at]
labels = [",\n".join(both[k].subjects) for k in at]
fig = picture_grid(grid, [f"{g}" for g in scales], labels)
lesson.show(fig, "scales", "Two things a picture: at 0 neither, then ever clearer and harder.")

# %% [markdown]
# At 0 the words are not heard: anything comes, and most varied. At 1 the pictures have the right colours and are often mush; this is the
# model as it was trained. Up to about 4 a picture says ever more clearly what was asked for; after that hardly anything is gained. What it
# costs is, first, variety: both seeds end in much the same picture. With prompts that say as much as these, nearly all that is lost of it
# is lost as soon as the words are heard, and pushing takes little more. Second, colours run to the ends of their range and contrasts grow
# hard; look at the last column.

# %% [markdown]
# ## Negative prompts
#
# The empty prompt is only what one pushes away *from*. Put something else in its place, and you push away from that: a *negative
# prompt*. Here the prompt does not say what colour the background is to be. The judge names the colours, and the commonest one becomes the
# negative prompt.

# %%
many = 6 if lesson.quick else 10


def backgrounds(negative):
    """Which colour the judge sees behind some frogs, and the first of their pictures."""
    walk = sd.denoise("a frog", steps=count, seeds=range(many), negative_prompt=negative)
    *_, last = walk
    pixels = sd.decode(last.x_t)
    named = read(pixels).backgrounds.argmax(dim=1).tolist()
    return [judge.config.colours[i] for i in named], to_images(pixels[:6])


plain, pictures_plain = backgrounds("")
most = max(judge.config.colours, key=plain.count)
without, pictures_without = backgrounds(f"a {most} background")
for label, found in (("empty", plain), (f"{most} background", without)):
    print(f"negative prompt {label}: {most} in {found.count(most)} of {len(found)}")

# %%
fig = picture_grid([pictures_plain, pictures_without], (), ["empty", f"negative:\n{most}"])
lesson.show(fig, "negative", "Six frogs, and below the same seeds with a negative prompt.")

# %% [markdown]
# The colour becomes rarer, or paler: the pictures start from the same noise, and go elsewhere. A negative prompt is a direction and no
# command. One or the other may keep its background. And the push is not for backgrounds alone: the frogs lose some of their own colours
# too, in their mouths for instance.

# %% [markdown]
# ## Break it: three mistakes in one line
#
# All of guidance is one line, and these three slips are common:
#
# 1. *Exchanged*: the empty prompt is put first, and the first half of the answer is taken for the prompt's.
# 2. *One more*: `cond + g (cond - uncond)`, which starts from the wrong end.
# 3. *Three of four*: only the first three channels of the latent are guided, as if they were red, green and blue, and the fourth stays as
#    it was. A widely copied program did this.
#
# Which of them would you see?


# %%
def exchanged(model, x_t, t, cond, uncond, g):
    return guided_answer(model, x_t, t, uncond, cond, g)


def one_more(model, x_t, t, cond, uncond, g):
    return guided_answer(model, x_t, t, cond, uncond, g + 1)  # cond + g (cond - uncond)


def three_channels(model, x_t, t, cond, uncond, g):
    whole = guided_answer(model, x_t, t, cond, uncond, g)
    return torch.cat([whole[:, :3], model(x_t, t, cond)[:, 3:]], dim=1)


# %%
cond, uncond, seeds, wanted = cond[::2], uncond[::2], seeds[::2], wanted[::2]  # one seed each
answers = {"right": guided_answer, "exchanged": exchanged}
answers |= {"one\nmore": one_more, "three of\nfour": three_channels}
results = {name: pictures(answer, scale) for name, answer in answers.items()}
for name, pixels in results.items():
    off = 127.5 * (pixels - results["right"]).abs().mean()
    print(f"{' '.join(name.split())}: accuracy {accuracy(pixels):.2f}, off by {off:.0f} of 255")

# %%
rows = {name: to_images(pixels[-5:]) for name, pixels in results.items() if name != "one\nmore"}
columns = ["\n".join(prompt.subjects) for prompt in asked[-5:]]
fig = picture_grid(list(rows.values()), columns, list(rows))
lesson.show(fig, "mistakes", "Right pictures; ruined ones; and some that look like the first.")

# %% [markdown]
# The first is seen at once: things are gone, and most backgrounds have turned to something like the opposite colour. The other two are not
# seen. The judge is content with them, or nearly, and nobody who sees their pictures alone would say that something is wrong. One more is
# nothing but a scale that is larger by one, so its pictures are not shown; but with it a scale means something else than in every other
# program. The fourth channel moves the colours a little. What finds both is a model whose answer is known. Let it say 1 with a prompt and 0
# without, in four channels, and guide by 4:


# %%
def known(x_t, t, context):
    """Answers 1 with a prompt of ones, 0 with one of zeros, in all channels."""
    return torch.ones_like(x_t) * context[:, :1, :1, None]


nothing = torch.zeros(1, 4, 1, 1)
for name, answer in answers.items():
    said = answer(known, nothing, torch.tensor([0]), torch.ones(1, 1, 1), torch.zeros(1, 1, 1), 4)
    print(f"{' '.join(name.split()):14}", said.flatten().tolist())

# %% [markdown]
# Every mistake shows, in a millisecond and without a picture. The tests of minidiff do this.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/10_cross_attention_and_guidance.py --model v1-5-pruned-emaonly.safetensors` draws the maps and the scales with a
# checkpoint that you have. (The judge knows only scenes of emoji; of photographs its word means little.) Such models are mostly used at a
# scale of 7.5. The true answer, noise or v, has numbers of size 1 or so (that is their standard deviation). How large are guided ones?

# %%
print(f"usual scale: {SD1.guidance_scale}; this model's: {sd.config.guidance_scale}")
x_t = noise_source([0, 0], shape, lesson.device)()
t = torch.full((2,), 700, device=lesson.device)
for g in (1, 4, SD1.guidance_scale, 16):
    with torch.no_grad():
        answer = guided_answer(sd.unet, x_t, t, cond[:2], uncond[:2], g)
    print(f"scale {g}: the answer's numbers have size {answer.std():.2f}")

# %% [markdown]
# The louder, the further from anything that an answer could truly be. That is where the hard colours come from.
#
# minidiff saves a part of the double work: before the first cross-attention both halves are the same, so they are worked out once
# (`shared_prefix` in `guided`).

# %% [markdown]
# ## On a GPU
#
# ```bash
# python lessons/10_cross_attention_and_guidance.py --model v1-5-pruned-emaonly.safetensors --device cuda
# ```
#
# Three minutes. Expect maps of 64 x 64 cells, and over-guided pictures with burnt colours. Look whether the words' share falls there too:
# such models look at the start token most of the time anyway.

# %% [markdown]
# ## Read next
#
# - `minidiff/guidance.py`: `guide` is one line, `guided` the batch around it. `minidiff/attention_maps.py`: how the maps are recorded without touching the picture.
# - Ho and Salimans 2022, "Classifier-free diffusion guidance", section 3.2; Hertz et al. 2022, "Prompt-to-prompt image editing", section 3.1, for the maps.
# - Lesson 11: the walk from noise to picture, taken with fewer steps.
