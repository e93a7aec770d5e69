"""Training runs by name, METHOD-SEED as in cim-0, and labels of methods; imports no heavy library."""

from cim.errors import CimError

REWARDS = ("cim", "grc", "qir", "self_retrieval", "clipscore")
# sft: captions as annotators write them; sft_perfect: complete captions without errors.
SFT_METHODS = ("sft", "sft_perfect")
# GRPO that starts from the fine-tuned model of the same seed instead of the base.
ON_SFT = "cim_on_sft"
BASE = "base-0"  # named like a run, though nothing trains it here
LABELS = {
    "base": "base",
    "sft": "SFT, annotators' captions",
    "sft_perfect": "SFT, perfect captions",
    "cim": "CIM (GRC + QIR)",
    "cim_on_sft": "CIM on SFT",
    "grc": "GRC only",
    "qir": "QIR only",
    "self_retrieval": "self-retrieval",
    "clipscore": "CLIPScore",
    "empty": "empty caption",
    "always_yes": "always Yes",
}


def parse_run(run: str) -> tuple[str, int]:
    """ "cim-0" to ("cim", 0); CimError where it is not METHOD-SEED or the method is unknown."""
    method, _, seed = run.rpartition("-")
    known = (*REWARDS, *SFT_METHODS, ON_SFT)
    if not seed.isdigit() or method not in known:
        raise CimError(f"run '{run}' should be METHOD-SEED with a method of {', '.join(known)}")
    return method, int(seed)


def reward_of(method: str) -> str:
    """The reward that a GRPO method optimises."""
    return "cim" if method == ON_SFT else method


def all_runs(runs: dict[str, list]) -> list[str]:
    """The `runs` group as one list; on_sft holds seeds."""
    return [*runs["grpo"], *runs["sft"], *(f"{ON_SFT}-{seed}" for seed in runs["on_sft"])]
