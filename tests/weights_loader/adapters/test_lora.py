import json
import math
import re
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.other import get_pattern_key

import weights_loader
from minidiff.adapters.layer_change import LayerChange
from minidiff.adapters.lora import LoRA
from minidiff.adapters.low_rank import LowRank
from tests.checkpoints import family_model, ldm_tensors, part_to_file
from tests.parity.check import largest_error
from tests.small_files import random_lora, weight_of
from tests.small_models import small_model
from weights_loader.adapters import lora as lora_files
from weights_loader.adapters.lora import pack, parse_weighted, read_lora, write_lora
from weights_loader.adapters.lora_file import Dialect, named_halves, parse_factors
from weights_loader.families import part_names
from weights_loader.families.shared import UNET_PREFIX
from weights_loader.name_table import name_table
from weights_loader.read import read
from weights_loader.write import write_safetensors

ATTENTION = r"attention\.to_"
NAMES = ("diffusers", "kohya")


@pytest.fixture(scope="module", params=["SD 1", "SD 2"])
def sd(request):
    """SD 2's proj_in and proj_out are matrices in files, SD 1's 1x1 convolutions."""
    return family_model(request.param)


@pytest.fixture(scope="module")
def pipe(sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "folder"
    weights_loader.save(sd, folder, layout="diffusers")
    return StableDiffusionPipeline.from_pretrained(folder)


def assert_same(a, b):
    a, b = a.layers, b.layers
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name].down.weight, b[name].down.weight), name
        assert torch.equal(a[name].up.weight, b[name].up.weight) and a[name].alpha == b[name].alpha, name


@torch.no_grad()
def outputs(unet, text_encoder, sd):
    """Of theirs or ours: the context of two prompts, and the U-Net's answer to a context that does not depend on the text encoder."""
    generator = torch.Generator().manual_seed(1)
    x, context = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, sd.config.text_encoder.context_length, 16)))
    words, answer = text_encoder(sd.tokenizer(["a red apple", "a cat"])), unet(x, torch.tensor([3, 700]), context)
    return words if torch.is_tensor(words) else words[0], answer if torch.is_tensor(answer) else answer.sample


# ----------------------------------------------------------------------------------------------- there and back again


@pytest.mark.parametrize("names", NAMES)
def test_a_lora_on_every_layer_is_read_back_bit_for_bit(names, sd, tmp_path):
    lora = random_lora(sd) if names == "kohya" else random_lora(sd, "", (2,), (2.0,))
    assert {weight_of(sd, name).dim() for name in lora.layers} == {2, 4}, "convolutions too"
    write_lora(tmp_path / "x.safetensors", lora, sd, names)
    assert_same(read_lora(tmp_path / "x.safetensors", sd), lora)


