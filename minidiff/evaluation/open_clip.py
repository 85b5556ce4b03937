"""A public CLIP as the encoder for alignment and KID: open_clip's network with weights from the user's file.

Nothing is downloaded. Names are open_clip's, such as ViT-B-32 or ViT-L-14; OpenAI's weights go with their -quickgelu names.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.evaluation.alignment import check_size


class OpenClip:
    """An Encoder (alignment.py). Features have length 1; float32.

    Raises ValueError for a name that open_clip does not know and for weights of another network, FileNotFoundError for no file.
    """

    def __init__(self, name: str, weights: Path, device: torch.device = torch.device("cpu")):
        import open_clip  # seconds

        if name not in open_clip.list_models():
            raise ValueError(f"CLIP {name!r} unknown; open_clip has {', '.join(open_clip.list_models()[:8])}, ...")
        if not weights.is_file():
            raise FileNotFoundError(f"{weights}: no such file; give the weights of a CLIP as open_clip reads them")
        self.model: Any = open_clip.create_model(name, device=device)  # its methods are not in nn.Module's type
        try:
            open_clip.load_checkpoint(self.model, str(weights))
        except Exception as error:  # what its readers raise for files of other kinds and for damaged ones is without end
            first = (str(error).splitlines() or [""])[0][:200]
            raise ValueError(
                f"{weights}: not the weights of {name}, or damaged ({type(error).__name__}: {first}); give the name they belong to"
            ) from error
        self.model.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(name)
        self.device = device
        visual = self.model.visual
        self.image_size: int = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]
        self.mean, self.std = (torch.tensor(getattr(visual, f"image_{part}"), device=device)[:, None, None] for part in ("mean", "std"))

    @torch.no_grad()
    def encode_pictures(self, pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Encode pixels in [-1, 1] of the network's size. Raises ValueError for another size."""
        check_size(pixels, self.image_size, "CLIP")
        return self.model.encode_image(((pixels.to(self.device).float() + 1) / 2 - self.mean) / self.std, normalize=True).float()

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        """Encode texts."""
        return self.model.encode_text(self.tokenizer(list(texts)).to(self.device), normalize=True).float()
