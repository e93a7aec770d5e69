"""What is checked before a run starts anything heavy, and an estimate of what it will take.

Sizes are counted on the model's skeleton, which holds no weights. Memory and time are estimates: they tell hours from
days, warn, and stop nothing.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from cim.captioners.models import DTYPES, ModelSettings, check_prompts, load_processor, skeleton, why_not_loaded
from cim.data.manifest import Manifest, read_manifest
from cim.errors import CimError
from cim.gallery.store import read_info
from cim.images import open_image
from cim.params import group
from cim.processes import default_device
from cim.runs import ON_SFT, SFT_METHODS, parse_run
from cim.train.adapters import lora
from cim.train.launch import configuration
from cim.train.settings import ComputeSettings, SftSettings, TrainSettings, batches, divided, sft_updates

GIB = 2**30
UTILISATION = 0.35  # the share of the speed of large matrix products that training a transformer usually reaches
OVERHEAD = 1.2  # fragments and buffers on top of what is counted


def start_of(run: str, model: ModelSettings, artifacts: Path) -> ModelSettings:
    """Where a run starts: the base model, or the fine-tuned model of the same seed.

    Raises:
        CimError: where that is not trained yet.
    """
    method, seed = parse_run(run)
    if method != ON_SFT:
        return model
    folder = artifacts / "train" / f"sft-{seed}"
    if not (folder / "log.json").is_file():
        raise CimError(f"{folder}: not trained yet; run '{run}' starts from run 'sft-{seed}', so train that first")
    return model.at(folder)


def training_images(artifacts: Path, settings: TrainSettings) -> tuple[Manifest, Manifest]:
    """The images to train on, and those of the same split that are held out for validation.

    Raises:
        CimError: where nothing would be left, or an image file is missing.
    """
    split = read_manifest(artifacts / "dataset" / "manifest.parquet").split(settings.split)
    if settings.validation >= len(split):
        raise CimError(
            f"parameters: train.validation={settings.validation} leaves none of the {len(split)} images "
            f"of split '{settings.split}' to train on; lower it"
        )
    if missing := [path for path in split.image_paths if not path.is_file()]:
        raise CimError(
            f"{missing[0]}: image not found, as {len(missing)} of {len(split)} of split '{settings.split}'; "
            "restore the files or make the data set again"
        )
    cut = len(split) - settings.validation
    return split.take(range(cut)), split.take(range(cut, len(split)))


def check_precision(settings: TrainSettings, model: ModelSettings, deepspeed: bool) -> None:
    """Refuse to update 16-bit weights themselves: a step of 1e-6 is lost in their rounding.

    LoRA's own weights are float32, and DeepSpeed keeps float32 copies.

    Raises:
        CimError: saying what to choose instead.
    """
    if model.dtype != "float32" and not settings.lora_rank and not deepspeed:
        raise CimError(
            f"parameters: model.dtype={model.dtype} with all weights trained: updates of train.lr={settings.lr:g} "
            "would be rounded away; set model.dtype=float32 and train.bf16=true, or train.lora_rank, or a DeepSpeed "
            "configuration (compute.accelerate=conf/accelerate/zero3.yaml)"
        )


def check_integrations(names: list[str]) -> None:
    """Refuse an experiment tracker that is not installed before anything is loaded.

    Raises:
        CimError: naming it.
    """
    for name in names:
        if find_spec(name) is None:
            raise CimError(f"parameters: compute.log_to names '{name}', which is not installed; 'pip install {name}'")


def prompt_tokens(processor, images: Manifest, model: ModelSettings) -> int:
    """Tokens of the longest prompt with its image, among the first images.

    Raises:
        CimError: where it is longer than model.max_prompt.
    """
    return check_prompts(processor, [open_image(path) for path in images.image_paths[:8]], model)


@dataclass(frozen=True)
class Size:
    """Of a model: parameters in all and trained, and of its language model layers, hidden width and vocabulary."""

    total: int
    trained: int
    layers: int
    hidden: int
    vocabulary: int


def plan(run: str, params: dict, artifacts: Path, processes: int) -> list[str]:
    """The lines of a dry run.

    Raises:
        CimError: for everything that would stop the run before its first step: parameters, images, gallery, model,
            prompts that are too long.
    """
    method, _ = parse_run(run)
    settings = group(TrainSettings, params.get("train"), "train")
    compute = group(ComputeSettings, params.get("compute"), "compute")
    model = start_of(run, group(ModelSettings, params.get("model"), "model"), artifacts)
    check_integrations(compute.log_to)
    kind = str(configuration(compute.accelerate).get("distributed_type", "NO"))
    check_precision(settings, model, kind == "DEEPSPEED")
    images, validation = training_images(artifacts, settings)
    try:
        processor = load_processor(model)
    except (OSError, ValueError, ImportError) as error:
        raise CimError(f"model '{model.name}' could not be loaded: {why_not_loaded(error)}") from None
    prompt, size = prompt_tokens(processor, images, model), model_size(model, settings)
    lines = [
        f"model: {model.name}, {size.total / 1e6:,.1f} M parameters in {model.dtype}, "
        f"{size.trained / 1e6:,.1f} M trained"
        + (f" (LoRA of rank {settings.lora_rank})" if settings.lora_rank else ""),
        f"data: {len(images):,} images to train on, {len(validation):,} held out for validation, "
        f"prompts of up to {prompt} tokens with their image",
    ]
    if method in SFT_METHODS:
        sft = group(SftSettings, params.get("sft"), "sft")
        accumulation, per_device = divided(sft.batch_size, compute.sft_per_device, processes, "compute.sft_per_device")
        updates = sft_updates(sft, len(images))
        lines.append(
            f"an update: {sft.batch_size} captions = {processes} processes x {per_device} at once x {accumulation} "
            f"accumulated; {updates} updates"
        )
        captions, passes = updates * sft.batch_size, 3
    else:
        info = read_info(artifacts / "gallery")
        lines.append(f"gallery: {info['rows']:,} captioned images, index {info['index']['kind']}")
        cut = batches(settings, compute.per_device, len(images), processes)
        lines += cut.lines(settings, len(images), processes)
        # Sampling and the reference model read each token once, an update three times.
        captions, passes, per_device = cut.rollouts * cut.captions, 5, cut.per_device
    reference = method not in SFT_METHODS and settings.kl > 0 and not settings.lora_rank
    need = memory(size, model, settings, compute, per_device, prompt, reference, processes, kind)
    flops, have = device_speed(DTYPES[model.dtype]), device_memory()
    seconds = captions * (prompt + settings.max_completion) * passes * 2 * size.total / processes / flops / UTILISATION
    parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in need.items())
    total = sum(need.values()) * OVERHEAD
    lines += [
        f"memory of a device: about {total / GIB:.1f} GiB of {have / GIB:.1f} ({parts}; a fifth on top)",
        f"time: about {duration(seconds)}, from matrix products at {flops / 1e12:.2f} TFLOP/s on this device",
    ]
    if total > have:
        lines.append(
            "WARNING: that may not fit; lower compute.per_device or model.max_pixels, set train.lora_rank, "
            "compute.gradient_checkpointing or model.dtype=bfloat16, or share the weights (conf/accelerate/fsdp.yaml)"
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
    compute: ComputeSettings,
    per_device: int,
    prompt: int,
    reference: bool,
    processes: int,
    kind: str = "NO",
) -> dict[str, float]:
    """Bytes on one device, by what they hold.

    Args:
        reference: whether a second copy of the weights is kept for the KL term.
        kind: accelerate's distributed_type.
    """
    each = DTYPES[model.dtype].itemsize
    # FSDP and ZeRO-3 divide weights, gradients and states; data parallelism copies them.
    shared = processes if kind in ("FSDP", "DEEPSPEED") else 1
    # Two moments in float32, and DeepSpeed's copy of 16-bit weights.
    state = (2 if "8bit" in settings.optimizer else 8) + (4 if kind == "DEEPSPEED" and each == 2 else 0)
    computed = 2 if settings.bf16 or model.dtype != "float32" else 4
    kept = 2 if compute.gradient_checkpointing else 34  # activations of a layer, in widths of the hidden state
    tokens = per_device * (prompt + settings.max_completion)
    return {
        "weights": size.total * each / shared,
        "reference": size.total * each / shared if reference else 0.0,
        "gradients": size.trained * each / shared,
        "optimizer": size.trained * state / shared,
        "activations": tokens * size.hidden * size.layers * kept * computed,
        # Logits of the completion in float32, and their gradient.
        "logits": 2.0 * per_device * settings.max_completion * size.vocabulary * 4,
        "vllm": compute.vllm_memory * device_memory() if compute.vllm == "colocate" else 0.0,
    }


def device_memory() -> int:
    """Bytes of the GPU, or of this machine where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_speed(dtype: torch.dtype, products: int = 20) -> float:
    """Floating-point operations a second of this device in large matrix products, measured for a moment."""
    device = default_device()
    side = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    torch.relu_(a @ b).sum().item()  # warm up; item() waits for a GPU
    start = time.perf_counter()
    for _ in range(products):
        out = a @ b
    out.sum().item()
    return 2 * side**3 * products / (time.perf_counter() - start)


def duration(seconds: float) -> str:
    """Seconds as whole seconds, minutes, hours or days.

    >>> duration(100), duration(7200)
    ('100 seconds', '2 hours')
    """
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