def test_the_same_lora_gives_the_same_bytes(sd, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_lora(tmp_path / name / "x.safetensors", random_lora(sd, ATTENTION), sd, settings={"steps": 3, "images": ["a.png"]})
    assert (tmp_path / "a" / "x.safetensors").read_bytes() == (tmp_path / "b" / "x.safetensors").read_bytes()


def test_names_are_those_that_other_programs_look_for(tmp_path):
    sd = small_model()
    pattern = r"down\.0\.transformers\.0\.(proj_in|blocks\.0\.cross_attention\.to_out)|blocks\.0\.conv_1$|blocks\.1\.attention\.to_q"
    lora = random_lora(sd, pattern, (4,), (2.0,))
    keys = {names: set(pack(lora, sd, names)[0]) for names in NAMES}
    assert {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_A.weight",
        "unet.down_blocks.0.attentions.0.proj_in.lora_B.weight",
        "unet.down_blocks.2.resnets.0.conv1.lora_A.weight",
        "text_encoder.text_model.encoder.layers.1.self_attn.q_proj.lora_B.weight",
    } <= keys["diffusers"]
    assert {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0.lora_down.weight",
        "lora_unet_down_blocks_0_attentions_0_proj_in.alpha",
        "lora_unet_down_blocks_2_resnets_0_conv1.lora_up.weight",
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj.alpha",
    } <= keys["kohya"]


def test_names_whose_readers_lose_an_alpha_are_refused_for_one_that_is_not_the_rank(sd, tmp_path):
    lora = random_lora(sd, ATTENTION, (4,), (1.0,))
    with pytest.raises(ValueError, match=r"names 'diffusers': most programs .* (\d+) layers .* rank 4, alpha 1\); take the names 'kohya'"):
        write_lora(tmp_path / "x.safetensors", lora, sd, "diffusers")
    assert not list(tmp_path.iterdir())
    write_lora(tmp_path / "x.safetensors", lora, sd)  # kohya's by default, with an alpha in each layer
    assert all(
        f"{name.removesuffix('.lora_up.weight')}.alpha" in read(tmp_path / "x.safetensors").tensors
        for name in read(tmp_path / "x.safetensors").tensors
        if name.endswith("lora_up.weight")
    )
    write_lora(tmp_path / "y.safetensors", random_lora(sd, ATTENTION, (4,), (4.0,)), sd, "diffusers")


def test_settings_are_kept_as_json(sd, tmp_path):
    settings = {"learning_rate": 1e-4, "images": ["größe.png"], "prior": None}
    write_lora(tmp_path / "x.safetensors", random_lora(sd, ATTENTION), sd, settings=settings)
    assert json.loads(read(tmp_path / "x.safetensors").metadata["minidiff.settings"]) == settings


def test_half_precision_files_are_read_as_float32(sd, tmp_path):
    lora = random_lora(sd, ATTENTION)
    tensors, metadata = pack(lora, sd, "diffusers")
    write_safetensors(tmp_path / "x.safetensors", {name: tensor.half() for name, tensor in tensors.items()}, metadata)
    for name, one in read_lora(tmp_path / "x.safetensors", sd).layers.items():
        down = one.down.weight
        assert down.dtype == torch.float32 and torch.equal(down, lora.layers[name].down.weight.half().float())


# ------------------------------------------------------------------------------------------------- against diffusers


@pytest.mark.parametrize(
    "names, ranks, alphas",
    [
        ("diffusers", (2, 3, 4), (0.5, 1.0, 2.5)),
        ("diffusers", (4,), (4.0,)),
        ("kohya", (4,), (1.0,)),
        ("kohya", (2, 3, 4), (1.0,)),
    ],
)
def test_diffusers_gives_the_same_with_our_file(names, ranks, alphas, sd, pipe, tmp_path):
    before = outputs(sd.unet, sd.text_encoder, sd)
    lora = random_lora(sd, "", ranks, alphas)
    write_safetensors(tmp_path / "x.safetensors", *pack(lora, sd, names))
    lora.attach(sd)
    pipe.load_lora_weights(tmp_path, weight_name="x.safetensors")
    try:
        for ours, theirs, base in zip(outputs(sd.unet, sd.text_encoder, sd), outputs(pipe.unet, pipe.text_encoder, sd), before):
            assert (ours - base).abs().max() > 0.3, "a LoRA that changes little would be near anything"
            largest_error(ours, theirs)
    finally:
        lora.detach()
        pipe.unload_lora_weights()


def test_an_extraction_with_ranks_of_all_sizes_is_the_same_in_diffusers_by_kohyas_names(sd, pipe, tmp_path):
    lora = random_lora(sd, ATTENTION)
    lora = LoRA({name: LowRank(one.down.weight, one.up.weight, float(one.rank)) for name, one in lora.layers.items()})
    write_lora(tmp_path / "x.safetensors", lora, sd, "kohya")
    assert_same(read_lora(tmp_path / "x.safetensors", sd), lora)
    lora.attach(sd)
    pipe.load_lora_weights(tmp_path, weight_name="x.safetensors")
    try:
        for ours, theirs in zip(outputs(sd.unet, sd.text_encoder, sd), outputs(pipe.unet, pipe.text_encoder, sd)):
            largest_error(ours, theirs)
    finally:
        lora.detach()
        pipe.unload_lora_weights()


def test_what_diffusers_saved_is_read(sd, pipe, tmp_path):
    alphas = {"mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 7}
    pipe.unet.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "to_v"], init_lora_weights=False, alpha_pattern=alphas))
    try:
        layers, config = get_peft_model_state_dict(pipe.unet), pipe.unet.peft_config["default"].to_dict()
        StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata=config)
        lora = read_lora(tmp_path, sd)
        alphas = {name: one.alpha for name, one in lora.layers.items()}
        assert alphas.pop("unet.middle.transformer.blocks.0.self_attention.to_q") == 7 and set(alphas.values()) == {5}
        lora.attach(sd)
        largest_error(*(outputs(unet, sd.text_encoder, sd)[1] for unet in (sd.unet, pipe.unet)))
        lora.detach()
    finally:
        pipe.unload_lora_weights()


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saved_is_read_with_the_scale_of_its_config(rslora, sd, tmp_path):
    from diffusers import UNet2DConditionModel

    weights_loader.save(sd, tmp_path / "model", layout="diffusers")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet")
    theirs = get_peft_model(unet, LoraConfig(r=4, lora_alpha=6, target_modules=["attn2.to_k"], init_lora_weights=False, use_rslora=rslora))
    theirs.save_pretrained(tmp_path / "peft")
    lora = read_lora(tmp_path / "peft", sd)
    assert {one.alpha for one in lora.layers.values()} == {6 * math.sqrt(4) if rslora else 6}
    lora.attach(sd)
    largest_error(*(outputs(unet, sd.text_encoder, sd)[1] for unet in (sd.unet, theirs)))
    lora.detach()


