"""The tokenizer of a model, and where a model lies. Apart from models/load.py: tokenising needs
none of the seconds that the model classes take to import."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rayft.config.run import ModelSpec
from rayft.core.errors import ConfigError

BUILTIN = {"tiny": Path(__file__).parent / "tiny"}


def resolve(path: str) -> str:
    """`builtin:NAME` as its folder in the package; anything else as it is."""
    if not path.startswith("builtin:"):
        if path.startswith(("/", "./", "../", "~")) and not Path(path).expanduser().is_dir():
            raise ConfigError(f"no such folder: {path}", fix="check model.path from this machine")
        return str(Path(path).expanduser()) if path.startswith("~") else path
    name = path.removeprefix("builtin:")
    if name not in BUILTIN:
        known = ", ".join(f"builtin:{each}" for each in BUILTIN)
        raise ConfigError(f"there is no builtin model {name!r}; there is {known}")
    return str(BUILTIN[name])


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The model's tokenizer, or `spec.tokenizer`, with `spec.chat_template` where given.

    A tokenizer without a padding token pads with its end-of-text token: padding is never attended
    to nor trained, and embeddings are never resized.

    Raises:
        ConfigError: not found, no network, or no token to pad with.
    """
    own = spec.tokenizer is None
    source = resolve(spec.path if spec.tokenizer is None else spec.tokenizer)
    with explained(source):
        tokenizer = AutoTokenizer.from_pretrained(
            source,
            revision=spec.revision if own else None,
            trust_remote_code=spec.trust_remote_code,
        )
    if spec.chat_template is not None:
        tokenizer.chat_template = _template(spec.chat_template)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"the tokenizer of {source} has neither a padding nor an end-of-text token",
                fix="name another one in model.tokenizer",
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the padding token.

    Raises:
        ConfigError: it has none; one that `load_tokenizer` gave has.
    """
    found = tokenizer.pad_token_id
    if not isinstance(found, int):
        raise ConfigError("the tokenizer has no padding token")
    return found


@contextmanager
def explained(source: str) -> Generator[None]:
    """What transformers says about a model that cannot be loaded, as one sentence."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        local = Path(source).exists()
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"cannot load model {source}: {first[:300]}",
            cause="not a complete transformers model folder, or a setting it does not support"
            if local
            else "no such folder, no such hub id, a gated model, or no way to the hub from here",
            fix=f"look at {source}/config.json and the model.* settings"
            if local
            else "check the spelling, set HF_TOKEN for gated models, or give a local folder",
        ) from error


def _template(text: str) -> str:
    """Jinja text as it is, a file's content otherwise."""
    if "{{" in text or "{%" in text:
        return text
    file = Path(text)
    if not file.is_file():
        raise ConfigError(
            f"model.chat_template is neither jinja text nor a file: {text}",
            fix="give a path from the working directory, or the template itself",
        )
    return file.read_text(encoding="utf-8")
