# %% [markdown]
# # 15 DreamBooth
#
# **How does a model learn one new animal from five pictures, and what does it forget meanwhile?**
#
# - Explains: [minidiff/trainers/methods/dreambooth.py](../minidiff/trainers/methods/dreambooth.py),
#   [minidiff/trainers/methods/finetune_task.py](../minidiff/trainers/methods/finetune_task.py)
# - You change: `with_prior`, the loss that keeps the class
# - Minutes: 35
# - Picture: [figures/15-forgotten.png](figures/15-forgotten.png)
#
# ![The whole pipeline; this lesson is about small changes of the weights](figures/pipeline-adapters.svg)
#
# *DreamBooth* teaches a model a subject from a handful of pictures: the subject gets a name, and the whole model goes on training. The
# subject is learned quickly. The price is paid elsewhere: all that the model knew of this kind of animal is drawn towards the five pictures.
# This lesson measures the price, and then the paper's remedy.

# %% [markdown]
# ## Guess first
#
# We show the model five tigers, and call each "a photo of a sks lion". Afterwards we ask for "a lion". What does it draw?
#
# 1. A lion: the tiger has another name.
# 2. A tiger.
# 3. Something between the two.

# %% [markdown]
# ## A subject, a name, a class
#
# The bundled model has never been shown a tiger. The subject gets a *name*, a rare word of one token which means nothing to the model yet,
# here `sks`; and behind the name stands the *class*, the kind of thing it is, here `lion`. The class gives the training a start: a sks lion
# begins as a lion. The name is what keeps the two apart, if all goes well.
#
# A *judge* looks at the pictures: a second network, trained on scenes of all subjects, tigers and lions too, that says how much of a
# picture each of them covers. We ask it how much of all that it sees is lion, and how much is tiger.

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
from minidiff.config import SD1
from minidiff.pictures import to_pixels
from minidiff.pipeline import to_images
from minidiff.scenes.pictures import subject_scenes
from minidiff.trainers.methods.options import Concept, Prior
from minidiff.trainers.methods.prior_preservation import fill_class_images
from minidiff.trainers.methods.table import METHODS, preset
from minidiff.unet import UNet
from weights_loader import load_judge

# %%
lesson = start("15_dreambooth")
sd = lesson.load()
judge = load_judge(device=lesson.device)
size = sd.config.image_size
scenes = subject_scenes("tiger", "fluent", 5, np.random.default_rng(0))
five = to_pixels(np.stack([scene.image for scene in scenes]))
five = to_images(F.interpolate(five, (size, size)))
root = TemporaryDirectory()
images, class_images = Path(root.name) / "tigers", Path(root.name) / "lions"
images.mkdir()
for i, image in enumerate(five):
    image.save(images / f"{i}.png")
for word in ("sks", "lion", "tiger"):
    print(f"{word!r} is token {sd.tokenizer.encode(word)} of {sd.tokenizer.vocab_size}")

# %%
backgrounds = ("red", "white", "blue", "green")[: 2 if lesson.quick else 4]
drawing_steps = 2 if lesson.quick else 10
lions = [f"a lion on a {colour} background" for colour in backgrounds]
named = [f"a sks lion on a {colour} background" for colour in backgrounds]


@torch.no_grad()
def draw(model, prompts):
    """The prompts' pictures; how much of all that the judge sees there is lion, and is tiger."""
    *_, last = model.denoise(prompts, seeds=range(len(prompts)), steps=drawing_steps)
    pixels = model.decode(last.x_t)
    assert pixels.shape == (len(prompts), 3, size, size)
    side = judge.config.image_size  # the judge reads pictures of one size only
    shares = judge.read(F.interpolate(pixels, (side, side), mode="area")).shares().sum(dim=0)
    lion, tiger = (shares[judge.config.subjects.index(name)] for name in ("lion", "tiger"))
    return to_images(pixels), float(lion / shares.sum()), float(tiger / shares.sum())


# %%
before = draw(sd, named), draw(sd, lions)
for words, (_, lion, tiger) in zip(("a sks lion", "a lion"), before):
    print(f"{words!r}, before: {lion:.0%} lion, {tiger:.0%} tiger")
fig = picture_grid([five, before[1][0]], labels=["five\ntigers", '"a lion"'])
lesson.show(fig, "five", "Five tigers; below, the lions that the model draws for a lion.")