# ------------------------------------------------------------------------------------------------------ other spellings


def renamed(lora, sd, changes, end=""):
    tensors, _ = pack(lora, sd, "diffusers")
    result = {}
    for name, tensor in tensors.items():
        for pattern, replacement in changes:
            name = re.sub(pattern, replacement, name)
        result[name + end] = tensor
    return result


OLDER = {
    "processor": [(r"(attn[12])\.to_out\.0\.lora", r"\1.processor.to_out.lora"), (r"(attn[12])\.(to_[qkv])\.lora", r"\1.processor.\2.lora")]
    + [(r"self_attn\.out_proj\.lora", "self_attn.to_out.lora"), (r"self_attn\.([qkv])_proj\.lora", r"self_attn.to_\1.lora")]
    + [(r"\.lora_A", "_lora.down"), (r"\.lora_B", "_lora.up")],
    "lora.down": [(r"lora_A", "lora.down"), (r"lora_B", "lora.up")],
    "lora_linear_layer": [(r"lora_A", "lora_linear_layer.down"), (r"lora_B", "lora_linear_layer.up")],
    "an adapter's name": [(r"lora_([AB])", r"lora_\1.default_0")],
    "peft's wrapper": [(r"^(unet|text_encoder)\.", "base_model.model.")],
    "transformers 5": [(r"text_model\.", "")],
}


@pytest.mark.parametrize("changes", OLDER.values(), ids=OLDER)
def test_older_spellings_are_read(changes, sd, tmp_path):
    lora = random_lora(sd, ATTENTION, (4,), (4.0,))
    tensors = renamed(lora, sd, changes)
    assert tensors.keys() != pack(lora, sd, "diffusers")[0].keys()
    torch.save(tensors, tmp_path / "x.bin")
    assert_same(read_lora(tmp_path / "x.bin", sd), lora)


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_an_alpha_that_is_missing_or_nought_is_the_rank(alpha, sd, tmp_path):
    tensors, _ = pack(random_lora(sd, ATTENTION, (3,), (1.0,)), sd, "kohya")
    for name in [name for name in tensors if name.endswith(".alpha")]:
        del tensors[name]
        if alpha is not None:
            tensors[name] = torch.tensor(alpha)
    write_safetensors(tmp_path / "x.safetensors", tensors)
    assert {one.alpha for one in read_lora(tmp_path / "x.safetensors", sd).layers.values()} == {3}


