"""The methods of personalising: what each one trains, which words go with which pictures, and every way to ask for too little."""

import dataclasses
import re
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

import weights_loader
from minidiff.config import SD1
from minidiff.trainers.data.augment import PAPER_SIZES
from minidiff.trainers.data.folder import read_folder
from minidiff.trainers.data.templates import fill_in
from minidiff.trainers.methods import custom_diffusion, dreambooth, fine_tune, lora, pivotal, textual_inversion
from minidiff.trainers.methods.common import names_token
from minidiff.trainers.methods.custom_diffusion import CustomDiffusionOptions, make_rare_tokens, size_augmentation
from minidiff.trainers.methods.dreambooth import DreamBoothOptions
from minidiff.trainers.methods.fine_tune import FineTuneOptions
from minidiff.trainers.methods.lora import LoRAOptions
from minidiff.trainers.methods.options import Concept, DataOptions, LowRankOptions, Prior
from minidiff.trainers.methods.pivotal import PivotalOptions
from minidiff.trainers.methods.prior_preservation import class_caption, fill_class_images
from minidiff.trainers.methods.textual_inversion import TextualInversionOptions
from minidiff.unet import UNet
from tests.small_concepts import FOLDER, picture_folder, quick, small_concept, small_methods
from tests.small_models import small_model
from tests.small_task import CPU

START = ("ktn", "pll", "ucd")


def trained(method, folder=None) -> list:
    return [step for _, step in method.run(CPU, folder)]


def values(sd) -> dict:
    return {
        f"{part}.{name}": p.detach().clone() for part in ("unet", "text_encoder", "vae") for name, p in getattr(sd, part).named_parameters()
    }


def moved(before, after) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def captions_of(method, phase=0) -> set[str]:
    return {example.caption for subject in method.phases[phase].subjects for example in subject.pictures.examples}


# --- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [name for name in small_methods() if "text encoder" not in name and name not in ("dreambooth", "fine-tune")]
)
def test_adapters_are_trained_beside_a_model_that_stays(tmp_path, name):
    function, options, token = small_methods()[name]
    sd, concept = small_model(), small_concept(tmp_path, token=token)
    before = values(sd)
    picture = sd.generate("a photo of a cat", steps=1)[0]
    method = function(sd, [concept], options)
    adapters = [one for one in (method.tokens, method.lora, method.custom_diffusion) if one is not None]
    at_first = [[p.detach().clone() for p in adapter.parameters()] for adapter in adapters]
    steps = trained(method)
    assert len(steps) == 3 * len(method.phases) and all(step.loss.isfinite() for step in steps)
    assert moved(before, values(sd)) == set()
    assert sd.generate("a photo of a cat", steps=1)[0].tobytes() == picture.tobytes()
    for adapter, old in zip(adapters, at_first):
        assert all(not torch.equal(a, b) for a, b in zip(old, adapter.parameters()))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("dreambooth", r"^unet\."),
        ("dreambooth, text encoder", r"^(unet|text_encoder)\."),
        ("fine-tune", r"^unet\.up.*conv_1|token_embedding"),
    ],
)
def test_the_models_own_weights_are_trained_where_they_are_named(tmp_path, name, pattern):
    function, options, token = small_methods()[name]
    sd = small_model()
    before = values(sd)
    method = function(sd, [small_concept(tmp_path, token=token)], options)
    trained(method)
    assert method.lora is method.tokens is method.custom_diffusion is None
    assert moved(before, values(sd)) == {name for name in before if re.search(pattern, name)}


def test_the_text_encoder_learns_at_its_own_rate(tmp_path):
    options = LoRAOptions(settings=quick(), low_rank=LowRankOptions(text_encoder=True, text_scale=0.25))
    method = lora.build(small_model(), [small_concept(tmp_path)], options)
    (optimizer,) = method.phases[0].optimizers(options.settings)
    assert [group["scale"] for group in optimizer.param_groups] == [1.0, 0.25]
    text = {p for name, low in method.lora.layers.items() if name.startswith("text_encoder.") for p in low.parameters()}
    assert text == set(optimizer.param_groups[1]["params"]) and len(text) == 2 * 2 * 4  # blocks, halves, projections


