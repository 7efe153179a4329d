"""The records that make a checkpoint: a manifest per rank, COMMIT.json, and the names of files.

    checkpoints/step-<n>-<attempt>/rank-<r>.safetensors  shards
                                   manifest-<r>.json     size and sha256 of the shard, its index
                                   COMMIT.json           written last: sha256 of every manifest, and
                                                         last of all bytes before that field

A reader trusts nothing that this chain of hashes does not reach, and parses nothing before its hash
matches. The attempt is in the name, so that two attempts can never mix their files.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rayft.checkpoint.folders import BAD, COMMIT, FOLDER, folder_name, folder_order
from rayft.checkpoint.shard_file import Index

__all__ = ["BAD", "COMMIT", "FOLDER", "folder_name", "folder_order"]

_SEAL = re.compile(rb',"sha256":"([0-9a-f]{64})"}\n')
_SEAL_BYTES = 78


class BadCommit(Exception):
    """A committed folder that must not be used; the text names the file and what is wrong."""


class _StrictModel(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, ser_json_inf_nan="constants"
    )


class Manifest(_StrictModel):
    """One rank's part of a checkpoint."""

    format: int = 1
    step: int
    rank: int
    world: int
    attempt: str
    path: str
    size: int
    sha256: str
    index: Index
    scalars: dict[str, float]
    extra: dict[str, Any]
    versions: dict[str, str]

    def to_bytes(self) -> bytes:
        """Compact JSON."""
        return self.model_dump_json().encode()


class FileHash(_StrictModel):
    """Of one manifest."""

    size: int
    sha256: str


def hash_of(manifest: bytes) -> FileHash:
    """What COMMIT.json says of a manifest."""
    return FileHash(size=len(manifest), sha256=hashlib.sha256(manifest).hexdigest())


class CommitRecord(_StrictModel):
    """COMMIT.json."""

    format: int = 1
    step: int
    attempt: str
    world: int
    config: str  # hash of the run's config
    parent: str | None  # name of the checkpoint this one continues
    best: bool
    created: float  # seconds since 1970
    manifests: list[FileHash]  # by rank

    def to_bytes(self) -> bytes:
        """JSON whose last field is the sha256 of all bytes before it."""
        body = self.model_dump_json().encode()[:-1]
        return body + b',"sha256":"%s"}\n' % hashlib.sha256(body).hexdigest().encode()

    @staticmethod
    def from_bytes(data: bytes) -> CommitRecord:
        """The inverse.

        Raises:
            BadCommit: a byte differs from what was written, or it is something else.
        """
        body, seal = data[:-_SEAL_BYTES], _SEAL.fullmatch(data[-_SEAL_BYTES:])
        if seal is None or hashlib.sha256(body).hexdigest().encode() != seal.group(1):
            raise BadCommit(f"{COMMIT} is damaged")
        try:
            record = CommitRecord.model_validate_json(body + b"}")
        except ValidationError as error:
            raise BadCommit(f"{COMMIT}: {_first(error)}") from error
        if record.format != 1 or record.world < 1 or len(record.manifests) != record.world:
            raise BadCommit(f"{COMMIT}: format {record.format}, {len(record.manifests)} manifests")
        return record


def parse_manifest(data: bytes, record_name: str, rank: int) -> Manifest:
    """A manifest whose hash is known to match.

    Raises:
        BadCommit: it does not belong to rank `rank` of the folder `record_name`.
    """
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise BadCommit(f"manifest-{rank}.json: {_first(error)}") from error
    path = shard_name(rank)
    name = folder_name(manifest.step, manifest.attempt)
    if (manifest.rank, manifest.path, name) != (rank, path, record_name):
        raise BadCommit(f"manifest-{rank}.json belongs to rank {manifest.rank} of {name}")
    return manifest


def shard_name(rank: int) -> str:
    """File of the tensors."""
    return f"rank-{rank}.safetensors"


def manifest_name(rank: int) -> str:
    """File that vouches for them."""
    return f"manifest-{rank}.json"


def failed_name(rank: int) -> str:
    """Marker: the rank could not write its part, do not wait for it."""
    return f"failed-{rank}.json"


def _first(error: ValidationError) -> str:
    item = error.errors()[0]
    return f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}"
