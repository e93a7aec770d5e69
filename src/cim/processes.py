"""The processes and devices of a run, however it was started: alone, by accelerate or by torchrun."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from torch.nn.attention import SDPBackend, sdpa_kernel


def processes() -> PartialState:
    """This process and its peers; on a CPU accelerate looks for peers only when it knows that it is one of several."""
    # The others wait while one joins and indexes a large gallery: longer than NCCL's ten minutes.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=2))


def default_device() -> torch.device:
    """This process's own GPU, or the CPU."""
    return processes().device if torch.cuda.is_available() else torch.device("cpu")


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16; where oneDNN emulates it, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def bfloat16_if_fast(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where the hardware computes in it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=computes_in_bfloat16(device))


@contextmanager
def trained_in_bfloat16_if_fast(device: torch.device) -> Iterator[None]:
    """The same for a forward that has a backward, with plain attention.

    On a CPU the backward of PyTorch's flash attention in bfloat16 would take half of a training step.
    """
    with bfloat16_if_fast(device), sdpa_kernel(SDPBackend.MATH):
        yield
