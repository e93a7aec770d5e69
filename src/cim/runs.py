"""Names of training runs: METHOD-SEED, as in cim-0."""

from __future__ import annotations

from cim.errors import CimError
from cim.scorer import REWARDS

# sft: captions as annotators write them; sft_perfect: captions that leave out nothing and err nowhere.
SFT_METHODS = ("sft", "sft_perfect")


def parse_run(run: str) -> tuple[str, int]:
    """ "cim-0" to ("cim", 0).

    Raises:
        CimError: where it is not METHOD-SEED or the method is not known.
    """
    method, _, seed = run.rpartition("-")
    known = (*REWARDS, *SFT_METHODS)
    if not seed.isdigit() or method not in known:
        raise CimError(f"run '{run}' should be METHOD-SEED with a method of {', '.join(known)}")
    return method, int(seed)
