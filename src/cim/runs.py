"""Training runs by name, METHOD-SEED as in cim-0, and labels of methods; imports no heavy library."""

from collections.abc import Iterable
from typing import Any

from cim.errors import CimError

REWARDS = ("cim", "grc", "qir", "self_retrieval", "clipscore")
# sft: captions as annotators write them; sft_perfect: complete captions without errors.
SFT_METHODS = ("sft", "sft_perfect")
# GRPO that starts from the fine-tuned model of the same seed instead of the base.
ON_SFT = "cim_on_sft"
BASE = "base-0"  # named like a run, though nothing trains it here
LABELS = {
    "base": "base", "sft": "SFT, annotators' captions", "sft_perfect": "SFT, perfect captions",
    "cim": "CIM", "cim_on_sft": "CIM on SFT", "grc": "GRC only", "qir": "QIR only",
    "self_retrieval": "self-retrieval", "clipscore": "CLIPScore", "empty": "empty caption", "always_yes": "always Yes",
}  # fmt: skip


def parse_run(run: str) -> tuple[str, int]:
    """ "cim-0" to ("cim", 0); CimError where it is not METHOD-SEED."""
    method, _, seed = run.rpartition("-")
    if not seed.isdecimal() or not method.replace("_", "").isalnum():
        raise CimError(f"run '{run}' should be METHOD-SEED, as in cim-0")
    return method, int(seed)


def with_variant(params: dict[str, Any], method: str) -> tuple[dict[str, Any], str]:
    """The parameters of a run of this method, and the reward or SFT method that it trains with.

    The `variants` group names methods of its own: CIM, or the reward that `of` names, with other values in groups
    `reward`, `train` and `encoders`, or SFT with other values in group `sft`.

    Raises:
        CimError: for an unknown method, or a variant that changes other groups or has a known method's name.
    """
    variants, known = params.get("variants") or {}, (*REWARDS, *SFT_METHODS, ON_SFT)
    for name, groups in variants.items():
        if name in known or not (set(groups) <= {"of", "reward", "train", "encoders"} or set(groups) == {"sft"}):
            raise CimError(
                f"parameters: variants.{name} needs a name of its own, and can change either groups reward, train and "
                "encoders (CIM, or the reward that `of` names) or group sft (SFT), not both"
            )
    if method in variants:
        changed = {name: params[name] | values for name, values in variants[method].items() if name != "of"}
        return params | changed, "sft" if "sft" in changed else variants[method].get("of", "cim")
    if method not in known:
        raise CimError(f"method '{method}' is unknown; choose one of {', '.join((*known, *variants))}")
    return params, "cim" if method == ON_SFT else method


def label(method: str) -> str:
    """A method's name in tables and figures."""
    return LABELS.get(method, method.replace("_", " "))


def in_order(methods: Iterable[str]) -> list[str]:
    """Methods in the order of tables and figures: the base first, variants last."""
    order = {method: place for place, method in enumerate(LABELS)}
    return sorted(methods, key=lambda method: (order.get(method, len(order)), method))


def all_runs(runs: dict[str, list]) -> list[str]:
    """The `runs` group as one list; on_sft holds seeds."""
    return [*runs["grpo"], *runs["sft"], *(f"{ON_SFT}-{seed}" for seed in runs["on_sft"])]