# %% [markdown]
# ## Learn the tiger, and look what becomes of the lion
#
# A noisy picture goes in, the network answers, the mean square error is the loss (lesson 02). Every weight of the U-Net moves, and every
# weight of the text encoder too, since it has to make a word out of `sks`. All five pictures have the caption "a photo of a sks lion".
# After every few steps we stop and ask for both, "a sks lion" and "a lion", on the same noise each time.
#
# `precision="bfloat16"` works out the products in numbers of half the size. Processors that have instructions for them are faster so. What
# is trained stays in float32: a small step would be rounded away otherwise.

# %%
concept = Concept(images=images, class_images=class_images, token="sks", class_word="lion")
options = preset("dreambooth", "bundled")
options = replace(options, text_encoder=True)
settings = replace(options.settings, batch=2, precision="bfloat16")


def learn(model, concept, prior, steps, look_every):
    """Trains, and stops to look; by step, what is drawn for the name and for the class."""
    now = replace(options, settings=replace(settings, steps=steps), prior=prior)
    method = METHODS["dreambooth"].build(model, [concept], now)
    seen = {0: before}
    for _, step in method.run(lesson.device):
        if step.done % look_every == 0:
            seen[step.done] = draw(model, named), draw(model, lions)
            (_, _, tiger), (_, lion, _) = seen[step.done]
            print(f"step {step.done:3}: {tiger:4.0%} tiger for sks, {lion:4.0%} lion for lion")
    return seen


# %%
alone = lesson.load()
seen_alone = learn(alone, concept, Prior(), *((1, 1) if lesson.quick else (60, 20)))

# %% [markdown]
# The second of the three answers comes nearest. The tiger is learned in a few dozen steps, and the lion goes with it. The name is one word
# of the caption, "lion" is another, and both got the tiger's pictures; nothing tells the model which of the two it was.

# %% [markdown]
# ## Prior preservation
#
# Nothing in the loss ever said that a lion should stay a lion. The paper calls what happens *language drift*, and adds what is missing
# (Ruiz et al. 2023, section 3.3 and eq. 2). Before the training the model itself draws pictures of "a photo of a lion", and each sample of
# the subject brings one of them into the batch, with its own caption:
#
# $$\mathcal{L} = \mathbb{E} \, \lVert \epsilon - \hat\epsilon(x_t, c) \rVert^2 + \lambda \; \mathbb{E} \, \lVert \epsilon' - \hat\epsilon(x'_t, c') \rVert^2$$
#
# The first mean is over the subject's pictures with the caption c, the second over the class pictures x' with theirs, c', and noise of
# their own; $\lambda$ is the weight of the second. What the model could do before becomes part of what it is taught. (The bundled model
# answers with v, a mix of picture and noise, instead of $\epsilon$; the sum is the same.)

# %% [markdown]
# ## Your turn: with_prior
#
# The trainer runs both parts through the U-Net in one batch and gets one loss a row, `loss` of shape `[B]`: the first `subjects` rows
# belong to the subject, the rest to the class. Write the sum of the equation, with `weight` for $\lambda$.


# %%
def with_prior(loss, subjects, weight):
    """Mean of the first rows + weight * mean of the others; loss [B], the first are subjects."""
    # YOUR CODE, about 1 line


def written_out(loss, subjects, weight):
    first, rest = loss.split([subjects, len(loss) - subjects])
    return first.mean() + weight * rest.mean()


with_prior = lesson.check(with_prior, instead=written_out)
rows = torch.tensor([0.4, 0.6, 0.2, 0.2])
print(f"two losses of the subject, two of the class: {with_prior(rows, 2, 1.0):.1f}")

# %% [markdown]
# ## The same training with the model's own lions

# %%
count, drawn_in = (2, 2) if lesson.quick else (16, 12)
prior = Prior(kind="generated", count=count, steps=drawn_in)
for filled in fill_class_images(sd, concept, replace(options, prior=prior)):
    pass
print(f"{filled.done} pictures of a lion, drawn by the model itself")

# %%
beside = lesson.load()
seen_beside = learn(beside, concept, prior, *((1, 1) if lesson.quick else (120, 40)))

