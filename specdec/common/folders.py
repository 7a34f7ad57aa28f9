"""The user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$SPECDEC_CACHE`, else `specdec` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("SPECDEC_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specdec"
