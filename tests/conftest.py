"""Settings of every test: one thread, no network, no chatter of transformers."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
