"""Settings of every test: one thread, no network, no chatter of transformers."""

from __future__ import annotations

import itertools
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():  # read when triton is imported, by transformers for one
    os.environ.setdefault("TRITON_INTERPRET", "1")

import transformers

from specdec.budgeting.ledger import LEARNED
from specdec.budgeting.pass_times import TIMES
from specdec.drafters.merging.known import _KNOWN

_NUMBERS = itertools.count()
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def nothing_learned() -> None:
    """Tests share tiny models; what earlier ones have taught budgets and drafters about these must not decide."""
    for known in (LEARNED, TIMES, _KNOWN):
        known.clear()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from the user's cache, and nothing written there."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path_factory.getbasetemp() / f"cache-{next(_NUMBERS)}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the tables that tests have recorded, wherever they ran."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, table in getattr(report, "user_properties", []):
                if name == "table" and report.when == "call":
                    terminalreporter.write_sep("-", report.nodeid)
                    terminalreporter.write_line(str(table))
