# %% [markdown]
# # 00 First picture
#
# **How do words become a picture?**
#
# - Explains: [minidiff/pipeline.py](../minidiff/pipeline.py)
# - You change: `to_bytes`, the last step to a picture file; seeds, steps and guidance to play with
# - Minutes: 20
# - Picture: [figures/00-film.png](figures/00-film.png)
#
# ![The whole pipeline; this lesson is about the whole of it](figures/pipeline-all.svg)
#
# Stable Diffusion makes pictures from words. Here it makes its first ones on your machine, with the small model that ships with minidiff:
# it knows emoji on plain backgrounds, and nothing else. You watch a picture come out of noise, turn the three knobs that everybody turns,
# and write the last lines between the model and the file. How each part works is for the lessons that follow.

# %% [markdown]
# ## Guess first
#
# The model starts from noise, like a television without a station, and takes a little of the noise away at each step. If you could stop it
# and look, when could you tell what the picture is going to be?
#
# 1. In the first third of the steps.
# 2. About halfway.
# 3. In the last third: it is mostly noise until then.

# %% [markdown]
# ## Words in, picture out
#
# The words are called the *prompt*. `generate` takes one prompt or several, and gives back a picture for each.

# %%
import time

import numpy as np
import torch
from matplotlib import pyplot as plt

from lessons.common import picture_grid, start
from minidiff.config import SD1
from minidiff.pipeline import noise_source, to_images

lesson = start("00_first_picture")
sd = lesson.load()
steps = 8 if lesson.quick else 20

# %%
things = {"mushroom": "brown", "burger": "white", "camera": "gray", "popcorn": "green"}
prompts = [f"a {thing} on a {colour} background" for thing, colour in things.items()]
begin = time.perf_counter()
pictures = sd.generate(prompts, steps=steps, seed=0)
taken = time.perf_counter() - begin

size = sd.config.image_size
assert all(picture.size == (size, size) for picture in pictures)
print(f"{len(pictures)} pictures, {size} x {size} pixels")
print(f"{steps} steps, {taken:.1f} seconds")
fig = picture_grid([pictures], list(things))
lesson.show(fig, "first", "A mushroom, a burger, a camera and popcorn.")

# %% [markdown]
# ## What generate does
#
# Four parts work together, and `minidiff/pipeline.py` is where they meet:
#
# 1. The *text encoder* turns the prompt into a tensor of numbers, the *context*.
# 2. A random generator draws noise. Its start number, the *seed*, is yours to choose.
# 3. The *U-Net*, a network, looks at what is there and at the context, and says how to make it less noisy. That is done again and again:
#    `denoise`.
# 4. The *decoder* turns the result into pixels.
#
# Nearly all of this happens not on pixels but on a smaller tensor, the *latent*, which the decoder knows how to enlarge. That is the
# "latent" in latent diffusion, and why it is fast. Both have shape B C H W: pictures in a batch, channels, height, width. One place of the
# latent, with its C numbers, is called a *cell*.

# %%
prompt = "a cactus on an orange background"
context = sd.encode_prompts([prompt])
film = list(sd.denoise(prompt, steps=steps, seeds=[0]))
latent = film[-1].x_t
pixels = sd.decode(latent)

B, C, h, w = latent.shape
assert (1, sd.config.vae.latent_channels) == (B, C) and h == w == size // sd.config.vae.factor
assert pixels.shape == (B, 3, size, size)
for name, tensor in {"context": context, "latent": latent, "pixels": pixels}.items():
    print(f"{name:8} {list(tensor.shape)}")
print(f"{pixels.numel() / latent.numel():.0f} times as many pixel values as latent values")

# %% [markdown]
# Those lines and `generate` are the same thing, to the last bit:

# %%
whole = sd.generate(prompt, steps=steps, seed=0)
assert np.array_equal(np.asarray(to_images(pixels)[0]), np.asarray(whole[0]))
differ = (np.asarray(to_images(pixels)[0]) != np.asarray(whole[0])).sum()
print(f"{differ} values differ")

