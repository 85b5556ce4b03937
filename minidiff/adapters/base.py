"""The base of everything that changes what a model computes without touching its weights: LoRA, new words, Custom Diffusion, ...

    adapter.attach(sd)      hooks on the layers of sd, and the adapter on the list sd.attached
    adapter.detach()        both are gone, and the model computes as before, bit for bit

The hooks of several adapters on one layer run in this order:

    input      changes what the layer reads, before it runs        multi-head parallel adapters, before to_out
    replace    gives the layer's output in place of the layer      Custom Diffusion
    add        adds to the output and keeps its shape              LoRA, adapters beside and behind a layer
    extend     makes the output longer                             prefix tuning, after to_k and to_v

A replacing hook always goes to the front, so it may come at any time. Nothing can be added once the output is longer, so what extends an
output is attached last. New words change no layer and may come at any time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

from torch import nn
from torch.utils.hooks import RemovableHandle

from minidiff.pipeline import StableDiffusion

Effect = Literal["input", "replace", "add", "extend"]  # see above
_changes = count(1)  # numbered over all adapters, so that no two ever have the same version


@dataclass(frozen=True, eq=False)
class Hook:
    """A function that a layer is to run at each call.

    Use a bound method or a partial of one, never a lambda: a deep copy of the model then runs a copy of the adapter.
    function: (layer, args) -> new args for "input", else (layer, args, output) -> new output.
    """

    layer: nn.Module
    function: Callable[..., Any]
    effect: Effect = "add"

    def register(self) -> RemovableHandle:
        """Put the function on the layer, in front of all others if it replaces the output."""
        if self.effect == "input":
            return self.layer.register_forward_pre_hook(self.function)
        return self.layer.register_forward_hook(self.function, prepend=self.effect == "replace")


class Adapter(nn.Module):
    """A module that is put on a model and taken off again. A subclass defines `fit`, and `title` for messages.

    layers: modules by the names of the layers they belong to, for an adapter that has one per layer.
    version: a number that grows whenever the adapter may compute something else than before, except by a change of its parameters in place:
    when it is attached or detached, moved or cast by `to`, switched between training and evaluation, and when any public attribute is set.
    What was captured from the model (a CUDA graph) holds as long as the versions in sd.attached stay the same.
    """

    title = "this adapter"
    version = 0

    def __init__(self, layers: Mapping[str, nn.Module] | None = None):
        super().__init__()
        # The name of a submodule must not have a dot in it.
        self.by_name = nn.ModuleDict({name.replace(".", "/"): module for name, module in (layers or {}).items()})
        self._sd: StableDiffusion | None = None
        self._hooks: tuple[Hook, ...] = ()
        self._handles: list[RemovableHandle] = []

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name != "version" and not name.startswith("_"):
            self.version = next(_changes)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "Adapter":
        """Count a move or a cast: `to`, `half`, `cuda` and the like all end here."""
        self.version = next(_changes)
        return super()._apply(fn, recurse)

    @property
    def layers(self) -> dict[str, Any]:
        """Return the modules by layer."""
        return {name.replace("/", "."): module for name, module in self.by_name.items()}

    @property
    def attached(self) -> bool:
        """Whether the adapter is on a model now."""
        return self._sd is not None

    def fit(self, sd: StableDiffusion) -> Sequence[Hook]:
        """Return the hooks that the adapter needs on this model, without changing the model.

        Raises ValueError for what does not fit the model.
        """
        raise NotImplementedError

    def attach(self, sd: StableDiffusion) -> None:
        """Move to the model's device; from now on the model computes with this adapter, in the dtype that it has.

        Raises ValueError, and changes nothing, if this is attached already, does not fit the model, or comes too late (see the
        order above).
        """
        if self.attached:
            raise ValueError(f"{self.title}: attached already; detach first")
        hooks = tuple(self.fit(sd))
        self._check_order(hooks, sd)
        self.to(sd.device)
        self._handles = [hook.register() for hook in hooks]
        self._hooks, self._sd = hooks, sd
        sd.attached.append(self)
        self.version = next(_changes)

    def detach(self) -> None:
        """Leave the model as it was before `attach`. Does nothing if this is not attached."""
        if self._sd is None:
            return
        for handle in self._handles:
            handle.remove()
        self._sd.attached.remove(self)
        self._hooks, self._handles, self._sd = (), [], None
        self.version = next(_changes)

    def changes(self, layer: nn.Module, effect: Effect) -> bool:
        """Return whether this adapter is attached with a hook of this effect on the layer."""
        return any(hook.layer is layer and hook.effect == effect for hook in self._hooks)

    def _check_order(self, hooks: Sequence[Hook], sd: StableDiffusion) -> None:
        for hook in hooks:
            for other in sd.attached:
                if hook.effect == "add" and other.changes(hook.layer, "extend"):
                    raise ValueError(
                        f"{self.title} adds to the output of a layer that {other.title} has made longer, as prefix tuning does; "
                        f"attach {self.title} before it"
                    )
