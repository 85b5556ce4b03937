"""What every adapter has in common: the list on the model, the version that a captured graph goes by, the order of hooks."""

import copy

import pytest
import torch

from minidiff.adapters.base import Adapter, Hook
from minidiff.adapters.custom_diffusion import CustomDiffusion, create_custom_diffusion
from minidiff.adapters.lora import LoRA
from minidiff.adapters.low_rank import LowRank
from minidiff.adapters.parallel import create_adapters
from minidiff.adapters.tokens import NewTokens
from tests.adapters.learned_lora import KEYS, generator, random_lora
from tests.small_models import small_model


@pytest.fixture
def sd():
    return small_model()


def prefix(sd):
    return create_adapters(sd, ("cross_attention$",), method="prefix", rank=3, generator=generator())


def every_kind(sd):
    words = NewTokens({"<new1>": torch.ones(1, 16)})
    return {
        "words": words,
        "Custom Diffusion": create_custom_diffusion(sd, tokens=NewTokens({"<new2>": torch.ones(2, 16)})),
        "LoRA": random_lora(sd, KEYS),
        "prefix": prefix(sd),
    }


def answer(sd):
    x, context = torch.randn(2, 4, 8, 8, generator=generator()), torch.randn(2, 7, 16, generator=generator())
    return sd.unet(x, torch.tensor([3, 700]), context)


# --- the list ---------------------------------------------------------------------------------------------------------


def test_the_model_lists_what_is_attached_in_its_order(sd):
    words, delta, lora, rows = every_kind(sd).values()
    for one in (words, delta, lora, rows):
        one.attach(sd)
    assert sd.attached == [words, delta.tokens, delta, lora, rows]
    lora.detach()
    delta.detach()
    assert sd.attached == [words, rows]
    delta.detach()  # without effect
    rows.detach(), words.detach()
    assert sd.attached == []


def test_what_does_not_fit_is_not_listed(sd):
    delta = CustomDiffusion({"unet.nowhere.to_k": torch.ones(16, 16)}, NewTokens({"<new1>": torch.ones(1, 16)}))
    for one in (delta, NewTokens({"<a>": torch.ones(1, 8)}), LoRA({"unet.x": LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)})):
        with pytest.raises(ValueError, match=r"no layer unet|wide"):
            one.attach(sd)
        assert sd.attached == [] and not one.attached


def test_a_deep_copy_lists_its_own_adapters_which_come_off_alone(sd):
    lora, before = random_lora(sd, KEYS), answer(sd)
    lora.attach(sd)
    live, copied = answer(sd), copy.deepcopy(sd)
    (other,) = copied.attached
    assert other is not lora
    other.detach()
    assert torch.equal(answer(copied), before) and torch.equal(answer(sd), live)
    assert copied.attached == [] and sd.attached == [lora]


# --- the version ------------------------------------------------------------------------------------------------------

CHANGES = {
    "attached": lambda adapter, sd: adapter.attach(sd),
    "detached": lambda adapter, sd: (adapter.attach(sd), adapter.detach()),
    "cast": lambda adapter, sd: adapter.to(torch.float64),
    "moved": lambda adapter, sd: adapter.to("meta"),
    "trained": lambda adapter, sd: (adapter.eval(), adapter.train()),
    "a setting": lambda adapter, sd: setattr(adapter, "weight", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["words", "Custom Diffusion", "LoRA", "prefix"])
def test_the_version_grows_with_whatever_changes_the_adapter(kind, change, sd):
    adapter = every_kind(sd)[kind]
    before = adapter.version
    CHANGES[change](adapter, sd)
    assert adapter.version > before


def test_the_version_stays_while_nothing_changes_or_parameters_are_written_in_place(sd):
    for adapter in every_kind(sd).values():
        adapter.attach(sd)
        before = adapter.version
        answer(sd)
        with torch.no_grad():
            for p in adapter.parameters():
                p.mul_(1.1)
        assert adapter.version == before


# --- the order --------------------------------------------------------------------------------------------------------


def test_a_custom_diffusion_gives_the_same_before_and_after_a_lora(sd):
    lora, delta = random_lora(sd, KEYS), create_custom_diffusion(sd)
    with torch.no_grad():
        for W in delta.weights:
            W.mul_(2)
    answers = []
    for order in ((lora, delta), (delta, lora)):
        for one in order:
            one.attach(sd)
        answers.append(answer(sd))
        for one in order:
            one.detach()
    assert torch.equal(*answers)


def test_a_prefix_comes_last_and_a_custom_diffusion_or_words_may_follow_it(sd):
    rows, delta, words = prefix(sd), create_custom_diffusion(sd), NewTokens({"<new1>": torch.ones(1, 16)})
    rows.attach(sd)
    before = answer(sd)
    with pytest.raises(ValueError, match="attach this LoRA before it"):
        random_lora(sd, KEYS).attach(sd)
    random_lora(sd, (r"self_attention\.to_k$",)).attach(sd)  # on other layers
    sd.attached[-1].detach()
    delta.attach(sd), words.attach(sd)
    assert torch.equal(answer(sd), before)  # its weights are the model's


# --- plugging in ------------------------------------------------------------------------------------------------------


class Louder(Adapter):
    """A toy adapter: the output of the first convolution, twice."""

    title = "the louder one"

    def fit(self, sd):
        return [Hook(sd.unet.conv_in, self.double)]

    def double(self, layer, args, output):
        return 2 * output


def test_a_new_kind_of_adapter_is_its_hooks(sd):
    before, loud = answer(sd), Louder()
    loud.attach(sd)
    assert not torch.equal(answer(sd), before) and sd.attached == [loud]
    with pytest.raises(ValueError, match="the louder one: attached already"):
        loud.attach(sd)
    loud.detach()
    assert torch.equal(answer(sd), before)
