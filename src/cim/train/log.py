"""What a run prints for every step."""

import time
from datetime import timedelta

from transformers import TrainerCallback

from cim.train.summary import COLUMNS

VALIDATION = {"eval_reward": ("validation reward", ".3f"), "eval_loss": ("validation loss", ".3f")}


class StepLog(TrainerCallback):
    """Prints a line for every step, and warns once where the captions collapse to a few."""

    def __init__(self, warn_distinct: float):
        self.warn_distinct = warn_distinct
        self.warned = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.start, self.first = time.monotonic(), state.global_step
        # Else a resumed run would go on with its checkpoint's, though another is given.
        state.save_steps, state.eval_steps = args.save_steps, args.eval_steps

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {**COLUMNS, **VALIDATION}
        values = [f"{name} {logs[key]:{form}}" for key, (name, form) in shown.items() if key in (logs or {})]
        if not values or not state.is_world_process_zero:
            return
        pace = (time.monotonic() - self.start) / max(1, state.global_step - self.first)
        left = timedelta(seconds=round(pace * (state.max_steps - state.global_step)))
        print(f"step {state.global_step}/{state.max_steps}", *values, f"{left} left", sep="  ", flush=True)
        distinct = logs.get("variety/distinct", 1.0)
        if distinct < self.warn_distinct and not self.warned:
            self.warned = True
            print(
                f"WARNING: only {distinct:.0%} of the captions of this step are distinct: training is collapsing. "
                "A better base, a denser gallery, a larger kl or beta, or a smaller lr prevents it.",
                flush=True,
            )
