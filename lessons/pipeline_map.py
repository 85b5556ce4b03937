"""The picture at the head of each lesson: the whole pipeline, with the part lit that the lesson is about.

drawing("sampler")    an SVG; `python -m lessons map` writes one for each part into figures/
"""

from html import escape

# What is lit, and how the picture says it in words.
PARTS = {
    "all": "the whole of it",
    "words": "the tokenizer and the text encoder",
    "schedule": "the noise schedule",
    "training": "the training loss",
    "sampler": "the denoising loop",
    "attention": "the attention layers of the U-Net",
    "blocks": "the residual blocks of the U-Net",
    "unet": "the U-Net",
    "guidance": "guidance",
    "vae": "the VAE",
    "adapters": "small changes of the weights",
    "control": "steering by a picture",
    "weights": "the file of weights",
}

# x, y, width, height, the lines of the label. Boxes that stand later lie above.
BOXES = {
    "words": (110, 34, 116, 52, ("tokenizer,", "text encoder")),
    "unet": (262, 24, 196, 104, ("U-Net",)),
    "blocks": (272, 52, 84, 66, ("time,", "residual", "blocks")),
    "attention": (364, 52, 84, 66, ("attention",)),
    "guidance": (482, 24, 92, 44, ("guidance",)),
    "sampler": (482, 84, 92, 44, ("sampler",)),
    "vae": (612, 50, 92, 52, ("VAE", "decoder")),
    "adapters": (110, 168, 116, 48, ("LoRA and", "other changes")),
    "control": (16, 168, 84, 48, ("edges,", "depth, ...")),
    "training": (262, 168, 92, 48, ("loss,", "training")),
    "schedule": (364, 168, 94, 48, ("noise", "schedule")),
    "weights": (482, 168, 92, 48, ("weights", "file")),
    "encoder": (612, 168, 92, 48, ("VAE", "encoder")),
}
LIT_TOGETHER = {"vae": ("vae", "encoder"), "unet": ("unet", "blocks", "attention"), "all": tuple(BOXES)}

# Arrows as lists of points, from where to where the tensors go; words stand at their own places.
ARROWS = (
    ((72, 60), (106, 60)),  # prompt
    ((226, 60), (258, 60)),  # context
    ((112, 110), (258, 110)),  # noise
    ((168, 168), (168, 122), (258, 122)),  # changes of weights
    ((458, 46), (478, 46)),
    ((528, 68), (528, 80)),
    ((482, 116), (470, 116), (470, 146), (244, 146), (244, 100), (258, 100)),  # the loop: x_t goes back
    ((574, 106), (592, 106), (592, 76), (608, 76)),  # the last latent
    ((658, 50), (658, 30)),  # picture
    ((658, 232), (658, 218)),
    ((612, 192), (596, 192), (596, 158), (412, 158), (412, 166)),  # latents of pictures are noised
    ((364, 192), (357, 192)),
)
TEXTS = ((14, 64, "prompt"), (640, 22, "picture"), (640, 244, "picture"), (250, 142, "x_t, again and again"), (14, 114, "noise: a seed"))


def drawing(part: str) -> str:
    """Return the pipeline as an SVG with the part lit. Raises KeyError for a part that is not in PARTS."""
    lit = LIT_TOGETHER.get(part, (part,))
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 250" width="720" height="250" role="img" '
        f'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="13"><title>{escape(title(part))}</title>',
        '<rect width="720" height="250" rx="8" fill="#ffffff"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#5c6370"/></marker></defs>',
    ]
    for name, (x, y, width, height, label) in BOXES.items():
        fill, stroke, text = ("#ffd873", "#8a5a00", "#1c1e21") if name in lit else ("#f2f4f7", "#b9c0ca", "#4a505a")
        lines.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{stroke}" stroke-width="1.5"/>')
        top = y + 19 if name == "unet" else y + height / 2 + 4.5 - 8 * (len(label) - 1)
        for i, line in enumerate(label):
            lines.append(f'<text x="{x + width / 2:g}" y="{top + 16 * i:g}" text-anchor="middle" fill="{text}">{line}</text>')
    for points in ARROWS:
        path = " ".join(f"{x},{y}" for x, y in points)
        lines.append(f'<polyline points="{path}" fill="none" stroke="#5c6370" stroke-width="1.5" marker-end="url(#tip)"/>')
    lines += [f'<text x="{x}" y="{y}" fill="#4a505a">{text}</text>' for x, y, text in TEXTS]
    return "\n".join([*lines, "</svg>", ""])


def title(part: str) -> str:
    """Return what the picture shows, in words."""
    return f"The whole pipeline; this lesson is about {PARTS[part]}"
