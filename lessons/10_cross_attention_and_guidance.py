# %% [markdown]
# # 10 Cross-attention and guidance
#
# **When does a picture follow its words, and how do we make it follow them more closely?**
#
# - Explains: [minidiff/attention_maps.py](../minidiff/attention_maps.py), [minidiff/guidance.py](../minidiff/guidance.py)
# - You change: `map_of_word`, `guided_prediction` and `rescale`: see the words at work, strengthen them, and repair the damage
# - Minutes: 45
# - Picture: [figures/10-maps.png](figures/10-maps.png)
#
# ![The whole pipeline; this lesson is about guidance](figures/pipeline-guidance.svg)
#
# In *cross-attention*, every cell of the latent looks at every token of the prompt (lesson 04). That was one call of the U-Net. A picture
# takes many, and this lesson follows the attention through all of them. Then it strengthens the words with *classifier-free guidance*,
# which nearly every picture from Stable Diffusion uses.

# %% [markdown]
# ## Guess first
#
# A picture is generated in ten steps. You may change the prompt once on the way, from a burger to a frog. Up to which step can you change
# it and still get a frog?
#
# 1. Up to the last steps.
# 2. Only in the first half.
# 3. Only before the first step.

# %% [markdown]
# ## Maps over the picture
#
# A U-Net has several layers with cross-attention, at several resolutions. In each of them a cell spreads its attention over the tokens, and
# its weights add up to one. `with_attention_maps` takes the steps of a denoising loop and records these weights, averaged over the heads.

# %%
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

import weights_loader
from lessons.common import curves, picture_grid, start
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
for name, weights in steps[0].attention_maps.items():
    print(f"{name:24} {list(weights.shape)}: batch, height, width, tokens")

# %% [markdown]
# ## Your turn: map_of_word
#
# Turn these recordings into one map for one word. `maps` is a list with a tensor `[H, W, L]` for each layer; the layers differ in H and W.
# `positions` is a list of the word's tokens in the row (lesson 09); there is more than one if the word was cut into pieces.
#
# 1. In each layer, add up the weights of the word's tokens: `m[..., positions]` picks them, and a sum over the last axis leaves `[H, W]`.
# 2. Enlarge each result to `side` x `side`: `F.interpolate(x, size=(side, side), mode="bilinear")`. It expects a batch and channels, so add
#    two axes with `[None, None]` and remove them afterwards with `[0, 0]`.
# 3. Average over the layers: `torch.stack` turns the list into one tensor.
#
# When it is right, you see the map of a word in three layers that were made up for the test.


# %%
def map_of_word(maps, positions, side):
    """One word's weight at each cell; maps: a list of [H, W, L], one a layer -> [side, side]."""
    # YOUR CODE, about 3 lines


map_of_word = lesson.check(map_of_word)

# %% [markdown]
# Here are the maps of the first prompt's two nouns, over its picture as it develops. The picture is bright where the word's weight is high.
# Each map has its own brightness scale.


# %%
def over(picture, shares):
    """The picture, dark where a word's weight is small."""
    light = F.interpolate(shares[None, None], size=picture.size[::-1], mode="bilinear")[0, 0]
    light = (light - light.min()) / (light.max() - light.min() + 1e-6)
    return (np.asarray(picture) * (0.15 + 0.85 * light.numpy()[..., None])).astype(np.uint8)


