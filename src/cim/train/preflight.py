"""What a run will take, before anything heavy starts: model, data, batches, and an estimate of memory.

Sizes are counted on the model's skeleton, which holds no weights. The estimate is rough: it warns and stops nothing.
"""

import os
import re
from collections import namedtuple
from pathlib import Path

import torch

from cim.captioners.models import DTYPES, load_processor, longest_prompt, skeleton
from cim.files import explained
from cim.gallery.store import read_info
from cim.train import launch
from cim.train.batches import grpo_batches, sft_batches
from cim.train.job import Job, trainable

GIB = 2**30
OVERHEAD = 1.2  # fragments and buffers on top of what is counted
# Widths of the hidden state that a token takes (benchmarks/skeletons.py): in a layer that waits for the backward pass,
# in the one that gradient checkpointing computes again, and in the one that reads a prompt before sampling.
KEPT, REDONE, READ = 36, 48, 30

# Of a model: parameters in all and trained, and of its language model layers, hidden width, vocabulary, and what the
# cache of sampling keeps of a token, in numbers.
Size = namedtuple("Size", "total trained layers hidden vocabulary cache")


def plan(run: str, params: dict, artifacts: Path, processes: int | None = None) -> list[str]:
    """The lines of a dry run; CimError for what is found to stop the run without loading its weights."""
    accelerate = (params.get("compute") or {}).get("accelerate")
    processes = processes or launch.processes(accelerate)
    job = Job(run, params, artifacts, launch.configuration(accelerate).get("distributed_type"))
    model, train = job.model_settings, job.settings
    prompt = longest_prompt(load_processor(model), job.images.image_paths[:8], model)
    size = model_size(job)
    adapted = f" (LoRA of rank {train.lora_rank})" if train.lora_rank else ""
    lines = [
        f"model: {model.name}, {size.total / 1e6:,.1f} M parameters in {model.dtype}, "
        f"{size.trained / 1e6:,.1f} M trained{adapted}",
        f"data: {len(job.images):,} images to train on, {len(job.validation):,} held out for validation, "
        f"prompts of up to {prompt} tokens with their image",
    ]
    if job.sft:
        batches = sft_batches(job.sft, job.compute.sft_per_device, len(job.images), processes)
    else:
        info = read_info(artifacts / "gallery")
        lines.append(f"gallery: {info['rows']:,} captioned images, index {info['index']['kind']}")
        batches = grpo_batches(train, job.compute.per_device, len(job.images), processes)
    gpu = torch.cuda.is_available()
    have = torch.cuda.mem_get_info()[1] if gpu else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    need = memory(job, size, batches.per_device, prompt, processes, have)
    total = sum(need.values()) * OVERHEAD
    lines += [
        *batches.summary,
        f"memory of a device: about {total / GIB:.1f} GiB of {have / GIB:.1f} "
        f"({', '.join(f'{name} {value / GIB:.2f}' for name, value in need.items())}; a fifth is added)",
    ]
    if total > have:
        lines.append(
            "WARNING: that may not fit; lower compute.per_device or model.max_pixels, set train.lora_rank, "
            "compute.gradient_checkpointing or model.dtype=bfloat16, or share the weights (conf/accelerate/fsdp.yaml)"
        )
    return lines


def model_size(job: Job) -> Size:
    """Counted on the skeleton, with the run's frozen parts and adapters."""
    from peft import get_peft_model

    bones = skeleton(job.model_settings)
    config = bones.config.get_text_config()
    total = sum(p.numel() for p in bones.parameters())
    if adapter := trainable(job.settings, bones):
        problem = f"parameters: train.lora_targets='{job.settings.lora_targets}' cannot be used"
        fix = "give a regular expression of their whole names, such as '.*_proj', or all-linear"
        with explained(problem, fix, ValueError, re.error), torch.device("meta"):
            bones = get_peft_model(bones, adapter)
    trained = sum(p.numel() for p in bones.parameters() if p.requires_grad)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * head
    return Size(total, trained, config.num_hidden_layers, config.hidden_size, config.vocab_size, cache)


def memory(job: Job, size: Size, per_device: int, prompt: int, processes: int, have: int) -> dict[str, float]:
    """Bytes on a device that has `have`, by what they hold; `prompt` is in tokens, with the image's."""
    train, compute, dtype = job.settings, job.compute, job.model_settings.dtype
    each = DTYPES[dtype].itemsize
    # The KL term needs a second copy, except with LoRA, whose adapters can be switched off.
    copies = 2 if not job.sft and train.kl > 0 and not train.lora_rank else 1
    # FSDP and ZeRO-3 divide weights, gradients and states; data parallelism copies them.
    shards = processes if job.sharded else 1
    # Two moments in float32, and DeepSpeed's copy of 16-bit weights.
    state = (2 if "8bit" in train.optimizer else 8) + (4 if job.distributed == "DEEPSPEED" and each == 2 else 0)
    computed = 2 if train.bf16 or dtype != "float32" else 4
    tokens = per_device * (prompt + train.max_completion)
    # With checkpointing, what lies between layers is kept, in the weights' type.
    widths = size.layers * each / computed + REDONE if compute.gradient_checkpointing else size.layers * KEPT
    # TRL computes logits in tiles; the output layer's gradient is float32 first.
    logits = min(per_device * train.max_completion, 4096) * 32_768 * computed
    logits += 0 if train.lora_rank else size.hidden * size.vocabulary * 4
    use = {"activations": tokens * size.hidden * widths * computed, "logits": logits}
    if not job.sft and compute.vllm == "off":  # all captions of a rollout at once; DeepSpeed gathers the weights for it
        captions = train.images_per_step * train.updates_per_rollout * train.group_size / processes
        numbers = captions * ((prompt + train.max_completion) * size.cache + prompt * size.hidden * READ)
        sampling = numbers * computed + (job.distributed == "DEEPSPEED") * size.total * each
        use = max(use, {"sampling": sampling}, key=lambda use: sum(use.values()))  # they take turns
    # Autocast keeps a copy of what it trains; FSDP and DeepSpeed convert weights layer by layer.
    cast = size.trained * computed if computed < each and not job.sharded else 0
    return {
        "weights": copies * size.total * each / shards + cast,
        "gradients": size.trained * each / shards,
        "optimizer": size.trained * state / shards,
        **use,
        "vllm": compute.vllm_memory * have if compute.vllm == "colocate" else 0.0,
    }
