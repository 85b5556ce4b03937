"""ControlNet files: both namings bit for bit, by diffusers too, differences and control-LoRAs on a base, and what is refused by name."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

import weights_loader
from minidiff.conditioning import Conditioning
from minidiff.config import SD1, SD2, SDXL
from minidiff.controlnet import Control, ControlNet, controlled, controlnet_config, create_controlnet
from minidiff.unet import UNet
from tests.small_models import small_config, small_model, wider_config, xl_config
from weights_loader.controlnet import NAMES, PREFIX, read_controlnet, write_controlnet
from weights_loader.families import part_names
from weights_loader.name_table import file_shapes, to_file
from weights_loader.read import read
from weights_loader.write import write_safetensors, write_torch

KEYS = json.loads(gzip.decompress((Path(__file__).parent.parent / "data" / "controlnet-keys.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def sd():
    return small_model()


@pytest.fixture(scope="module")
def net(sd):
    """Random everywhere, also where training begins at 0."""
    made = create_controlnet(sd.config, sd.unet, torch.Generator()).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for p in made.parameters():
        p.copy_(p + 0.1 * torch.randn(p.shape, generator=generator))
    return made


def same(ours: ControlNet, net: ControlNet, **tolerance) -> None:
    assert ours.state_dict().keys() == net.state_dict().keys()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, **(tolerance or dict(rtol=0, atol=0)), msg=name)


def original(net, prefix=PREFIX):
    return {prefix + name: tensor for name, tensor in to_file(net, NAMES["original"]).items()}


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config, key", [(SD1, "sd15"), (SD2, "sd21")])
@pytest.mark.parametrize("names", NAMES)
def test_names_and_shapes_are_all_of_the_published_ones(config, key, names):
    with torch.device("meta"):
        net = ControlNet(controlnet_config(config))
    expected = KEYS[key if names == "original" else f"{key}_diffusers"]
    prefix = PREFIX if names == "original" else ""
    assert {prefix + name: list(shape) for name, shape in file_shapes(net, NAMES[names]).items()} == expected
    assert sum(p.numel() for p in net.parameters()) == {"sd15": 361_279_120, "sd21": 364_228_240}[key]


def test_names_and_shapes_of_sdxls_are_diffusers():
    with torch.device("meta"):
        net = ControlNet(controlnet_config(SDXL))
        theirs = diffusers.ControlNetModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert file_shapes(net, NAMES["diffusers"]) == expected
    ldm = file_shapes(net, NAMES["original"])
    assert len(ldm) == len(expected) and ldm["label_emb.0.0.weight"] == (1280, 2816) and "zero_convs.8.0.weight" in ldm


# --- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("names, name", [("original", "net.safetensors"), ("diffusers", "net")])
def test_what_is_written_is_read_back_bit_for_bit(names, name, dtype, sd, net, tmp_path):
    stored = ControlNet(replace(net.config, channel_order="bgr", pooled=True)).requires_grad_(False).to(dtype)
    stored.load_state_dict(net.state_dict())
    write_controlnet(tmp_path / name, stored, sd, names, {"steps": 3})
    read_back = read_controlnet(tmp_path / name, sd, dtype)
    same(read_back, stored)
    assert read_back.config == stored.config and not read_back.training and not any(p.requires_grad for p in read_back.parameters())
    again = tmp_path / f"again-{name}"
    write_controlnet(again, read_back, sd, names, {"steps": 3})
    for file in [tmp_path / name] if names == "original" else (tmp_path / name).iterdir():
        other = again if names == "original" else again / file.name
        assert file.read_bytes() == other.read_bytes()


def test_diffusers_reads_the_folder_and_answers_alike(sd, net, tmp_path):
    write_controlnet(tmp_path / "net", net, sd, "diffusers")
    theirs = diffusers.ControlNetModel.from_pretrained(tmp_path / "net")
    assert theirs.config.conditioning_embedding_out_channels == [16, 32, 96]
    generator = torch.Generator().manual_seed(0)
    x, context, hint = (torch.randn(size, generator=generator) for size in ((2, 4, 8, 8), (2, 5, 16), (2, 3, 32, 32)))
    skips, middle = theirs(x, torch.tensor([1, 900]), context, hint, return_dict=False)
    with torch.no_grad():
        ours = net(x, torch.tensor([1, 900]), context, net.hint_block(hint))
    for a, b in zip(ours, [*skips, middle], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    same(read_controlnet(tmp_path / "net" / "diffusion_pytorch_model.safetensors", sd), net)


@pytest.fixture(scope="module")
def xl():
    return small_model(xl_config())


@pytest.fixture(scope="module")
def xl_net(xl):
    made = create_controlnet(xl.config, xl.unet, torch.Generator()).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for p in made.parameters():
        p.copy_(p + 0.1 * torch.randn(p.shape, generator=generator))
    return made


@pytest.mark.parametrize("names, name", [("original", "net.safetensors"), ("diffusers", "net")])
def test_a_controlnet_of_sdxl_is_written_and_read_back_by_us_and_by_diffusers(names, name, xl, xl_net, tmp_path):
    write_controlnet(tmp_path / name, xl_net, xl, names)
    same(read_controlnet(tmp_path / name, xl), xl_net)
    if names == "original":
        write_safetensors(tmp_path / "bare.safetensors", original(xl_net, ""))
        same(read_controlnet(tmp_path / "bare.safetensors", xl), xl_net)
        return
    theirs = diffusers.ControlNetModel.from_pretrained(tmp_path / "net")
    theirs.save_pretrained(tmp_path / "theirs")
    same(read_controlnet(tmp_path / "theirs", xl), xl_net)
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 4, 8, 8), (2, 5, 40), (2, 20), (2, 6), (2, 3, 32, 32))
    x, context, pooled, size, hint = (torch.randn(size, generator=generator) for size in sizes)
    added = {"text_embeds": pooled, "time_ids": size}
    skips, middle = theirs(x, torch.tensor([1, 900]), context, hint, added_cond_kwargs=added, return_dict=False)
    with torch.no_grad():
        ours = xl_net(x, torch.tensor([1, 900]), Conditioning(context, pooled, size), xl_net.hint_block(hint))
    for a, b in zip(ours, [*skips, middle], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_controlnet_of_sdxl_steers_its_pictures(xl, xl_net):
    *_, plain = xl.denoise("a cat", steps=2, size=32, seeds=[0, 1])
    hint = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(2))
    steered = {
        scale: list(xl.denoise("a cat", steps=2, size=32, seeds=[0, 1], model=controlled(xl.predict, [Control(xl_net, hint, scale)])))[
            -1
        ].x_t
        for scale in (0.0, 1.0)
    }
    assert torch.equal(steered[0.0], plain.x_t) and (steered[1.0] - plain.x_t).abs().max() > 1e-2


def test_a_controlnet_of_the_other_family_and_a_small_one_are_one_line(sd, net, xl, xl_net, tmp_path):
    write_controlnet(tmp_path / "sd.safetensors", net, sd)
    write_controlnet(tmp_path / "xl.safetensors", xl_net, xl)
    with pytest.raises(
        ValueError, match="a ControlNet made for another model .context of width 16., and this model is a Stable .* .of width 40.; give"
    ):
        read_controlnet(tmp_path / "sd.safetensors", xl)
    with pytest.raises(
        ValueError, match="a ControlNet made for another model .context of width 40., and this model is a Stable .* .of width 16.; give"
    ):
        read_controlnet(tmp_path / "xl.safetensors", sd)
    small = {name: tensor for name, tensor in to_file(xl_net, NAMES["diffusers"]).items() if ".transformer_blocks.1." not in name}
    write_safetensors(tmp_path / "small.safetensors", small)
    with pytest.raises(ValueError, match="a ControlNet of 3 transformer blocks where the model has 5, as diffusers' small and mid ones"):
        read_controlnet(tmp_path / "small.safetensors", xl)


def test_what_diffusers_writes_is_read(sd, net, tmp_path):
    write_controlnet(tmp_path / "net", net, sd, "diffusers")
    diffusers.ControlNetModel.from_pretrained(tmp_path / "net").save_pretrained(tmp_path / "theirs")
    same(read_controlnet(tmp_path / "theirs", sd), net)


def test_the_originals_forms_are_read(sd, net, tmp_path):
    """Without the prefix, as a pickle, wrapped in a state_dict, and beside a whole model."""
    write_safetensors(tmp_path / "bare.safetensors", original(net, ""))
    write_torch(tmp_path / "pruned.pth", {"state_dict": original(net)})
    weights_loader.save(sd, tmp_path / "model.safetensors")
    whole = dict(read(tmp_path / "model.safetensors").tensors)
    write_safetensors(tmp_path / "full.safetensors", whole | original(net))
    write_safetensors(tmp_path / "single.safetensors", to_file(net, NAMES["diffusers"]))
    write_safetensors(tmp_path / "wrapped.safetensors", original(net, "module."))
    for name in ("wrapped.safetensors", "bare.safetensors", "pruned.pth", "full.safetensors", "single.safetensors"):
        same(read_controlnet(tmp_path / name, sd), net)


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_difference_is_added_to_the_model_in_use(prefix, sd, net, tmp_path):
    """The U-Net's part as (control - base), one tensor that did not change left out, the rest whole."""
    base, tensors = to_file(sd.unet, replace(part_names(sd.config, "unet", "ldm"), prefix="")), original(net, "")
    unchanged = "input_blocks.1.0.in_layers.2.weight"
    changed = {name: tensor - base[name] if name in base else tensor for name, tensor in tensors.items() if name != unchanged}
    write_safetensors(tmp_path / "diff.safetensors", {prefix + n: x for n, x in changed.items()} | {"difference": torch.tensor(1.0)})
    read_back = read_controlnet(tmp_path / "diff.safetensors", sd)
    expected = {name: x.clone() for name, x in net.state_dict().items()}
    expected["down.0.blocks.0.conv_1.weight"] = sd.unet.down[0].blocks[0].conv_1.weight.detach()
    for name, tensor in read_back.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)  # a sum and a difference in float32


