"""Read a pickle as data: nothing in it runs.

Checkpoints from before safetensors (.ckpt, .pt, .bin) are pickles, and a pickle is a program: the instructions of a small
stack machine, some of which import any function of Python and call it. Here those instructions are walked one by one:

    instruction                       what Python does                     what happens here
    GLOBAL, STACK_GLOBAL              imports what is named                a Name: the text, nothing imported
    REDUCE                            calls it                             one of the few functions below, else an InertObject
    INST, OBJ                         calls it                             refused
    NEWOBJ, NEWOBJ_EX                 cls.__new__(...)                     an InertObject
    BUILD                             __setstate__ or any attribute        ignored
    EXT1, EXT2, EXT4                  looks up a registered function       refused

No name is ever looked up in Python's modules, so there is no class or function for a file to reach: the table
`CALLS` holds our own few lines in place of torch's and the standard library's. A file that asks for a function by which
attacks reach the system is refused altogether (ATTACKS), and one with such an object among its weights by checkpoint.py.

A small file can ask for much memory: by views of more elements than their storage has, or by one value made again and
again. So what is made is counted, and bounded by a multiple of the pickle's size; so is the number of instructions.

Left out: numbers, arrays and sets of other libraries keep their place but lose their value (INERT_CALLS); no weight is
stored as one. The machine itself is described in Python's own pickletools.
"""

import math
import mmap
import pickletools
import re
import reprlib
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
    """Stands where the pickle has an object of a class that is not ours. What was in it is gone.

    called: whether Python would have called `name` to make it, which may do anything.
    """

    name: Name
    called: bool = False


class ParameterDict(dict):
    """The parameters of a pickled torch.nn.ParameterDict, in which the authors of Textual Inversion save their words."""


def unpickle(
    buffer: mmap.mmap,
    size: int,
    load_storage: Callable[[tuple], Tensor | Name],
    load_bytes: Callable[[bytes], Tensor],
) -> tuple[object, tuple[str, ...]]:
    """Return the value of one pickle, and the names in it that stayed inert.

    Dicts of any kind come as dict, sets as list, tensors as views of their storage, without requires_grad.

    Args:
        buffer: a mapped file, read from its position to the pickle's end.
        size: the most bytes that the pickle can have.
        load_storage: takes a persistent id, as ("storage", Name("torch.FloatStorage"), key, location, numel), and gives the whole
            storage as one flat tensor.
        load_bytes: does the same for a torch file inside the pickle, the way that tensors are pickled without torch.save.

    Raises Refused when the file asks for a call by which attacks work or for far more than it holds, ValueError when it is no whole pickle.
    """
    machine = _Machine(size, load_storage, load_bytes)
    try:
        return machine.run(buffer), tuple(machine.inert)
    except Refused:
        raise
    except Exception as error:  # a damaged pickle can trip over anything: an empty stack, an unknown memo, a wrong type
        raise ValueError(f"damaged or cut short: {type(error).__name__}: {str(error)[:LONGEST_NAME]}") from error


def rebuild_tensor(storage: Tensor, offset: int, shape: tuple | list, stride: tuple | list, *_unused) -> Tensor:
    """Make a view of a flat storage, as torch._utils._rebuild_tensor_v2.

    Args:
        storage: flat.
        offset: the first element's place in the storage.
        shape, stride: one integer per axis, in elements.
        _unused: what follows the stride, which concerns autograd.

    Raises Refused for a tensor that does not fit its storage.
    """
    if not isinstance(storage, Tensor) or storage.dim() != 1:
        raise Refused(f"damaged: a tensor is built from {type(storage).__name__}; expected a storage")
    if not isinstance(shape, tuple | list) or not isinstance(stride, tuple | list) or len(shape) > MOST_AXES:
        raise Refused(f"damaged: a tensor's shape is {reprlib.repr(shape)}, its stride {reprlib.repr(stride)}; expected a few integers")
    if len(shape) != len(stride) or not all(type(number) is int and number >= 0 for number in (offset, *shape, *stride)):
        raise Refused(
            f"damaged: a tensor has offset {offset}, shape {shape}, stride {stride}; expected integers from 0, one stride an axis"
        )
    end = offset + 1 + sum((size - 1) * step for size, step in zip(shape, stride)) if 0 not in shape else offset
    needed = max(end, math.prod(shape))  # a view may show an element twice, so that few numbers look like many
    if needed > storage.numel():
        raise Refused(f"damaged: a tensor of shape {tuple(shape)} needs {needed} elements of a storage that has {storage.numel()}")
    return storage.as_strided(shape, stride, offset)


