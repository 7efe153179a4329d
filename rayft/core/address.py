"""Addresses of storage and data, and the credentials that people write into them.

An address is a local path or `scheme://place/path?option=value`. Whatever is kept, shown or sent is
clean: `clean` takes `KEY:SECRET@` and secret options out of an address at once and remembers them
in the memory of this process only; `rayft.storage.remote` looks them up again when it connects.
`redact` does the same to any text (messages of other libraries, tracebacks, command lines), and
hides remembered secrets wherever they stand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, quote, unquote

SECRET_OPTIONS = ("access_key", "secret_key", "session_token")
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"
# Secrets may hold an @, or slashes: after a colon all counts up to the last @ before a slash, else
# up to the first @ at all. Without a colon (a token) only what stands before the first slash.
# `git@` and `anonymous@` are names, not secrets.
_NAME = r"[^\s/@:'\"<>?]"
_USER = rf"(?!(?:git|anonymous)@)(?:{_NAME}*:[^\s/'\"<>?]*@|{_NAME}*:[^\s@'\"<>?]*@|{_NAME}+@)"
_USERINFO = re.compile(rf"({_SCHEME})({_USER})")
_SECRET = rf"({'|'.join(SECRET_OPTIONS)})=([^&\s'\"<>]*)"
_OPTION = re.compile(rf"[?&]{_SECRET}", re.IGNORECASE)
_OPTIONS = re.compile(rf"([?&])((?:{_SECRET}&?)+)", re.IGNORECASE)
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?]*)([^?]*)(?:\?(.*))?", re.DOTALL)
_SHORT = 8  # characters; a shorter secret would hide words of every message


@dataclass(frozen=True)
class Credentials:
    """Of one bucket; never printed."""

    access_key: str = field(default="", repr=False)
    secret_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)


@dataclass(frozen=True)
class AddressParts:
    """A clean address. `path` is as written (percent-encoded), with its leading slash."""

    scheme: str
    place: str  # bucket or host
    path: str
    options: dict[str, str]


_remembered: dict[str, Credentials] = {}  # by `_key`


def parts_of(address: str) -> AddressParts | None:
    """The parts of a clean address; None for a local path."""
    found = _ADDRESS.fullmatch(address)
    if found is None:
        return None
    scheme, place, path, query = found.groups()
    options = dict(parse_qsl(query or "", keep_blank_values=True))
    return AddressParts(scheme.lower(), place, path, options)


def clean(address: str) -> str:
    """`address` without credentials, which this process remembers for it."""
    if "://" not in address:
        return address
    user = _USERINFO.match(address)
    secret = {name.lower(): unquote(value) for name, value in _OPTION.findall(address)}
    bare = _bare(address)
    if user is not None:
        key, _, word = user[2][:-1].partition(":")
        secret = {"access_key": unquote(key), "secret_key": unquote(word)} | secret
    if secret:
        _remembered[_key(bare)] = Credentials(**secret)
    return bare


def clean_all(data: object) -> object:
    """Plain data with every address in it `clean`."""
    if isinstance(data, str):
        return clean(data) if re.match(_SCHEME, data) else data
    if isinstance(data, Mapping):
        return {key: clean_all(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [clean_all(value) for value in data]
    return data


def credentials_for(address: str) -> Credentials | None:
    """What `clean` took out of an address of the same bucket and endpoint."""
    return _remembered.get(_key(address))


def carried(addresses: Iterable[str]) -> str:
    """A sentence for people where one of these addresses carried credentials, else ""."""
    places = {_key(address).split("?")[0] for address in addresses if credentials_for(address)}
    if not places:
        return ""
    return (
        f"the address of {', '.join(sorted(places))} carries credentials, which are written "
        "nowhere: give them as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"
    )


def remembered() -> dict[str, Credentials]:
    """All that this process remembers, to be handed to another one."""
    return dict(_remembered)


def remember(credentials: Mapping[str, Credentials]) -> None:
    """Take over what another process remembers."""
    _remembered.update(credentials)


def redact(text: str) -> str:
    """`text` with clean addresses, and `***` for every remembered secret."""
    text = _bare(text)
    for known in _remembered.values():
        # an access key is a name; alone it is a token
        for secret in (known.secret_key or known.access_key, known.session_token):
            for form in (secret, quote(secret, safe="")):
                if len(form) >= _SHORT:
                    text = text.replace(form, "***")
    return text


def shown(address: str) -> str:
    """An address for people: without credentials and options."""
    bare = _bare(address)
    found = _ADDRESS.fullmatch(bare)
    return bare if found is None else f"{found[1]}://{found[2]}{found[3]}"


def below(address: str, *names: str) -> str:
    """The address of what lies below a folder; options stay at the end."""
    folder, mark, query = _halves(address)
    return "/".join([folder.rstrip("/"), *names]) + mark + query


def above(address: str) -> tuple[str, str]:
    """The address of the folder that holds it, and its name there."""
    folder, mark, query = _halves(address)
    folder, _, name = folder.rstrip("/").rpartition("/")
    return folder + mark + query, name


def _bare(text: str) -> str:
    if "://" in text:
        text = _USERINFO.sub(r"\1", text)
    if "=" in text:
        text = _OPTIONS.sub(lambda found: found[1] if found[2].endswith("&") else "", text)
    return text


def _halves(address: str) -> tuple[str, str, str]:
    """A local path has no options: a question mark is part of a name there."""
    return address.partition("?") if "://" in address else (address, "", "")


def _key(address: str) -> str:
    found = parts_of(address)
    if found is None:
        return address
    return f"{found.scheme}://{found.place}?{found.options.get('endpoint_override', '')}"
