"""What a run would take: models, data, batches, memory and hours, before anything heavy starts.

Sizes are counted on the model's skeleton, which holds no weights. Memory and hours are estimates from sizes and from
this device's speed, measured for a moment; they tell hours from days, not minutes from minutes.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from cim.encoders import default_device
from cim.errors import CimError
from cim.gallery import read_info
from cim.manifest import Manifest, open_image
from cim.models import DTYPES, ModelSettings, check_prompts, load_processor, skeleton, why_not_loaded
from cim.runs import SFT_METHODS, parse_run
from cim.settings import group
from cim.train.common import check_integrations, check_precision, lora, start_of, training_images
from cim.train.launch import configuration
from cim.train.settings import Batches, TrainSettings, batches

GIB = 2**30
UTILISATION = 0.35  # of the speed of a large product of matrices, what training a transformer usually reaches
OVERHEAD = 1.2  # fragments and buffers on top of what is counted


@dataclass(frozen=True)
class Size:
    """Of a model.

    Attributes:
        total, trained: parameters.
        layers, hidden, vocabulary: of its language model.
    """

    total: int
    trained: int
    layers: int
    hidden: int
    vocabulary: int


@dataclass(frozen=True)
class Device:
    """What it holds and does: bytes, floating-point operations a second, bytes a second."""

    name: str
    memory: int
    flops: float
    bandwidth: float


def plan(run: str, params: dict, artifacts: Path, processes: int, device: Device | None = None) -> list[str]:
    """The lines of a dry run.

    Raises:
        CimError: for everything that would stop the run before its first step: parameters, images, gallery, model,
            prompts that are too long, and memory that is too small.
    """
    method, _ = parse_run(run)
    settings = group(TrainSettings, params.get("train"), "train")
    model = start_of(run, group(ModelSettings, params.get("model"), "model"), artifacts)
    check_integrations(settings.log_to)
    kind = str(configuration(settings.accelerate).get("distributed_type", "NO"))
    check_precision(settings, model, kind == "DEEPSPEED")
    images, validation = training_images(artifacts, settings)
    prompt, size = _prompt_tokens(model, images), model_size(model, settings)
    device = device or this_device(DTYPES[model.dtype])
    lines = [
        f"model: {model.name}, {size.total / 1e6:,.1f} M parameters in {model.dtype}, "
        f"{size.trained / 1e6:,.1f} M trained"
        + (f" (LoRA of rank {settings.lora_rank})" if settings.lora_rank else ""),
        f"data: {len(images):,} images to train on, {len(validation):,} held out for validation, "
        f"prompts of up to {prompt} tokens with their image",
    ]
    if method in SFT_METHODS:
        from cim.train.sft import SftSettings, divided, updates

        sft = group(SftSettings, params.get("sft"), "sft")
        accumulation, per_device = divided(sft, processes)
        total = updates(sft, len(images))
        lines.append(
            f"an update: {sft.batch_size} captions = {processes} processes x {per_device} at once x {accumulation} "
            f"accumulated; {total} updates"
        )
        tokens = prompt + settings.max_completion
        need = memory(size, model, settings, per_device, tokens, reference=False, processes=processes, kind=kind)
        seconds = total * sft.batch_size / processes * tokens * _update_flops(size, settings) / _speed(device)
    else:
        cut = batches(settings, len(images), processes)
        lines += _gallery_line(artifacts)
        lines += cut.lines(settings, len(images), processes)
        tokens = prompt + settings.max_completion
        reference = settings.kl > 0 and not settings.lora_rank
        need = memory(size, model, settings, cut.per_device, tokens, reference, processes, kind)
        seconds = _grpo_seconds(size, model, settings, cut, prompt, processes, device)
    parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in need.items())
    total_need = sum(need.values()) * OVERHEAD
    lines.append(f"memory of a device: about {total_need / GIB:.1f} GiB ({parts}; a fifth on top)")
    lines.append(f"device: {device.name}, {device.memory / GIB:.1f} GiB, {device.flops / 1e12:.2f} TFLOP/s measured")
    lines.append(f"time: about {duration(seconds)}, at {UTILISATION:.0%} of that speed and full-length captions")
    if total_need > device.memory and settings.check_memory:
        print("\n".join(lines), flush=True)  # what was found is told, whatever comes of it
        raise CimError(
            f"run '{run}' needs about {total_need / GIB:.1f} GiB on a device that has {device.memory / GIB:.1f} GiB; "
            "lower train.per_device or model.max_pixels, set train.lora_rank, train.gradient_checkpointing or "
            "model.dtype=bfloat16, share the weights (conf/accelerate/fsdp.yaml), or, if you know better, set "
            "train.check_memory=false"
        )
    return lines


def model_size(model: ModelSettings, settings: TrainSettings) -> Size:
    """Counted on the skeleton, with the run's frozen parts and adapters."""
    if (Path(model.name) / "adapter_config.json").is_file():  # merged into its base before training
        from peft import PeftConfig

        model = model.at(PeftConfig.from_pretrained(model.name).base_model_name_or_path)
    bones = skeleton(model)
    config = bones.config.get_text_config()
    total = sum(p.numel() for p in bones.parameters())
    adapter = lora(settings, bones)
    if adapter is not None:
        from peft import get_peft_model

        with torch.device("meta"):
            bones = get_peft_model(bones, adapter)
    trained = sum(p.numel() for p in bones.parameters() if p.requires_grad)
    return Size(total, trained, config.num_hidden_layers, config.hidden_size, config.vocab_size)


