"""A state as a safetensors file.

The file's tensors are those of the state under made-up keys; its metadata has the state itself as JSON, in which an
object with one key stands for what JSON has not: ``{"tensor": key}``, ``{"dict": [[key, value], ...]}``,
``{"tuple": [...]}``. So names may hold anything, and all comes back as it was. A checksum covers that text and all
tensors. Files of the first version have neither a checksum nor tuples; they are still read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from hetu import arguments
from hetu.errors import HetuError, caller
from hetu.graph import Graph
from hetu.runtime.checkpoint import at_rest, state_dict
from hetu.runtime.copies import dense, refuse
from hetu.runtime.files import refuse_special, replacing
from hetu.runtime.modes import in_own_modes

PATH = str | os.PathLike[str]
VERSION = 2
DEEPEST = 100
"""How far the parts of a state may be nested."""

_DICTS: Mapping[type, str] = {dict: "dict", Counter: "counter", OrderedDict: "ordered"}
_EXACT = 2**63
"""Ints from here on are written in base 16: Python neither writes nor reads thousands of digits in base 10."""


@in_own_modes
def save(what: Graph | Mapping[str, Any], path: PATH) -> None:
    """See :func:`hetu.save`."""
    target = arguments.path(path, op="save")
    if isinstance(what, Graph):
        state = what.executor.state
        with at_rest(state):
            encoder = _Encoder(state_dict(state, copy=False, op="save"))
    elif isinstance(what, Mapping):
        encoder = _Encoder(what)
    else:
        refuse(f"can't save {arguments.shown(what)}", "give a graph, or a state as g.state_dict() gives it", op="save")
    text = json.dumps({"version": VERSION, **encoder.value})
    metadata = {"hetu": text, "checksum": _checksum(text, encoder.tensors)}
    with replacing(target) as beside:
        _write(encoder.tensors, beside, metadata, target)


def _write(tensors: dict[str, torch.Tensor], beside: str, metadata: dict[str, str], target: str) -> None:
    from safetensors.torch import save_file

    try:
        save_file(tensors, beside, metadata=metadata)
    except OSError:
        raise
    except Exception as error:  # safetensors has its own for a full disk, and others for dtypes that it has not
        why = f"{type(error).__name__}: {error}".replace(beside, target)
        raise HetuError(f"{target} can't be written: {why}", op="save", where=caller()) from error


@in_own_modes
def load(path: PATH) -> dict[str, Any]:
    """See :func:`hetu.load`."""
    from safetensors import safe_open

    source = arguments.path(path, op="load")
    refuse_special(source, "load")
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: what is mapped would change with the file, and end the process if that became shorter.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - it is no dict
    except OSError:
        raise
    except Exception as error:  # what is damaged may fail anywhere
        raise _damaged(source, error) from error
    if "hetu" not in metadata:
        refuse(f"{source} is a safetensors file, but not one that hetu.save wrote", "load it with safetensors")
    try:
        tree = json.loads(metadata["hetu"])
        version = tree.pop("version", 1)
        if version == VERSION and metadata["checksum"] != _checksum(metadata["hetu"], tensors):
            raise ValueError("the checksum is another")
        found = _decoded(tree, tensors)
    except Exception as error:
        raise _damaged(source, error) from error
    if version not in (1, VERSION):
        refuse(f"{source} is of version {version!r}, expected {VERSION}", "use the hetu that wrote it")
    if not isinstance(found, dict):
        refuse(f"{source} holds no state of a graph")
    return found


def _damaged(path: str, error: Exception) -> HetuError:
    what = f"{path} is no whole safetensors file: {type(error).__name__}: {error}"
    return HetuError(what, op="load", where=caller(), fix="use an earlier checkpoint")


class _Encoder:
    """A state as a JSON value in which keys stand for tensors, which are put aside.

    Attributes:
        value: The JSON value.
        tensors: The tensors, on the CPU, by key.
    """

    def __init__(self, state: Mapping[Any, Any]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.value = self._encode(state, 0)

    def _encode(self, value: Any, depth: int) -> Any:
        if depth > DEEPEST:
            refuse(
                f"a state may be nested {DEEPEST} times; this one is deeper, or holds itself", "flatten it", op="save"
            )
        if isinstance(value, torch.Tensor):
            return {"tensor": self._put_aside(value)}
        if isinstance(value, Mapping):
            kind = _DICTS.get(type(value), "dict")
            return {kind: [[self._key(key, depth), self._encode(item, depth + 1)] for key, item in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [self._encode(item, depth + 1) for item in value]}
        if isinstance(value, list):
            return [self._encode(item, depth + 1) for item in value]
        if value is None or isinstance(value, str):
            return value
        number = arguments.number_of(value)
        if number is None:
            refuse(
                f"a state may hold tensors, numbers and strings, not {type(value).__name__}",
                "take it out of the state; if it came with the schedule, use one that torch itself can save",
                op="save",
            )
        return {"int": hex(number)} if isinstance(number, int) and abs(number) >= _EXACT else number

    def _key(self, key: Any, depth: int) -> Any:
        parts = key if isinstance(key, tuple) else ()
        if isinstance(key, torch.Tensor) or any(isinstance(part, torch.Tensor) for part in parts):
            refuse("a state may have strings, numbers and tuples of them as keys, not tensors", "name it", op="save")
        return self._encode(key, depth + 1)

    def _put_aside(self, value: torch.Tensor) -> str:
        key = f"t{len(self.tensors)}"
        whole = dense(value, "a tensor of the state", op="save").resolve_conj().resolve_neg()
        # A file has each tensor whole and by itself, however they lie in memory.
        self.tensors[key] = whole.to("cpu", copy=True, memory_format=torch.contiguous_format)
        return key


def _decoded(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The inverse; a value that is of none of these forms raises any error."""
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    return _FORMS[kind](content, tensors)


def _pairs(content: Any, tensors: Mapping[str, torch.Tensor]) -> dict[Any, Any]:
    return {_decoded(key, tensors): _decoded(item, tensors) for key, item in content}


_FORMS: Mapping[str, Callable[[Any, Mapping[str, torch.Tensor]], Any]] = {
    "tensor": lambda content, tensors: tensors[content],
    "dict": _pairs,
    "counter": lambda content, tensors: Counter(_pairs(content, tensors)),
    "ordered": lambda content, tensors: OrderedDict(_pairs(content, tensors)),
    "tuple": lambda content, tensors: tuple(_decoded(list(content), tensors)),
    "int": lambda content, tensors: int(content, 16),
}


def _checksum(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """A digest of all that a file holds."""

    def one(key: str) -> bytes:
        tensor = tensors[key]
        digest = hashlib.blake2b(f"{key} {tensor.dtype} {list(tensor.shape)} ".encode(), digest_size=16)
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.digest()

    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        digests = list(pool.map(one, sorted(tensors)))
    return hashlib.blake2b(text.encode() + b"".join(digests), digest_size=16).hexdigest()
