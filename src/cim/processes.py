"""The processes that work together, however they were started: alone, by accelerate or by torchrun."""

from __future__ import annotations

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """This process's place among them; on a CPU accelerate looks for others only when told that it is one."""
    return PartialState(cpu=not torch.cuda.is_available())
