"""One rank's shard as a safetensors file, staged in one host buffer and read back by slice.

The file is safetensors' own layout: header length (8 bytes, little endian), JSON header, raw data.
The staging buffer has the layout of the data part, so that copying the live tensors into it is the
only thing training waits for, and the file is written from it without another copy. Tensor keys are
`kind:name` for slices (`param:`, `exp_avg:`, ...) and `whole:name`; an Index says which elements a
slice holds.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from safetensors import safe_open
from torch import Tensor

from rayft.core.background import in_background
from rayft.core.errors import StorageError
from rayft.core.process import temporary
from rayft.core.shards import StateShard
from rayft.storage import failpoints
from rayft.storage.folder import Storage

CHUNK = 8 << 20  # bytes per write
WHOLE = "whole"
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class ShardPart(BaseModel):
    """Elements [start, start + numel) of a flattened parameter of `shape`, in these kinds."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    shape: list[int]
    start: int
    numel: int
    kinds: list[str]


Index = dict[str, ShardPart]  # by parameter name


def index_of(shard: StateShard) -> Index:
    """What the shard holds.

    Raises:
        ValueError: a slice without tensors, or its tensors differ in length.
    """
    index = {}
    for name, piece in shard.slices.items():
        sizes = {tensor.numel() for tensor in piece.tensors.values()}
        if len(sizes) != 1:
            raise ValueError(f"slice of {name}: tensors of {sorted(sizes)} elements")
        index[name] = ShardPart(
            shape=list(piece.shape), start=piece.start, numel=sizes.pop(), kinds=[*piece.tensors]
        )
    return index