def _rebuild_typed(storage: Tensor, offset: int, shape: tuple, stride: tuple, _gradient, _hooks, dtype: object, *_unused) -> Tensor:
    """Make a view of an untyped storage, as torch._utils._rebuild_tensor_v3: the newer dtypes are stored in this way."""
    if not isinstance(dtype, torch.dtype) or not isinstance(storage, Tensor) or storage.dtype != torch.uint8:
        raise Refused(f"damaged: a tensor of dtype {_describe(dtype)} is built from {_describe(storage)}; expected untyped bytes")
    if storage.numel() % dtype.itemsize:
        raise Refused(f"damaged: a storage of {storage.numel()} bytes for numbers of {dtype.itemsize} bytes each")
    return rebuild_tensor(storage.view(dtype), offset, shape, stride)


def _size(numbers) -> tuple:
    if not isinstance(numbers, tuple | list):
        raise Refused(f"damaged: a size made of {_describe(numbers)}; expected integers")
    return tuple(numbers)


def _text_to_bytes(text, _encoding) -> bytes:
    """Return bytes as a pickle of protocol 2 holds them."""
    if not isinstance(text, str):
        raise Refused(f"damaged: bytes made of {_describe(text)}; expected text")
    return text.encode("latin1")


def _dict(items=()) -> dict:
    pairs = list(items.items()) if isinstance(items, dict) else items
    if not isinstance(pairs, list | tuple) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise Refused(f"damaged: a dict made of {_describe(items)}; expected pairs")
    result = {}
    _set_items(result, [part for pair in pairs for part in pair])
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
    "torch._utils._rebuild_tensor_v3": _rebuild_typed,
    "torch._utils._rebuild_parameter": lambda tensor, *_unused: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_unused: tensor,
    "torch.Size": _size,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": lambda _factory=None, items=(): _dict(items),
    "_codecs.encode": _text_to_bytes,
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
STORAGES |= {"torch.storage.UntypedStorage": torch.uint8, "torch.UntypedStorage": torch.uint8}
_NEWER = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "uint16", "uint32", "uint64")
_DTYPES = {str(dtype): dtype for dtype in (*_STORAGE_DTYPES.values(), *(getattr(torch, name) for name in _NEWER if hasattr(torch, name)))}
PARAMETER_DICT = "torch.nn.modules.container.ParameterDict"

# What no training script leaves in a file: a file that asks to call one of these attacks whoever reads it with Python's own pickle.
ATTACKS = re.compile(
    r"(os|posix|nt|sys|subprocess|shutil|socket|ctypes|importlib|runpy|pty|platform|signal|pickle|_pickle|marshal|types|code|webbrowser"
    r"|requests|urllib|http|pip|timeit|cProfile|pdb|bdb)\..+"
    r"|(builtins|__builtin__)\.(eval|exec|compile|open|__import__|input|breakpoint|globals|locals|vars|setattr|delattr|execfile|map|apply)"
    r"|torch\.(load|hub\..+|serialization\..+|jit\..+|utils\.cpp_extension\..+)|numpy\.(load|f2py\..+)|operator\.(attrgetter|methodcaller)"
)

MADE_FREE, MADE_PER_BYTE = 16_000_000, 32  # bytes: what any pickle may make, and for each of its own bytes
CONTAINER, CALL, MEMO = 64, 512, 100  # bytes that these take at least
MOST_INSTRUCTIONS = 4_000_000  # some seconds; a Stable Diffusion's pickle has 40,000
MOST_MARKS, MOST_AXES, LONGEST_NAME = 10_000, 16, 300

