"""Spec: the base of every config class."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from rayft.core.address import clean

Address = Annotated[str, AfterValidator(clean)]
"""A local path or URI; credentials in it stay in this process's memory and out of the config."""

STEPS = 10**9
"""More steps than any run has."""


class Spec(BaseModel):
    """Frozen and strict: an unknown key is an error, and the docstring under a field is its
    description."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )
