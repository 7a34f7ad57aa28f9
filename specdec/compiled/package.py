"""Compiles a module ahead of time, and keeps on disk what was compiled."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from specdec.priors import cache_folder

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
    with _LOCK, _undisturbed(inputs[0].device):
        program = torch.export.export(module, tuple(inputs), dynamic_shapes=(tuple(dynamic),), strict=False)
        return _compiled(program, module, name)


def _compiled(program: ExportedProgram, module: nn.Module, name: str) -> Function:
    file = cache_folder() / f"{_digest(program, module)}.pt2"
    if not file.exists():
        _LOGGER.warning("compiling the passes of %s, once on this machine: about half a minute", name)
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder) / "package.pt2"
            torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=dict(CONFIG))
            if not _keep(package, file):
                return _loaded(package, program, module)
    return _loaded(file, program, module)


def _keep(package: Path, file: Path) -> bool:
    """Puts a package into the cache; False where that cannot be written to."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}")
        part.write_bytes(package.read_bytes())
        part.replace(file)
    except OSError:
        return False
    return True


def _loaded(package: Path, program: ExportedProgram, module: nn.Module) -> Function:
    loaded = torch._inductor.aoti_load_package(str(package))
    tensors: dict[str, Any] = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
        **program.constants,
    }
    constants = {name: tensors[name].detach() for name in loaded.get_constant_fqns()}
    loaded.load_constants(constants, check_full_update=True, user_managed=True)

    def function(*inputs: Tensor, _kept: Any = constants) -> Sequence[Tensor]:
        outputs: Sequence[Tensor] = loaded(*inputs)
        return outputs

    return function


def _digest(program: ExportedProgram, module: nn.Module) -> str:
    """Tells apart what would be compiled to something else."""
    device = next(iter(module.parameters())).device
    parts: list[Any] = [program, torch.__version__, CONFIG, torch.get_float32_matmul_precision(), _processor()]
    parts.append(torch.are_deterministic_algorithms_enabled())
    parts += [torch.cuda.get_device_name(device), torch.version.cuda] if device.type == "cuda" else []
    digest = hashlib.sha256("\n".join(map(str, parts)).encode())
    for name, constant in sorted(program.constants.items()):
        digest.update(name.encode())
        if isinstance(constant, Tensor):
            digest.update(constant.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


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
