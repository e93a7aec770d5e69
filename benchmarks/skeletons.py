"""The memory of an update of Qwen2.5-VL, counted on tensors without content, beside what `cim train --plan` estimates.

    python benchmarks/skeletons.py

No weights and no GPU are needed. Counted are the bytes alive at most between an operation and the next: of the language
model's layers, without the vision tower, the logits, and the fragments that an allocator leaves.
"""

import weakref
from types import SimpleNamespace

import pandas as pd
import torch
from common import report
from peft import LoraConfig, get_peft_model
from random_models import SIZES, captioner_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2_5_VLForConditionalGeneration

from cim.captioners.models import DTYPES, VISION
from cim.train.preflight import GIB, READ, Size, memory

BATCH, PROMPT, COMPLETION, RANK = 4, 808, 256, 16
# Size, rank of LoRA, type of the weights, whether autocast to bfloat16, whether gradient checkpointing.
CASES = [
    ("3B", RANK, "bfloat16", True, True),
    ("3B", RANK, "bfloat16", True, False),
    ("7B", RANK, "bfloat16", True, True),
    ("7B", RANK, "bfloat16", True, False),
    ("3B", 0, "float32", True, True),
    ("3B", 0, "float32", True, False),
]


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations make, now and at most; those of `known` tensors do not count."""

    def __init__(self, known):
        super().__init__()
        self.now = self.most = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.known:
                self.known.add(key)
                self._change(tensor.untyped_storage().nbytes())
                weakref.finalize(tensor.untyped_storage(), self._freed, key, tensor.untyped_storage().nbytes())
        return out

    def _change(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def count(size: str, rank: int, dtype: str, bf16: bool, checkpointing: bool) -> dict[str, float]:
    """GiB at most of a prompt's first pass, of a forward pass and of both passes; without weights and gradients."""
    with FakeTensorMode():
        torch.set_default_dtype(DTYPES[dtype])
        model = Qwen2_5_VLForConditionalGeneration(captioner_config(size))
        torch.set_default_dtype(torch.float32)
        if rank:
            # Its layers are made where and as they should be; fake tensors cannot be moved.
            moved, torch.nn.Module.to = torch.nn.Module.to, lambda self, *args, **kwargs: self
            get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", exclude_modules=VISION))
            torch.nn.Module.to = moved
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        shape = (BATCH, PROMPT + COMPLETION)
        ids, mask, places = (torch.ones(size, dtype=torch.long) for size in (shape, shape, (3, *shape)))
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places, "use_cache": False}
        trained = [p for p in model.parameters() if p.requires_grad]

        def passed(alive: Alive) -> torch.Tensor:
            with alive, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return model.model(**inputs).last_hidden_state

        known = [*model.parameters(), *model.buffers(), ids, mask, places]
        with torch.no_grad():
            passed(reading := Alive(known))
        out = passed(alive := Alive(known))
        forward = alive.most
        with alive:
            out.float().sum().backward()
        # The most is reached at the first layer or the last, before or after gradients are made.
        gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
        update = max(forward, alive.most - gradients)
    return {"reading": reading.most / GIB, "forward": forward / GIB, "update": update / GIB}


def estimate(size: str, rank: int, dtype: str, bf16: bool, checkpointing: bool) -> dict[str, float]:
    """GiB of the same by cim.train.preflight."""
    train = SimpleNamespace(
        kl=0, lora_rank=rank, bf16=bf16, optimizer="adamw_torch", max_completion=COMPLETION, images_per_step=1,
        updates_per_rollout=1, group_size=2,
    )  # fmt: skip
    job = SimpleNamespace(
        settings=train, compute=SimpleNamespace(gradient_checkpointing=checkpointing, vllm="off"),
        model_settings=SimpleNamespace(dtype=dtype), sft=None, sharded=False, distributed="NO",
    )  # fmt: skip
    width, layers, _, _, _, vocabulary, _ = SIZES[size]
    with torch.device("meta"):
        language = Qwen2_5_VLForConditionalGeneration(captioner_config(size)).model.language_model
    total = sum(p.numel() for p in language.parameters())
    need = memory(job, Size(total, 0 if rank else total, layers, width, vocabulary, 0), BATCH, PROMPT, 1, 0)
    copies = need["weights"] - total * DTYPES[dtype].itemsize
    reading = BATCH * (PROMPT + COMPLETION) * width * READ * 2
    return {"reading": (reading + copies) / GIB, "update": (need["activations"] + copies) / GIB}


def main() -> None:
    rows = []
    for case in CASES:
        counted, estimated = count(*case), estimate(*case)
        names = dict(zip(("size", "lora_rank", "dtype", "bf16", "gradient_checkpointing"), case, strict=True))
        rows.append(names | counted | {f"estimated_{name}": value for name, value in estimated.items()})
        print(rows[-1], flush=True)
    result = {"captions": BATCH, "prompt": PROMPT, "completion": COMPLETION, "gib": rows}
    report("skeletons", result, pd.DataFrame(rows))


if __name__ == "__main__":
    main()
