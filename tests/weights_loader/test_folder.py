import dataclasses
import inspect
import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from transformers import CLIPTokenizer

import weights_loader
from minidiff.config import SD1, SD2, SDXL
from minidiff.schedule import NoiseSchedule
from minidiff.tokenizer import Tokenizer
from minidiff.two_encoders import text_configs
from tests.checkpoints import assert_same_model, family_configs, family_model, part_to_file
from weights_loader import prediction
from weights_loader.families import family_of_config
from weights_loader.families.shared import SETTINGS
from weights_loader.folder import folder_config, write_folder_config
from weights_loader.folder.settings import HARMLESS, NEEDED, READ, SCHEDULERS
from weights_loader.write import write_safetensors


def tokenizers(config):
    return {name: Tokenizer(numbers) for name, (numbers, _) in text_configs(config).items()}


def diffusers_folder(sd, path):
    """Written by diffusers itself, from a folder of ours."""
    weights_loader.save(sd, path.with_name("ours"), layout="diffusers")
    return DiffusionPipeline.from_pretrained(path.with_name("ours"))


@pytest.mark.parametrize(
    "family, options",
    [
        *(("SD 1", options) for options in ({}, {"safe_serialization": False}, {"max_shard_size": "200KB"}, {"variant": "fp16"})),
        *(("SDXL", options) for options in ({"max_shard_size": "200KB"}, {"variant": "fp16"})),
    ],
    ids=str,
)
def test_a_folder_that_diffusers_wrote_is_read(family, options, tmp_path):
    sd = family_model(family)
    for part in sd.parts.values():
        part.half()
    pipeline = diffusers_folder(sd, tmp_path / "theirs").to(torch.float16)
    pipeline.save_pretrained(tmp_path / "theirs", **options)
    loaded = weights_loader.load(tmp_path / "theirs", dtype="file")
    # guidance_scale is the one number that such a folder has no place for, and logit_scale no weight that diffusers knows
    sd.config = dataclasses.replace(sd.config, guidance_scale=family_of_config(sd.config).config.guidance_scale)
    sd.extra_tensors.pop("conditioner.embedders.1.model.logit_scale", None)
    assert_same_model(loaded, sd)


@pytest.mark.parametrize("family", ["SD 1", "SD 2", "SDXL", "bundled"])
def test_diffusers_runs_a_saved_folder_and_gives_the_same_picture(family, tmp_path):
    sd = family_model(family)
    pipeline = diffusers_folder(sd, tmp_path / "theirs")
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    settings = {"num_inference_steps": 4, "guidance_scale": 4.0, "height": 32, "width": 32}
    theirs = pipeline("a red apple", latents=noise, output_type="np", **settings).images[0]
    ours = sd.generate("a red apple", steps=4, guidance_scale=4.0, size=32, seed=3)[0]
    # fp32 on both sides, then 8 bits: the last bit may round the other way, and one more for the sampler's order of operations
    assert np.abs(np.asarray(ours, dtype=float) - 255 * theirs).max() <= 2


def edit_json(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize("zeros", [True, False])
def test_what_no_negative_prompt_means_is_the_folders_and_kept(zeros, tmp_path):
    sd = family_model("SDXL")
    weights_loader.save(sd, tmp_path / "model", layout="diffusers")
    edit_json(tmp_path / "model" / "model_index.json", force_zeros_for_empty_prompt=zeros)
    ours, theirs = weights_loader.load(tmp_path / "model"), DiffusionPipeline.from_pretrained(tmp_path / "model")
    theirs.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    settings = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 32, "width": 32, "output_type": "latent"}
    expected = theirs("a red apple", latents=noise, **settings).images
    *_, step = ours.denoise("a red apple", steps=2, guidance_scale=4.0, size=32, seeds=[3])
    torch.testing.assert_close(step.x_t, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))  # float32, two steps of guidance 4
    for layout in ("ldm", "diffusers"):
        again = tmp_path / f"again.{layout}" if layout == "diffusers" else tmp_path / "again.safetensors"
        weights_loader.save(ours, again, layout=layout)
        assert weights_loader.load(again).config.zero_negative is zeros


