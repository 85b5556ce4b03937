"""Read a pickle as data: nothing in it runs.

Checkpoints from before safetensors (.ckpt, .pt, .bin) are pickles, and a pickle is a program: the instructions of a small
stack machine, some of which import any function of Python and call it. Here those instructions are walked one by one:

    instruction                       what Python does                     what happens here
    GLOBAL, STACK_GLOBAL              imports what is named                a Name: the text, nothing imported
    REDUCE                            calls it                             one of the few functions below, else refused
    INST, OBJ                         calls it                             refused
    NEWOBJ, NEWOBJ_EX                 cls.__new__(...)                     an InertObject
    BUILD                             __setstate__ or any attribute        ignored
    EXT1, EXT2, EXT4                  looks up a registered function       refused

No name is ever looked up in Python's modules, so there is no class or function for a file to reach: the table
`CALLS` holds our own few lines in place of torch's and the standard library's.

Left out: numbers, arrays and sets of other libraries keep their place but lose their value (INERT_CALLS); no weight is
stored as one. The machine itself is described in Python's own pickletools.
"""

import mmap
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor


class Refused(ValueError):
    """Why a file is not read, in words for whoever gave it."""


@dataclass(frozen=True)
class Name:
    """What a pickle calls by name, such as `os.system`: the text only."""

    path: str


@dataclass(eq=False)
class InertObject:
    """Stands where the pickle has an object of a class that is not ours. What was in it is gone."""

    name: Name


def unpickle(
    buffer: mmap.mmap,
    load_storage: Callable[[tuple], Tensor | Name],
    load_bytes: Callable[[bytes], Tensor],
) -> tuple[object, tuple[str, ...]]:
    """Return the value of one pickle, and the names in it that stayed inert.

    Dicts of any kind come as dict, sets as list, tensors as views of their storage, without requires_grad.

    Args:
        buffer: a mapped file, read from its position to the pickle's end.
        load_storage: takes a persistent id, as ("storage", Name("torch.FloatStorage"), key, location, numel), and gives the whole
            storage as one flat tensor.
        load_bytes: does the same for a torch file inside the pickle, the way that tensors are pickled without torch.save.

    Raises Refused when the file asks for a call that is not in CALLS, ValueError when it is no whole pickle.
    """
    machine = _Machine(load_storage, load_bytes)
    try:
        return machine.run(buffer), tuple(machine.inert)
    except Refused:
        raise
    except Exception as error:  # a damaged pickle can trip over anything: an empty stack, an unknown memo, a wrong type
        raise ValueError(f"damaged or cut short: {type(error).__name__}: {error}") from error


def rebuild_tensor(storage: Tensor, offset: int, shape: tuple, stride: tuple, *_unused) -> Tensor:
    """Make a view of a flat storage, as torch._utils._rebuild_tensor_v2.

    Args:
        storage: flat.
        offset: the first element's place in the storage.
        shape, stride: one integer per axis, in elements.
        _unused: what follows the stride, which concerns autograd.

    Raises Refused for a tensor that does not fit its storage.
    """
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, Tensor) or storage.dim() != 1:
        raise Refused(f"damaged: a tensor is built from {type(storage).__name__}; expected a storage")
    if len(shape) != len(stride) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise Refused(
            f"damaged: a tensor has offset {offset}, shape {shape}, stride {stride}; expected integers from 0, one stride an axis"
        )
    end = offset + 1 + sum((size - 1) * step for size, step in zip(shape, stride)) if 0 not in shape else offset
    if end > storage.numel():
        raise Refused(f"damaged: a tensor of shape {shape} needs {end} elements of a storage that has {storage.numel()}")
    return storage.as_strided(shape, stride, offset)


def _dict(items=()) -> dict:
    result = {}
    _set_items(result, [part for pair in (items.items() if isinstance(items, dict) else items) for part in pair])
    return result


# Hashing follows tuples inward without a limit, so one nested a million deep would end the whole process.
_KEY_TYPES = (str, bytes, int, float, type(None), Name, InertObject)


def _set_items(target: dict, keys_and_values: list):
    for key, value in zip(keys_and_values[::2], keys_and_values[1::2], strict=True):
        if not isinstance(key, _KEY_TYPES):
            raise ValueError(f"{_describe(key)} as a key; expected text or a number")
        target[key] = value


# The calls that are made, by the function's name in the file.
CALLS = {
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_unused: tensor,
    "torch.Size": tuple,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda _factory=None, items=(): _dict(items),
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # how bytes look in a pickle of protocol 2
}

# Harmless calls that training scripts leave in a file beside the weights. They are not made either: an InertObject is the result.
INERT_CALLS = {
    "__builtin__.set",
    "builtins.set",
    "collections.Counter",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "torch.device",
}

_STORAGE_DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _STORAGE_DTYPES.items()}
_DTYPES = {str(dtype): dtype for dtype in STORAGES.values()}

