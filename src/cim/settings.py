"""params.yaml read into dataclasses, so that a wrong name or type is one clear error before any work."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cim.errors import CimError

PARAMS_FILE = Path("params.yaml")
T = TypeVar("T")


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


def group(cls: type[T], values: dict[str, Any] | None, name: str) -> T:
    """Build the settings dataclass `cls` from the params group `name`.

    Raises:
        CimError: for a missing group, and for an unknown, missing, ill-typed or refused parameter.
    """
    if not isinstance(values, dict):
        raise CimError(f"parameters: group '{name}' is missing or not a mapping")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(values) - set(fields)):
        raise CimError(f"parameters: '{name}.{unknown[0]}' is not known; '{name}' takes {', '.join(fields)}")
    missing = dataclasses.MISSING
    required = [f.name for f in fields.values() if f.default is missing and f.default_factory is missing]
    if absent := [key for key in required if key not in values]:
        raise CimError(f"parameters: '{name}.{absent[0]}' is missing")
    checked = {key: _checked(value, hints[key], f"{name}.{key}") for key, value in values.items()}
    try:
        return cls(**checked)
    except ValueError as error:
        raise CimError(f"parameters: {name}: {error}") from None


def _checked(value: Any, kind: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return None
        return _checked(value, next(o for o in options if o is not type(None)), where)
    if origin is list:
        if not isinstance(value, list):
            raise CimError(f"parameters: '{where}' should be a list, not {value!r}")
        return [_checked(item, typing.get_args(kind)[0], where) for item in value]
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    base = origin or kind
    if not isinstance(value, base) or (base is int and isinstance(value, bool)):
        raise CimError(f"parameters: '{where}' should be of type {base.__name__}, not {value!r}")
    return value


def require(condition: bool, message: str) -> None:
    """For `__post_init__` of settings: refuse a value, saying what is wanted."""
    if not condition:
        raise ValueError(message)
