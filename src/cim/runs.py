"""Names of training runs: METHOD-SEED, as in cim-0."""

from __future__ import annotations

from pathlib import Path

from cim.errors import CimError
from cim.models import ModelSettings
from cim.scorer import REWARDS

# sft: captions as annotators write them; sft_perfect: captions that leave out nothing and err nowhere.
SFT_METHODS = ("sft", "sft_perfect")
# GRPO that starts from the fine-tuned model of the same seed instead of the base.
ON_SFT = "cim_on_sft"


def parse_run(run: str) -> tuple[str, int]:
    """ "cim-0" to ("cim", 0).

    Raises:
        CimError: where it is not METHOD-SEED or the method is not known.
    """
    method, _, seed = run.rpartition("-")
    known = (*REWARDS, *SFT_METHODS, ON_SFT)
    if not seed.isdigit() or method not in known:
        raise CimError(f"run '{run}' should be METHOD-SEED with a method of {', '.join(known)}")
    return method, int(seed)


def reward_of(method: str) -> str:
    """The reward that a GRPO method optimises."""
    return "cim" if method == ON_SFT else method


def start_of(run: str, model: ModelSettings, artifacts: Path) -> ModelSettings:
    """Where a run starts: the base, or the fine-tuned model of the same seed.

    Raises:
        CimError: where that is not trained yet.
    """
    method, seed = parse_run(run)
    if method != ON_SFT:
        return model
    folder = artifacts / "train" / f"sft-{seed}"
    if not (folder / "log.json").is_file():
        raise CimError(f"{folder}: not trained yet; run '{run}' starts from run 'sft-{seed}', so train that first")
    return model.at(folder)


def all_runs(runs: dict[str, list]) -> list[str]:
    """The `runs` group as one list; on_sft holds seeds."""
    return [*runs["grpo"], *runs["sft"], *(f"{ON_SFT}-{seed}" for seed in runs["on_sft"])]