@pytest.mark.parametrize("names", ["kohya", "comfy"])
def test_layers_with_the_originals_numbers_are_read(names, sd, tmp_path):
    lora = random_lora(sd, r"^unet\.", (4,), (2.0,))
    places = name_table(sd.unet, part_names(sd.config, "unet", "ldm"))
    tensors = {}
    for name, one in lora.layers.items():
        layer = places[name.removeprefix("unet.") + ".weight"].name.removeprefix(UNET_PREFIX).removesuffix(".weight")
        layer = f"lora_unet_{layer.replace('.', '_')}" if names == "kohya" else f"diffusion_model.{layer}"
        tensors |= {f"{layer}.lora_down.weight": one.down.weight, f"{layer}.lora_up.weight": one.up.weight}
        tensors[f"{layer}.alpha"] = torch.tensor(2.0)
    assert any("input_blocks" in name for name in tensors) and any("output_blocks" in name for name in tensors)
    write_safetensors(tmp_path / "x.safetensors", tensors)
    assert_same(read_lora(tmp_path / "x.safetensors", sd), lora)


def test_an_alpha_that_is_a_python_number_counts(sd, tmp_path):
    lora = random_lora(sd, ATTENTION, (4,), (1.0,))
    tensors, _ = pack(lora, sd, "kohya")
    plain = {name: tensor.item() if name.endswith(".alpha") else tensor for name, tensor in tensors.items()}
    for name, tree in (("x.pt", plain), ("y.ckpt", {"state_dict": plain | {"z.alpha": None}, "epoch": 3})):
        torch.save(tree, tmp_path / name)
        back = read_lora(tmp_path / name, sd)
        assert {one.alpha for one in back.layers.values()} == {1.0}
        assert_same(back, lora)


@pytest.mark.parametrize(
    "patterns",
    [
        {"to_k": 2},
        {"attn1.to_k": 2, "to_k": 3},
        {r".*attentions.[01].*attn2\.to_[qk]": 2},
        {r"^mid_block.*": 2, "k": 9},
        {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": 2, r"(up|mid)_blocks?\..*": 3},
    ],
    ids=str,
)
def test_alpha_patterns_mean_what_they_mean_to_peft(patterns, sd, tmp_path):
    lora = random_lora(sd, r"^unet\..*attention\.to_[qkv]", (4,), (1.0,))
    tensors, _ = pack(lora, sd, "diffusers")
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 5, "unet.alpha_pattern": patterns})}
    write_safetensors(tmp_path / "x.safetensors", tensors, metadata)
    places, found = lora_files.layer_locations(sd, lora_files.PEFT), set()
    for name, one in read_lora(tmp_path / "x.safetensors", sd).layers.items():
        layer = places[name].name.removeprefix("unet.")
        expected = patterns.get(get_pattern_key(patterns, layer), 5)
        assert one.alpha == expected, layer
        found.add(expected)
    assert len(found) > 1


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "name, message",
    [
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "diffusion transformer"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "diffusion transformer"),
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "a LoHa or LoKr"),
        ("lora_unet_mid_block_attentions_0_proj_in.oft_blocks", "an OFT or BOFT"),
        ("unet.mid_block.attentions.0.proj_in.oft_R.default.weight", "an OFT or BOFT"),
        ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", "a DoRA"),
        ("lora_unet_mid_block_attentions_0_proj_in.on_input", "an IA3"),
        ("base_model.model.mid_block.attentions.0.proj_in.ia3_l", "an IA3"),
        ("lora_unet_mid_block_attentions_0_proj_in.a1.weight", "a GLoRA"),
        ("lora_unet_mid_block_attentions_0_proj_in.diff", "whole differences"),
        ("lora_unet_mid_block_attentions_0_proj_in.diff_b", "whole differences"),
        ("lora_unet_mid_block_attentions_0_norm.w_norm", "changes of normalisation layers"),
        ("unet.mid_block.attentions.0.proj_in.lora_E", "an AdaLora"),
        ("base_model.model.mid_block.attentions.0.proj_in.vera_lambda_b", "one of peft's other methods"),
        ("bundle_emb.cat.clip_l", "learned words bundled into it"),
        ("lora_unet_mid_block_resnets_0_conv1.lora_mid.weight", "Tucker"),
        ("unet:3:up", "numbers its layers"),
    ],
)
def test_other_kinds_are_refused_by_name(name, message, tmp_path):
    tensors, _ = pack(random_lora(small_model(), ATTENTION), small_model(), "kohya")
    write_safetensors(tmp_path / "x.safetensors", tensors | {name: torch.zeros(4, 4)})
    with pytest.raises(ValueError, match=rf"x.safetensors: .*{message}.*not supported.*{re.escape(name)}"):
        read_lora(tmp_path / "x.safetensors", small_model())


