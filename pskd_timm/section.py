"""What the sections of a recipe are made of: pydantic models that refuse what they do not know, and bounded numbers."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, field_validator

COMMAND_LINE = "command line"  # the source of a value that is laid over those of a file


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value, info):
        # pydantic takes true for 1; a YAML file that says so means something else.
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in (
            int,
            float,
            int | None,
            float | None,
        ):
            raise ValueError(f"should be a number, not {str(value).lower()}")
        return value


class SourcedSection(Section):
    """A whole recipe, which knows where its values come from."""

    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    def source_of(self, key: str) -> str:
        """Where the dotted `key`'s value comes from: `default`, a preset, the recipe's file, or COMMAND_LINE."""
        return self._sources.get(key, "default")


Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Area = Annotated[float, Field(gt=0.0, le=1.0)]
Count = Annotated[int, Field(ge=1)]
Names = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
