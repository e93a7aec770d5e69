"""Composing the parameters of a profile from conf/."""

import argparse
from pathlib import Path

import yaml

from cim.errors import CimError

CONF = Path("conf")
HEADER = "# The active parameters, composed from conf/ by 'cim params'; docs/parameters.md says how to change them.\n"


def add_overrides(command: argparse.ArgumentParser, text: str = "as in -S profile=smoke -S train.steps=20") -> None:
    """Add -S to a command; its values are `overrides`, which compose takes."""
    command.add_argument("-S", "--set", dest="overrides", action="append", default=[], help=text)


def compose(overrides: list[str], conf: Path = CONF) -> dict:
    """Compose conf/config.yaml with overrides in Hydra's syntax.

    Raises:
        CimError: for an unknown profile or parameter, and for an invalid value.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from cim.pipeline.groups import check_params

    if not (conf / "config.yaml").is_file():
        raise CimError(f"{conf}/config.yaml: not found; run from the repository's root")
    try:
        with initialize_config_dir(str(conf.resolve()), version_base=None):
            params = OmegaConf.to_container(hydra_compose("config", overrides), resolve=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise CimError(f"parameters: {' '.join(str(error).split())[:300]}") from None
    check_params(params)
    return params


def dump(params: dict) -> str:
    """Parameters as the text of params.yaml."""
    return HEADER + yaml.safe_dump(params, sort_keys=False, width=100)
