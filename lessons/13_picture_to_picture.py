# %% [markdown]
# # 13 Picture to picture, and filling holes
#
# **How does a model that only removes noise change a picture that is already there?**
#
# - Explains: [minidiff/editing/start.py](../minidiff/editing/start.py), [minidiff/editing/inpaint.py](../minidiff/editing/inpaint.py)
# - You change: `noised_start`, `blend` and `paste`: where an edit begins, what it keeps, and how it is laid over the original
# - Minutes: 45
# - Picture: [figures/13-ladder.png](figures/13-ladder.png)
#
# ![The whole pipeline; this lesson is about the denoising loop](figures/pipeline-sampler.svg)
#
# Every picture of the earlier lessons began as pure noise. Often you already have a picture and want another version of it, or one thing in
# it replaced. Neither needs a new model. *Image to image* starts the denoising loop in the middle, from your picture with noise on it.
# *Inpainting* repaints a hole and keeps the rest. In this lesson you write the lines that both of them add to the loop.

# %% [markdown]
# ## Guess first
#
# We have a picture of a pig left of a cactus. We add noise to it, as much as belongs to timestep 599, past the middle of the way to pure
# noise. From there we denoise it with DDIM, under the prompt "a lion left of a cactus". What comes out?
#
# 1. The pig again: with DDIM the start decides the picture (lesson 03), and the pig is in the start.
# 2. A lion in place of the pig, and the cactus as it was, since the prompt asks for the same cactus.
# 3. A lion in place of the pig, and a different cactus in place of the old one.

# %% [markdown]
# ## A picture of your own
#
# The picture is a drawing, composed for this lesson. The model did not make it. Where the pig is, a rectangle is marked, the `mask`: one
# where we want something new, zero where the picture should stay. The VAE's encoder turns the picture into the clean latent `x_0`. An
# encoder gives the mean and the variance of a latent (lesson 08). Edits take the mean, so that nothing about `x_0` is random.

# %%
import torch
import torch.nn.functional as F

from lessons.common import curves, distance, picture_grid, start
from minidiff.editing.canvas import resize
from minidiff.editing.image_to_image import image_to_image
from minidiff.editing.inpaint import inpaint
from minidiff.editing.masks import cover_cells, to_cells
from minidiff.editing.start import Sampling, encode_rows
from minidiff.pictures import to_pixels
from minidiff.pipeline import noise_source, to_images
from minidiff.scenes.scenes import Item, compose

lesson = start("13_picture_to_picture")
sd = lesson.load()

# %%
pig, cactus = Item("pig", 32, (17, 32)), Item("cactus", 28, (48, 32))
scene = compose([pig, cactus], background="yellow", style="fluent", relation="left of")
prompt = scene.caption.replace("pig", "lion")
size, factor = sd.config.image_size, sd.config.vae.factor
left, top, right, bottom = scene.objects[0].box
mask = torch.zeros(1, 1, *scene.image.shape[:2])
mask[:, :, top - 3 : bottom + 3, max(0, left - 3) : right + 2] = 1
mask = (resize(mask, size, size) >= 0.5).float()  # the model may be larger than the scene
original = resize(to_pixels(scene.image[None]), size, size)
print(f"the picture:  {scene.caption}")
print(f"the prompt:   {prompt}")