def test_a_control_lora_is_added_to_the_model_in_use(sd, net, tmp_path):
    tensors = {name: x for name, x in original(net, "").items() if name.startswith(("zero_convs", "middle_block_out", "input_hint_block"))}
    generator = torch.Generator().manual_seed(2)
    linear, conv = "input_blocks.1.1.transformer_blocks.0.attn2.to_k", "input_blocks.1.0.in_layers.2"
    halves = {f"{linear}.up": (16, 2), f"{linear}.down": (2, 16), f"{conv}.up": (16, 2, 1, 1), f"{conv}.down": (2, 16, 3, 3)}
    lora = {name: torch.randn(shape, generator=generator) for name, shape in halves.items()}
    whole = {"input_blocks.0.0.bias": torch.ones(16)}
    write_safetensors(tmp_path / "lora.safetensors", tensors | lora | whole | {"lora_controlnet": torch.tensor([])})
    state, base = read_controlnet(tmp_path / "lora.safetensors", sd).state_dict(), sd.unet.state_dict()
    name = "down.0.transformers.0.blocks.0.cross_attention.to_k.weight"
    torch.testing.assert_close(state[name], base[name] + lora[f"{linear}.up"] @ lora[f"{linear}.down"])
    name = "down.0.blocks.0.conv_1.weight"
    change = torch.einsum("or,rikl->oikl", lora[f"{conv}.up"][:, :, 0, 0], lora[f"{conv}.down"])
    torch.testing.assert_close(state[name], base[name] + change)
    assert torch.equal(state["conv_in.bias"], torch.ones(16)) and torch.equal(state["conv_in.weight"], base["conv_in.weight"])
    assert torch.equal(state["zero_convs.0.weight"], net.zero_convs[0].weight)

    write_safetensors(tmp_path / "half.safetensors", tensors | {f"{linear}.up": lora[f"{linear}.up"], "lora_controlnet": torch.tensor([])})
    with pytest.raises(ValueError, match=r"attn2.to_k: up \(16, 2\), down missing"):
        read_controlnet(tmp_path / "half.safetensors", sd)