def test_new_words_start_from_the_class_and_then_stay_while_the_lora_learns(tmp_path):
    function, options, _ = small_methods()["pivotal"]
    sd = small_model()
    cat = sd.text_encoder.token_embedding.weight[sd.tokenizer.encode("cat")].detach().clone()
    method = function(sd, [small_concept(tmp_path)], options)
    rows = method.tokens.rows["<cat>"]
    assert torch.equal(rows, cat.expand(2, -1))
    after = {}
    for phase, step in method.run(CPU):
        if step.done == step.steps:
            after[phase.name] = rows.detach().clone()
    assert not torch.equal(after["tokens"], cat.expand(2, -1))
    assert torch.equal(after["tokens"], after["lora"])


def test_custom_diffusion_trains_nineteen_million_weights_of_stable_diffusion():
    from minidiff.adapters.custom_diffusion import create_custom_diffusion

    sd = small_model()
    with torch.device("meta"):
        sd.unet = UNet(SD1.unet)
    assert sum(p.numel() for p in create_custom_diffusion(sd).parameters()) == 19_169_280  # the paper's 75 MB in float32


def test_concepts_are_learnt_jointly_or_one_after_the_other(tmp_path):
    cat, dog = small_concept(tmp_path, "a"), small_concept(tmp_path, "b", token="<dog>", class_word="dog")
    options = CustomDiffusionOptions(settings=quick(), prior=FOLDER, start=START)
    sd = small_model()
    joint = custom_diffusion.build(sd, [cat, dog], options)
    assert joint.custom_diffusion.tokens.names == ("<cat>", "<dog>")
    assert captions_of(joint) == {"photo of a <cat> cat", "photo of a <dog> dog"}
    trained(joint)

    first = custom_diffusion.build(sd, [cat], options)
    trained(first)
    kept = {name: W.detach().clone() for name, W in first.custom_diffusion.layers.items()}
    second = custom_diffusion.build(sd, [dog], options, start_from=first.custom_diffusion)
    rows = second.custom_diffusion.tokens.rows
    assert list(rows) == ["<cat>", "<dog>"]
    assert torch.equal(rows["<dog>"], sd.text_encoder.token_embedding.weight[sd.tokenizer.encode("pll")])  # the next rare one
    assert all(torch.equal(W, kept[name]) for name, W in second.custom_diffusion.layers.items())
    trained(second)
    assert torch.equal(rows["<cat>"], first.custom_diffusion.tokens.rows["<cat>"])
    assert all(torch.equal(W, kept[name]) for name, W in first.custom_diffusion.layers.items())
    assert not any(torch.equal(W, kept[name]) for name, W in second.custom_diffusion.layers.items())
    with pytest.raises(ValueError, match="<cat> was learned before"):
        custom_diffusion.build(sd, [cat], options, start_from=first.custom_diffusion)


def test_the_averages_are_the_result(tmp_path):
    sd, concept = small_model(), small_concept(tmp_path)
    plain, averaged = (lora.build(sd, [concept], LoRAOptions(settings=quick(ema_decay=average))) for average in (None, 0.9))
    followed = {name: p.detach().clone() for name, p in averaged.lora.named_parameters()}
    for n, _ in enumerate(plain.run(CPU)):
        d = min(0.9, (1 + n) / (10 + n))
        followed = {name: d * followed[name] + (1 - d) * p.detach() for name, p in plain.lora.named_parameters()}
    trained(averaged)
    for name, p in averaged.lora.named_parameters():
        torch.testing.assert_close(p.detach(), followed[name], rtol=1e-5, atol=1e-7)  # lerp rounds otherwise


