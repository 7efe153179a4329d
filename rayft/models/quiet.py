"""Keep transformers' and DeepSpeed's chatter off the user's terminal; errors and warnings stay."""

from __future__ import annotations

import os

import torch
from transformers.utils import logging


def hush() -> None:
    """For this process: no progress bars for loading and writing, no guessing of accelerators."""
    logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers may import deepspeed