def test_what_no_negative_prompt_means_is_true_or_false(tmp_path):
    weights_loader.save(family_model("SDXL"), tmp_path / "model", layout="diffusers")
    edit_json(tmp_path / "model" / "model_index.json", force_zeros_for_empty_prompt="no")
    with pytest.raises(ValueError, match=r"model_index.json: force_zeros_for_empty_prompt is 'no'; expected true or false"):
        weights_loader.load(tmp_path / "model")


def test_a_text_encoder_without_its_prefix_and_an_old_vae_are_read(tmp_path):
    sd = family_model("SD 1")
    weights_loader.save(sd, tmp_path / "model", layout="diffusers")
    text = part_to_file(sd, "text_encoder", "diffusers")
    write_safetensors(tmp_path / "model/text_encoder/model.safetensors", {k.removeprefix("text_model."): t for k, t in text.items()})
    vae, old = {}, {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name, tensor in part_to_file(sd, "vae", "diffusers").items():
        for new, spelling in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{spelling}.")
        vae[name] = tensor
    assert any("proj_attn" in name for name in vae)
    write_safetensors(tmp_path / "model/vae/diffusion_pytorch_model.safetensors", vae)
    assert_same_model(weights_loader.load(tmp_path / "model"), sd)


@pytest.mark.parametrize(
    "file, setting, value, message",
    [
        ("model_index.json", "_class_name", "StableDiffusion3Pipeline", "a StableDiffusion3Pipeline, not supported"),
        ("unet/config.json", "act_fn", "mish", "act_fn is 'mish', which is not supported"),
        ("unet/config.json", "transformer_layers_per_block", [1, 2, 10], "transformer_layers_per_block is"),
        ("unet/config.json", "block_out_channels", None, "block_out_channels is None; expected a list of whole numbers"),
        ("unet/config.json", "in_channels", "4", "in_channels is '4'; expected a whole number"),
        ("unet/config.json", "in_channels", True, "in_channels is True; expected a whole number"),
        ("unet/config.json", "layers_per_block", 10**9, "layers_per_block is 1000000000; expected a whole number from 1 to"),
        ("unet/config.json", "time_embedding_act_fn", "gelu", "time_embedding_act_fn is 'gelu', which is not supported; expected None"),
        ("unet/config.json", "norm_eps", 1e-6, "norm_eps is 1e-06, which is not supported; expected 1e-05"),
        ("unet/config.json", "a_setting_of_2030", 3, "a_setting_of_2030 is 3, a setting that is not known here"),
        ("vae/config.json", "_class_name", "AutoencoderTiny", "_class_name is 'AutoencoderTiny', which is not supported"),
        ("vae/config.json", "scaling_factor", "0.18", "scaling_factor is '0.18'; expected a finite number"),
        ("vae/config.json", "up_block_types", ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"], "up_block_types is"),
        ("text_encoder/config.json", "num_hidden_layers", 2.0, "num_hidden_layers is 2.0; expected a whole number"),
        ("text_encoder/config.json", "model_type", "t5", "model_type is 't5', which is not supported"),
        ("scheduler/scheduler_config.json", "beta_start", "0.1", "beta_start is '0.1'; expected a finite number"),
        ("scheduler/scheduler_config.json", "beta_schedule", 3, "beta_schedule is 3; expected text"),
        ("scheduler/scheduler_config.json", "timestep_spacing", "cosine", "timestep_spacing 'cosine' not supported"),
        ("scheduler/scheduler_config.json", "trained_betas", [0.1, 0.2], "trained_betas is"),
        ("scheduler/scheduler_config.json", "_class_name", "FlowMatchEulerDiscreteScheduler", "is no scheduler of Stable Diffusion's"),
        ("tokenizer/tokenizer_config.json", "model_max_length", "77", "model_max_length is '77'; expected a whole number"),
        ("tokenizer/tokenizer_config.json", "added_tokens_decoder", [1], "added_tokens_decoder is"),
        ("unet/config.json", "down_block_types", ["SimpleCrossAttnDownBlock2D"] * 3, "expected CrossAttnDownBlock2D or DownBlock2D"),
        ("vae/config.json", "latents_mean", [0.1] * 4, "latents_mean is"),
        ("text_encoder/config.json", "hidden_act", "relu", "hidden_act 'relu'"),
        ("scheduler/scheduler_config.json", "beta_schedule", "linear", "beta_schedule is 'linear'"),
        ("scheduler/scheduler_config.json", "prediction_type", "sample", "prediction_type 'sample' not supported"),
    ],
)
def test_a_setting_that_stable_diffusion_does_not_have_is_refused_by_name(file, setting, value, message, tmp_path):
    weights_loader.save(family_model("SD 1"), tmp_path / "model", layout="diffusers")
    settings = json.loads((tmp_path / "model" / file).read_text())
    (tmp_path / "model" / file).write_text(json.dumps(settings | {setting: value}))
    with pytest.raises(ValueError, match=message):
        weights_loader.load(tmp_path / "model")


def test_a_file_missing_from_a_folder_is_named(tmp_path):
    weights_loader.save(family_model("SD 1"), tmp_path / "model", layout="diffusers")
    shutil.rmtree(tmp_path / "model/scheduler")
    with pytest.raises(FileNotFoundError, match=r"scheduler_config.json: no such file, and a diffusers folder needs it"):
        weights_loader.load(tmp_path / "model")


def test_a_damaged_json_file_is_named(tmp_path):
    weights_loader.save(family_model("SD 1"), tmp_path / "model", layout="diffusers")
    (tmp_path / "model/unet/config.json").write_text('{"in_channels": 4,')
    with pytest.raises(ValueError, match="unet/config.json: no JSON"):
        weights_loader.load(tmp_path / "model")


def test_an_old_folder_that_does_not_say_the_prediction_is_tested(tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "noise_correlation", lambda *parts: 0.99)
    for family in ("SD 1", "SD 2"):
        folder = tmp_path / family
        weights_loader.save(family_model(family), folder, layout="diffusers")
        scheduler = folder / "scheduler/scheduler_config.json"
        settings = json.loads(scheduler.read_text())
        del settings["prediction_type"]
        scheduler.write_text(json.dumps(settings))
        loaded = weights_loader.load(folder)
        assert loaded.config.schedule.prediction == "eps"
        assert loaded.notes[0].startswith("predicts eps: decided by a numerical test")


@pytest.mark.parametrize("family", family_configs())
def test_a_config_is_read_back_from_the_json_files(family, tmp_path):
    config = family_configs()[family]
    write_folder_config(tmp_path, config, tokenizers(config))
    # guidance_scale has no place in such a folder
    assert folder_config(tmp_path) == (dataclasses.replace(config, guidance_scale=family_of_config(config).config.guidance_scale), True)


@pytest.mark.parametrize("config", [SD1, SD2, SDXL], ids=["SD 1", "SD 2", "SDXL"])
def test_the_public_configs_are_read_back_and_clips_merges_are_recognised(config, tmp_path):
    write_folder_config(tmp_path, config, tokenizers(config))
    assert folder_config(tmp_path) == (config, True)


def without(path, *names):
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name not in names}))