# Instructions that put their argument on the stack.
_CONSTANTS = {
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "LONG4",
    "FLOAT",
    "BINFLOAT",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "BYTEARRAY8",
    "UNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE",
    "BINUNICODE8",
}


class _Machine:
    """The stack machine that a pickle is written for, without the instructions that reach outside."""

    def __init__(self, load_storage: Callable[[tuple], Tensor | Name], load_bytes: Callable[[bytes], Tensor]):
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.inert: dict[str, None] = {}  # a dict as a set that keeps its order
        self.load_storage = load_storage
        self.calls: dict[str, Callable] = CALLS | {"torch.storage._load_from_bytes": load_bytes}

    def run(self, buffer: mmap.mmap) -> object:
        for opcode, argument, _position in pickletools.genops(buffer):  # type: ignore[arg-type]  # an mmap reads like a file
            if opcode.name in _CONSTANTS:
                self.stack.append(argument)
            elif opcode.name == "STOP":
                return self.stack.pop()
            elif not (self.plain(opcode.name, argument) or self.container(opcode.name) or self.outside(opcode.name, argument)):
                raise ValueError(f"the instruction {opcode.name}, which no weights need")
        raise ValueError("no STOP at its end")

    def plain(self, name: str, argument) -> bool:
        """Handle the stack, the memo and single values. Like the next two, return whether the instruction was one of these."""
        stack = self.stack
        match name:
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self.memo[argument])
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "MARK":
                self.marks.append(len(stack))
            case "POP":
                stack.pop()
            case "POP_MARK":
                self.pop_to_mark()
            case "DUP":
                stack.append(stack[-1])
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "PROTO" | "FRAME":
                pass
            case _:
                return False
        return True

    def container(self, name: str) -> bool:
        """Handle tuples, lists, dicts, and sets as lists."""
        stack = self.stack
        match name:
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
            case "TUPLE":
                stack.append(tuple(self.pop_to_mark()))
            case "EMPTY_TUPLE":
                stack.append(())
            case "LIST" | "FROZENSET":
                stack.append(self.pop_to_mark())
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "APPEND":
                self.append([stack.pop()])
            case "APPENDS" | "ADDITEMS":
                self.append(self.pop_to_mark())
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                items = self.pop_to_mark()
                stack.append({})
                self.set_items(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.pop_to_mark())
            case _:
                return False
        return True

    def outside(self, name: str, argument) -> bool:
        """Handle the instructions by which a pickle reaches beyond itself: the table in the module's docstring."""
        stack = self.stack
        match name:
            case "BINPERSID":
                stack.append(self.load_storage(stack.pop()))
            case "GLOBAL":
                self.push_name(*argument.split(" ", 1))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                self.push_name(module, attribute)
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self.call(function, arguments))
            case "INST":
                _refuse_call(Name(argument.replace(" ", ".")))
            case "OBJ":
                _refuse_call(self.pop_to_mark()[0])
            case "EXT1" | "EXT2" | "EXT4":
                raise Refused(f"refused: the file asks for number {argument} of Python's registered extensions ({name})")
            case "NEWOBJ" | "NEWOBJ_EX":
                del stack[-1 if name == "NEWOBJ" else -2 :]
                cls = stack.pop()
                if not isinstance(cls, Name) or cls.path in self.calls:
                    _refuse_call(cls)
                stack.append(InertObject(cls))
            case "BUILD":
                stack.pop()
                if not isinstance(stack[-1], dict | InertObject):
                    raise Refused(f"refused: the file sets the attributes of {_describe(stack[-1])}")
            case _:
                return False
        return True

    def push_name(self, module: str, attribute: str):
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise ValueError(f"a name made of {_describe(module)} and {_describe(attribute)}; expected text")
        path = f"{module}.{attribute}"
        if path in _DTYPES:
            self.stack.append(_DTYPES[path])
            return
        if path not in self.calls and path not in STORAGES and path not in INERT_CALLS:
            self.inert[path] = None
        self.stack.append(Name(path))

    def call(self, function: object, arguments: tuple) -> object:
        if not isinstance(function, Name):
            _refuse_call(function)
        if function.path in INERT_CALLS:
            return InertObject(function)
        if function.path not in self.calls:
            _refuse_call(function)
        return self.calls[function.path](*arguments)

    def pop_to_mark(self) -> list:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def append(self, items: list):
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, InertObject):
            raise ValueError(f"items for {_describe(target)}; expected a list")

    def set_items(self, keys_and_values: list):
        target = self.stack[-1]
        if isinstance(target, InertObject):
            return
        if not isinstance(target, dict):
            raise ValueError(f"keys for {_describe(target)}; expected a dict")
        _set_items(target, keys_and_values)


def _refuse_call(function: object) -> NoReturn:
    raise Refused(
        f"refused: the file asks to call {_describe(function)}, and weights need no call; nothing in it was run. Ask for a safetensors file"
    )


def _describe(value: object) -> str:
    return f"'{value.path}'" if isinstance(value, Name) else f"a value of type {type(value).__name__}"
