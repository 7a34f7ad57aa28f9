"""A drafter from a published checkpoint: its config and files say what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import file_exists, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

from specdec.drafters.base import Drafter
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.eagle3 import Eagle3Drafter
from specdec.drafters.medusa import MedusaDrafter
from specdec.heads.checkpoints import MEDUSA_FILE, PICKLED_FILE
from specdec.heads.eagle3_files import is_eagle3

REFUSED = {
    "peagle": "P-EAGLE",
    "eagle": "EAGLE-1 or EAGLE-2",
    "dflash": "DFlash",
    "dspark": "DSpark",
    "hydra": "Hydra",
    "mtp": "an MTP head outside its target's checkpoint",
    "mlp_speculator": "an MLP speculator",
}
"""Kinds of draft checkpoints, by how their config names them, that cannot be used yet."""


def published_drafter(name: str) -> Drafter:
    """The drafter for a checkpoint: Medusa heads (Medusa's or vLLM's layout), an EAGLE-3 head, or a causal LM.

    Args:
        name: A folder, or a repository of the Hugging Face hub.

    Raises:
        FileNotFoundError: There is no such folder or repository.
        ValueError: It is none of these.
    """
    config = _config(name)
    architectures = [str(part) for part in config.get("architectures") or []]
    kind = str(config.get("speculators_model_type") or config.get("model_type") or "")
    if is_eagle3(config):
        return Eagle3Drafter(name)
    if kind == "medusa" or "medusa_num_heads" in config or _has_heads(name):
        return MedusaDrafter(name)
    words = " ".join([kind, *architectures, *(key for key in config if key.endswith("_config"))]).lower()
    for word, what in REFUSED.items():
        if word in words.replace("-", ""):
            raise ValueError(
                f"{name!r} holds {what}, which is not supported; use Medusa heads, an EAGLE-3 head, or a causal LM "
                "with the target's tokenizer"
            )
    if any("ForCausalLM" in part or "LMHeadModel" in part for part in architectures):
        return DraftModelDrafter(name)
    raise ValueError(
        f"{name!r} holds {', '.join(architectures) or kind or 'nothing known'}; a drafter is made of Medusa heads, an "
        "EAGLE-3 head, or a causal LM"
    )


def _config(name: str) -> dict[str, Any]:
    if Path(name).is_dir():
        path = Path(name) / "config.json"
        if not path.is_file():
            if _has_heads(name):
                return {}
            raise FileNotFoundError(f"{name!r} has no config.json, so nothing says what it holds")
    else:
        try:
            path = Path(hf_hub_download(name, "config.json"))
        except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError, OSError) as error:
            raise FileNotFoundError(
                f"{name!r} is neither a folder nor a repository of the hub that can be reached ({type(error).__name__})"
            ) from error
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return config


def _has_heads(name: str) -> bool:
    """Whether there is a file that Medusa heads alone have."""
    files = (MEDUSA_FILE, PICKLED_FILE)
    if Path(name).is_dir():
        return any((Path(name) / file).is_file() for file in files)
    try:
        return any(file_exists(name, file) for file in files)
    except (HFValidationError, OfflineModeIsEnabled, OSError):
        return False