named, words = ("frog", "rose"), dict(sd.tokenizer.words(prompts[0]))
shown, maps = [0, count // 4, count // 2, 3 * count // 4, count - 1], {}
for i, word in product(shown, named):
    layers = [weights[0].cpu() for weights in steps[i].attention_maps.values()]
    maps[i, word] = map_of_word(layers, words[word], side)
own = word_map(steps[0].attention_maps, words["frog"], (side, side))[0].cpu()
assert own.shape == maps[0, "frog"].shape and torch.allclose(own, maps[0, "frog"], atol=1e-5)

# %%
seen = to_images(sd.decode(torch.cat([steps[i].x0_hat[:1] for i in shown])))
rows = [seen, *([over(p, maps[i, w]) for p, i in zip(seen, shown)] for w in named)]
fig = picture_grid(rows, [f"t = {steps[i].t}" for i in shown], [r"$\hat{x}_0$", *named])
lesson.show(fig, "maps", "A frog and a rose develop; below, which cells look at each word.")

# %% [markdown]
# The top row is `x0_hat`, the model's prediction of the clean picture (lesson 00). At the first step it is a blur, predicted from pure
# noise. Do the maps show by then where things will be? We measure it: for each map, where is its centre between the left edge, `0`, and
# the right edge, `1`?


# %%
def centre(shares):
    """The mean column of a map, each weighted by its share above the smallest one."""
    columns = shares.sum(dim=0) - shares.sum(dim=0).min()
    return float((columns * (torch.arange(side) + 0.5) / side).sum() / columns.sum())


for word in named:
    places = [centre(maps[i, word]) for i in shown]
    print(f"{word}: centre at " + ", ".join(f"{place:.2f}" for place in places))
assert lesson.model != "tiny" or centre(maps[0, "frog"]) < centre(maps[0, "rose"])

# %% [markdown]
# From the first step on, cells on the left look at the frog and cells on the right at the rose. A cell that will be part of the frog looks
# at the word before there is a frog to see.

# %% [markdown]
# ## Where the attention goes, step by step
#
# The weights of a cell add up to one over the whole row: the start token, the words, and the end token with the padding (lesson 09). A cell
# that needs nothing from the prompt must look somewhere too. We follow these three shares over the steps, averaged over all cells, layers
# and prompts.

# %%
lengths = [len(sd.tokenizer.encode(prompt)) for prompt in prompts]
L = sd.config.text_encoder.context_length
shares = {"words": [], "end and padding": [], "start": []}
for step in steps:
    looks = torch.stack([m.mean(dim=(1, 2)) for m in step.attention_maps.values()]).mean(dim=0)
    assert looks.shape == (B, L)
    at_words = [float(row[1 : 1 + length].sum()) for row, length in zip(looks, lengths)]
    shares["words"].append(np.mean(at_words))
    shares["start"].append(float(looks[:, 0].mean()))
    shares["end and padding"].append(1 - shares["words"][-1] - shares["start"][-1])
for name, values in shares.items():
    ends = f"{values[0]:.0%} of the attention at the first step, {values[-1]:.0%} at the last"
    print(f"{name}: {ends}")

# %%
lines = {name: ([step.t for step in steps], values) for name, values in shares.items()}
last_t = steps[0].t, steps[-1].t
fig = curves(lines, "timestep t", "share of the attention", ylim=(0, 1), xlim=last_t)
lesson.show(fig, "looks", "Shares of attention over the steps, from noise on the left to picture.")

# %% [markdown]
# The shares change slowly, and the words keep most of theirs. What they lose goes to the start token. It comes before all
# words and knows none of them (lesson 09), so to look there is to look at nothing. From this figure alone you might conclude that the words
# matter at every step. Does the picture agree?

# %% [markdown]
# ## When is it decided?
#
# We change the words on the way: begin with a burger, continue with a frog, and ask which of the two is in the picture. The answer comes
# from a *judge*, a small network that was trained to name what is in such scenes and that has no part in generating them. It estimates how
# much of the picture each subject covers. Of the two subjects, the one that covers more counts.

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
def generate(model, seeds, count):
    """The final latents; model(x_t, t) is the U-Net with its words and its guidance."""
    x_T = noise_source(seeds, shape, lesson.device)()
    *_, last = sample(model, x_T, sd.schedule, steps=count)
    return last.x_t


def changed_at(when, count):
    """Pictures that begin with the first words and continue with the second ones."""
    texts = [[f"a {name} on a white background" for name in part] for part in zip(*pairs)]
    contexts = [sd.encode_prompts(one) for one in texts]
    models = [guided(sd.unet, c, empty.expand_as(c), scale, True) for c in contexts]
    calls = iter(range(count))
    return generate(lambda x_t, t: models[next(calls) >= when](x_t, t), range(len(pairs)), count)


# %%
count = 3 if lesson.quick else 10
changes = [0, 1, 2, 3] if lesson.quick else [0, 1, 3, 5, 7, 9]
index = [[judge.config.subjects.index(name) for name in pair] for pair in pairs]
second, generated = [], []
for when in changes:
    pixels = sd.decode(changed_at(when, count))
    covered = read(pixels).shares()
    won = [bool(row[b] > row[a]) for row, (a, b) in zip(covered, index)]
    second.append(np.mean(won))
    generated.append(to_images(pixels[:3]))
    print(f"changed after {when} of {count} steps: the second in {sum(won)} of {len(won)}")
assert lesson.model != "tiny" or lesson.quick or second[1] > 0.5 > second[-2]

# %%
rows = [[pictures[k] for pictures in generated] for k in range(3)]
fig = picture_grid(rows, [f"after {w}" for w in changes], [f"{a},\n{b}" for a, b in pairs[:3]])
lesson.show(fig, "changed", "The later the words change, the more of the first subject stays.")

# %% [markdown]
# If the change comes early, the second subject takes over completely. Around the middle, the picture is a mixture. Later the new words
# only colour what is already there. The early steps decide what the picture shows, although the late ones look at the words almost as much:
# by then the latent itself tells the U-Net what is there. Attention weights say where the network looks, not how much it matters.

# %% [markdown]
# ## Guidance: exaggerate the words
#
# Lesson 00 had a parameter called guidance. At each step the model predicts twice, once with the prompt, $\epsilon_\text{cond}$
# ("conditional"), and once with an empty prompt, $\epsilon_\text{uncond}$ ("unconditional"). The difference between the two is the effect
# of the words. *Classifier-free guidance* multiplies it by the *guidance scale* $g$ (Ho and Salimans 2022, eq. 6, whose $w$ is $g - 1$):
#
# $$\hat\epsilon = \epsilon_\text{uncond} + g \; (\epsilon_\text{cond} - \epsilon_\text{uncond})$$
#
# With $g = 0$ the words have no effect, with $g = 1$ we get the plain model, and a larger $g$ exaggerates the words. The same line works
# for models that predict v (lesson 01). The model must know what an empty prompt means, so during training one caption in ten was left
# empty. The method is called classifier-free because an earlier one needed a second network, a classifier, to push the picture towards its
# class.

# %% [markdown]
# ## Your turn: guided_prediction
#
# Write it with a single call of the model, which is faster than two. `model(x_t, t, context)` predicts for a whole batch. Join the inputs
# with `torch.cat`: `x_t` twice, `t` twice, and the two contexts, `uncond` for the first half and `cond` for the second. Cut the result into
# its halves with `.chunk(2)` and combine them.
#
# A right function reports what it makes of a model whose predictions are known.


# %%
def guided_prediction(model, x_t, t, cond, uncond, guidance_scale):
    """uncond + guidance_scale (cond - uncond); x_t [B, C, H, W], t [B], contexts [B, L, D]."""
    # YOUR CODE, about 3 lines


guided_prediction = lesson.check(guided_prediction)

# %% [markdown]
# ## Accuracy against variety
#
# How large should the scale be? We generate prompts with two subjects, each with two seeds, at several scales, and measure three things.
# *Accuracy* is how many of the requested subjects are among the two that cover most of the picture, according to the judge. *Variety* is
# how far apart the two pictures of a prompt are in their pixels, divided by the same distance without words. *Saturated* is how many pixel
# values are at the very ends of their range.

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


def pictures(predict, g):
    latents = generate(lambda x_t, t: predict(sd.unet, x_t, t, cond, uncond, g), seeds, count)
    return sd.decode(latents)


# %%
scales = [0, 1, 4, 8, 16] if lesson.quick else [0, 1, 2, 4, 8, 16]
results, drawn = {"accuracy": [], "variety": [], "saturated": []}, {}
for g in scales:
    drawn[g] = pixels = pictures(guided_prediction, g)
    assert pixels.shape[0] == len(both)
    results["accuracy"].append(accuracy(pixels))
    results["variety"].append(float((pixels[0::2] - pixels[1::2]).abs().mean()))
    results["saturated"].append(float((pixels.abs() > 0.99).float().mean()))
results["variety"] = [value / results["variety"][0] for value in results["variety"]]
for g, right, apart, ends in zip(scales, *results.values()):
    print(f"scale {g:2}: accuracy {right:.2f}, variety {apart:.2f}, saturated {ends:.1%}")
right = dict(zip(scales, results["accuracy"]))
assert lesson.model != "tiny" or lesson.quick or right[0] < right[1] < right[4]

# %%
lines = {name: (range(len(scales)), values) for name, values in results.items()}
fig = curves(lines, "guidance scale", "share", ylim=(0, 1.05))
fig.axes[0].set_xticks(range(len(scales)), scales)
lesson.show(fig, "scale", "Accuracy rises and levels off; variety falls as words come in.")

# %%
at = (-4, -3, -6)  # two seeds of one prompt, one of another
grid = [[to_images(drawn[g][k][None])[0] for g in scales] for k in at]
labels = [",\n".join(both[k].subjects) for k in at]
fig = picture_grid(grid, [f"{g}" for g in scales], labels)
lesson.show(fig, "scales", "Two subjects at rising scales: absent at 0, then clearer and harsher.")

# %% [markdown]
# At scale 0 the words have no effect: the pictures vary most and show none of what was asked. At 1, the model as it was trained, the
# pictures often have the right colours and unclear shapes. From there on accuracy rises, and then levels off. There are two costs. Variety
# falls, because the words leave less open: most of it is lost as soon as the words count at all. And more values reach the ends of their
# range: look at the harsh colours in the last column.

# %% [markdown]
# ## Your turn: rescale
#
# Where do the harsh colours come from? A true noise or v has values of about size one, and so has an unguided prediction. Guidance
# exaggerates: the larger $g$, the larger its values. Lin et al. (2023, eq. 15 and 16) therefore bring the guided prediction back to the
# standard deviation of the conditional one, for each picture separately. Because that alone makes pictures a little dull, they take only
# the share $\phi$ of it:
#
# $$\mathrm{full} = \mathrm{guided} \cdot \frac{\mathrm{std}(\mathrm{cond})}{\mathrm{std}(\mathrm{guided})} \qquad \mathrm{result} = \phi \; \mathrm{full} + (1 - \phi) \; \mathrm{guided}$$
#
# Write it in two lines. `x.std(dim=(1, 2, 3), keepdim=True)` is the standard deviation of each picture of a batch, shape `[B, 1, 1, 1]`.
# When it is right, it reports how large a guided prediction is before and after.


# %%
def rescale(guided, cond, phi):
    """The share phi of guided with cond's standard deviation; guided and cond [B, C, H, W]."""
    # YOUR CODE, about 2 lines


rescale = lesson.check(rescale)


# %%
def rescaled(model, x_t, t, cond, uncond, g):
    prediction = guided_prediction(model, x_t, t, cond, uncond, g)
    return rescale(prediction, model(x_t, t, cond), 0.7)


high = scales[-2]
repaired = pictures(rescaled, high)
for name, pixels in (("guided", drawn[high]), ("rescaled", repaired)):
    ends = (pixels.abs() > 0.99).float().mean()
    print(f"scale {high}, {name}: accuracy {accuracy(pixels):.2f}, saturated {ends:.1%}")
rows = [to_images(pixels[-6:]) for pixels in (drawn[high], repaired)]
fig = picture_grid(rows, labels=["guided", "rescaled"])
lesson.show(fig, "rescaled", "Pictures at a high scale, and below with the prediction rescaled.")

# %% [markdown]
# Compare the two lines. On plain emoji the difference is small. It is larger in photographs, where shades matter.

# %% [markdown]
# ## Negative prompts
#
# The unconditional prediction is what guidance moves *away* from. If you put another prompt in place of the empty one, the picture moves
# away from that: a *negative prompt*. Here the prompt leaves the colour of the background open. The judge names the colours, and the most
# frequent one becomes the negative prompt.

# %%
many = 6 if lesson.quick else 10


def backgrounds(negative):
    """The colour that the judge sees behind each of some frogs, and the first of their pictures."""
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
assert lesson.model != "tiny" or lesson.quick or without.count(most) < plain.count(most)

# %%
fig = picture_grid([pictures_plain, pictures_without], (), ["empty", f"negative:\n{most}"])
lesson.show(fig, "negative", "Six frogs; below, the same seeds with a negative prompt.")

# %% [markdown]
# The colour becomes less frequent. A negative prompt is a direction, not a command: some pictures may keep the background. It also affects
# more than backgrounds. Compare the colours of the frogs themselves.

# %% [markdown]
# ## Break it: three mistakes in one line
#
# All of guidance is one line, and these three mistakes are common:
#
# 1. *Swapped*: the two halves of the batch are confused, and the conditional prediction is taken for the unconditional one.
# 2. *From cond*: `cond + g (cond - uncond)`, which starts from the wrong end.
# 3. *Last channel*: a channel of the latent is not guided. A widely copied program guided three of Stable Diffusion's four channels, as if
#    they were red, green and blue.
#
# Which of them would you notice?


# %%
def swapped(model, x_t, t, cond, uncond, g):
    return guided_prediction(model, x_t, t, uncond, cond, g)


def from_cond(model, x_t, t, cond, uncond, g):
    return guided_prediction(model, x_t, t, cond, uncond, g + 1)  # cond + g (cond - uncond)


def last_channel(model, x_t, t, cond, uncond, g):
    whole = guided_prediction(model, x_t, t, cond, uncond, g)
    return torch.cat([whole[:, :-1], model(x_t, t, cond)[:, -1:]], dim=1)


# %%
cond, uncond, seeds, wanted = cond[::2], uncond[::2], seeds[::2], wanted[::2]  # one seed each
ways = {"right": guided_prediction, "swapped": swapped, "from cond": from_cond}
ways |= {"last channel": last_channel}
results = {name: pictures(predict, scale) for name, predict in ways.items()}
for name, pixels in results.items():
    off = 127.5 * (pixels - results["right"]).abs().mean()
    print(f"{name}: accuracy {accuracy(pixels):.2f}, off by {off:.1f} of 255")

# %%
rows = {name.replace(" ", "\n"): to_images(pixels[-5:]) for name, pixels in results.items()}
columns = ["\n".join(prompt.subjects) for prompt in asked[-5:]]
fig = picture_grid(list(rows.values()), columns, list(rows))
lesson.show(fig, "mistakes", "Right pictures, ruined ones, and two rows that merely look right.")

# %% [markdown]
# The first mistake is obvious: the pictures move away from the words. The other two are not. The judge hardly notices them, and nobody who
# sees only these pictures would say that something is wrong. *From cond* is the same as a scale that is larger by one, so a scale means
# something else than in every other program. An unguided channel shifts the picture a little. What finds both is a model whose predictions
# are known. It predicts 1 with a prompt and 0 without, in all channels, and we guide it by 4:


# %%
def known(x_t, t, context):
    """Predicts 1 with a prompt of ones, 0 with one of zeros, in all channels."""
    return torch.ones_like(x_t) * context[:, :1, :1, None]


zeros = torch.zeros(1, 4, 1, 1)
for name, predict in ways.items():
    said = predict(known, zeros, torch.tensor([0]), torch.ones(1, 1, 1), torch.zeros(1, 1, 1), 4)
    print(f"{name:14}", said.flatten().tolist())

# %% [markdown]
# Every mistake shows up, in a millisecond and without a picture. minidiff's tests do the same.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/10_cross_attention_and_guidance.py --model v1-5-pruned-emaonly.safetensors` draws the maps and the scales with a
# checkpoint of yours. (The judge only knows scenes of emoji; its verdict on photographs means little.) Such models are mostly used at a
# scale of 7.5. How large are the values of guided predictions, compared to one?

# %%
print(f"usual scale: {SD1.guidance_scale}; this model's: {sd.config.guidance_scale}")
x_t = noise_source([0, 0], shape, lesson.device)()
t = torch.full((2,), 700, device=lesson.device)
for g in (1, 4, SD1.guidance_scale, 16):
    with torch.no_grad():
        prediction = guided_prediction(sd.unet, x_t, t, cond[:2], uncond[:2], g)
    print(f"scale {g}: standard deviation {prediction.std():.2f}")

# %% [markdown]
# minidiff saves part of the double work: before the first cross-attention layer both halves of the batch are equal, so `guided` computes
# them once (`shared_prefix`).

# %% [markdown]
# ## On a GPU
#
# ```bash
# python lessons/10_cross_attention_and_guidance.py --model v1-5-pruned-emaonly.safetensors --device cuda
# ```
#
# Three minutes. Expect maps of 64 x 64 cells, and burnt colours at high scales. Look at the shares of the attention too: in such models
# most of it goes to the start token at every step.

# %% [markdown]
# ## What you now know
#
# - The attention weights of a word, averaged over layers, show where its subject will be, from the first step on.
# - The early steps decide what a picture shows; words that change late only colour it.
# - Guidance exaggerates the difference between the predictions with and without the prompt.
# - A higher scale follows the words more closely, up to a point, and costs variety and colours; rescaling repairs part of the latter.
# - A negative prompt takes the place of the empty one: the picture moves away from it.

# %% [markdown]
# ## Your guess
#
# The second answer is right, as the figure of the changed prompts shows. The first confuses looking with effect: the late steps still look
# at the words, but the latent already says what is there. The third would be right if the first step fixed everything; it only predicts a
# blur.

# %% [markdown]
# ## Quiz
#
# 1. At scale 1, can you save the unconditional half of the batch?
# 2. A negative prompt says the same as the prompt. What does guidance do?
# 3. A word was cut into three tokens. Why are their weights added up, rather than averaged?
#
# <details><summary>Answers</summary>
#
# 1. Yes: $\epsilon_\text{uncond} + 1 \cdot (\epsilon_\text{cond} - \epsilon_\text{uncond})$ is $\epsilon_\text{cond}$.
# 2. Nothing at any scale: the difference is zero, and the plain conditional prediction remains.
# 3. A cell's weights add up to one over all tokens, so its share for the word is the sum over the word's tokens.
#
# </details>

# %% [markdown]
# ## Now you
#
# Guide in some of the steps only (Kynkäänniemi et al. 2024). In `generate`, count the calls, and use a scale of 1 for the first third of
# the steps; then for the middle third; then for the last. Predict which of the three costs the least accuracy and which gives the most
# variety back. Then measure all three with `accuracy` and with the variety of two seeds.

# %% [markdown]
# ## Read next
#
# - `minidiff/guidance.py`: `guide` is one line, `guided` the batch around it. `minidiff/attention_maps.py`: how weights are recorded without
#   changing the picture.
# - Ho and Salimans 2022, "Classifier-free diffusion guidance", section 3.2; Hertz et al. 2022, "Prompt-to-prompt image editing", section 3.1,
#   for the maps; Lin et al. 2023, "Common diffusion noise schedules and sample steps are flawed", section 3.4, for rescaling.
# - Lesson 11: the way from noise to picture in fewer steps.