class StagingBuffer:
    """A host buffer that is used again for every save (page-locked when the tensors are CUDA)."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.header = b""

    def fill(self, shard: StateShard) -> None:
        """Copy every tensor of the shard; on return the live ones may change."""
        flat = _flatten(shard)
        total = sum(tensor.nbytes for _, tensor in flat)
        cuda = any(tensor.is_cuda for _, tensor in flat)
        if total != self._buffer.numel() or cuda != self._buffer.is_pinned():
            self._buffer = _host_buffer(total, pinned=cuda)
        if cuda:  # what lies in host memory (offloaded, paged) may be written by the device still
            torch.cuda.current_stream().synchronize()
        layout, start = {}, 0
        for key, tensor in flat:
            stop = start + tensor.nbytes
            layout[key] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, stop],
            }
            _copy(tensor.detach(), self._buffer[start:stop])
            start = stop
        if cuda:
            torch.cuda.current_stream().synchronize()
        text = json.dumps(layout, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self._buffer.numel()

    def chunks(self) -> Iterator[memoryview]:
        """The bytes of the file, in order, without copying."""
        yield memoryview(self.header)
        data = self._buffer.numpy().data
        for start in range(0, len(data), CHUNK):
            yield data[start : start + CHUNK]


def _host_buffer(size: int, *, pinned: bool) -> Tensor:
    """(size,) uint8: page-locked, or on huge pages where the system offers them."""
    if pinned or size == 0:
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    pages = mmap.mmap(-1, size)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)  # keeps the mapping alive


def _copy(tensor: Tensor, target: Tensor) -> None:
    """Bytes of `tensor` into `target`; from CUDA without waiting.

    On the CPU through numpy, whose plain memcpy does not read the target's cache lines first.
    """
    if tensor.is_cuda:
        target.view(tensor.dtype).copy_(tensor.reshape(-1), non_blocking=True)
    elif tensor.numel() > 0:
        source = tensor.contiguous().reshape(-1).view(torch.uint8)
        np.copyto(target.numpy(), source.numpy())


def _flatten(shard: StateShard) -> list[tuple[str, Tensor]]:
    """(key, tensor), wide elements first: every tensor is then aligned to its element size."""
    flat = [
        (f"{kind}:{name}", tensor)
        for name, piece in shard.slices.items()
        for kind, tensor in piece.tensors.items()
    ]
    flat += [(f"{WHOLE}:{name}", tensor) for name, tensor in shard.whole.items()]
    return sorted(flat, key=lambda item: (-item[1].element_size(), item[0]))


@dataclass(frozen=True)
class WrittenShard:
    """A shard on storage. `hash_seconds` is what hashing added after the last byte was durable."""

    size: int
    sha256: str
    write_seconds: float
    hash_seconds: float


def write_shard(storage: Storage, path: str, staging: StagingBuffer) -> WrittenShard:
    """Write the staged bytes and hash them at the same time, in another thread.

    Raises:
        StorageError: after the retries.
    """
    digest = hashlib.sha256()

    def hash_all() -> None:
        for chunk in staging.chunks():
            digest.update(chunk)  # releases the GIL

    def write_all() -> None:
        failpoints.hit("checkpoint.shard.open")
        with storage.open_output(path) as file:
            for chunk in staging.chunks():
                failpoints.hit("checkpoint.shard.data")
                file.write(chunk)
            failpoints.hit("checkpoint.shard.close")

    start = time.perf_counter()
    hashed = in_background(hash_all, "shard-hash")
    try:
        storage.attempt("write", path, write_all)
        written = time.perf_counter()
    finally:
        wait([hashed])  # it reads the staging buffer, which the next save fills again
    hashed.result()
    waited = time.perf_counter() - written
    return WrittenShard(staging.size, digest.hexdigest(), written - start, waited)


def hash_file(storage: Storage, path: str) -> tuple[int, str]:
    """(bytes, sha256) of a file as storage returns it."""

    def run() -> tuple[int, str]:
        digest, size = hashlib.sha256(), 0
        with storage.open_input(path) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
        return size, digest.hexdigest()

    return storage.attempt("read", path, run)


class CommitShards:
    """ShardReader over the verified files of one checkpoint; slices are read when asked for.

    Args:
        fetch: rank -> local file, called once per rank that is needed.
        indexes: by rank.
        scalars: of the checkpoint.
    """

    def __init__(
        self,
        fetch: Callable[[int, Path], Path],
        indexes: Sequence[Index],
        scalars: Mapping[str, float],
    ) -> None:
        self.world = len(indexes)
        self.scalars: Mapping[str, float] = dict(scalars)
        self._fetch, self._files = fetch, {}
        self._folder = temporary("shards")
        self._parts: dict[str, list[tuple[int, ShardPart]]] = {}
        for rank, index in enumerate(indexes):
            for name, part in index.items():
                self._parts.setdefault(name, []).append((rank, part))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every saved parameter."""
        return {name: tuple(parts[0][1].shape) for name, parts in self._parts.items()}

    def kinds(self, name: str) -> set[str]:
        """Which kinds are saved of `name` (one that never had a step may have no moments)."""
        return set.intersection(*(set(part.kinds) for _, part in self._parts[name]))

    def read(self, name: str, kind: str, start: int, stop: int) -> Tensor:
        """Flat elements [start, stop), a fresh CPU tensor in the saved dtype.

        Raises:
            KeyError: no such parameter, or no such kind of it.
            StorageError: the shards leave a gap there.
        """
        parts = self._parts[name]
        if kind not in self.kinds(name):
            raise KeyError(f"{kind} of {name}")
        if not 0 <= start <= stop <= math.prod(parts[0][1].shape):
            raise ValueError(f"{name}: no elements [{start}, {stop})")
        pieces, here = [], start
        for rank, part in sorted(parts, key=lambda item: item[1].start):
            end = part.start + part.numel
            if part.start <= here < min(end, stop):
                upto = min(end, stop)
                rows = self._open(rank).get_slice(f"{kind}:{name}")
                pieces.append(rows[here - part.start : upto - part.start])
                here = upto
        if here != stop:
            raise StorageError(f"no shard holds element {here} of {name}")
        if not pieces:
            rank, _ = parts[0]
            return self._open(rank).get_slice(f"{kind}:{name}")[0:0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def whole(self, rank: int) -> dict[str, Tensor]:
        """The `whole` tensors that rank `rank` saved."""
        file = self._open(rank)
        prefix = f"{WHOLE}:"
        return {
            key[len(prefix) :]: file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118 (not a mapping)
            if key.startswith(prefix)
        }

    def close(self) -> None:
        """Let go of the files; downloaded ones are deleted."""
        self._files.clear()
        self._folder.cleanup()

    def __enter__(self) -> CommitShards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, rank: int) -> safe_open:
        if rank not in self._files:
            path = self._fetch(rank, Path(self._folder.name))
            self._files[rank] = safe_open(path, framework="pt", device="cpu")
        return self._files[rank]