# %% [markdown]
# ## The film
#
# `denoise` is a generator: it hands out each step, so that it can be watched. A step has two tensors worth decoding. `x_t` is the latent as
# it stands, noise and all. `x0_hat` is the model's guess at the clean latent, made at that step: what it would answer if it had to stop
# now. The hat says "guessed". `t`, the *timestep*, says how much noise there is, and counts backwards: `999` is nothing but noise, `0`
# almost none.

# %%
shown = [film[i] for i in np.linspace(0, steps - 1, 6).round().astype(int)]
latents = [torch.cat([getattr(step, name) for step in shown]) for name in ("x_t", "x0_hat")]
rows = [to_images(sd.decode(z)) for z in latents]
columns = [f"step {step.i + 1}" for step in shown]
fig = picture_grid(rows, columns, ["$x_t$", "guess\n$\\hat{x}_0$"])
print(f"steps begin at t = {', '.join(str(step.t) for step in film[:3])}, ... {film[-1].t}")
lesson.show(fig, "film", "Above, noise becomes a cactus; below, a blurred cactus becomes sharp.")

# %% [markdown]
# The very first guess has the colours right and is a blob. Soon it has the shape, and the rest of the time goes into making it sharp. How
# far is each from the latent at the end? The distance below is the root of the mean squared difference; for two tensors of noise it is 1.4.


# %%
def distance(a, b):
    return float((a - b).square().mean().sqrt())