@pytest.mark.parametrize(
    "scheduler, missing, message",
    [
        ("DDIMScheduler", "beta_schedule", r"beta_schedule is 'linear' .diffusers' default., which is not supported"),
        ("HeunDiscreteScheduler", "beta_schedule", r"beta_schedule is 'linear' .diffusers' default."),
        ("LCMScheduler", "beta_schedule", None),
        ("DDIMScheduler", "beta_end", None),
    ],
)
def test_a_missing_setting_is_what_diffusers_takes(scheduler, missing, message, tmp_path):
    write_folder_config(tmp_path, SD1, tokenizers(SD1))
    path = tmp_path / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": scheduler}))
    without(path, missing, "timestep_spacing")
    if message:
        with pytest.raises(ValueError, match=message):
            folder_config(tmp_path)
        return
    theirs = getattr(diffusers, scheduler).from_pretrained(tmp_path / "scheduler")
    ours = folder_config(tmp_path)[0].schedule
    assert ours.beta_end == theirs.config.beta_end and ours.spacing == theirs.config.timestep_spacing
    assert torch.allclose(NoiseSchedule(ours).alpha_bar.float(), theirs.alphas_cumprod, rtol=1e-5)  # theirs is a product in float32


@pytest.mark.parametrize("part, theirs", [("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)])
def test_every_setting_of_diffusers_is_known_with_its_default(part, theirs):
    defaults = {name: one.default for name, one in inspect.signature(theirs.__init__).parameters.items() if name != "self"}
    for name, default in defaults.items():
        if name in READ[part]:
            assert READ[part][name][1] in (default, NEEDED, None), name
        elif name in SETTINGS[part]:
            given = default if isinstance(default, tuple) else (default,)
            assert all(one == SETTINGS[part][name] for one in given), name
        else:
            assert HARMLESS[part].fullmatch(name) or not default, name  # what a later version adds is off by default


def test_every_scheduler_takes_what_diffusers_takes():
    for name, ours in SCHEDULERS.items():
        theirs = getattr(diffusers, f"{name}Scheduler", None)
        if theirs is None or name in ("LMSDiscrete", "DPMSolverSDE"):  # need packages that are not here
            continue
        parameters = inspect.signature(theirs.__init__).parameters
        assert all(parameters[key].default == value for key, value in ours.items() if key in parameters), name


WRONG = (None, True, -1, 0, 2**70, 0.5, float("nan"), "4", "", [], {}, [None], [[1]], {"a": 1}, [1] * 100)
JSON_FILES = ["unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json", "model_index.json"]
JSON_FILES += [f"tokenizer/{name}.json" for name in ("tokenizer_config", "special_tokens_map", "vocab", "added_tokens", "tokenizer")]


@pytest.mark.parametrize("file", JSON_FILES)
def test_values_of_any_type_end_in_a_config_or_in_one_line(file, tmp_path):
    config = family_configs()["SD 1"]
    write_folder_config(tmp_path, config, tokenizers(config))
    path, read = tmp_path / file, 0
    if file == "tokenizer/added_tokens.json":
        path.write_text('{"<a>": 3}')
    if file == "tokenizer/tokenizer.json":
        path.write_text(json.dumps({"model": {"vocab": {}, "merges": []}, "added_tokens": []}))
        (tmp_path / "tokenizer/merges.txt").unlink(), (tmp_path / "tokenizer/vocab.json").unlink()
    values = json.loads(path.read_text())
    for wrong in (*WRONG, *({name: value} for name in list(values)[:30] for value in WRONG)):
        path.write_text(json.dumps(values | wrong if isinstance(wrong, dict) else wrong))
        try:
            folder_config(tmp_path)
            read += 1
        except (ValueError, FileNotFoundError) as error:
            assert str(error) and len(str(error)) < 1000 and "\n" not in str(error), wrong
    assert read < len(values) * len(WRONG)


@pytest.mark.parametrize("lines", [1, 100, 400])
@pytest.mark.parametrize("kept", ["vocab.json", "the end token", "the rows"])
def test_a_merges_file_that_was_cut_short_is_refused(kept, lines, tmp_path):
    config = family_configs()["SD 1"]
    write_folder_config(tmp_path, config, tokenizers(config))
    merges = tmp_path / "tokenizer/merges.txt"
    merges.write_text("\n".join(merges.read_text().split("\n")[:-lines]))
    if kept != "vocab.json":
        (tmp_path / "tokenizer/vocab.json").unlink()
    if kept == "the rows":
        without(tmp_path / "text_encoder/config.json", "eos_token_id")
    said = {"vocab.json": "by the vocabulary", "the end token": "by the text encoder", "the rows": "rows"}[kept]
    if lines == 1:  # the newline at its end
        folder_config(tmp_path)
    else:
        with pytest.raises(ValueError, match=rf"merges.txt: .* {said}.*cut short"):
            folder_config(tmp_path)


@pytest.mark.parametrize("family", ["SD 1", "SD 2"])
def test_transformers_reads_the_tokenizer_files_and_gives_the_same_tokens(family, tmp_path):
    config = family_configs()[family]
    write_folder_config(tmp_path, config, tokenizers(config))
    ours = Tokenizer(config.tokenizer)
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    # Without "!", which transformers takes for padding wherever it stands, once that is what pads.
    texts = ["a red apple on a blue background", "sks dog, 42", "", "café"]
    expected = theirs(texts, padding="max_length", max_length=theirs.model_max_length, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(ours(texts), expected)


def with_words(sd, words):
    """The model with these words and a row for each at the end of its table."""
    config = sd.config
    text = dataclasses.replace(config.text_encoder, vocab_size=config.text_encoder.vocab_size + len(words))
    sd.config = dataclasses.replace(config, text_encoder=text, tokenizer=dataclasses.replace(config.tokenizer, added=words))
    rows = torch.randn(len(words), text.width, generator=torch.Generator().manual_seed(4))
    sd.text_encoder.token_embedding = torch.nn.Embedding.from_pretrained(torch.cat([sd.text_encoder.token_embedding.weight.detach(), rows]))
    sd.text.tokenizers["text_encoder"] = Tokenizer(sd.config.tokenizer)
    return sd


@pytest.mark.parametrize("family", ["SD 1", "SD 2"])
def test_words_that_were_added_to_a_model_are_written_read_and_known_to_diffusers(family, tmp_path):
    sd = with_words(family_model(family), ("<Cat>", "sks-1"))
    pipeline = diffusers_folder(sd, tmp_path / "theirs")
    # Version 5 of transformers knows an added word in any case, as it knows all others; before, only as it was added.
    prompt = "a <cat> on SKS-1, red" if int(transformers.__version__.split(".")[0]) >= 5 else "a <Cat> on sks-1, red"
    ids = pipeline.tokenizer(prompt, padding="max_length", max_length=pipeline.tokenizer.model_max_length, return_tensors="pt").input_ids
    assert torch.equal(sd.tokenizer([prompt]), ids) and ids.max() == sd.config.text_encoder.vocab_size - 1
    pipeline.save_pretrained(tmp_path / "theirs")  # transformers has other files for them
    weights_loader.save(sd, tmp_path / "model.safetensors")
    for path in (tmp_path / "ours", tmp_path / "theirs", tmp_path / "model.safetensors"):
        loaded = weights_loader.load(path)
        assert loaded.config.tokenizer.added == ("<Cat>", "sks-1")
        assert torch.equal(loaded.tokenizer([prompt]), ids) and torch.equal(loaded.encode_prompts([prompt]), sd.encode_prompts([prompt]))


def test_words_in_the_file_of_older_folders_are_read(tmp_path):
    config = family_configs()["SD 1"]
    write_folder_config(tmp_path, config, tokenizers(config))
    size = config.text_encoder.vocab_size
    for words, expected in (({"<b>": size + 1, "<a>": size, "old": 3}, ("<a>", "<b>")), ({}, ())):
        (tmp_path / "tokenizer" / "added_tokens.json").write_text(json.dumps(words))
        assert folder_config(tmp_path)[0].tokenizer.added == expected
    (tmp_path / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<a>": size + 1}))
    with pytest.raises(ValueError, match=rf"tokenizer: added words have the ids {size + 1} '<a>'; expected {size}, {size + 1}, ..."):
        folder_config(tmp_path)


def test_words_without_rows_are_an_error(tmp_path):
    weights_loader.save(family_model("SD 1"), tmp_path / "model", layout="diffusers")
    (tmp_path / "model/tokenizer/added_tokens.json").write_text(json.dumps({"<a>": 1126}))
    with pytest.raises(ValueError, match="the tokenizer knows 1127 tokens, the text encoder 1126"):
        weights_loader.load(tmp_path / "model")


def test_shapes_of_another_size_than_the_json_says_are_an_error(tmp_path):
    weights_loader.save(family_model("SD 1"), tmp_path / "model", layout="diffusers")
    config = tmp_path / "model/unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 32}))
    with pytest.raises(ValueError, match="0 keys missing, 0 unexpected, 14 of the wrong shape"):
        weights_loader.load(tmp_path / "model")


def test_a_folder_that_makes_no_picture_is_said_to_be_left_out(tmp_path):
    weights_loader.save(family_model("SD 1"), tmp_path / "model", layout="diffusers")
    (tmp_path / "model/safety_checker").mkdir()
    assert weights_loader.load(tmp_path / "model").notes == ("safety_checker/ is left out: no part of making a picture",)


def test_the_padding_of_sd_2_is_in_the_special_tokens_map_of_its_old_files(tmp_path):
    write_folder_config(tmp_path, SD2, tokenizers(SD2))
    settings = json.loads((tmp_path / "tokenizer" / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder", None)
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<|endoftext|>"}))
    (tmp_path / "tokenizer" / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    assert folder_config(tmp_path)[0].tokenizer.padding == "zero"


def test_the_wrong_sample_size_of_old_folders_is_not_believed(tmp_path):
    write_folder_config(tmp_path, SD1, tokenizers(SD1))
    path = tmp_path / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 32}))
    assert folder_config(tmp_path)[0].image_size == 512
