"""Copies of objects that threads share, and that know of models by weak references."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from typing import Any

_LOCKS = type(threading.Lock()), type(threading.RLock())


def new_locks(value: Any, memo: dict[int, Any]) -> None:
    """Lets `copy.deepcopy` put new locks and empty thread-local states where an object of specdec holds some.

    Weak references to what the copy has copied before (a model, say) become references to its copy.

    Args:
        value: What is about to be copied.
        memo: Of that copy.
    """
    found, parts = set(), [value]
    while parts:
        part = parts.pop()
        if id(part) in found:
            continue
        found.add(id(part))
        if isinstance(part, _LOCKS):
            memo[id(part)] = threading.Lock() if isinstance(part, _LOCKS[0]) else threading.RLock()
        elif isinstance(part, threading.local):
            memo[id(part)] = threading.local()
        elif isinstance(part, weakref.ref):
            if (copied := memo.get(id(part()))) is not None:
                memo[id(part)] = weakref.ref(copied)
        elif isinstance(part, Mapping):
            parts += part.values()
        elif isinstance(part, (list, tuple)):
            parts += part
        elif type(part).__module__.startswith("specdec."):
            parts += getattr(part, "__dict__", {}).values()
