"""What all sections of a protocol share."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

Precision = Literal["auto", "single", "mixed", "double"]


class Settings(BaseModel):
    """Base of all sections: unknown keys are refused, values cannot change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Numbers in text are welcome (YAML reads 1e-3 as text), but yes, no, on and off are not 1 and 0.
        field = cls.model_fields.get(info.field_name or "")
        if isinstance(value, bool) and field is not None and field.annotation is not bool:
            raise ValueError(f"expected no true or false, got {value}")
        return value
