"""Groups of params.yaml as typed settings: a wrong name, type or value is one clear error before any work starts."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cim.errors import CimError

PARAMS_FILE = Path("params.yaml")
Share = Annotated[float, Field(ge=0, le=1)]
Names = Annotated[list[str], Field(min_length=1)]
S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """One group of parameters: frozen, strictly typed, no unknown names, no infinite or undefined numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def read_params(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """The parameters file as a dictionary of groups."""
    try:
        params = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CimError(f"{path}: not found; run from the repository's root") from None
    except yaml.YAMLError as error:
        raise CimError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(params, dict):
        raise CimError(f"{path}: should hold named groups of parameters")
    return params


def group(cls: type[S], values: dict[str, Any] | None, name: str) -> S:
    """The settings `cls` from the parameters group `name`.

    Raises:
        CimError: for a missing group, and for the first unknown, missing or invalid parameter.
    """
    if not isinstance(values, dict):
        raise CimError(f"parameters: group '{name}' is missing or not a mapping")
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
    where = ".".join(map(str, (name, *first["loc"])))
    match first["type"]:
        case "extra_forbidden":
            raise CimError(f"parameters: '{where}' is unknown; '{name}' takes {', '.join(cls.model_fields)}")
        case "missing":
            raise CimError(f"parameters: '{where}' is missing")
        case "value_error" | "assertion_error":
            raise CimError(f"parameters: {where}: {first['ctx']['error']}")
    raise CimError(f"parameters: '{where}' {first['msg'].removeprefix('Input ')}, not {first['input']!r}")


def require(condition: bool, message: str) -> None:
    """Raise a ValueError with this message unless the condition holds; for validators of settings."""
    if not condition:
        raise ValueError(message)