def test_a_lora_for_another_model_names_layers_widths_and_the_likely_cause(tmp_path):
    sd = small_model()
    unet, text_encoder = replace(sd.config.unet, context_width=768), replace(sd.config.text_encoder, width=768)
    wide = small_model(replace(sd.config, unet=unet, text_encoder=text_encoder))
    lora = random_lora(wide, r"cross_attention\.to_k|down\.0\.blocks\.0\.conv_1", (4,), (4.0,))
    tensors, _ = pack(lora, wide, "kohya")
    extra = "lora_unet_down_blocks_3_resnets_0_conv1"
    tensors |= {f"{extra}.lora_down.weight": torch.zeros(4, 16, 3, 3), f"{extra}.lora_up.weight": torch.zeros(16, 4, 1, 1)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(ValueError) as error:
        read_lora(tmp_path / "x.safetensors", sd)
    text = str(error.value)
    assert "1 of its 9 layers are not there, 7 have other widths" in text
    assert f"no layer {extra} (nearest: lora_unet_down_blocks_2_resnets_0_conv1)" in text
    assert "attn2_to_k: down (4, 768) and up (16, 4); this layer needs (4, 16) and (16, 4)" in text and "and 3 more" in text
    assert (
        "made for Stable Diffusion 1.x (context of width 768), and this model is a Stable Diffusion of its own size (of width 16)" in text
    )


def broken(change):
    tensors, _ = pack(random_lora(small_model(), ATTENTION), small_model(), "kohya")
    first = next(iter(tensors)).split(".")[0]
    change(tensors, first)
    return tensors


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t, layer: t.pop(f"{layer}.lora_up.weight"), "has no up half"),
        (lambda t, layer: t.update({"emb_params": torch.zeros(2, 16)}), "'emb_params' is no part of a LoRA"),
        (lambda t, layer: t.update({f"{layer}.gamma": torch.zeros(2)}), "gamma' is no part of a LoRA"),
        (lambda t, layer: t.update({f"{layer}.alpha": torch.zeros(2)}), r"alpha has shape \(2,\)"),
        (lambda t, layer: t.update({f"{layer}.alpha": torch.tensor(float("nan"))}), "alpha is nan; expected a finite number"),
        (lambda t, layer: t.update({f"{layer}.lora_A.weight": torch.zeros(2)}), "two tensors for down"),
        (lambda t, layer: t.update({f"{layer}.lora_down.weight": torch.zeros(())}), r"other widths\n.*down \(\) and up"),
    ],
)
def test_a_file_that_is_not_understood_wholly_is_an_error(change, message, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", broken(change))
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path / "x.safetensors", small_model())


def test_a_layer_under_two_names_is_an_error(tmp_path):
    sd = small_model()
    lora = random_lora(sd, ATTENTION)
    both = {**pack(lora, sd, "kohya")[0], **pack(lora, sd, "diffusers")[0]}
    write_safetensors(tmp_path / "both.safetensors", both)
    with pytest.raises(ValueError, match="occurs under two names"):
        read_lora(tmp_path / "both.safetensors", sd)


