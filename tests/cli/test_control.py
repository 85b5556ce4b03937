"""`minidiff hint`, and the flags of `minidiff generate` for ControlNets."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import weights_loader
from minidiff.cli.control import Frame, load_hints, parse_controls
from minidiff.cli.edit import EditFlags, prepare_edit, read_edit
from minidiff.controlnet import create_controlnet
from minidiff.hints import canny, to_hint
from minidiff.pictures import save_png
from tests.command import runner
from tests.small_models import small_config, small_model


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    return runner(monkeypatch, tmp_path, capsys)


@pytest.fixture
def files(tmp_path):
    """A model, a ControlNet that does something, a photograph and its edges."""
    sd = small_model()
    net = create_controlnet(sd.config, sd.unet, torch.Generator()).requires_grad_(False)
    for conv in (*net.zero_convs, net.hint_block.conv_out):
        conv.weight.copy_(0.2 * torch.randn(conv.weight.shape, generator=torch.Generator().manual_seed(1)))
    weights_loader.save(sd, tmp_path / "model.safetensors")
    weights_loader.write_controlnet(tmp_path / "net.safetensors", net, sd)
    noise = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize((32, 32), Image.Resampling.BICUBIC)
    save_png(photo, tmp_path / "photo.png")
    save_png(Image.fromarray(canny(np.asarray(photo))), tmp_path / "edges.png", hint="canny")
    return tmp_path


GENERATE = ("generate", "a cat", "--model", "model.safetensors", "--steps", "4", "--out", "cat.png")


def pixels(path):
    return np.asarray(Image.open(path))


# --- hint -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["canny", "scribble", "tile"])
def test_a_hint_is_written_beside_the_picture(kind, run, files):
    code, out, _ = run("hint", kind, "photo.png")
    assert (code, out.strip()) == (0, f"photo-{kind}.png")
    with Image.open(files / f"photo-{kind}.png") as image:
        assert image.info["hint"] == kind and image.size == (32, 32) and image.mode == "RGB"
    assert run("hint", kind, "photo.png")[1].strip() == f"photo-{kind}-2.png"  # nothing is overwritten


def test_canny_has_its_thresholds_and_size(run, files):
    run("hint", "canny", "photo.png", "--out", "a.png", "--low", "20", "--high", "40", "--size", "64")
    expected = canny(np.asarray(Image.open(files / "photo.png").resize((64, 64), Image.Resampling.LANCZOS)), 20, 40)
    assert np.array_equal(pixels(files / "a.png"), expected)


def test_a_hint_given_to_a_hint_maker_is_said(run, files):
    assert "edges.png: a hint already, it seems; give it to --control as it is" in run("hint", "canny", "edges.png")[2]
    assert "already" not in run("hint", "canny", "photo.png")[2]


def test_an_inpainting_hint_has_a_hole(run, files):
    mask = np.zeros((32, 32), np.uint8)
    mask[8:16] = 255
    save_png(Image.fromarray(mask), files / "mask.png")
    assert run("hint", "inpaint", "photo.png", "--mask", "mask.png", "--out", "hole.png")[0] == 0
    with Image.open(files / "hole.png") as image:
        assert torch.equal(to_hint(image)[0] == -1, torch.from_numpy(mask > 0))
    save_png(Image.fromarray(mask[:16]), files / "small.png")
    code, _, error = run("hint", "inpaint", "photo.png", "--mask", "small.png")
    assert (
        code == 2
        and error.strip() == "minidiff: small.png: a mask of 32 x 16 pixels for a picture of 32 x 32; give one of the picture's size"
    )


@pytest.mark.parametrize(
    "args, message",
    [
        (("canny", "none.png"), "none.png"),
        (("canny", "photo.png", "--low", "300"), "canny thresholds 300 and 200: give 0 <= low <= high"),
        (("tile", "photo.png", "--factor", "0"), "tile factor 0 is outside 1..32"),
        (("canny", "photo.png", "--size", "0"), "--size 0: at least 1 pixel"),
        (("canny", "photo.png", "--size", "1000000"), "1000000 x 1000000 pixels; at most 64 megapixels are made"),
        (("scribble", "photo.png", "--width", "1000000"), "scribble width 1000000 is outside 1..4"),
        (("canny", "photo.png", "--out", "a.jpg"), "a.jpg: pictures are written as PNG"),
    ],
)
def test_what_is_wrong_with_a_hint_is_one_line(args, message, run, files):
    code, _, error = run("hint", *args)
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1


# --- generate ---------------------------------------------------------------------------------------------------------


def test_a_controlnet_steers_and_is_in_the_settings(run, files):
    assert run(*GENERATE)[0] == 0
    plain = pixels(files / "cat.png")
    assert run(*GENERATE, "--control", "edges.png", "--controlnet", "net.safetensors")[0] == 0
    steered = pixels(files / "cat.png")
    with Image.open(files / "cat.png") as image:
        assert "Control: edges.png, ControlNet: net.safetensors" in image.info["parameters"]
    assert (steered != plain).mean() > 0.1
    run(*GENERATE, "--control", "edges.png", "--controlnet", "net.safetensors:0")
    assert np.array_equal(pixels(files / "cat.png"), plain)
    found = [steered]
    for rest in ((":0.5",), (":1:0:0.5",), ("", "--guess-mode")):
        assert run(*GENERATE, "--control", "edges.png", "--controlnet", f"net.safetensors{rest[0]}", *rest[1:])[0] == 0
        found.append(pixels(files / "cat.png"))
    assert len({picture.tobytes() for picture in found}) == 4


def test_two_halves_are_a_whole(run, files):
    run(*GENERATE, "--control", "edges.png", "--controlnet", "net.safetensors")
    whole = pixels(files / "cat.png").astype(int)
    twice = ("--control", "edges.png", "--controlnet", "net.safetensors:0.5") * 2
    run(*GENERATE, *twice)
    assert np.abs(pixels(files / "cat.png") - whole).max() <= 1  # of 255: the sum is rounded otherwise


def test_a_folder_has_a_hint_for_each_picture(run, files):
    (files / "hints").mkdir()
    for name, picture in (("a.png", "edges.png"), ("b.png", "photo.png")):
        save_png(Image.open(files / picture), files / "hints" / name)
    assert run(*GENERATE, "--batch", "2", "--control", "hints", "--controlnet", "net.safetensors")[0] == 0
    second = pixels(files / "cat-1.png").astype(int)
    run(*GENERATE, "--seed", "1", "--control", "photo.png", "--controlnet", "net.safetensors")
    assert np.abs(pixels(files / "cat.png") - second).max() <= 1
    code, _, error = run(*GENERATE, "--batch", "3", "--control", "hints", "--controlnet", "net.safetensors")
    assert code == 2 and "--control hints: 2 hints for 3 pictures; give one for each, or one for all" in error


def test_another_size_and_black_on_white_are_said(run, files):
    save_png(Image.fromarray(255 - pixels(files / "edges.png")).resize((64, 32), Image.Resampling.NEAREST), files / "black.png")
    error = run(*GENERATE, "--control", "black.png", "--controlnet", "net.safetensors")[2]
    assert "black.png: black lines on white, it seems; ControlNets for lines want white on black: invert it" in error
    assert "black.png: a hint of 64 x 32 pixels, resized to 32 x 32, which stretches it; a --size of the same shape would not" in error
    assert "edges.png:" not in run(*GENERATE, "--control", "edges.png", "--controlnet", "net.safetensors")[2]


@pytest.mark.parametrize(
    "args, message",
    [
        (("--controlnet", "net.safetensors"), "0 --control for 1 --controlnet; give each ControlNet its hint"),
        (("--control", "edges.png"), "1 --control for 0 --controlnet"),
        (("--control", "none.png", "--controlnet", "net.safetensors"), "--control none.png: no such file; make one by `minidiff hint`"),
        (("--control", "edges.png", "--controlnet", "none.safetensors:0.5"), "none.safetensors: no such file"),
        (("--control", "net.safetensors", "--controlnet", "net.safetensors"), "net.safetensors: not a picture that can be read"),
        (
            ("--control", "edges.png", "--controlnet", "net.safetensors:1:0.5:0.5"),
            "--controlnet net.safetensors: control from 0.5 to 0.5: an empty",
        ),
        (("--control", "edges.png", "--controlnet", "net.safetensors:1:0.3:0.4"), "contains none of the 4 steps"),
        (("--control", "edges.png", "--controlnet", "net.safetensors:nan"), "control scale nan is not a finite number"),
        (("--control", "edges.png", "--controlnet", "model.safetensors"), "given as a ControlNet, but it is a whole model"),
        (("--control", "edges.png", "--controlnet", "net.safetensors", "--sampler", "euler_b"), "sampler 'euler_b' unknown"),
        (("--guess-mode",), "--guess-mode without a ControlNet"),
    ],
)
def test_what_is_wrong_is_one_line(args, message, run, files):
    code, _, error = run(*GENERATE, *args)
    assert code == 2 and message in error and not (files / "cat.png").exists()
    assert len(error.strip().splitlines()) == 1


@pytest.fixture
def mask(files):
    values = np.zeros((32, 32), np.uint8)
    values[8:24, 4:16] = 255
    save_png(Image.fromarray(values), files / "mask.png")
    return values > 0


CONTROL = ("--control", "edges.png", "--controlnet", "net.safetensors")


def test_a_controlnet_steers_image_to_image(run, files):
    edit = ("--image", "photo.png", "--strength", "0.7")
    found = []
    for args in ((), CONTROL, (*CONTROL[:3], "net.safetensors:0"), (*CONTROL[:3], "net.safetensors:1:0:0.5")):
        code, _, error = run(*GENERATE, *edit, *args)
        assert code == 0, error
        found.append(pixels(files / "cat.png"))
    assert (found[1] != found[0]).mean() > 0.1 and np.array_equal(found[2], found[0]) and not np.array_equal(found[3], found[1])
    code, _, error = run(*GENERATE, "--image", "photo.png", "--strength", "0.5", *CONTROL[:3], "net.safetensors:1:0.1:0.3")
    assert code == 2 and "contains none of the 2 steps" in error  # of those that are left


def test_a_controlnet_steers_the_hole_alone(run, files, mask):
    assert run("hint", "inpaint", "photo.png", "--mask", "mask.png", "--out", "hole.png")[0] == 0
    found = []
    for args in ((), ("--control", "hole.png", "--controlnet", "net.safetensors")):
        code, _, error = run(*GENERATE, "--image", "photo.png", "--mask", "mask.png", "--feather", "0", *args)
        assert code == 0, error
        found.append(pixels(files / "cat.png"))
    photo = pixels(files / "photo.png")
    assert all(np.array_equal(one[~mask], photo[~mask]) for one in found) and (found[0] != found[1])[mask].mean() > 0.1


def test_an_inpainting_model_is_steered_with_a_picture_and_a_mask(run, files, mask):
    nine = small_model(small_config(in_channels=9))
    weights_loader.save(nine, files / "model.safetensors")
    edit = ("--image", "photo.png", "--mask", "mask.png")
    assert run(*GENERATE, *edit)[0] == 0
    plain = pixels(files / "cat.png")
    code, _, error = run(*GENERATE, *edit, *CONTROL)
    assert code == 0, error
    assert not np.array_equal(pixels(files / "cat.png"), plain)


def test_a_hint_of_the_pictures_size_is_cropped_and_resized_as_the_picture_is(files, mask):
    """Its hole too, and only the part around the mask where that alone is worked on; of another size it is taken to fit the result."""
    flags = EditFlags(image=files / "photo.png", mask=files / "mask.png", only_masked=True)
    edit = prepare_edit(flags, read_edit(flags), small_model(), 64)
    rgba = np.dstack([pixels(files / "photo.png"), np.where(mask, 0, 255).astype(np.uint8)])
    save_png(Image.fromarray(rgba), files / "hole.png", hint="inpaint")
    (hint,) = load_hints(files / "hole.png", 1, edit.size, edit.frame)
    assert edit.size == (64, 64) and edit.canvas.crop.width < 32
    assert torch.equal(hint[0] == -1, edit.canvas.mask[0, 0] > 0)
    around = edit.canvas.mask[0, 0] == 0
    inside = (edit.canvas.pixels[0] + 1) / 2
    # Beyond the filter's four cells around the hole the hint is the picture, as bytes.
    far = torch.nn.functional.max_pool2d((~around).float()[None, None], 17, 1, 8)[0, 0] == 0
    torch.testing.assert_close(hint[:, far], inside[:, far], rtol=0, atol=1e-5)
    wide = EditFlags(image=files / "photo.png")
    for fit in ("crop", "resize", "pad"):
        flags = replace(wide, fit=fit)
        edit = prepare_edit(flags, read_edit(flags), small_model(), (48, 32))
        (hint,) = load_hints(files / "photo.png", 1, edit.size, edit.frame)
        torch.testing.assert_close(hint, (edit.pixels[0] + 1) / 2, rtol=0, atol=2e-2)  # the range at which values are cut differs
        (other,) = load_hints(files / "edges.png", 1, (64, 64), Frame((16, 16), edit.frame.follow))
        assert other.shape == (3, 64, 64)


@pytest.mark.parametrize(
    "args",
    [
        ("--image", "photo.png", "--strength", "0.7"),
        ("--image", "large.png", "--mask", "large-mask.png", "--only-masked", "--feather", "3"),
        ("--image", "large.png", "--mask", "large-mask.png", "--only-masked", "--size", "50x40"),
        ("--image", "photo.png", "--outpaint", "left=8,top=4", "--strength", "0.9"),
        ("--image", "photo.png", "--size", "24x40", "--fit", "pad"),
        CONTROL,
        (*CONTROL[:3], "net.safetensors:0.7:0:0.5", "--control", "photo.png", "--controlnet", "net.safetensors:0.3", "--guess-mode"),
        ("--image", "photo.png", "--mask", "mask.png", *CONTROL[:3], "net.safetensors:0.8"),
    ],
    ids=" ".join,
)
def test_a_picture_is_made_again_from_its_settings(args, run, files, mask):
    Image.open(files / "photo.png").resize((96, 64)).save(files / "large.png")
    Image.open(files / "mask.png").resize((96, 64), Image.Resampling.NEAREST).save(files / "large-mask.png")
    code, _, error = run(*GENERATE[:-2], *args, "--seed", "5", "--out", "first.png")
    assert code == 0, error
    code, _, error = run("generate", "--settings", "first.png", "--out", "again.png")
    assert code == 0 and "not taken over" not in error, error
    first, again = (Image.open(files / name) for name in ("first.png", "again.png"))
    assert np.array_equal(np.asarray(first), np.asarray(again)) and again.text["parameters"] == first.text["parameters"]


def test_an_inpainting_model_alone_is_refused(run, files):
    weights_loader.save(small_model(small_config(in_channels=9)), files / "model.safetensors")
    code, _, error = run(*GENERATE, "--control", "edges.png", "--controlnet", "net.safetensors")
    assert code == 2 and "9 channels: an inpainting model" in error


def test_a_file_with_a_colon_in_its_name(tmp_path):
    (tmp_path / "a.png").touch()
    asked = [str(tmp_path / "a.png")]
    assert [request.file for request in parse_controls(asked, ["C:\\nets\\a.safetensors"])] == ["C:\\nets\\a.safetensors"]
    (request,) = parse_controls(asked, ["C:\\a.safetensors:0.5:0.1"])
    assert (request.file, request.numbers) == ("C:\\a.safetensors", (0.5, 0.1))
