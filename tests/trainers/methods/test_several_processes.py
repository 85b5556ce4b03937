"""Several processes train what one does with the whole batch, whatever a method trains and wherever that is in the model."""

import pytest
import torch

from minidiff.trainers.engine import distributed
from minidiff.trainers.engine.loop import Training
from tests.small_concepts import quick, small_concept, small_methods
from tests.small_models import small_model
from tests.small_task import CPU, together

# adapters on U-Net and text encoder, with dropout; a word; the model itself, with class pictures; a table of words and some layers
CASES = [("lora", 0), ("pivotal", 0), ("pivotal", 1), ("dreambooth, text encoder", 0), ("fine-tune", 0)]


def first_gradients(name, number, concept, settings):
    """The loss of a first step and the gradient of each weight, None where it has none. No weight is 0, as half of a new LoRA is."""
    build, options, _ = small_methods()[name]
    with build(small_model(), [concept], options).phases[number] as phase:
        training = Training(phase, settings, CPU)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in training.weights.values():
                p += 0.02 * torch.randn(p.shape, generator=generator)
        loss = training._gradients()
        return loss, {name: p.grad for name, p in training.weights.items()}


@pytest.mark.forks
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "number"), CASES)
def test_the_gradients_of_every_method_are_those_of_one_process(tmp_path, name, number, checkpointing):
    concept = small_concept(tmp_path, token=small_methods()[name][2])

    def run():
        settings = quick(batch=2, gradient_accumulation=2, checkpointing=checkpointing)
        torch.save(first_gradients(name, number, concept, settings), tmp_path / f"{distributed.rank()}.pt")

    assert together(2, run) == [0, 0]
    loss, alone = first_gradients(name, number, concept, quick(batch=8))
    largest = max(gradient.abs().max().item() for gradient in alone.values() if gradient is not None)
    for process in (0, 1):
        told, gradients = torch.load(tmp_path / f"{process}.pt")
        torch.testing.assert_close(told, loss, rtol=1e-5, atol=0)  # float32: sums in another order
        assert gradients.keys() == alone.keys() and all("module" not in name for name in gradients)
        for name, gradient in alone.items():
            assert (gradient is None) == (gradients[name] is None), name
            if gradient is not None:  # likewise, through some thirty layers; single numbers may cancel, and those of a key's bias all do
                floor = max(1e-4 * gradient.abs().max().item(), 1e-6 * largest)
                torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=floor)