def test_something_else_given_as_a_lora_is_named(tmp_path):
    sd = family_model("SD 1")
    weights_loader.save(sd, tmp_path / "folder", layout="diffusers")
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd))
    write_safetensors(tmp_path / "vae.safetensors", part_to_file(sd, "vae", "ldm"))
    write_safetensors(tmp_path / "word.safetensors", {"<cat>": torch.zeros(1, 16)})
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("model.safetensors", "given as a LoRA, but it is a whole model; give it as the model"),
        ("vae.safetensors", "given as a LoRA, but it is a VAE alone"),
        ("word.safetensors", "given as a LoRA, but it is a Textual Inversion embedding.*--embedding"),
        ("folder", "a whole model, given as a LoRA"),
        ("empty", "no LoRA in this folder"),
    ):
        with pytest.raises(ValueError, match=message):
            read_lora(tmp_path / name, sd)
    with pytest.raises(FileNotFoundError):
        read_lora(tmp_path / "absent.safetensors", sd)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "no JSON"),
        ("[]", "expected an object"),
        ('{"unet.lora_alpha": "a"}', "alpha is 'a'; expected a finite number"),
        ('{"unet.alpha_pattern": {"to_[": 3}}', r"alpha_pattern 'to_\[', which cannot be matched"),
        ('{"unet.alpha_pattern": {"(.|..)+[0-9]q": 3}}', r"which cannot be matched .it takes longer than"),
        ('{"unet.alpha_pattern": [3]}', r"alpha_pattern \[3\]; expected layers and their alphas"),
        ('{"unet.init_lora_weights": "pissa_niter_16"}', "unet.init_lora_weights is 'pissa_niter_16': PiSSA, .* not supported"),
        ('{"unet.init_lora_weights": "OLoRA"}', "init_lora_weights is 'olora': OLoRA"),
        ('{"text_encoder.init_lora_weights": "corda"}', "text_encoder.init_lora_weights is 'corda': CorDA"),
        ('{"unet.init_lora_weights": "loftq"}', "init_lora_weights is 'loftq': LoftQ"),
        ('{"unet.bias": "all"}', "unet.bias is 'all', which is not supported; expected 'none'"),
        ('{"unet.peft_type": "LOKR"}', "unet.peft_type is 'LOKR', which is not supported"),
        ('{"unet.use_dora": true}', "unet.use_dora is True, which is not supported"),
    ],
)
def test_a_config_of_peft_that_is_damaged_is_an_error(text, message, sd, tmp_path):
    tensors, _ = pack(random_lora(sd, ATTENTION), sd, "diffusers")
    write_safetensors(tmp_path / "x.safetensors", tensors, {"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path / "x.safetensors", sd)


@pytest.mark.parametrize("start", ['"eva"', '"gaussian"', "true"])
def test_a_lora_that_began_beside_an_unchanged_base_is_read(start, sd, tmp_path):
    lora = random_lora(sd, ATTENTION)
    tensors, _ = pack(lora, sd, "diffusers")
    write_safetensors(tmp_path / "x.safetensors", tensors, {"lora_adapter_metadata": f'{{"unet.init_lora_weights": {start}}}'})
    assert read_lora(tmp_path / "x.safetensors", sd).layers.keys() == lora.layers.keys()


def test_writing_says_what_it_cannot(sd, tmp_path):
    lora = random_lora(sd, ATTENTION)
    with pytest.raises(ValueError, match="names 'a1111' unknown; choose diffusers or kohya"):
        write_lora(tmp_path / "x.safetensors", lora, sd, "a1111")
    with pytest.raises(ValueError, match="written as .safetensors; name it x.safetensors"):
        write_lora(tmp_path / "x.pt", lora, sd)
    with pytest.raises(ValueError, match="settings: .*give text, numbers"):
        write_lora(tmp_path / "x.safetensors", lora, sd, settings={"device": torch.device("cpu")})
    assert not list(tmp_path.iterdir())


# --- plugging in ------------------------------------------------------------------------------------------------------


class FullDifference(LayerChange):
    """A toy change: the difference as it is."""

    def __init__(self, difference):
        super().__init__()
        self.difference = torch.nn.Parameter(difference)

    @property
    def shape(self):
        return tuple(self.difference.shape)

    def delta(self):
        return self.difference


class StoredDifference:
    def __init__(self, tensor):
        self.tensor = tensor

    def to_change(self, weight):
        difference = self.tensor.reshape(self.tensor.shape[: weight.dim()])
        if difference.shape != weight.shape:
            raise ValueError(f"a difference of shape {tuple(difference.shape)}; this layer needs {tuple(weight.shape)}")
        return FullDifference(difference)


DIFFERENCES = Dialect(
    "differences",
    matches=lambda names: all(name.endswith(".diff") for name in names),
    parse=lambda checkpoint: {name.removesuffix(".diff"): StoredDifference(tensor) for name, tensor in checkpoint.tensors.items()},
)


def test_a_new_dialect_with_a_new_kind_of_change_is_a_line_in_the_table(sd, tmp_path, monkeypatch):
    lora, places = random_lora(sd), lora_files.layer_locations(sd, lora_files.PEFT)
    deltas = {name: one.delta().detach() for name, one in lora.layers.items()}
    tensors = {f"{places[name].name}.diff": delta[(..., None, None) if places[name].convolution else ...] for name, delta in deltas.items()}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(ValueError, match="whole differences of weights or biases"):
        read_lora(tmp_path / "x.safetensors", sd)
    monkeypatch.setattr(lora_files, "DIALECTS", (DIFFERENCES, *lora_files.DIALECTS))
    back = read_lora(tmp_path / "x.safetensors", sd)
    answers = []
    for one in (lora, back):
        one.attach(sd)
        answers.append(outputs(sd.unet, sd.text_encoder, sd))
        one.detach()
    for ours, other in zip(*answers):
        largest_error(ours, other)
    summary = weights_loader.inspect(tmp_path / "x.safetensors")
    assert summary.kind == "LoRA, names of differences" and sum(summary.parts.values()) == len(lora.layers)
    with pytest.raises(ValueError, match="has a FullDifference, and files of kohya hold low-rank changes only"):
        write_lora(tmp_path / "y.safetensors", back, sd, "kohya")
    with pytest.raises(ValueError, match="names 'differences' unknown; choose diffusers or kohya"):
        write_lora(tmp_path / "y.safetensors", lora, sd, "differences")


def test_a_dialect_that_names_and_writes_layers_in_its_own_way_is_a_line_too(sd, tmp_path, monkeypatch):
    mirrored = Dialect(
        "mirrored",
        matches=lambda names: any(name.startswith("mirror.") for name in names),
        parse=lambda checkpoint: parse_factors(checkpoint.tensors, (), lambda layer, rank: 2.5),
        layer_name=lambda part, theirs: f"mirror.{theirs[::-1].replace('.', '-')}-{part}",
        pack=lambda changes, sd: (named_halves(changes, "lora_A", "lora_B"), {"by": "a toy"}),
    )
    monkeypatch.setattr(lora_files, "DIALECTS", (mirrored, *lora_files.DIALECTS))
    lora = random_lora(sd, alphas=(2.5,))
    write_lora(tmp_path / "x.safetensors", lora, sd, "mirrored")
    assert "by" in read(tmp_path / "x.safetensors").metadata
    assert_same(read_lora(tmp_path / "x.safetensors", sd), lora)


# -------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    "text, expected",
    [
        ("x.safetensors", ("x.safetensors", 1.0)),
        ("x.safetensors:0.7", ("x.safetensors", 0.7)),
        ("folder:-1", ("folder", -1.0)),
        (r"C:\loras\x.safetensors", (r"C:\loras\x.safetensors", 1.0)),
        (r"C:\loras\x.safetensors:.5", (r"C:\loras\x.safetensors", 0.5)),
        ("12:30.safetensors", ("12:30.safetensors", 1.0)),
    ],
)
def test_a_weight_stands_behind_the_last_colon(text, expected):
    assert parse_weighted(text) == expected


def test_a_file_whose_name_ends_like_a_weight_is_that_file(tmp_path):
    (tmp_path / "take:2").touch()
    assert parse_weighted(str(tmp_path / "take:2")) == (str(tmp_path / "take:2"), 1.0)


@pytest.mark.parametrize(
    "text, message", [("x.safetensors:much", "weight 'much' of x.safetensors is no number"), ("x.safetensors:nan", "finite number")]
)
def test_a_weight_that_is_no_number_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        parse_weighted(text)
