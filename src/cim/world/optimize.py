"""How the small world's models are trained: the optimizers and the loop."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from open_clip_train.scheduler import cosine_lr
from timm.optim.muon import get_lr_scale, zeropower_via_newtonschulz
from torch import nn
from torch.optim import AdamW, Optimizer
from tqdm import tqdm

STEPS = 5  # of the Newton-Schulz iteration
COEFFICIENTS = [(3.4445, -4.7750, 2.0315)]  # Keller Jordan's


class Muon(Optimizer):
    """Muon (Jordan et al., 2024), by which the image encoder learns as much in half of AdamW's steps.

    For weights of linear layers and convolutions. PyTorch's and timm's orthogonalize in bfloat16, which takes long
    where the hardware emulates it; this one in float32.

    Args:
        lr: as for AdamW: an update is as large as one of AdamW's.
        momentum: less than the usual 0.95, which averages more steps than short trainings can wait for.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.9):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(mean, momentum).flatten(1)
                update = zeropower_via_newtonschulz(update, STEPS, COEFFICIENTS, dtype=torch.float32)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update.view(p.shape), alpha=-lr * get_lr_scale(update.shape, "match_rms_adamw"))


def muon(model: nn.Module, lr: float, weight_decay: float) -> tuple[Muon, AdamW]:
    """Muon for the matrices and kernels of `model` that are trained, AdamW for embeddings, biases and gains."""
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = [p for p in trained if p.ndim > 1 and id(p) not in embeddings]
    others = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    adamw = AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)
    return Muon(weights, lr, weight_decay), adamw


def minimize(
    optimizers: Sequence[Optimizer], loss_of: Callable[[Any], torch.Tensor], batches: Iterable[Any], steps: int,
    warmup: float, name: str, max_norm: float = math.inf,
) -> list[float]:  # fmt: skip
    """One update for each of `steps` batches, gradients clipped to `max_norm`; returns the losses.

    Learning rates rise from 0 to the optimizers' own in the first `warmup` of the steps and decay as a cosine.
    """
    schedules = [cosine_lr(optimizer, optimizer.defaults["lr"], int(warmup * steps), steps) for optimizer in optimizers]
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    losses = []
    for step, batch in enumerate(tqdm(batches, total=steps, desc=name, mininterval=2)):
        loss = loss_of(batch)
        loss.backward()
        if max_norm < math.inf:
            nn.utils.clip_grad_norm_(parameters, max_norm)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            schedule(step)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()
