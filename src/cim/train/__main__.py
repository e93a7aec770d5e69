"""One training run. notebooks/train.ipynb starts it; by hand:

    accelerate launch --num_processes 1 --cpu -m cim.train --run cim-0              two CPU cores
    accelerate launch --num_processes 1 --gpu_ids 0 -m cim.train --run cim-0        one GPU
    accelerate launch --num_processes 8 -m cim.train --run cim-0                    eight GPUs
    torchrun --nproc_per_node 8 -m -- cim.train --run cim-0                         without accelerate's launcher

A run is METHOD-SEED. The method is a reward (cim, grc, qir, self_retrieval, clipscore: GRPO), cim_on_sft (GRPO from the
fine-tuned model), sft (on captions as annotators write them), sft_perfect (on complete captions without errors) or one
of the `variants` group.
If interrupted, rerun the same command: it resumes from the last checkpoint.
"""

import argparse
import os
import signal
import threading
from pathlib import Path

import torch

from cim.errors import CimError, one_line_errors
from cim.params import read_params
from cim.runs import SFT_METHODS, parse_run, with_variant
from cim.train import grpo, sft
from cim.train.preflight import plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="METHOD-SEED, as in cim-0")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--attached", action="store_true", help="end when standard input is closed, as cim train does")
    arguments = parser.parse_args()
    if arguments.attached:
        threading.Thread(target=_end_with_standard_input, daemon=True).start()
    artifacts = Path("artifacts")
    with one_line_errors():
        params = read_params(arguments.params)
        refuse_other_precision(params)
        trainer = sft if with_variant(params, parse_run(arguments.run)[0])[1] in SFT_METHODS else grpo
        if os.environ.get("RANK", "0") == "0":
            print(*plan(arguments.run, params, artifacts, int(os.environ.get("WORLD_SIZE", 1))), sep="\n", flush=True)
        try:
            trainer.train(arguments.run, params, artifacts)
        except torch.OutOfMemoryError as error:
            raise CimError(
                f"the GPU ran out of memory ({' '.join(str(error).split())[:120]}); lower compute.per_device or "
                "model.max_pixels, or set compute.gradient_checkpointing, and rerun the same command to resume"
            ) from None


def refuse_other_precision(params: dict) -> None:
    """Refuse a precision of accelerate that would silently replace that of the parameters, which names the run."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "bf16" if (params.get("train") or {}).get("bf16") else "no"):
        raise CimError(f"accelerate's mixed precision is {asked}, which train.bf16 does not say; set the two alike")


def _end_with_standard_input() -> None:
    """End this process when whoever started the run has ended, so that no second one joins it at the checkpoints."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
