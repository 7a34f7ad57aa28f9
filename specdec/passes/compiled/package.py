"""Compiles a module ahead of time, and keeps on disk what was compiled."""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import platform
import stat
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save
from torch import Tensor, nn

from specdec.common.folders import cache_folder
from specdec.passes.compiled.structure import describe

CONFIG: dict[str, Any] = {
    # Weights stay where the model has them.
    "aot_inductor.package_constants_in_so": False,
    # What is between matrix products is small, and a second OpenMP runtime would fight torch's own for the cores.
    "cpp.threads": 1,
}
Function = Callable[..., Sequence[Tensor]]
_LOCK = threading.Lock()
"""torch compiles one thing at a time."""
_LOGGER = logging.getLogger(__name__)


def compile_ahead(module: nn.Module, inputs: Sequence[Tensor], dynamic: Sequence[Any], name: str) -> Function:
    """A compiled function in a module's place; it reads the module's parameters and buffers where they are.

    Args:
        module: With a forward of `*inputs`, to a tuple of tensors.
        inputs: Examples. What is written to an input is written to it by the function, too.
        dynamic: Per input which dimensions may have other sizes, as for `torch.export.export`.
        name: For a message, in case it must be compiled and was not found on the disk.

    Raises:
        Exception: Whatever torch raises where it cannot export or compile.
    """
    file = package_file(module, inputs, dynamic)
    with _LOCK, _undisturbed(inputs[0].device):
        if file.exists():
            return load(file, module)
        _LOGGER.warning("compiling the passes of %s, once on this machine; this takes minutes for many layers", name)
        with tempfile.TemporaryDirectory() as folder, locked(file, waits=True):
            if not file.exists():
                made = write_package(Path(folder), module, inputs, dynamic)
                if not keep(made, file):
                    return load(made, module)
        return load(file, module)


def write_package(folder: Path, module: nn.Module, inputs: Sequence[Tensor], dynamic: Sequence[Any]) -> Path:
    """Exports and compiles, into a folder; beside the package stand tensors that the forward itself makes, if any.

    Raises:
        Exception: Whatever torch raises where it cannot export or compile.
    """
    package = folder / "package.pt2"
    with _undisturbed(inputs[0].device):
        program = torch.export.export(module, tuple(inputs), dynamic_shapes=(tuple(dynamic),), strict=False)
        torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=dict(CONFIG))
    own = {name for name, _ in (*module.named_parameters(remove_duplicate=False), *_buffers(module))}
    constants = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in program.constants.items()
        if isinstance(tensor, Tensor) and name not in own
    }
    if constants:
        _constants_of(package).write_bytes(save(constants))
    return package


def keep(package: Path, file: Path) -> bool:
    """Puts a package into the cache; False where that cannot be written to."""
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for source, kept in ((_constants_of(package), _constants_of(file)), (package, file)):  # the package last
            if source.exists():
                part = kept.with_name(f"{kept.name}.{os.getpid()}")
                part.write_bytes(source.read_bytes())
                part.replace(kept)
        failure_file(file).unlink(missing_ok=True)
    except OSError:
        return False
    return True


def check_owner(package: Path) -> None:
    """Refuses a package that someone else may have written: it is native code that runs as the caller.

    Raises:
        PermissionError: It, or its folder, belongs to another user or can be written by everyone.
    """
    if not hasattr(os, "getuid"):
        return
    for path in (package, package.parent):
        found = path.stat()
        is_open = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
        if is_open or found.st_uid not in (0, os.getuid()):
            problem = "can be written by everyone" if is_open else "belongs to another user"
            raise PermissionError(
                f"{path} {problem}, so what was compiled is not loaded; delete it, or set SPECDEC_CACHE to a folder of "
                "your own"
            )


def load(package: Path, module: nn.Module) -> Function:
    """The function of a package, with a module's weights.

    Raises:
        PermissionError: See `check_owner`.
    """
    check_owner(package)
    loaded = torch._inductor.aoti_load_package(str(package))
    device = next(iter(module.parameters())).device
    made = load_file(_constants_of(package), device=str(device)) if _constants_of(package).exists() else {}
    tensors: Mapping[str, Tensor] = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(_buffers(module)),
        **made,
    }
    constants = {name: tensors[name].detach() for name in loaded.get_constant_fqns()}
    loaded.load_constants(constants, check_full_update=True, user_managed=True)

    def function(*inputs: Tensor, _kept: Any = constants) -> Sequence[Tensor]:
        outputs: Sequence[Tensor] = loaded(*inputs)
        return outputs

    return function


def package_file(module: nn.Module, inputs: Sequence[Tensor], dynamic: Sequence[Any]) -> Path:
    """Where the package of a module is, or would be; another one for whatever would be compiled to something else."""
    call = [getattr(module, "layout", None), dynamic, *((tuple(x.shape), x.dtype, x.device.type) for x in inputs)]
    return cache_folder() / f"{module_digest(module)}-{_digest(map(str, call))}.pt2"


def module_digest(module: nn.Module) -> str:
    """Begins the names of all packages of a module on this machine, whatever the kinds of inputs."""
    device = next(iter(module.parameters())).device
    parts: list[Any] = [torch.__version__, transformers.__version__, CONFIG, torch.get_float32_matmul_precision()]
    parts += [_processor(), torch.are_deterministic_algorithms_enabled()]
    parts += [torch.cuda.get_device_name(device), torch.version.cuda] if device.type == "cuda" else []
    return _digest([*map(str, parts), *describe(module)])


def failure_file(file: Path) -> Path:
    """Where the reason is kept why a package could not be compiled in the background."""
    return file.with_suffix(".failed")


def _constants_of(package: Path) -> Path:
    return package.with_suffix(".safetensors")


def _buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return module.named_buffers(remove_duplicate=False)


def _digest(lines: Any) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:24]


def _processor() -> str:
    """The processor's instructions: what is compiled for one processor may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Inside, torch may draw and warn as it likes, and no gradients are recorded."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def locked(file: Path, waits: bool) -> Iterator[bool]:
    """Holds the lock of a package; the system frees it when the process dies, however that may be.

    Args:
        file: The package.
        waits: Wait for whoever holds it.

    Yields:
        Whether it is held; True, too, where there are no locks, as in a folder that cannot be written to.
    """
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = file.with_suffix(".lock").open("w")
    except OSError:
        yield True
        return
    with lock:
        yield _take(lock.fileno(), waits)


def _take(descriptor: int, waits: bool) -> bool:
    try:
        fcntl: Any = importlib.import_module("fcntl")
        fcntl.flock(descriptor, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows, or a file system without locks
        return True
    return True
