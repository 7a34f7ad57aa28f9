"""How good a set of heads is on a model, and the tree that was tuned for it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from operator import index
from pathlib import Path
from typing import Any

FILE_NAME = "medusa_tree.json"


@dataclass
class HeadCalibration:
    """What was measured of heads on a calibration set and on a device.

    Args:
        accuracies: Per head, per rank from the best: how often the token of this rank is the one that the target picks.
        tree: The tuned tree: paths of ranks from the root, best first, a path after the one it extends ("medusa
            choices"). None: not tuned.
        num_tokens: Positions that were measured.
        step_seconds: Seconds of a target pass by number of nodes, on the device.
        device: What that was.
    """

    accuracies: list[list[float]]
    tree: list[list[int]] | None = None
    num_tokens: int = 0
    step_seconds: dict[int, float] = field(default_factory=dict)
    device: str = ""

    def __post_init__(self) -> None:
        self.accuracies = [list(map(float, ranks)) for ranks in self.accuracies]
        self.step_seconds = {int(nodes): float(seconds) for nodes, seconds in self.step_seconds.items()}
        if self.tree is not None:
            self.tree = [list(map(index, path)) for path in self.tree]
        self.validate()

    @property
    def num_heads(self) -> int:
        """Heads that were measured."""
        return len(self.accuracies)

    def validate(self) -> None:
        """Checks what can be wrong in a file that was edited or belongs to other heads.

        Raises:
            ValueError: A value is out of range; the message says which, and what is allowed.
        """
        if not self.accuracies or not all(self.accuracies):
            raise ValueError(f"accuracies={self.accuracies!r}: each head needs the accuracy of one rank at least")
        for head, ranks in enumerate(self.accuracies, 1):
            if not all(0 <= accuracy <= 1 for accuracy in ranks) or sum(ranks) > 1 + 1e-6:
                raise ValueError(
                    f"accuracies of head {head} must lie between 0 and 1 and sum to at most 1; got {ranks}"
                )
        if self.num_tokens < 0:
            raise ValueError(f"num_tokens={self.num_tokens} must not be negative")
        for nodes, seconds in self.step_seconds.items():
            if nodes < 1 or not (0 < seconds < math.inf):
                raise ValueError(f"step_seconds[{nodes}]={seconds}: nodes are counted from 1, seconds are positive")
        self._validate_tree()

    def _validate_tree(self) -> None:
        known: set[tuple[int, ...]] = {()}
        for path in map(tuple, self.tree or []):
            if not path or path in known:
                raise ValueError(f"tree: path {list(path)} is empty or there twice")
            if len(path) > self.num_heads:
                raise ValueError(f"tree: path {list(path)} is longer than the number of heads, {self.num_heads}")
            num_ranks = len(self.accuracies[len(path) - 1])
            if not 0 <= path[-1] < num_ranks:
                raise ValueError(
                    f"tree: rank {path[-1]} in path {list(path)} is not one of the {num_ranks} measured ranks of head "
                    f"{len(path)}"
                )
            if path[:-1] not in known:
                raise ValueError(f"tree: path {list(path)} comes without, or before, the path {list(path[:-1])}")
            known.add(path)

    def save(self, folder: str | Path) -> None:
        """Writes `medusa_tree.json` into a folder, which is created if need be."""
        self.validate()
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> HeadCalibration:
        """Reads `medusa_tree.json` from a folder.

        Raises:
            FileNotFoundError: There is none.
            ValueError: It is not what `save` writes.
        """
        path = Path(folder) / FILE_NAME
        try:
            stored: Any = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(stored, dict):
                raise TypeError("not a JSON object")
            if unknown := set(stored) - {f.name for f in fields(cls)}:
                raise TypeError(f"unknown: {', '.join(sorted(unknown))}")
            return cls(**stored)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a calibration of heads: {error}; measure it again") from error
