"""A public CLIP as encoder: open_clip's own picture and text features, from a file of weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.evaluation.alignment import Encoder
from minidiff.evaluation.open_clip import OpenClip
from minidiff.pictures import fit

SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    (folder / "small-clip.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("small-clip")
    torch.save(model.state_dict(), folder / "small.pt")
    return folder / "small.pt", model.eval(), preprocess, open_clip.get_tokenizer("small-clip")


def test_features_are_open_clips_own(small):
    path, model, preprocess, tokenizer = small
    encoder = OpenClip("small-clip", path)
    assert isinstance(encoder, Encoder)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    texts = ["a cat on a red background", "a dog"]
    with torch.no_grad():
        expected = model.encode_image(preprocess(picture)[None], normalize=True)
        words = model.encode_text(tokenizer(texts), normalize=True)
    # float32 parity of a whole tower: rtol 1e-4, atol 1e-5; no scaling, the picture has the network's size
    torch.testing.assert_close(encoder.encode_pictures(pixels), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.encode_texts(texts), words, rtol=1e-4, atol=1e-5)


def test_other_sizes_are_cut_and_scaled_as_open_clip_does(small):
    path, model, preprocess, _ = small
    encoder, rng = OpenClip("small-clip", path), np.random.default_rng(1)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((120, 90), Image.Resampling.BICUBIC)
    with torch.no_grad():
        expected = model.encode_image(preprocess(smooth)[None], normalize=True)
    cosine = float((encoder.encode_pictures(fit(smooth, encoder.image_size)[None]) * expected).sum())
    assert cosine > 0.999  # open_clip scales first, rounds to 8 bits, and cuts on whole pixels
    with pytest.raises(ValueError, match="pictures of 120 x 90 pixels given, the CLIP reads 32 x 32"):
        encoder.encode_pictures(torch.zeros(1, 3, 90, 120))


def test_unknown_names_missing_files_and_other_weights_are_named(small, tmp_path):
    path, *_ = small
    with pytest.raises(ValueError, match="CLIP 'ViT-Z' unknown; open_clip has"):
        OpenClip("ViT-Z", path)
    with pytest.raises(FileNotFoundError, match="no such file; give the weights of a CLIP"):
        OpenClip("small-clip", tmp_path / "none.pt")
    torch.save({"visual.proj": torch.zeros(3, 3)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not the weights of small-clip"):
        OpenClip("small-clip", tmp_path / "other.pt")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a file of weights",
        b"PK\x03\x04" + bytes(100),
        b"\x80\x02}q\x00.",
        b'\x10\x00\x00\x00\x00\x00\x00\x00{"a": [1, 2, 3]}',
        bytes(1000),
    ],
    ids=["empty", "text", "cut zip", "empty dict", "wrong header", "zeros"],
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz", ".bin"])
def test_any_bad_file_of_weights_ends_in_one_line(suffix, content, small, tmp_path):
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"bad{suffix}: not the weights of small-clip, or damaged") as error:
        OpenClip("small-clip", path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
