"""Groups of params.yaml as typed settings: a wrong name, type or value is one clear error before any work starts."""

from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from cim.errors import CimError
from cim.files import explained, read_text

Share = Annotated[float, Field(ge=0, le=1)]
Names = Annotated[list[str], Field(min_length=1)]
S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """One group of parameters: frozen, strictly typed, no unknown names, no infinite or undefined numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class EncoderSettings(Settings):
    """The `encoders` group: which text and image encoder, how many inputs at once, and their precision.

    Here, and not in cim.encoders, so that checking parameters imports no PyTorch.

    Attributes:
        text_tower: an image encoder's name; CLIPScore and self-retrieval read captions by its text tower. None for that
            of `image`, whose image tower it must share.
    """

    text: str
    image: str
    text_tower: str | None = None
    text_batch: PositiveInt | None = None  # None: 32, on a GPU 256
    image_batch: PositiveInt = 128
    # bfloat16 is used only where the hardware computes in it, else float32.
    text_precision: Literal["float32", "bfloat16"] = "float32"
    image_precision: Literal["float32", "bfloat16"] = "float32"


class FastVlmSettings(Settings):
    """What both forms of the `captioner` group share, the small world's and that for photographs.

    Attributes:
        hidden_size, layers, heads: of a decoder from scratch.
        fact_steps, style_steps: updates of the two phases, for what the model knows and for how it says it.
    """

    prompt: str
    hidden_size: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    seed: int
    batch_size: PositiveInt
    fact_steps: PositiveInt
    style_steps: PositiveInt
    lr: PositiveFloat
    style_lr: PositiveFloat

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        require(self.hidden_size % self.heads == 0, "hidden_size must be a multiple of heads")
        return self


def read_params(path: Path = Path("params.yaml")) -> dict[str, Any]:
    """The parameters file as a dictionary of groups."""
    if not path.exists():
        where = "run from the repository's root" if path == Path("params.yaml") else "name a file that is there"
        raise CimError(f"{path}: not found; {where}")
    with explained(f"{path}: not valid YAML", "correct it", yaml.YAMLError):
        params = yaml.safe_load(read_text(path))
    if not isinstance(params, dict):
        raise CimError(f"{path}: should hold named groups of parameters")
    return params


def group(cls: type[S], values: dict[str, Any] | None, name: str) -> S:
    """The settings `cls` from the parameters group `name`.

    Raises:
        CimError: for a missing group, and for the first unknown, missing or invalid parameter.
    """
    if not isinstance(values, dict):
        raise CimError(f"parameters: group '{name}' is missing or not a mapping; 'cim params' prints all groups")
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
    outer, where = (".".join(map(str, (name, *loc))) for loc in (first["loc"][:-1], first["loc"]))
    match first["type"]:
        case "extra_forbidden":
            inner = reduce(_part, first["loc"][:-1], cls)
            raise CimError(f"parameters: '{where}' is unknown; '{outer}' takes {', '.join(inner.model_fields)}")
        case "missing":
            raise CimError(f"parameters: '{where}' is missing")
        case "value_error" | "assertion_error":
            raise CimError(f"parameters: {where}: {first['ctx']['error']}")
    raise CimError(f"parameters: '{where}' {first['msg'].removeprefix('Input ')}, not {first['input']!r}")


def _part(kind: Any, name: str) -> Any:
    """The type of a field of settings, or of the values of a dictionary."""
    return kind.model_fields[name].annotation if hasattr(kind, "model_fields") else get_args(kind)[-1]


def require(condition: bool, message: str) -> None:
    """Raise a ValueError with this message unless the condition holds; for validators of settings."""
    if not condition:
        raise ValueError(message)
