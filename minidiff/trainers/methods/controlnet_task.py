"""The training of a ControlNet: the ordinary loss of the locked U-Net, which is told the ControlNet's residuals.

    picture -> latent -> q_sample -> x_t -.----------------> U-Net (locked, or its way up trained too) -> loss
    caption, or "" ---> text encoder -----+--> ControlNet --------^ residuals
    hint ------------------------------------^

Zhang et al. 2023, section 3.3. The gradient passes the U-Net's way up, not its way down. While the zero convolutions are 0, nothing behind
them gets a gradient; after some thousand steps the pictures follow the hint from one sheet to the next ("sudden convergence"), which the
loss does not show. So each sheet is drawn on fixed hints, and says how well the edges of its pictures agree with them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.conditioning import Conditioning
from minidiff.controlnet import Control, ControlNet, controlled
from minidiff.files import digest, fingerprint
from minidiff.hints import canny, edge_f1
from minidiff.pictures import grid
from minidiff.pipeline import StableDiffusion, to_images
from minidiff.trainers.data.hinted import HintedSource
from minidiff.trainers.engine.diffusion_loss import diffusion_loss, sample_noise
from minidiff.trainers.engine.ema import EMA
from minidiff.trainers.engine.loop import rng_for
from minidiff.trainers.engine.optimizer import adamw
from minidiff.trainers.engine.settings import Settings
from minidiff.trainers.methods.controlnet import ControlNetOptions
from minidiff.trainers.methods.finetune_task import Group, Sheet

SHEET_ROWS = 4
LINES = ("outline", "canny", "scribble")  # kinds of hints that are edges themselves


class ControlNetTask:
    """A Task of loop.py, and a phase for the command line: see FinetuneTask, whose method names it shares.

    Args:
        sd: the model
        net: the ControlNet, float32
        source: pictures, captions and hints
        options: settings, data, and what is trained
    """

    def __init__(self, sd: StableDiffusion, net: ControlNet, source: HintedSource, options: ControlNetOptions):
        self.sd, self.net, self.source, self.options, self.settings = sd, net, source, options, options.settings
        self.name = "controlnet"
        self.averages: Mapping[str, EMA] = {}  # see FinetuneTask
        silent = list(net.zero_convs[:-1].parameters()) if options.middle_only else []
        self.groups = [Group(tuple(p for p in net.parameters() if all(p is not other for other in silent)))]
        self.modules: dict[str, nn.Module] = {"controlnet": net}
        if options.decoder:
            self.groups.append(Group(decoder_weights(sd), options.decoder_scale))
            self.modules["unet"] = sd.unet
        self.networks, self.resident = (sd.unet, net), tuple(sd.parts.values())  # the sheets need the VAE
        self.about: dict[str, object] = {"phase": self.name, "data": digest(source.identity())[:16], "model": fingerprint(sd.unet.conv_in)}
        self.about |= {"hint": options.hint, "middle only": options.middle_only} | asdict(options.data)

    # --- before and after ---------------------------------------------------------------------------------------------

    def prepare(self) -> Iterator[int]:
        """Make the latents; yield how many are done."""
        return self.source.prepare()

    def __enter__(self) -> "ControlNetTask":
        for _ in self.prepare():
            pass
        for module in (self.sd.unet, *self.sd.text.encoders.values(), self.net):
            module.requires_grad_(False)
        for group in self.groups:
            for p in group.params:
                p.requires_grad_(True)
        return self

    def __exit__(self, *_) -> None:
        for group in self.groups:
            for p in group.params:
                p.requires_grad_(False)
                p.grad = None

    # --- what the loop asks for ---------------------------------------------------------------------------------------

    def optimizers(self, settings: Settings) -> tuple[torch.optim.Optimizer, ...]:
        """Return AdamW over the groups."""
        return (adamw([{"params": list(group.params), "scale": group.scale} for group in self.groups], settings),)

    def loss(self, step: int, sample_ids: range) -> Float[Tensor, ""]:
        """Return the mean over the samples of the diffusion loss."""
        sd, data = self.sd, self.options.data
        rngs = [rng_for(self.settings.seed, step, sample) for sample in sample_ids]
        batch = self.source.batch([int(rng.integers(len(self.source))) for rng in rngs], rngs)
        captions = ["" if rng.random() < data.caption_dropout else caption for rng, caption in zip(rngs, batch.captions)]
        noise = sample_noise(rngs, batch.latents.shape[1:], sd.config.schedule.timesteps, sd.device, data.offset_noise)
        height, width = batch.hints.shape[-2:]
        with torch.no_grad():
            told = sd.text(captions, (width, height)).to(sd.device, sd.dtype)

        def steered(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
            return sd.unet(x_t.to(sd.dtype), t, replace(told, residuals=self._residuals(x_t, t, told, batch.hints)))

        return diffusion_loss(steered, sd.schedule, batch.latents, told.context, noise, min_snr=data.min_snr).mean()

    def _residuals(self, x_t: Tensor, t: Tensor, told: Conditioning, hints: Tensor) -> tuple[Tensor, ...]:
        """Run the ControlNet in its float32, or what autocast makes of it."""
        own = told.to(self.sd.device, torch.float32)
        return tuple(r.to(self.sd.dtype) for r in self.net(x_t.float(), t, own, self.net.hint_block(hints)))

    # --- to look at ---------------------------------------------------------------------------------------------------

    @property
    def picture_count(self) -> int:
        """Return how many pictures are learned from."""
        return len(self.source)

    @property
    def prompts(self) -> list[str]:
        """Return the captions of the sheet's hints."""
        return [caption for caption, _ in self.source.fixed(SHEET_ROWS)]

    def sheet(self, prompts: Sequence[str], *, count: int, steps: int) -> Sheet:
        """Draw one row per prompt: its fixed hint, then pictures that follow it. Of several hints, the next row's is compared as well.

        Args:
            prompts: one per row; rows beyond the fixed hints begin again with the first
            count: pictures in a row, on the seeds 0..count-1
            steps: of the sampler
        """
        fixed = [hint for _, hint in self.source.fixed(SHEET_ROWS)]
        hints = torch.stack([fixed[i % len(fixed)] for i in range(len(prompts))])
        columns = [to_images(2 * hints - 1), *(self._draw(prompts, hints, seed, steps) for seed in range(count))]
        edges = [edges_of(hint, self.options.hint if self.options.hints is None else None) for hint in hints]
        drawn = [[canny(np.asarray(picture)) for picture in column] for column in columns[1:]]
        numbers = {"edge F1": mean_f1(drawn, edges)}
        if len(fixed) > 1 and len(prompts) > 1:
            numbers["with another hint"] = mean_f1(drawn, [*edges[1:], edges[0]])
        pictures = [column[row] for row in range(len(prompts)) for column in columns]
        return Sheet(grid(pictures, columns=len(columns)), numbers)

    def _draw(self, prompts: Sequence[str], hints: Tensor, seed: int, steps: int) -> list:
        height, width = hints.shape[-2:]
        model = controlled(self.sd.predict, [Control(self.net, hints)])
        *_, last = self.sd.denoise(list(prompts), seeds=[seed] * len(prompts), steps=steps, size=(width, height), model=model)
        return to_images(self.sd.decode(last.x_t))


def decoder_weights(sd: StableDiffusion) -> tuple[nn.Parameter, ...]:
    """Return the parameters of the U-Net's way up. Raises ValueError if they are not float32."""
    params = tuple(p for part in (sd.unet.up, sd.unet.norm_out, sd.unet.conv_out) for p in part.parameters())
    if params[0].dtype != torch.float32:
        raise ValueError(f"the U-Net is {params[0].dtype}, in which small steps are rounded away; load it in float32 to train its decoder")
    return params


def edges_of(hint: Float[Tensor, "3 H W"], kind: str | None) -> np.ndarray:
    """Return the edges that a picture of this hint should have: the hint itself if its kind is of lines, else what canny finds in it."""
    pixels = (hint.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return pixels if kind in LINES else canny(pixels)


def mean_f1(columns: Sequence[Sequence[np.ndarray]], edges: Sequence[np.ndarray]) -> float:
    """Return the mean agreement of pictures' edges with those of their row's hint."""
    return float(np.mean([edge_f1(found, expected) for column in columns for found, expected in zip(column, edges)]))