def test_an_inpainting_model_has_the_controlnet_of_its_text_to_image_model(net, tmp_path):
    inpainting = small_model(small_config(in_channels=9))
    write_safetensors(tmp_path / "net.safetensors", original(net))
    same(read_controlnet(tmp_path / "net.safetensors", inpainting), net)


def test_a_shuffle_is_known_by_its_name(sd, net, tmp_path):
    write_safetensors(tmp_path / "control_v11e_sd15_shuffle.safetensors", original(net))
    with pytest.warns(UserWarning, match="a shuffle ControlNet by its name"):
        assert read_controlnet(tmp_path / "control_v11e_sd15_shuffle.safetensors", sd).config.pooled


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, what",
    [
        ("control_add_embedding.linear_1.bias", "a ControlNet union"),
        ("task_embedding", "a ControlNet union"),
        ("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.conditioning1.0.weight", "a ControlNet-LLLite"),
        ("adapter.body.0.resnets.0.block1.weight", "a T2I-Adapter"),
        ("body.0.in_conv.weight", "a T2I-Adapter"),
        ("control_to_base_for_conv_in.weight", "a ControlNet-XS"),
        ("ip_adapter.1.to_k_ip.weight", "an IP-Adapter"),
    ],
)
def test_relatives_are_refused_by_name(name, what, sd, tmp_path):
    write_safetensors(tmp_path / "other.safetensors", {name: torch.zeros(2)})
    with pytest.raises(
        ValueError, match=f"other.safetensors: {what}.*not supported, give a ControlNet for Stable Diffusion 1.x, 2.x or XL"
    ):
        read_controlnet(tmp_path / "other.safetensors", sd)
    with pytest.raises(ValueError, match=what):
        weights_loader.inspect(tmp_path / "other.safetensors")