noise = noise_source(range(100), (C, h, w), torch.device("cpu"))()
print(f"two tensors of noise: {distance(noise[:50], noise[50:]):.1f}")
fig, axis = plt.subplots()
for name, label, marker in (("x_t", "$x_t$", "o"), ("x0_hat", r"guess $\hat{x}_0$", "s")):
    away = [distance(getattr(step, name), latent) for step in film]
    axis.plot(range(1, steps + 1), away, marker=marker, label=label)
    third, half = away[steps // 3 - 1], away[steps // 2 - 1]
    print(f"{name:6} after a third: {third:.2f}, after half: {half:.2f}")
axis.set(xlabel="step", ylabel="distance to the end", ylim=(0, None))
axis.set_xticks(range(2, steps + 1, 2))
axis.legend()
lesson.show(fig, "distance", "The guess starts further from the end than x_t, soon overtakes it.")

# %% [markdown]
# So it depends on what you look at. The noisy latent comes nearer slowly, and most of the way late; to your eyes it shows its cactus about
# halfway or later. The guess starts further off, since it knows next to nothing, but soon overtakes it: by the guess the first answer is
# right. A good part of the course is about this guess.

# %% [markdown]
# ## Knob one: the seed
#
# The seed decides the noise, and the noise decides everything that the prompt leaves open. Another seed is another picture of the same
# thing. The same seed is the same picture, but for rounding: tomorrow, on another machine, alone or among others.

# %%
four = sd.generate("a fox on a green background", steps=steps, seed=0, batch=4)
alone = sd.generate("a fox on a green background", steps=steps, seed=3)
largest = np.abs(np.asarray(four[3]).astype(int) - np.asarray(alone[0])).max()
assert largest <= 2  # of 255: a batch is computed in another order, so it is rounded otherwise
print(f"seed 3 alone and as one of four: at most {largest} of 255 apart")
fig = picture_grid([four], [f"seed {seed}" for seed in range(4)])
lesson.show(fig, "seeds", "Four foxes: same prompt, four seeds.")

# %% [markdown]
# ## Knob two: the number of steps
#
# More steps are more work, and finer ones. Watch where it stops mattering.

# %%
counts = (1, 2, 4, 8) if lesson.quick else (1, 2, 4, 8, 16, 32)
fox = "a fox on a green background"
ends = {n: list(sd.denoise(fox, steps=n, seeds=[1]))[-1].x_t for n in counts}
for n in counts[:-1]:
    print(f"{n:2} steps: {distance(ends[n], ends[counts[-1]]):.2f} from {counts[-1]} steps")
foxes = to_images(sd.decode(torch.cat(list(ends.values()))))
fig = picture_grid([foxes], [f"{n} steps" for n in counts])
lesson.show(fig, "steps", "A fox in more and more steps: first a blur, then hardly a change.")

# %% [markdown]
# A single step gives the guess of step one, and you have seen what that looks like. After that each doubling brings the picture nearer to
# where it is going, until the eye sees nothing more. Lesson 03 measures how fast.

# %% [markdown]
# ## Knob three: guidance
#
# At each step the U-Net is asked twice: once with the prompt, once with an empty one. The difference of the two answers is what the prompt
# is about, and it is taken more than once. That is *guidance* (Ho and Salimans 2022), and its scale $g$ says how many times:
#
# $$\mathrm{answer} = \mathrm{empty} + g \, (\mathrm{prompt} - \mathrm{empty})$$
#
# At 0 the prompt is not heard. At 1 it is heard as it is, as in training. Beyond that it is exaggerated.

# %%
scales = (0, 1, 4, 16) if lesson.quick else (0, 1, 2, 4, 8, 16)
asked = ["a burger on a white background", "a fox on a green background"]
films = [sd.denoise(asked, steps=steps, seeds=[4, 5], guidance_scale=g) for g in scales]
ends = [list(film)[-1].x_t for film in films]
for g, end in zip(scales, ends):
    print(f"guidance {g:2}: the latent's numbers have size {end.std():.2f}")
pixels = [to_images(sd.decode(end)) for end in ends]
fig = picture_grid(list(zip(*pixels)), [f"g = {g}" for g in scales], ["burger", "fox"])
lesson.show(fig, "guidance", "A burger and a fox from guidance 0, anything, to 16, too loud.")
print(f"this model's own scale: {sd.config.guidance_scale:g}")

# %% [markdown]
# With 0 you get something, but not what you asked for. Too much is too loud: look at the edges, and at the ears. Every model has a range in
# between where it does what it is told and still looks good. Lesson 10 takes guidance apart.

# %% [markdown]
# ## Your turn: to_bytes
#
# The decoder gives pixels as numbers between `-1` and `1`, of shape `[B, 3, H, W]`. A picture file wants whole numbers between `0` and
# `255`, colours last: `[B, H, W, 3]`, type `torch.uint8`. So `-1` becomes `0`, `1` becomes `255`, and what is between is *rounded* to the
# nearest. The decoder is a network and does not keep exactly to its range: what lies below `-1` counts as `-1`, what lies above `1` as `1`.
#
# `clamp`, `round`, `permute` and `to` are the methods of a tensor that you need.


# %%
def to_bytes(pixels):
    """From numbers in about [-1, 1] of shape [B, 3, H, W] to uint8 of shape [B, H, W, 3]."""
    # YOUR CODE, about 2 lines


def library(pixels):
    return torch.stack([torch.from_numpy(np.array(picture)) for picture in to_images(pixels)])


to_bytes = lesson.check(to_bytes, instead=library)

# %% [markdown]
# ## Break it: forget the clamp
#
# A byte has no room for 260. Turned into one it wraps round, like a mileage counter: 256 becomes 0, 260 becomes 4. What should have been
# brighter than white becomes black. `sd.decode` clamps, as you did; the decoder by itself, `sd.vae.decode`, does not.


# %%
def to_bytes_without_clamp(pixels):
    values = ((pixels + 1) * 127.5).round().to(torch.int16)
    return values.permute(0, 2, 3, 1).to(torch.uint8).cpu()


for value in (255, 256, 260):
    print(f"{value} becomes {torch.tensor(value, dtype=torch.int16).to(torch.uint8)}")
with torch.no_grad():
    raw = sd.vae.decode(torch.cat(ends[1:]) / sd.config.vae.scaling_factor)
right, wrapped = to_bytes(raw), to_bytes_without_clamp(raw)
assert right.shape == wrapped.shape == (len(raw), size, size, 3) and right.dtype == torch.uint8

# %%
print("wrong values  burger on white  fox on green")
wrong = (right != wrapped).float().mean(dim=(1, 2, 3))
for i, g in enumerate(scales[1:]):
    print(f"guidance {g:2} {wrong[2 * i]:17.1%} {wrong[2 * i + 1]:13.1%}")
names = ("with\nclamp", "without")
rows = [[values[2 * i].numpy() for i in range(len(scales) - 1)] for values in (right, wrapped)]
fig = picture_grid(rows, [f"g = {g}" for g in scales[1:]], names)
lesson.show(fig, "wrapped", "Burgers; without the clamp the white around them turns black and red.")

# %% [markdown]
# No error, no warning, and nothing in the shapes: how much is wrong depends on the prompt and on the guidance. Colours at the ends of the
# range suffer, and exaggerated latents decode to exaggerated colours. On one prompt with little guidance you might never have noticed.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/00_first_picture.py --model v1-5-pruned-emaonly.safetensors` runs all of the above with a checkpoint that you have, and
# draws what its prompts say in photographs rather than emoji. The code is the same. Only the numbers differ, and they stand in
# `minidiff/config.py`:

# %%
for name, config in {"this model": sd.config, "Stable Diffusion 1.x": SD1}.items():
    side, vae = config.image_size, config.vae
    print(f"{name}: {side} x {side} pixels,")
    print(f"  latent {vae.latent_channels} x {side // vae.factor} x {side // vae.factor},")
    print(f"  context {config.tokenizer.context_length} x {config.unet.context_width},")
    print(f"  guidance {config.guidance_scale:g}")

# %% [markdown]
# Stable Diffusion's latent has 64 x 64 cells where the bundled model's has 16 x 16, and its layers are far wider. It takes minutes a
# picture on a processor, and seconds on a good GPU.

# %% [markdown]
# ## On a GPU
#
# ```bash
# minidiff generate "a photo of a fox in the snow" --model v1-5-pruned-emaonly.safetensors --seed 0 --device cuda --out fox.png
# ```
#
# One minute, most of it for reading the file. Then change one knob at a time: `--seed 1`, `--steps 10`, `--guidance-scale 1`. Expect the same
# three effects as here: another fox, the same fox a little rougher, and a fox that is none.

# %% [markdown]
# ## What you now know
#
# - A prompt becomes a picture in four parts: text encoder, noise from a seed, U-Net in a loop, decoder.
# - The loop works on the latent, a tensor much smaller than the picture.
# - Every step has two tensors to look at: `x_t`, the noisy latent, and `x0_hat`, the model's prediction of the clean one.
# - The seed decides what the prompt leaves open; more steps refine; guidance makes the prompt count for more.
# - The decoder's values leave their range now and then, so they are clamped before they become bytes.

# %% [markdown]
# ## Your guess
#
# It depends on which tensor you watch. In `x_t` you see the subject late, because the noise hides it. In the prediction `x0_hat` you see it
# in the first third of the steps, so by that measure the first answer is right.

# %% [markdown]
# ## Quiz
#
# 1. You run one prompt with the same seed on another machine. What do you expect?
# 2. What does guidance of one do, and how often is the U-Net needed at each step then?
# 3. Why is the first prediction `x0_hat` a blur and not a bad picture?
#
# <details><summary>Answers</summary>
#
# 1. The same picture, except for rounding: the noise is drawn on the processor from the seed.
# 2. The prompt is followed as in training. The empty prompt has no weight, so one prediction per step is enough.
# 3. The model has seen nothing but noise and the words, so it predicts an average of everything that fits them.
#
# </details>

# %% [markdown]
# ## Now you
#
# Take a prompt that leaves much open, such as "a fox", and one that leaves little open. Predict for which of them four seeds differ more.
# Then generate both with four seeds each, measure the mean `distance` between the final latents, and look at the pictures. Does the number
# agree with your eyes?

# %% [markdown]
# ## Read next
#
# - `minidiff/pipeline.py`: `generate` is four lines; `denoise` puts text encoder, noise, guidance and steps together; `noise_source` has
#   one generator a picture; `to_images` is your blank.
# - Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models": the paper of Stable Diffusion, figure 3 is the same
#   four parts.
# - Lesson 01: how a picture turns into noise in the first place.