# %%
seeds = [0, 1]
x_0 = encode_rows(sd, original, len(seeds))  # the same picture once for each seed
B, C, H, W = x_0.shape
assert x_0.shape == (B, C, size // factor, size // factor)
assert mask.shape == original[:, :1].shape == (1, 1, size, size)


def changed(pixels, where):
    """Mean absolute change of the pixels where a mask is 1, of 255."""
    off = (pixels.cpu() - original).abs().mean(dim=1, keepdim=True) * where
    return 127.5 * float(off.sum() / where.sum() / len(pixels))


through_vae = sd.decode(x_0[:1])
off = changed(through_vae, 1 - mask)
print(f"encoded and decoded: changed by {off:.1f} of 255 outside the mask")

# %% [markdown]
# Remember that last number. Even without a single denoising step, a picture that went through the VAE is no longer the same picture.

# %% [markdown]
# ## Start in the middle
#
# The closed-form forward process takes a clean latent to any timestep at once (lesson 01):
#
# $$x_t = \sqrt{\bar\alpha_t} \; x_0 + \sqrt{1 - \bar\alpha_t} \; \epsilon$$
#
# Noise hides the small things first. At a middle timestep the pig's face is gone, while the yellow and the places of the two things can
# still be made out. If the loop starts there, the model has to invent what the noise has hidden, and it invents what the prompt says. It
# follows what it can still see. This method is SDEdit (Meng et al. 2022).
#
# Users say how much noise they want by a *strength* between zero and one. We let it name a timestep, $\mathrm{strength} \cdot (T - 1)$. The
# loop visits only some of the timesteps, so the edit starts at the nearest of those.

# %% [markdown]
# ## Your turn: noised_start
#
# Write the start. The `timesteps` that the loop visits are a tensor of whole numbers, falling, and T is the length of `alpha_bar`. Find the
# index `i` of the timestep nearest to the one that is wanted (`abs` and `argmin`), and noise `x_0` to exactly that timestep with `eps`.
# Return both, `i` first. When it is right, a picture appears: a disc of light, noised by your function to five strengths.


# %%
def noised_start(alpha_bar, timesteps, strength, x_0, eps):
    """Index of the visited timestep nearest to strength (T - 1), and x_0 noised to it."""
    # YOUR CODE, about 4 lines


noised_start = lesson.check(noised_start)

# %%
steps = 5 if lesson.quick else 20
timesteps = sd.schedule.timesteps(steps).to(lesson.device)
alpha_bar = sd.schedule.alpha_bar.float().to(lesson.device)
eps = noise_source(seeds, (C, H, W), lesson.device)()  # what text to image starts from
i, x_t = noised_start(alpha_bar, timesteps, 0.6, x_0, eps)
assert x_t.shape == x_0.shape
print(f"strength 0.6 starts at t = {int(timesteps[i])}: {steps - i} of {steps} steps are left")
sampling = Sampling(steps=steps)
*_, mine = sd.denoise(prompt, seeds=seeds, steps=steps, start=i, x=x_t)
*_, own = image_to_image(sd, prompt, original, strength=0.6, seeds=seeds, sampling=sampling)
off = (mine.x_t - own.x_t).abs().max()
assert off < 1e-3
print(f"the edit ends within {off:.0e} of the library's")

# %% [markdown]
# ## The ladder of strengths
#
# The same two seeds from a low strength to the highest one. The table says how much of the picture is in the start, and how far the pixels
# end from the original, in the mask and outside it.

# %%
strengths = (0.2, 0.4, 0.6, 0.8, 1.0)
ladder = {}
print("strength   picture in x_t   changed: mask   outside")
for strength in strengths:
    i, x_t = noised_start(alpha_bar, timesteps, strength, x_0, eps)
    *_, last = sd.denoise(prompt, seeds=seeds, steps=steps, start=i, x=x_t)
    ladder[strength] = sd.decode(last.x_t)
    share = float(alpha_bar[timesteps[i]].sqrt())
    moved = [changed(ladder[strength], where) for where in (mask, 1 - mask)]
    print(f"{strength:8} {share:16.0%} {moved[0]:15.1f} {moved[1]:9.1f}")

# %%
firsts = to_images(original) * B
rows = [[first, *row] for first, *row in zip(firsts, *map(to_images, ladder.values()))]
fig = picture_grid(rows, ["original", *map(str, strengths)], [f"seed {seed}" for seed in seeds])
lesson.show(fig, "ladder", "From the original to a new picture, by strength and for two seeds.")

# %% [markdown]
# At the lowest strength the pig's pink and its outline are still there. Higher up a lion stands in its place. The best strength hides what
# should change and leaves visible what should stay. It depends on the size of the thing, since large shapes outlast small ones. What the
# prompt names as well, the yellow ground and the order of the two things, stays at every strength.
#
# Now look at the cactus, which nobody wanted to change. Its arms change along with the pig. Noise hides everything alike.

# %% [markdown]
# ## Strength one is text to image
#
# Because `eps` is the noise that the seed gives, the highest strength should be text to image from the same seed. Is it?

# %%
*_, from_noise = sd.denoise(prompt, seeds=seeds, steps=steps)
i, x_t = noised_start(alpha_bar, timesteps, 1.0, x_0, eps)
*_, from_picture = sd.denoise(prompt, seeds=seeds, steps=steps, start=i, x=x_t)
*_, own = image_to_image(sd, prompt, original, strength=1.0, seeds=seeds, sampling=sampling)
kept = float(alpha_bar[timesteps[0]].sqrt())
print(f"of the picture in the first x_t: {kept:.1%}")
print(f"text to image is {distance(from_picture.x_t, from_noise.x_t):.3f} from your start")
print(f"and {distance(own.x_t, from_noise.x_t):.3f} from the library's strength 1")
assert torch.equal(own.x_t, from_noise.x_t)

# %% [markdown]
# If the first timestep holds nothing of the picture (zero terminal SNR), both are text to image. In a model whose first timestep keeps a
# trace of the picture, your start has that trace too. The library then starts from the noise alone, so that strength one means the same for
# every model.

# %% [markdown]
# ## What becomes of the mask
#
# To keep the cactus we have to tell the loop where it may change things. The loop works on latents, and a *cell* of the latent stands for a
# square of pixels. The mask's edge runs through the middle of some of these squares. If such a cell were kept, a rim of the pig would
# survive. A cell therefore belongs to the hole if *any* of its pixels does, which is the maximum over each square.

# %%
cells = to_cells(mask, factor).to(lesson.device)
grown = cover_cells(mask, factor)
nearest = F.interpolate(mask, (H, W), mode="nearest")  # the first pixel of each square
lost = mask * (1 - F.interpolate(nearest, scale_factor=factor))
assert cells.shape == (1, 1, H, W) and grown.shape == mask.shape
print(f"{int(mask.sum())} pixels are masked; they touch {int(cells.sum())} of {H * W} cells")
print(f"these cells stand for {int(grown.sum())} pixels")
print(f"by the first pixel of each square {int(lost.sum())} masked pixels would be left out")

# %%
views = [to_images(original * (1 - m))[0] for m in (mask, grown)]
row = [to_images(original)[0], views[0], cells[0, 0].cpu(), views[1]]
fig = picture_grid([row], ["original", "masked", "cells", "pixels of\nthese cells"])
lesson.show(fig, "cells", "The picture, the hole, the hole's cells, and the larger hole they make.")

# %% [markdown]
# The hole grew by less than a cell on each side. We come back to the pixels that it gained.

# %% [markdown]
# ## Put back what is known, as noisy as the rest
#
# This model takes no mask. But the loop hands us `x_t` after every step, and takes back whatever we make of it. After the step to the
# timestep `then` we keep `x_t` inside the hole, and put back the original outside. The U-Net will be told `then`, so what we put back must
# have the noise of `then` on it. We always use the noise that the run started from. The known part thus follows the one trajectory that
# leads to the original (DDIM keeps its noise, lesson 03):
#
# $$x_{then} \leftarrow m \; x_{then} + (1 - m) \left( \sqrt{\bar\alpha_{then}} \; x_0 + \sqrt{1 - \bar\alpha_{then}} \; \epsilon \right)$$
#
# Here $m$ is one in the hole's cells and zero elsewhere. Each prediction is made from all of `x_t`, so what grows in the hole has its
# surroundings in view.

# %% [markdown]
# ## Your turn: blend
#
# Write the line above: the known part, noised to `then`, and the two parts together. `cells` has one channel, and multiplies all of them.
#
# When your blend is right, a picture appears. The data are again the eight points on a ring of lesson 03, and what is known is the first of
# a point's two numbers. Your function fills in the second one, starting from noise. Some points end where no data are. When do they choose
# their second number, and how much can they see of the first one by then?


# %%
def blend(alpha_bar, x_t, x_0, eps, cells, then):
    """x_t where cells [1, 1, H, W] is 1, elsewhere x_0 noised to then; the rest [B, C, H, W]."""
    # YOUR CODE, about 3 lines


blend = lesson.check(blend)

# %%
after = [*timesteps[1:].tolist(), 0]  # where each step leads


def fill(put_back):
    """x0_hat and x_t of every step of the loop; put_back(x_t, then) is what makes x_t."""
    loop, x_t, path = sd.denoise(prompt, seeds=seeds, steps=steps), None, []
    for then in after:
        step = loop.send(x_t)  # hands over what the next step begins with; None at first
        x_t = put_back(step.x_t, then)
        path.append((step.x0_hat, x_t))
    return zip(*path)


predictions, latents = fill(lambda x_t, then: blend(alpha_bar, x_t, x_0, eps, cells, then))
filled = latents[-1]
*_, own = inpaint(sd, prompt, original, mask, seeds=seeds, sampling=sampling)
off = (cells * (filled - own.x_t)).abs().max()
assert filled.shape == x_0.shape and off < 1e-3
print(f"the hole ends within {off:.0e} of the library's")

# %%
at = torch.linspace(0, steps - 1, 5).round().int().tolist()
shown = torch.stack([*(predictions[k] for k in at), filled])
rows = [to_images(sd.decode(shown[:, b])) for b in range(B)]
titles = [*(f"step {k + 1}" for k in at), "end"]
fig = picture_grid(rows, titles, [f"seed {seed}" for seed in seeds])
lesson.show(fig, "filled", "Predictions along the way: the old cactus appears as its noise falls.")

# %%
outside = (1 - cells).expand_as(x_0).bool()
errors = [distance(x0_hat[outside], x_0[outside]) for x0_hat in predictions]
lines, ticks = {"outside": (range(1, steps + 1), errors)}, range(1, steps + 1, 2)
fig = curves(lines, "step", "off the original", xticks=ticks, ylim=(0, None))
lesson.show(fig, "seen", "How far the model's prediction outside the hole is from the original.")
print(f"the first prediction is off by {errors[0]:.2f} outside the hole")
print(f"the last prediction is off by {errors[-1]:.2f}")

# %% [markdown]
# In the first steps the known part is almost all noise, and the model cannot see the cactus. It predicts a cactus of its own, and a lion
# that goes with it. It sees the real surroundings only as the noise falls. This is the method's weakness: the large shapes in the hole are
# settled before the surroundings can be seen. If the lion does not fit its place, try another seed, a larger hole, or a strength below one,
# so that the hole begins with something of the right size.

# %% [markdown]
# ## What the latent cannot keep
#
# The cells outside the hole now hold the original's latent. Still, the pixels there are not the original's, for two reasons. The VAE loses
# something in any case. In addition, the decoder's convolutions look at neighbouring cells, and its attention and normalisation layers at
# the whole latent, so a new hole changes pixels far from it. To measure the second effect, we exchange the hole's cells and nothing else.

# %%
exchanged = sd.decode(cells * filled + (1 - cells) * x_0).cpu()
reach = (exchanged - through_vae.cpu()).abs().amax(dim=(0, 1)) * (1 - grown[0, 0])
print(f"outside the hole, by the VAE:  changed by {changed(through_vae, 1 - grown):.1f} of 255")
print(f"with another hole:             changed by {changed(exchanged, 1 - grown):.1f} of 255")
count, of = int((reach > 1 / 127.5).sum()), int((1 - grown).sum())
print(f"the exchange changes {count} of {of} pixels outside by more than 1 of 255")

# %% [markdown]
# No mask on latents can mend that. We have to lay the new picture over the original one and let only the hole show. To hide the seam, the
# new part fades out over a few pixels, the *feather*.

# %% [markdown]
# ## Your turn: paste
#
# The opacity $a$ is one on the mask and falls evenly to zero at `width + 1` pixels from it. Make it in two lines. Grow the mask by `d`
# pixels with `F.max_pool2d(mask, 2 * d + 1, stride=1, padding=d)`, for each `d` from zero to `width`, and take the mean of these masks.
# Last, mix the two pictures:
#
# $$\mathrm{original} + a \, (\mathrm{made} - \mathrm{original})$$
#
# When it is right, your function pastes a white square onto a black one and counts the pixels.


# %%
def paste(original, made, mask, width):
    """made [B, 3, H, W] over original [1, 3, H, W]; mask [1, 1, H, W], feather of width pixels."""
    # YOUR CODE, about 3 lines


paste = lesson.check(paste)

# %%
decoded = sd.decode(filled).cpu()
result = paste(original, decoded, mask, factor)
assert result.shape == decoded.shape == (B, 3, size, size)
beyond = F.max_pool2d(mask, 2 * factor + 1, stride=1, padding=factor) == 0
same = (result == original).all(dim=1, keepdim=True)
assert bool(same[beyond.expand_as(same)].all())
for label, pixels in (("decoded", decoded), ("pasted", result)):
    print(f"{label}: changed by {changed(pixels, beyond.float()):.1f} of 255 beyond the feather")
print(f"{int(beyond.sum())} pixels of {size * size} are the original's, bit for bit")


# %%
def difference_map(pixels):
    return (pixels[0] - original[0]).abs().mean(dim=0).clamp(max=0.2)


pictures = [to_images(original)[0], *(to_images(p)[0] for p in (decoded, result))]
rows = [pictures, [None, difference_map(decoded), difference_map(result)]]
fig = picture_grid(rows, ["original", "decoded", "pasted"], ["picture", "changed"])
lesson.show(fig, "pasted", "Decoded, the whole picture has changed; pasted, only the hole.")

# %% [markdown]
# Beyond the feather the pixels are exactly the original's, since $a$ is zero there and `original + 0 * (...)` is `original`. The feather is
# one cell wide, so that it covers the pixels that the hole gained when it grew to whole cells.

# %% [markdown]
# ## A look ahead: back to the noise
#
# Random noise hides the cactus together with the pig. Is there a start that hides nothing? DDIM's step is not random, so it can be taken in
# the other direction, from `x_0` up to noise. This is *inversion*. DDIM from that noise should lead back to the picture. A step up needs
# the prediction at its upper end, which is not known yet, and takes the one at its lower end instead. The shorter the steps, the smaller
# the error.

# %%
from minidiff.editing.inversion import invert

counts = (5, 10) if lesson.quick else (10, 20, 50)
returned = {}
for scale in (1.0, sd.config.guidance_scale):
    for n in counts:
        *_, top_step = invert(sd, [scene.caption], x_0[:1], steps=n, guidance_scale=scale)
        *_, last = sd.denoise(scene.caption, x=top_step.x_t, steps=n, guidance_scale=scale)
        returned[scale, n] = last.x_t
        spread, off = top_step.x_t.std(), distance(last.x_t, x_0[:1])
        print(f"scale {scale:g}, {n} steps: deviation {spread:.2f}, back within {off:.2f}")

# %%
shown = [(1.0, counts[0]), (1.0, counts[-1]), (sd.config.guidance_scale, counts[-1])]
row = [to_images(sd.decode(returned[key]))[0] for key in shown]
titles = ["VAE alone", *(f"{n} steps,\nscale {s:g}" for s, n in shown)]
fig = picture_grid([[to_images(through_vae)[0], *row]], titles)
lesson.show(fig, "inverted", "Up to noise and back: with few steps, many steps, and guidance.")

# %% [markdown]
# Guidance amplifies the error of each step. Without it, at scale one, many steps bring the picture back from a latent that looks like
# noise. It is not quite the noise of training, whose deviation is one. `minidiff edit --image` starts from such a latent and keeps the
# layout by steering the attention layers.

# %% [markdown]
# ## Break it: put back the wrong amount of noise
#
# The known part must be as noisy as the timestep says. There are three ways to get this wrong:
#
# - *One step late*: it has the noise of the timestep that the step left, not of the one it reached.
# - *Clean*: it has no noise, since the original is known.
# - *Not at all*: nothing is put back. We denoise freely and paste.
#
# Halfway we let the model tell us how large the noise outside the hole is, by its own prediction. In training it is one. The *rim* is one
# cell wide, just outside the hole, where the new picture meets the original.

# %%
before = dict(zip(after, timesteps.tolist()))  # the timestep that each step left
ways = {
    "right": lambda x_t, then: blend(alpha_bar, x_t, x_0, eps, cells, then),
    "one step late": lambda x_t, then: blend(alpha_bar, x_t, x_0, eps, cells, before[then]),
    "clean": lambda x_t, then: cells * x_t + (1 - cells) * x_0,
    "not at all": lambda x_t, then: x_t,
}
rim = F.max_pool2d(grown, 2 * factor + 1, stride=1, padding=factor) - grown
print(f"the rim has {int(rim.sum())} pixels")

# %%
half, made = steps // 2, {}
for label, way in ways.items():
    predicted, latents = fill(way)
    a, x_t = alpha_bar[timesteps[half]], latents[half - 1]  # what the step `half` began with
    noise = (x_t - a.sqrt() * predicted[half]) / (1 - a).sqrt()
    made[label] = sd.decode(latents[-1]).cpu()
    spread, off = noise[outside].std(), changed(made[label], rim)
    print(f"{label:14} noise {spread:.2f}, off the original at the rim by {off:.1f}")

# %%
rows = []
for label, pixels in made.items():
    pair = zip(to_images(pixels), to_images(paste(original, pixels, mask, factor)))
    rows.append([picture for decoded_and_pasted in pair for picture in decoded_and_pasted])
fig = picture_grid(rows, ["decoded", "pasted"] * B, list(made))
lesson.show(fig, "wrong", "Four ways of putting back, decoded and pasted, for two seeds.")

# %% [markdown]
# One step late leaves noise in the last latent, and the decoded background shows it. Pasting hides most of this, so the mistake is easy to
# overlook. If nothing is put back, the lion belongs to another picture with another cactus. Compare its rim with the right one's: where the
# two pictures disagree, a seam remains, or the new thing is cut off at the hole's edge.
#
# The clean latent is the surprise. The model finds too little noise outside the hole, which never happened in training, and its prediction
# need not make sense there. Yet the pictures can look fine, because the surroundings are in view from the second step on. Some programs do
# it this way. A mistake that one picture does not show is found by measuring many; `minidiff/editing/README.md` has such a table.

# %% [markdown]
# ## On real Stable Diffusion
#
# `python lessons/13_picture_to_picture.py --model v1-5-pruned-emaonly.safetensors` runs the lesson on a checkpoint of yours. Strength is
# where programs disagree. Many of them skip a share of the *steps*, so that the noise depends on the sampler's spacing:

# %%
from minidiff.config import SD1
from minidiff.schedule import NoiseSchedule

sd1, n, strength, last_t = NoiseSchedule(SD1.schedule), 50, 0.75, SD1.schedule.timesteps - 1
for spacing in ("leading", "linspace", "trailing"):
    visited = sd1.timesteps(n, spacing)
    by_steps = int(visited[n - int(n * strength)])
    by_noise = int(visited[(visited - strength * last_t).abs().argmin()])
    trace = float(sd1.alpha_bar[visited[0]].sqrt())
    print(f"{spacing:8}: {by_steps} by steps, {by_noise} by noise; first x_t keeps {trace:.1%}")
h = 512 // SD1.vae.factor
c = SD1.vae.latent_channels
print(f"a model made for inpainting reads {c} + 1 + {c} channels of {h} x {h} cells")

# %% [markdown]
# *Inpainting models* of Stable Diffusion were trained with holes. Their U-Net reads the noisy latent, the mask in cells, and the latent of
# the picture with its hole in grey. They see the surroundings without noise from the first step, so nothing has to be put back. The result
# still has to be pasted, because the VAE is the same.

# %% [markdown]
# ## On a GPU
#
# ```bash
# minidiff generate "a lion in a meadow" --image my-dog.jpg --mask mask.png --model v1-5-pruned-emaonly.safetensors --device cuda
# ```
#
# Less than a minute. Paint the mask white over your dog. Then leave the mask away and try `--strength` from 0.4 to 0.8: from which value on
# is it a lion, and what else has changed by then?

# %% [markdown]
# ## What you now know
#
# - Image to image is the denoising loop begun in the middle, at the latent of a picture noised to that timestep.
# - Strength names the noise. Fine things are lost first and large ones last; strength one is text to image from the same seed.
# - To keep a part, put it back after every step with the noise of the timestep reached, always the same noise.
# - A mask becomes cells by the maximum. The decoder reaches past them, so the original has to be pasted back.
# - DDIM can be run backward, to a noise that leads back to the picture if steps are short and guidance is off.

# %% [markdown]
# ## Your guess
#
# The third answer is right. The ladder shows it, and the column "outside" of its table measures it: the cactus is redrawn along with the
# pig. The first answer forgets that a start decides the picture only together with the prompt, and most of the loop is still to come. The
# second one takes a mask.

# %% [markdown]
# ## Quiz
#
# 1. You raise the number of steps and keep the strength. Does the edit begin with more noise, less, or as much?
# 2. A mask covers a single pixel. How much of the picture may the loop change, and how much of it differs after pasting?
# 3. The known part is put back with fresh noise at each step, of the right size. Is that wrong?
#
# <details><summary>Answers</summary>
#
# 1. As much, up to the nearest timestep: strength names a noise level, and more steps are spent on the way down from it.
# 2. One cell of the latent. After pasting, the pixel and the feather around it.
# 3. No: its size fits the timestep, which is what the model needs. The known part then follows no single trajectory.
#
# </details>

# %% [markdown]
# ## Now you
#
# Let the hole begin with the pig in it. Take `i` and `x_t` from `noised_start` at strength 0.6, hand them to `sd.denoise` in `fill` as
# `start` and `x`, and leave out the first `i` entries of `after`. Before you run it, predict how the lion's size and place will change, and
# whether the rim will be closer to the original. Then do the same at strength 0.2. Which strength gives a lion that fits?

# %% [markdown]
# ## Read next
#
# - `minidiff/editing/start.py`: `find_start` and `add_noise` are your `noised_start`. `keep_known` in `inpaint.py` is your `blend` as a loop
#   around the loop, and `masks.py` has your `paste`. `canvas.py` pads a picture for outpainting, and crops to the hole.
# - Meng et al. 2022, "SDEdit", section 3. Lugmayr et al. 2022, "RePaint", eq. 8, whose remedy for early steps is to repeat them. Avrahami et
#   al. 2022, "Blended latent diffusion".
# - Lesson 14: teach the model a subject of yours, to put in the hole.
