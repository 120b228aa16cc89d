"""The one base of every model of settings in this project. Imports no torch."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Refuses unknown keys, conversions, NaN and infinity; cannot be changed; docstrings of fields are their help."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
