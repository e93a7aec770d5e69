"""Which weights a run trains: all, all but the vision tower's, or LoRA adapters."""

from __future__ import annotations

from cim.captioners.models import is_vision
from cim.train.settings import TrainSettings


def lora(settings: TrainSettings, model):
    """peft's configuration, or None for full fine-tuning; freezes the vision tower where asked."""
    if settings.lora_rank:
        from peft import LoraConfig

        return LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            target_modules=settings.lora_targets,
            # Frozen towers stay free of adapters too.
            exclude_modules=r"(.*\.)?(vision_tower|visual|vision_model)\..*" if settings.freeze_vision else None,
            task_type="CAUSAL_LM",
        )
    if settings.freeze_vision:
        for name, parameter in model.named_parameters():
            if is_vision(name):
                parameter.requires_grad = False
    return None