_MAKING = {"TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "LIST", "FROZENSET", "EMPTY_LIST", "EMPTY_SET", "EMPTY_DICT", "DICT"}
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

    def __init__(self, size: int, load_storage: Callable[[tuple], Tensor | Name], load_bytes: Callable[[bytes], Tensor]):
        self.left = MADE_FREE + MADE_PER_BYTE * size
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.inert: dict[str, None] = {}  # a dict as a set that keeps its order
        self.load_storage = load_storage
        own = {"torch.storage._load_from_bytes": load_bytes, "torch._tensor._rebuild_from_type_v2": self.call_inner}
        self.calls: dict[str, Callable] = CALLS | own

    def run(self, buffer: mmap.mmap) -> object:
        for number, (opcode, argument, _position) in enumerate(pickletools.genops(buffer)):  # type: ignore[arg-type]  # reads like a file
            if number > MOST_INSTRUCTIONS:
                raise Refused(f"damaged, or no weights: a pickle of more than {MOST_INSTRUCTIONS:,} instructions")
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
                self.spend(MEMO)
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self.memo[argument])
            case "MEMOIZE":
                self.spend(MEMO)
                self.memo[len(self.memo)] = stack[-1]
            case "MARK":
                if len(self.marks) >= MOST_MARKS:
                    raise ValueError("nested too deep")
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
        if name in _MAKING:
            self.spend(CONTAINER)
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
                refuse_call(Name(argument.replace(" ", ".")))
            case "OBJ":
                refuse_call(self.pop_to_mark()[0])
            case "EXT1" | "EXT2" | "EXT4":
                raise Refused(f"refused: the file asks for number {argument} of Python's registered extensions ({name})")
            case "NEWOBJ" | "NEWOBJ_EX":
                del stack[-1 if name == "NEWOBJ" else -2 :]
                cls = stack.pop()
                if not isinstance(cls, Name) or cls.path in self.calls:
                    refuse_call(cls)
                self.spend(CALL)
                stack.append(ParameterDict() if cls.path == PARAMETER_DICT else InertObject(cls))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], ParameterDict) and isinstance(state, dict):
                    held = state.get("_parameters")
                    stack[-1].update(held if isinstance(held, dict) else {})
                if not isinstance(stack[-1], dict | InertObject):
                    raise Refused(f"refused: the file sets the attributes of {_describe(stack[-1])}")
            case _:
                return False
        return True

    def push_name(self, module: str, attribute: str):
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise ValueError(f"a name made of {_describe(module)} and {_describe(attribute)}; expected text")
        path = f"{module}.{attribute}"
        if len(path) > LONGEST_NAME:
            raise ValueError(f"a name of {len(path)} letters")
        self.spend(CONTAINER)
        if path in _DTYPES:
            self.stack.append(_DTYPES[path])
            return
        if path not in self.calls and path not in STORAGES and path not in INERT_CALLS and path != PARAMETER_DICT:
            self.inert[path] = None
        self.stack.append(Name(path))

    def call(self, function: object, arguments: tuple) -> object:
        if not isinstance(function, Name) or ATTACKS.fullmatch(function.path):
            refuse_call(function)
        if not isinstance(arguments, tuple):
            raise ValueError(f"the arguments of '{function.path}' are {_describe(arguments)}; expected a tuple")
        if function.path not in self.calls:
            self.spend(CALL)
            return InertObject(function, called=function.path not in INERT_CALLS)
        # What is made of a value may be as large as the value, and a value can be taken from the memo any number of times.
        self.spend(CALL + sum(len(one) * CONTAINER for one in arguments if isinstance(one, dict | list | tuple | str | bytes | bytearray)))
        return self.calls[function.path](*arguments)

    def call_inner(self, function: object, _type: object, arguments: tuple, *_state: object) -> object:
        """Do what torch._tensor._rebuild_from_type_v2 does for a tensor with attributes of its own, which are left out."""
        if isinstance(function, Name) and function.path.endswith("_rebuild_from_type_v2"):
            raise ValueError("a tensor with attributes, rebuilt of itself")
        return self.call(function, arguments)

    def spend(self, size: int):
        """Count bytes that are made. Raises Refused for many times more than the file has."""
        self.left -= size
        if self.left < 0:
            raise Refused("damaged or hostile: a pickle that asks for many times more memory than it has bytes")

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


def refuse_call(function: object) -> NoReturn:
    """Raise Refused for a file that asks to call a function, or a value that is none."""
    raise Refused(
        f"refused: the file asks to call {_describe(function)}, and weights need no call; nothing in it was run. Ask for a safetensors file"
    )


def _describe(value: object) -> str:
    value = value.name if isinstance(value, InertObject) else value
    return f"'{value.path}'" if isinstance(value, Name) else f"a value of type {type(value).__name__}"
