"""Where rows come from and how they become token rows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayft.config.base import Address, Spec

Shape = Literal["auto", "text", "alpaca", "sharegpt", "messages", "prompt_completion", "preference"]

CLEAN = r"^[^\x00-\x1f\x7f-\x9f]+$"


class SourceSpec(Spec):
    """One source of rows. A bare string in the list is short for {path: string}."""

    path: Address
    """File, folder, glob, s3:// or gs:// URI, hub id, `builtin:NAME`, or a name in
    `dataset_info`."""
    weight: float = Field(default=1.0, gt=0, le=10**6)
    """Passes over this source per epoch: 0.5 takes a fresh random half, 2 takes every row twice."""
    task: str = Field(default="default", max_length=100, pattern=CLEAN)
    """Task tag: evaluation is reported per task."""
    shape: Shape = "auto"
    """How a row is laid out; `auto` finds it by the columns."""
    columns: dict[str, str] = {}
    """Column mapping, ours: theirs, e.g. {prompt: question, completion: answer}."""
    split: str | None = None
    """Split of a hub or builtin source; default `train` (in data.eval of builtins: `heldout`)."""
    subset: str | None = None
    """Configuration name of a hub dataset."""
    samples: int | None = Field(default=None, ge=1, le=10**12)
    """Take only the first rows."""
    dataset_info: str | None = None
    """A LLaMA-Factory dataset_info.json; `path` is then a name in it."""


class DataSpec(Spec):
    """Training and held-out data."""

    train: tuple[SourceSpec, ...] = Field(min_length=1, max_length=1000)
    """Sources to train on."""
    eval: tuple[SourceSpec, ...] = Field(default=(), max_length=1000)
    """Held-out sources; loss and perplexity are reported per task."""
    max_length: int = Field(default=1024, ge=8, le=10**8)
    """Tokens per row at most."""
    packing: bool = False
    """Put several documents into one row (best fit); attention and positions restart at each
    document."""
    overflow: Literal["cut", "drop"] = "cut"
    """What happens to a document longer than max_length; both are counted."""
    bad_rows: float = Field(default=0.01, ge=0, le=1)
    """Share of bad rows above which the run stops before training (exit 3)."""
    cache: Address | None = None
    """Where tokenised data is kept (local path or URI); default: `<storage>/.cache`."""
