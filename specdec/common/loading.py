"""Models and prompts from the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from specdec.common.errors import UserError, user_errors

EMBEDDED = "embedded"
"""The name of the model that comes with the package."""
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    attn: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Loads a causal LM and its tokenizer.

    Args:
        name: `"embedded"`, `"embedded-draft"`, `"smollm2"`, a folder, or a name on the Hugging Face hub.
        dtype: One of `DTYPES`.
        device: Such as `"cpu"` or `"cuda:0"`; `"auto"` is CUDA where there is some. Not used with `device_map`.
        device_map: As for `from_pretrained`.
        attn: Attention implementation, as for `from_pretrained`.
        trust_remote_code: Run code that comes with the model.

    Raises:
        UserError: It cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not known; use one of {', '.join(DTYPES)}")
    path = path_of(name)
    if name.startswith(EMBEDDED) and device == "auto":
        device = "cpu"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kwargs: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    kwargs |= {"device_map": device_map} if device_map else {}
    kwargs |= {"attn_implementation": attn} if attn else {}
    with user_errors(
        OSError, ValueError, ImportError, KeyError, remedy="name a folder or a causal LM of the Hugging Face hub"
    ):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=trust_remote_code, **kwargs).eval()
    if not device_map:
        with user_errors(
            RuntimeError, AssertionError, ValueError, remedy=f"--device {device} cannot be used, try --device cpu"
        ):
            model = model.to(device)
    return model, tokenizer


def own_draft_model(name: str) -> str | None:
    """The draft model that comes with a model, by its name on the command line; None where there is none."""
    return f"{EMBEDDED}-draft" if name == EMBEDDED else None


def path_of(name: str, needed: str = "config.json") -> str:
    """Folder or hub name for a name from the command line.

    Args:
        name: See `load_model`.
        needed: File that a folder must hold.

    Raises:
        UserError: It is a path, and not of such a folder.
    """
    from specdec.common.embedded import embedded_path
    from specdec.common.smollm2 import SMOLLM2, smollm2_path

    if name == SMOLLM2:
        with user_errors(OSError, ValueError, ImportError):
            return str(smollm2_path())
    if name in (EMBEDDED, f"{EMBEDDED}-draft"):
        with user_errors(FileNotFoundError):
            return str(embedded_path("draft" if name.endswith("-draft") else "target"))
    if name.startswith(("/", "./", "../", "~")):
        folder = Path(name).expanduser()
        if not (folder / needed).is_file():
            raise UserError(f"{name} is not the folder of a model (it has no {needed}); check the path")
        return str(folder)
    return name


def read_text(file: Path) -> str:
    """Text of a file.

    Raises:
        UserError: It is missing, or not text.
    """
    if not file.is_file():
        raise UserError(f"{file} is not a file; check the path")
    with user_errors(OSError, UnicodeDecodeError, remedy=f"{file} must be a text file in UTF-8"):
        return file.read_text(encoding="utf-8")


def prepare_torch(threads: int | None) -> None:
    """Sets torch's number of CPU threads, if one is given, and keeps transformers' advice out of the output.

    In a terminal it also tells when kernels are compiled: a new user would take that for a standstill. Elsewhere
    nothing but the output is wanted.
    """
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    from specdec.kernels import tell_of_compiling

    is_read = sys.stderr.isatty()
    tell_of_compiling(lambda: print("compiling, once on this machine ...", file=sys.stderr) if is_read else None)
    if threads is not None:
        torch.set_num_threads(threads)
