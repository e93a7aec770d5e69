"""The options of all commands that compute CIM: the parameters of the reward."""

import argparse
from pathlib import Path


def add_reward_options(command: argparse.ArgumentParser) -> None:
    """Add them to a command's parser; what is not given keeps the published value."""
    command.add_argument("--reward", type=Path, help="YAML of the parameters, such as conf/reward/calibrated.yaml")
    command.add_argument("-k", type=int, help="images retrieved (default: 3)")
    command.add_argument("--beta", type=float, help="weight of QIR (default: 1)")
    command.add_argument("--decay", type=float, help="ratio of the weights of successive ranks (default: 0.5)")
    command.add_argument("--include-source", action="store_true", help="let a caption retrieve its own image")


def reward_settings(arguments: argparse.Namespace):
    """The RewardSettings that these options give; CimError for invalid ones."""
    from cim.params import group, read_params
    from cim.rewards import RewardSettings

    values = read_params(arguments.reward) if arguments.reward else {}
    values |= {name: value for name in ("k", "beta", "decay") if (value := getattr(arguments, name)) is not None}
    return group(RewardSettings, values | ({"exclude_source": False} if arguments.include_source else {}), "reward")