def test_another_family_is_named(sd, net, tmp_path):
    write_safetensors(tmp_path / "net.safetensors", original(net))
    message = (
        "a ControlNet made for another model .context of width 16., and this model is a Stable Diffusion of its own size .of width 24.; "
    )
    with pytest.raises(ValueError, match=message + "give a ControlNet of the model's family, or another --model"):
        read_controlnet(tmp_path / "net.safetensors", small_model(wider_config()))
    tensors = {name: tensor for name, tensor in original(net).items() if "attn2" not in name}  # as in diffusers' small ones
    write_safetensors(tmp_path / "xl.safetensors", tensors | {PREFIX + "label_emb.0.0.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="a ControlNet made for Stable Diffusion XL, and this model is a Stable Diffusion of its own size"):
        read_controlnet(tmp_path / "xl.safetensors", sd)


def test_a_controlnet_of_stable_diffusion_1_is_named_on_a_2(tmp_path):
    """By made-up weights of the full shapes' text alone; the U-Net in use is of 2.x."""
    model = small_model()
    model.config = replace(SD2, vae=model.config.vae)
    key = "control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    hint = {f"control_model.input_hint_block.{2 * k}.weight": torch.zeros(c, 1) for k, c in enumerate((16, 16, 32, 32, 96, 320))}
    write_safetensors(tmp_path / "net.safetensors", hint | {key: torch.zeros(320, 768)})
    with pytest.raises(
        ValueError, match="a ControlNet made for Stable Diffusion 1.x .context of width 768., and this model is .* .of width 1024."
    ):
        read_controlnet(tmp_path / "net.safetensors", model)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: tensors.pop(PREFIX + "zero_convs.3.0.weight"), "1 keys missing, 0 unexpected.*zero_convs.3.0.weight"),
        (lambda tensors: tensors.update({PREFIX + "strange": torch.zeros(1)}), "0 keys missing, 1 unexpected.*strange"),
        (
            lambda tensors: tensors.update({PREFIX + "middle_block_out.0.bias": torch.zeros(3)}),
            r"1 of the wrong shape.*middle_block_out.0.bias is \(3,\), should be \(32,\)",
        ),
        (
            lambda tensors: [tensors.pop(f"{PREFIX}input_hint_block.{k}.weight") for k in (6, 8)],
            "latents of 2 pixels a cell; this model's have 4",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, sd, net, tmp_path):
    tensors = original(net)
    change(tensors)
    write_safetensors(tmp_path / "net.safetensors", tensors)
    with pytest.raises(ValueError, match=f"(?s)net.safetensors: .*{message}"):
        read_controlnet(tmp_path / "net.safetensors", sd)


def test_settings_that_are_not_supported_are_named(sd, net, tmp_path):
    write_controlnet(tmp_path / "net", net, sd, "diffusers")
    metadata_less = dict(read(tmp_path / "net").tensors)
    write_safetensors(tmp_path / "net" / "diffusion_pytorch_model.safetensors", metadata_less)
    values = json.loads((tmp_path / "net" / "config.json").read_text())
    for change, message in (
        ({"_class_name": "ControlNetUnionModel"}, "a ControlNetUnionModel, not supported"),
        ({"conditioning_channels": 6}, "conditioning_channels is 6"),
        ({"attention_head_dim": 8}, r"attention heads \(8, 8, 8\); this model's U-Net has \(2, 2, 4\)"),
    ):
        (tmp_path / "net" / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=message):
            read_controlnet(tmp_path / "net", sd)
    (tmp_path / "net" / "config.json").write_text(json.dumps(values | {"controlnet_conditioning_channel_order": "bgr"}))
    assert read_controlnet(tmp_path / "net", sd).config.channel_order == "bgr"


@pytest.mark.parametrize(
    "stated, message",
    [
        ("[]", "expected an object with channel_order and pooled"),
        ("{", "net.safetensors"),
        ('{"channel_order": "grb"}', "channel_order 'grb' unknown"),
    ],
)
def test_metadata_that_is_wrong_is_said(stated, message, sd, net, tmp_path):
    write_safetensors(tmp_path / "net.safetensors", original(net), {"minidiff.controlnet": stated})
    with pytest.raises(ValueError, match=message):
        read_controlnet(tmp_path / "net.safetensors", sd)


def test_other_files_are_named(sd, net, tmp_path):
    weights_loader.save(sd, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"given as a ControlNet, but it is a whole model; give it as the model \(--model\)"):
        read_controlnet(tmp_path / "model.safetensors", sd)
    write_safetensors(tmp_path / "net.safetensors", original(net))
    with pytest.raises(ValueError, match=r"a ControlNet, which steers a model and is none; give it beside one \(--controlnet\)"):
        weights_loader.load(tmp_path / "net.safetensors")


@pytest.mark.parametrize("names, name", [("original", "net"), ("diffusers", "net.safetensors"), ("kohya", "net")])
def test_a_place_that_does_not_fit_the_names_is_refused(names, name, sd, net, tmp_path):
    with pytest.raises(ValueError, match="unknown; choose original, diffusers" if names == "kohya" else "a ControlNet in the names of"):
        write_controlnet(tmp_path / name, net, sd, names)
    assert not list(tmp_path.iterdir())


def test_inspect_says_what_it_is(sd, net, tmp_path):
    write_controlnet(tmp_path / "net.safetensors", net, sd)
    write_controlnet(tmp_path / "net", net, sd, "diffusers")
    parameters = sum(p.numel() for p in net.parameters()) / 1e6
    for path, names in ((tmp_path / "net.safetensors", "original"), (tmp_path / "net", "diffusers")):
        said = str(weights_loader.inspect(path))
        assert f"ControlNet, names of {names}" in said and f"parameters  {parameters:.3f} M" in said


def test_the_unets_part_has_the_unets_names():
    with torch.device("meta"):
        net, unet = ControlNet(controlnet_config(SD1)), UNet(SD1.unet)
    assert net.state_dict().keys() - unet.state_dict().keys() == {n for n in net.state_dict() if n.startswith(("hint_block", "zero_convs"))}