def memory(
    size: Size,
    model: ModelSettings,
    settings: TrainSettings,
    per_device: int,
    tokens: int,
    reference: bool,
    processes: int,
    kind: str = "NO",
) -> dict[str, float]:
    """Bytes on one device, by what they hold.

    Args:
        kind: accelerate's distributed_type.
    """
    each = DTYPES[model.dtype].itemsize
    # FSDP and ZeRO-3 cut weights, gradients and states; data parallelism copies them.
    shared = processes if kind in ("FSDP", "DEEPSPEED") else 1
    # Two moments in float32, and DeepSpeed's copy of 16-bit weights.
    state = (2 if "8bit" in settings.optimizer else 8) + (4 if kind == "DEEPSPEED" and each == 2 else 0)
    computed = 2 if settings.bf16 or model.dtype != "float32" else 4
    kept = 2 if settings.gradient_checkpointing else 34  # activations of a layer, in widths of the hidden state
    return {
        "weights": size.total * each / shared,
        "reference": size.total * each / shared if reference else 0.0,
        "gradients": size.trained * each / shared,
        "optimizer": size.trained * state / shared,
        "activations": per_device * tokens * size.hidden * size.layers * kept * computed,
        # Logits of the completion in float32, and their gradient.
        "logits": 2.0 * per_device * settings.max_completion * size.vocabulary * 4,
        "vllm": settings.vllm_memory * this_memory() if settings.vllm == "colocate" else 0.0,
    }


def _update_flops(size: Size, settings: TrainSettings) -> float:
    """Operations a token: forward 2, backward 4 (frozen: 2), and forward again with checkpointing."""
    backward = 4 if size.trained > size.total / 2 else 2
    return (2 + backward + 2 * settings.gradient_checkpointing) * size.total


def _grpo_seconds(
    size: Size,
    model: ModelSettings,
    settings: TrainSettings,
    cut: Batches,
    prompt: int,
    processes: int,
    device: Device,
) -> float:
    captions = cut.captions / processes
    tokens = prompt + settings.max_completion
    # Reading the prompts is computing; each further token of a batch reads all weights once.
    at_once = captions if settings.vllm != "off" else min(captions, cut.per_device * cut.per_rollout)
    weights = size.total * DTYPES[model.dtype].itemsize / device.bandwidth
    token = max(weights, at_once * 2 * size.total / _speed(device))
    rollout = captions * prompt * 2 * size.total / _speed(device) + settings.max_completion * token * captions / at_once
    reference = captions * tokens * 2 * size.total / _speed(device) if settings.kl > 0 else 0.0
    update = captions * tokens * _update_flops(size, settings) / _speed(device)
    return cut.rollouts * (rollout + reference + update)


def _speed(device: Device) -> float:
    return device.flops * UTILISATION


def _prompt_tokens(model: ModelSettings, images: Manifest) -> int:
    try:
        processor = load_processor(model)
    except (OSError, ValueError, ImportError) as error:
        raise CimError(f"model '{model.name}' could not be loaded: {why_not_loaded(error)}") from None
    return check_prompts(processor, [open_image(path) for path in images.image_paths[:8]], model)


def _gallery_line(artifacts: Path) -> list[str]:
    info = read_info(artifacts / "gallery")
    return [
        f"gallery: {info['rows']:,} captioned images, searched {info['index']['kind']} by "
        f"{info['text_encoder']['spec']}, compared by {info['image_encoder']['spec']}"
    ]


def this_memory() -> int:
    """Bytes of the GPU, or of this machine where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def this_device(dtype: torch.dtype, seconds: float = 0.3) -> Device:
    """Measure the device that a run would use."""
    device = default_device()
    side = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    flops = 2 * side**3 / _fastest(lambda: a @ b, seconds)
    many = torch.empty(2**26 if device.type == "cuda" else 2**24, device=device)
    bandwidth = 2 * many.nbytes / _fastest(many.clone, seconds)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Device(name, this_memory(), flops, bandwidth)


def _fastest(work, seconds: float) -> float:
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, to two digits."""
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds:.2g} seconds"