# %%
fig, axes = plt.subplots(1, 2, sharey=True, figsize=(6, 3.4))
for seen, label, style in ((seen_alone, "alone", "o--"), (seen_beside, "with prior", "s-")):
    axes[0].plot(seen.keys(), [100 * drawn[2] for drawn, _ in seen.values()], style, label=label)
    axes[1].plot(seen.keys(), [100 * drawn[1] for _, drawn in seen.values()], style, label=label)
for axis, title in zip(axes, ("tiger for the name", "lion for the class")):
    axis.set(xlabel="step", title=title, ylim=(0, 105))
axes[0].set_ylabel("% of what the judge sees")
axes[0].legend(loc="upper left")
lesson.show(fig, "forgetting", "Tigers come either way; lions stay with the prior, and go without.")

# %%
rows = [drawn[0] for seen in (seen_alone, seen_beside) for drawn in list(seen.values())[-1]]
labels = ['"a sks\nlion"', '"a lion"', '"a sks\nlion",\nprior', '"a lion",\nprior']
fig = picture_grid(rows, labels=labels)
lesson.show(fig, "forgotten", "Without the prior lions turn into tigers; with it they stay lions.")

# %% [markdown]
# For this model and this subject the prior keeps the class: the judge sees about as much lion at the last step as before the first. They
# are not quite the old lions. They have grown darker, and more alike than those of the first picture: a few lions now stand for all that
# there were, which is why the paper draws hundreds. That is one price, and the other is time. Each step looks at twice as many pictures,
# and it takes more steps to pull apart two captions that are nearly the same.

# %% [markdown]
# ## Break it: leave out the name
#
# Why the strange word? The same training with the same prior, but the tigers are captioned as an honest person would, "a photo of a lion".

# %%
nameless = replace(concept, token="", prompt="a photo of a lion")
broken = lesson.load()
fine = replace(preset("fine-tune", "bundled"), prior=prior, weights=("^unet", "^text_encoder"))
fine = replace(fine, settings=replace(settings, steps=1 if lesson.quick else 80))
for _ in METHODS["fine-tune"].build(broken, [nameless], fine).run(lesson.device):
    pass
pictures, lion, tiger = draw(broken, lions)
print(f'"a lion", without a name: {lion:.0%} lion, {tiger:.0%} tiger')
fig = picture_grid([before[1][0], pictures], labels=["before", "without\na name"])
lesson.show(fig, "nameless", "Lions before; afterwards lions with a tiger's colours.")

# %% [markdown]
# Neither a lion nor a tiger: a lion's mane around a face as orange as a tiger's, in every picture. The same words now have to mean two
# animals, and the model gives what lies between. The prior pulls one way and the subject the other; only a name gives the two pulls
# different places to go. So of the three answers the third was not wrong, for this caption.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/15_dreambooth.py --model v1-5-pruned-emaonly.safetensors --device cuda` does the same on a checkpoint of yours; a tiger it
# knows already, so give it a folder of your own in place of `images`. What makes DreamBooth heavy is that everything moves: for each weight
# the trainer holds the weight, its gradient and two running means of Adam, four numbers of four bytes.

# %%
with torch.device("meta"):  # shapes alone
    unet = UNet(SD1.unet)
weights = sum(p.numel() for p in unet.parameters())
print(f"{weights / 1e6:.0f} million, {4 * 4 * weights / 1e9:.1f} GB before any picture")

# %% [markdown]
# That is why DreamBooth is mostly used with a LoRA in place of the whole U-Net (lesson 14): the same names, captions and class pictures,
# and far fewer weights that move.

# %% [markdown]
# ## On a GPU
#
# ```bash
# minidiff train dreambooth --model v1-5-pruned-emaonly.safetensors --images my-dog --token sks --class-word dog --out runs/dreambooth
# ```
#
# 30 minutes on a GPU of 24 GB, most of it for the 200 class pictures. Expect your dog for "a sks dog", and for "a dog" dogs of all kinds;
# train twice as long, and look whether they become yours.

# %% [markdown]
# ## Read next
#
# - `minidiff/trainers/methods/dreambooth.py`: `build` puts the pieces together; `minidiff/trainers/methods/finetune_task.py`: the last line of
#   `FinetuneTask.loss` is yours.
# - Ruiz et al. 2023, "DreamBooth: fine tuning text-to-image diffusion models for subject-driven generation", section 3.3 and eq. 2.
# - Lesson 16: nothing of the model moves, and one word is learned.