def test_a_method_that_was_stopped_goes_on_in_its_phase(tmp_path):
    function, options, _ = small_methods()["pivotal"]
    concept, results = small_concept(tmp_path), []
    for stop in (None, 5):
        sd, states = small_model(), tmp_path / str(stop)
        states.mkdir()
        seen = []
        for _ in range(1 if stop is None else 2):
            method = function(sd, [concept], options)
            run = method.run(CPU, states)
            for phase, step in run:
                seen.append((phase.name, step.done))
                if len(seen) == stop:
                    run.close()
        assert seen == [(name, i) for name in ("tokens", "lora") for i in (1, 2, 3)]
        results.append([*method.tokens.parameters(), *method.lora.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_what_was_learnt_is_written_and_read_back(tmp_path):
    sd = small_model()
    for name, write, read in (
        ("lora", weights_loader.write_lora, weights_loader.read_lora),
        ("textual inversion", lambda path, tokens, sd: weights_loader.write_embedding(path, tokens), weights_loader.read_embedding),
        ("custom diffusion", weights_loader.write_custom_diffusion, weights_loader.read_custom_diffusion),
    ):
        function, options, token = small_methods()[name]
        method = function(sd, [small_concept(tmp_path / name, token=token)], options)
        trained(method)
        adapter = method.lora or method.tokens or method.custom_diffusion
        path = tmp_path / f"{name}.safetensors"
        write(path, adapter, sd)
        again = read(path, sd)
        expected, found = (one.state_dict() for one in (adapter, again))
        assert expected.keys() == found.keys() and all(torch.equal(found[key], tensor) for key, tensor in expected.items())


# --- words ------------------------------------------------------------------------------------------------------------


def test_words_are_put_into_holes_with_the_right_article():
    assert fill_in("a photo of a {}", "apple") == "a photo of an apple"
    assert fill_in("a photo of a {}", "<cat> cat") == "a photo of a <cat> cat"
    assert fill_in("a photo of the {}", "apple") == "a photo of the apple"
    assert fill_in("a banana {}", "a\\1") == "a banana a\\1"


def test_dreambooth_says_the_rare_word_and_the_class_alone(tmp_path):
    options = DreamBoothOptions(settings=quick(), prior=FOLDER, low_rank=LowRankOptions())
    method = dreambooth.build(small_model(), [small_concept(tmp_path, token="sks", class_word="animal")], options)
    assert captions_of(method) == {"a photo of a sks animal"}
    assert {example.caption for example in method.phases[0].subjects[0].prior.examples} == {"a photo of an animal"}


def test_a_concept_brings_its_own_prompt_or_captions(tmp_path):
    options = LoRAOptions(settings=quick(), low_rank=LowRankOptions())
    concept = small_concept(tmp_path, token="sks", prompt="my sks thing")
    method = lora.build(small_model(), [concept], dataclasses.replace(options, prior=FOLDER))
    assert captions_of(method) == {"my sks thing"}
    assert {example.caption for example in method.phases[0].subjects[0].prior.examples} == {"a photo of a cat"}
    concept = small_concept(tmp_path, "b", token="sks", prompt="my {} at home")
    assert captions_of(lora.build(small_model(), [concept], options)) == {"my sks cat at home"}
    folder = picture_folder(tmp_path / "captioned", captions=("a {} on a red background", "the sks thing"))
    concept = Concept(images=folder, token="sks", class_word="cat", captions=True)
    assert captions_of(lora.build(small_model(), [concept], options)) == {"a sks cat on a red background", "the sks thing"}
    inverted = textual_inversion.build(
        small_model(),
        [dataclasses.replace(concept, token="<cat>", images=picture_folder(tmp_path / "c", captions=("a {} in snow",)))],
        TextualInversionOptions(settings=quick()),
    )
    assert captions_of(inverted) == {"a <cat> in snow"} and inverted.phases[0].subjects[0].templates == ()


@pytest.mark.parametrize(
    ("kind", "words", "expected"),
    [
        ("object", "photo", "a cropped photo of the <cat>"),
        ("style", "photo", "a painting in the style of <cat>"),
        ("style", "scenes", "a photo in <cat> style"),
    ],
)
def test_new_words_stand_in_templates_without_the_class(tmp_path, kind, words, expected):
    options = TextualInversionOptions(settings=quick(), kind=kind, template_set=words)
    templates = textual_inversion.build(small_model(), [small_concept(tmp_path)], options).phases[0].subjects[0].templates
    assert expected in templates and all("<cat>" in template and "cat>" in template and " cat" not in template for template in templates)


def test_sizes_are_said_in_words_that_the_model_knows(tmp_path):
    concept = small_concept(tmp_path)
    photo, scenes, none = (
        size_augmentation(concept, CustomDiffusionOptions(settings=quick(), sizes=sizes, size_phrases=words))
        for sizes, words in (("paper", "photo"), ("code", "scenes"), ("none", "photo"))
    )
    assert photo == PAPER_SIZES and none is None and scenes.kind == "code"
    assert scenes.with_phrase("a photo of a <cat> cat", "small") == "a photo of a small <cat> cat"


# --- class pictures ---------------------------------------------------------------------------------------------------


def test_class_pictures_are_generated_once_and_learnt_from(tmp_path):
    sd = small_model()
    concept = dataclasses.replace(small_concept(tmp_path, token="sks"), class_images=tmp_path / "generated")
    options = DreamBoothOptions(settings=quick(), prior=Prior(kind="generated", count=3, steps=1), low_rank=LowRankOptions())
    assert [filled.done for filled in fill_class_images(sd, concept, options)] == [3]
    prior = dreambooth.build(sd, [concept], options).phases[0].subjects[0].prior
    assert [example.caption for example in prior.examples] == ["a photo of a cat"] * 3
    expected = sd.generate("a photo of a cat", steps=1, seed=1)[0]
    assert Image.open(prior.examples[1].path).tobytes() == expected.tobytes()


def test_regularisation_pictures_are_scenes_or_captions_near_the_class(tmp_path):
    sd = small_model()
    concept = dataclasses.replace(small_concept(tmp_path), class_images=tmp_path / "scenes")
    scenes = Prior(kind="scenes", count=5)
    options = CustomDiffusionOptions(settings=quick(), prior=scenes, start=START)
    *_, filled = fill_class_images(sd, concept, options)
    assert filled.done == filled.count == 5
    prior = custom_diffusion.build(sd, [concept], options).phases[0].subjects[0].prior
    assert [example.caption for example in prior.examples] == [example.caption for example in read_folder(tmp_path / "scenes", size=32)]
    near = dataclasses.replace(options, prior=Prior(kind="near", count=2, min_similarity=None))
    assert len(custom_diffusion.build(sd, [concept], near).phases[0].subjects[0].prior) == 2


def test_a_folder_of_class_pictures_keeps_its_own_captions(tmp_path):
    options = LoRAOptions(settings=quick(), low_rank=LowRankOptions(), prior=FOLDER)
    folder = picture_folder(tmp_path / "captioned", captions=("one", "two"))
    concept = dataclasses.replace(small_concept(tmp_path), class_images=folder)
    for class_prompt, expected in ((None, {"one", "two"}), ("an icon of a {}", {"an icon of a cat"})):
        one = dataclasses.replace(concept, class_prompt=class_prompt)
        prior = lora.build(small_model(), [one], options).phases[0].subjects[0].prior
        assert {example.caption for example in prior.examples} == expected


# --- what is wrong is found before training ----------------------------------------------------------------------------


def test_a_name_that_splits_is_warned_of(tmp_path):
    options = DreamBoothOptions(settings=quick(), prior=Prior(), low_rank=LowRankOptions())
    with pytest.warns(UserWarning, match="token 'qzxwv' splits into . .*such as sks"):
        dreambooth.build(small_model(), [small_concept(tmp_path, token="qzxwv")], options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dreambooth.build(small_model(), [small_concept(tmp_path, "b", token="sks")], options)


LOW = LowRankOptions()
WRONG = {
    "nothing": (lora.build, LoRAOptions(settings=quick()), [], "no concept to learn"),
    "no hole's words": (
        lora.build,
        LoRAOptions(settings=quick()),
        [{"token": "", "class_word": ""}],
        "nothing for the hole of 'a photo of a {}'",
    ),
    "no class word": (
        dreambooth.build,
        DreamBoothOptions(settings=quick(), low_rank=LOW),
        [{"token": "sks", "class_word": ""}],
        "need a class word, such as dog",
    ),
    "no class folder": (
        dreambooth.build,
        DreamBoothOptions(settings=quick(), low_rank=LOW),
        [{"token": "sks", "class_images": None}],
        "the prior 'generated' needs class pictures",
    ),
    "no identifier": (dreambooth.build, DreamBoothOptions(settings=quick()), [{"token": ""}], "DreamBooth needs a token"),
    "unnamed": (lora.build, LoRAOptions(settings=quick()), [{"prompt": "my cat"}], "'my cat' does not name <cat>"),
    "known word": (
        textual_inversion.build,
        TextualInversionOptions(settings=quick()),
        [{"token": "dog"}],
        "'dog' is a word of the vocabulary already",
    ),
    "no word": (textual_inversion.build, TextualInversionOptions(settings=quick()), [{"token": ""}], "no token; give the new word"),
    "long start": (
        textual_inversion.build,
        TextualInversionOptions(settings=quick(), start="qzxwv"),
        [{}],
        "the start 'qzxwv' is not a single token",
    ),
    "one word twice": (textual_inversion.build, TextualInversionOptions(settings=quick()), [{}, {}], "'<cat>' is given for two concepts"),
    "too few starts": (
        custom_diffusion.build,
        CustomDiffusionOptions(settings=quick(), start=("ktn",), prior=Prior()),
        [{}, {"token": "<dog>"}],
        "2 concepts and 1 words to start from",
    ),
    "no such layer": (
        lora.build,
        LoRAOptions(settings=quick(), low_rank=LowRankOptions(layers=("to_w",))),
        [{}],
        "pattern 'to_w' matches no layer",
    ),
    "no such weight": (fine_tune.build, FineTuneOptions(settings=quick(), weights=("conv_9",)), [{}], "pattern 'conv_9' matches no layer"),
    "pictures too small": (lora.build, LoRAOptions(settings=quick(), data=DataOptions(size=128)), [{}], "32 x 32 pixels are too few"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_asked_for_is_checked_before_training(tmp_path, case):
    function, options, changes, message = WRONG[case]
    concepts = [small_concept(tmp_path, name, **change) for name, change in zip("ab", changes)]
    with pytest.raises(ValueError, match=re.escape(message)):
        function(small_model(), concepts, options)


def test_one_folder_is_not_two_concepts(tmp_path):
    concept = small_concept(tmp_path)
    with pytest.raises(ValueError, match="given twice"):
        lora.build(small_model(), [concept, concept], LoRAOptions(settings=quick()))


def test_a_models_own_weights_are_trained_in_float32_only(tmp_path):
    sd = small_model()
    sd.unet.bfloat16()
    with pytest.raises(ValueError, match="is torch.bfloat16, .*load the model in float32"):
        fine_tune.build(sd, [small_concept(tmp_path)], FineTuneOptions(settings=quick()))
    lora.build(sd, [small_concept(tmp_path, "b")], LoRAOptions(settings=quick()))


def test_an_inpainting_model_is_refused(tmp_path):
    from tests.small_models import small_config

    with pytest.raises(ValueError, match="9 input channels: an inpainting model"):
        lora.build(small_model(small_config(in_channels=9)), [small_concept(tmp_path)], LoRAOptions(settings=quick()))


def test_rare_words_and_class_captions_by_themselves():
    sd = small_model()
    assert make_rare_tokens(sd, [], START, torch.Generator(), {}) is None
    with pytest.raises(ValueError, match="class pictures need a class word"):
        class_caption(Concept(images=Path("x"), token="sks"), "a photo of a {}")


def test_pivotal_with_several_concepts_has_a_word_for_each(tmp_path):
    words = TextualInversionOptions(settings=quick(), template_set="scenes")
    options = PivotalOptions(tokens=words, lora=LoRAOptions(settings=quick(), low_rank=LOW))
    concepts = [small_concept(tmp_path, "a"), small_concept(tmp_path, "b", token="<dog>", class_word="dog")]
    method = pivotal.build(small_model(), concepts, options)
    assert method.tokens.names == ("<cat>", "<dog>")
    assert [phase.name for phase in method.phases] == ["tokens", "lora"]
    assert method.phases[1].subjects[1].templates[0] == "a <dog>"
    method = pivotal.build(small_model(), concepts, dataclasses.replace(options, lora=dataclasses.replace(options.lora, prior=FOLDER)))
    assert {example.caption for example in method.phases[1].subjects[1].prior.examples} == {"a photo of a dog"}


def test_a_caption_names_a_token_by_the_tokenizers_words():
    tokenizer = small_model().tokenizer
    for caption, token, named in (
        ("many tasks", "sks", False),
        ("a photo of sks, sitting", "sks", True),
        ("a SKS cat", "sks", True),
        ("a <cat>", "<cat>", True),
        ("a(<cat>)", "<cat>", True),
        ("a <cats>", "<cat>", False),
        ("cats and dogs", "cat", False),
        ("the red cat", "red cat", True),
        ("red, cat", "red cat", False),
    ):
        assert names_token(tokenizer, caption, token) == named, (caption, token)
    both = tokenizer.with_added({"<cat>": (9999,)})
    assert names_token(both, "a <cat>", "<cat>") and not names_token(both, "a cat", "<cat>")
