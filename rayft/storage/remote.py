"""Connecting to an object store by its address: pyarrow's file systems, with bounded waits.

    s3://bucket/path?region=...&endpoint_override=host:9000&scheme=http&anonymous=true
    gs://bucket/path

Addresses are taken apart here and not by pyarrow, whose own parser knows no `anonymous` and no
timeouts, and repeats the whole address, secrets included, in its errors.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from urllib.parse import unquote

from rayft.core.address import AddressParts, clean, credentials_for, parts_of, shown
from rayft.core.errors import StorageError

S3_OPTIONS = {
    "region": str,
    "scheme": str,
    "endpoint_override": str,
    "anonymous": bool,
    "allow_bucket_creation": bool,
    "allow_bucket_deletion": bool,
    "force_virtual_addressing": bool,
    "tls_ca_file_path": str,
    "connect_timeout": float,
    "request_timeout": float,
}
_GCS = ("gs", "gcs")
_GCS_WAIT = 30  # seconds of retries; pyarrow's default is 15 minutes
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]+")
_ENDPOINT = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?")


def refuse_malformed(address: str) -> None:
    """What can be told of an address of an object store without asking anybody; nothing is
    imported for it. Other addresses pass.

    Raises:
        StorageError: it names no bucket, or an option is unknown or means nothing.
    """
    parts = parts_of(clean(address))
    if parts is None or parts.scheme not in ("s3", *_GCS):
        return
    try:
        _check_bucket(parts)
        if parts.scheme == "s3":
            _endpoint(_options(parts.options))
    except ValueError as error:
        raise _refusal(address, error) from error


def connect(address: str) -> tuple[object, str]:
    """(pyarrow file system, path in it) of an address; nothing is asked of an s3:// store yet
    unless its region has to be found.

    Raises:
        StorageError: the address means nothing, or the bucket's region cannot be found.
    """
    from pyarrow import ArrowException

    address = clean(address)
    parts = parts_of(address)
    try:
        if parts is not None and parts.scheme == "s3":
            return _s3(parts, address)
        if parts is not None and parts.scheme in _GCS:
            return _gcs(address, parts)
    except (ArrowException, OSError, ValueError) as error:
        raise _refusal(address, error) from error
    raise StorageError(
        f"cannot open {shown(address)}: not an address rayft knows",
        fix="a local path, s3://bucket/path or gs://bucket/path",
    )


def _refusal(address: str, error: Exception) -> StorageError:
    return StorageError(
        f"cannot open {shown(address)}: {error}",
        fix="s3://bucket/path?region=...&endpoint_override=host:port&scheme=http",
    )


def _s3(parts: AddressParts, address: str) -> tuple[object, str]:
    from pyarrow.fs import AwsDefaultS3RetryStrategy, S3FileSystem, resolve_s3_region

    _check_bucket(parts)
    options = _options(parts.options)
    known = credentials_for(address)
    if known is not None:
        if not (known.access_key and known.secret_key):
            raise ValueError("an access key and its secret come together: s3://KEY:SECRET@bucket")
        options |= {"access_key": known.access_key, "secret_key": known.secret_key}
        options |= {"session_token": known.session_token} if known.session_token else {}
    if "endpoint_override" not in options and (endpoint := _endpoint_of_environment()):
        options["endpoint_override"] = endpoint
    options |= _endpoint(options)
    if "endpoint_override" in options:
        if not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
            options.setdefault("region", "us-east-1")  # or the SDK asks a cloud's metadata server
    elif "region" not in options:
        options["region"] = resolve_s3_region(parts.place)
    path = unquote(f"{parts.place}{parts.path}").rstrip("/")
    # pyarrow's own choice (AwsStandardS3RetryStrategy) has a quota that a long run of 503s uses up;
    # from then on it tries nothing again.
    patient = AwsDefaultS3RetryStrategy(max_attempts=4)
    return S3FileSystem(**options, retry_strategy=patient), path


def _endpoint_of_environment() -> str:
    """What the AWS tools read where an address names no endpoint; "" without."""
    if os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return ""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def _check_bucket(parts: AddressParts) -> None:
    if not parts.place:
        raise ValueError("it names no bucket")
    if not _BUCKET.fullmatch(parts.place):
        raise ValueError(f"{parts.place!r} is not the name of a bucket")


def _options(given: dict[str, str]) -> dict[str, object]:
    options: dict[str, object] = {}
    for name, text in given.items():
        kind = S3_OPTIONS.get(name)
        if kind is None:
            near = difflib.get_close_matches(name, S3_OPTIONS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(S3_OPTIONS)}"
            raise ValueError(f"{name!r} is not an option; {hint}")
        if kind is bool and text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(f"{name} is true or false, not {text!r}")
        options[name] = text.lower() in ("true", "1") if kind is bool else kind(text)
    return options


def _endpoint(options: Mapping[str, object]) -> dict[str, str]:
    """`host:port`; a scheme before it, as other tools write it, is taken as `scheme`."""
    if "endpoint_override" not in options:
        return {}
    text = str(options["endpoint_override"])
    scheme, _, place = text.rpartition("://")
    found = _ENDPOINT.fullmatch(place.rstrip("/"))
    if found is None or not 0 < int(found[1] or 1) < 65536:
        raise ValueError(f"endpoint_override is host or host:port, not {text!r}")
    return {"endpoint_override": found[0]} | ({"scheme": scheme} if scheme else {})


def _gcs(address: str, parts: AddressParts) -> tuple[object, str]:
    from pyarrow.fs import FileSystem

    _check_bucket(parts)
    if "retry_limit_seconds" not in parts.options:
        address += f"{'&' if '?' in address else '?'}retry_limit_seconds={_GCS_WAIT}"
    fs, path = FileSystem.from_uri(address)
    return fs, path.rstrip("/")
