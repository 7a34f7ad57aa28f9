"""A module without its weights: a description to tell packages apart, and a copy for another process."""

from __future__ import annotations

import copyreg
import functools
import hashlib
import io
import json
import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.passes.compiled.forward import IMPLEMENTATION
from specdec.passes.cuda_graphs.fingerprint import PLAIN

SMALL = 64
"""Tensors of at most this many elements count by value: torch writes the smallest into the code it generates."""
NOT_DESCRIBED = frozenset(
    {"_modules", "_parameters", "_buffers", "_is_full_backward_hook", "_version", "_compiled_call_impl"}
)
_NOT_OF_THE_FORWARD = frozenset({"_name_or_path", "transformers_version"})


def describe(module: nn.Module) -> Iterator[str]:
    """Lines that differ where another forward would be compiled; the same in every process.

    They hold classes and their source files, plain attributes, configs, and shape, type and sharing of weights. The
    values of weights are left out, those of tiny tensors excepted.
    """
    tensors: dict[int, str] = {}
    configs: dict[int, str] = {}
    files: set[Path] = set()
    for name, part in module.named_modules(remove_duplicate=False):
        forward = type(part).forward
        yield f"{name}: {_name(type(part))} {_name(forward)}"
        for kind in (*type(part).__mro__, forward):
            files |= _source_of(kind)
        for key, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                yield f"{name}.{key}: {tensors.setdefault(id(tensor), f'{name}.{key}')} {_described_tensor(tensor)}"
        for key, value in sorted(vars(part).items()):
            if key not in NOT_DESCRIBED and "_hooks" not in key:
                files |= _source_of(value)
                yield f"{name}.{key} = {_described(value, configs)}"
    for file in sorted(files):
        yield f"{file.name}: {_hash(file)}"


def _described(value: Any, configs: dict[int, str]) -> str:
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        return _described_tensor(value)
    if isinstance(value, Mapping):
        return str(sorted((str(key), _described(item, configs)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return str([_described(item, configs) for item in value])
    if isinstance(value, (set, frozenset)):
        return str(sorted(_described(item, configs) for item in value))
    if isinstance(value, functools.partial):
        return f"partial {_described([value.func, value.args, value.keywords], configs)}"
    if hasattr(value, "to_diff_dict") and hasattr(value, "to_dict"):
        return configs.setdefault(id(value), _described_config(value))
    return _name(value if callable(value) and hasattr(value, "__qualname__") else type(value))


def _described_config(config: Any) -> str:
    attention = getattr(config, "_attn_implementation", None)
    attention = "sdpa" if attention == IMPLEMENTATION else attention
    values = {key: value for key, value in config.to_dict().items() if key not in _NOT_OF_THE_FORWARD}
    return f"{attention} {json.dumps(values, sort_keys=True, default=str)}"


def _described_tensor(tensor: Tensor) -> str:
    text = f"{type(tensor).__name__} {tuple(tensor.shape)} {tensor.stride()} {tensor.dtype} {tensor.device.type}"
    is_small = tensor.numel() <= SMALL and tensor.device.type != "meta"
    return f"{text} {tensor.detach().cpu().tolist()}" if is_small else text


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"


def _source_of(value: Any) -> set[Path]:
    """The file a class or function comes from; none for torch's own, whose version is told elsewhere."""
    name = getattr(value, "__module__", None) if isinstance(getattr(value, "__qualname__", None), str) else None
    if name is None or name.partition(".")[0] in ("builtins", "torch", "typing", "abc"):
        return set()
    file = getattr(sys.modules.get(name), "__file__", None)
    return {Path(file)} if file else set()


@functools.cache
def _hash(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return "unreadable"


class _Pickler(pickle.Pickler):
    """Leaves out forward hooks and the values of all tensors that are not tiny."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: dict[int, Tensor] = {}

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) not in (Tensor, nn.Parameter) or obj.numel() <= SMALL:
            return None
        self.tensors[id(obj)] = obj  # kept alive, so that no other one gets its id
        layout = tuple(obj.shape), obj.stride(), obj.dtype, str(obj.device)
        return id(obj), layout, obj.requires_grad, isinstance(obj, nn.Parameter)

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, nn.Module):
            return NotImplemented
        state = {key: OrderedDict() if "_hooks" in key else value for key, value in vars(obj).items()}
        return copyreg.__newobj__, (type(obj),), state  # type: ignore[attr-defined]


class _Unpickler(pickle.Unpickler):
    """Makes tensors whose memory is never touched in place of those that were left out."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: dict[int, Tensor] = {}

    def persistent_load(self, pid: Any) -> Tensor:
        number, (shape, stride, dtype, device), needs_gradient, is_parameter = pid
        if number not in self.tensors:
            tensor = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            self.tensors[number] = nn.Parameter(tensor, needs_gradient) if is_parameter else tensor
        return self.tensors[number]


def without_weights(*objects: Any) -> bytes:
    """Modules and whatever belongs to them, for another process on this machine.

    Raises:
        Exception: Something in them cannot be pickled.
    """
    file = io.BytesIO()
    _Pickler(file).dump(objects)
    return file.getvalue()


def restored(content: bytes) -> Any:
    """What the process that started this one has put into `without_weights`; no other source may be read."""
    return _Unpickler(io.BytesIO(content)).load()
