"""Files of published heads: in a folder, or on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError


def fetch(source: str | Path, name: str, revision: str | None, token: str | bool | None) -> Path | None:
    """A file of the folder or of the hub's repository; None if it has no such file.

    Raises:
        FileNotFoundError: There is no such folder or repository.
    """
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(source), name, revision=revision, token=token))
    except EntryNotFoundError:
        return None
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(f"{str(source)!r} is neither a folder nor a repository of the hub") from error
