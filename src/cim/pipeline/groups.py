"""All groups of params.yaml and their settings, checked at once: an invalid value is found before any stage runs.

Imports no heavy library, so that every command can afford the check.
"""

from typing import Any, Literal

from pydantic import ConfigDict, Field, NonNegativeInt

from cim.captioners.settings import CaptionSettings, ModelSettings, PhotoCaptionerSettings
from cim.data.dataset import DatasetSettings
from cim.errors import CimError
from cim.evaluation import settings as evaluation
from cim.gallery.settings import GallerySettings
from cim.params import EncoderSettings, Settings, group
from cim.rewards import RewardSettings
from cim.runs import ON_SFT, REWARDS, SFT_METHODS, all_runs, parse_run, with_variant
from cim.train.settings import ComputeSettings, SftSettings, TrainSettings
from cim.world.settings import CaptionerSettings, EncoderTrainingSettings


class RunSettings(Settings):
    """The `runs` group: runs by the stage that trains them; for stage on_sft their seeds."""

    grpo: list[str]
    sft: list[str]
    on_sft: list[NonNegativeInt]


class Variant(Settings):
    """What one of the `variants` changes, and the reward that it is a variant of."""

    of: Literal[REWARDS] = "cim"
    reward: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    encoders: dict[str, Any] = Field(default_factory=dict)
    sft: dict[str, Any] = Field(default_factory=dict)


class VariantSettings(Settings):
    """The `variants` group: a Variant by method; see cim.runs.with_variant."""

    model_config = ConfigDict(extra="allow")


class ResultSettings(Settings):
    """The `results` group: the profile that made the results."""

    profile: str


GROUPS = {
    "ablation": evaluation.AblationSettings, "captioner": CaptionerSettings, "captions": CaptionSettings,
    "compute": ComputeSettings, "correlation": evaluation.CorrelationSettings, "dataset": DatasetSettings,
    "encoder": EncoderTrainingSettings, "encoders": EncoderSettings, "evaluate": evaluation.EvaluateSettings,
    "gallery": GallerySettings, "judgements": evaluation.JudgementSettings, "labels": evaluation.LabelSettings,
    "model": ModelSettings, "results": ResultSettings, "reward": RewardSettings, "runs": RunSettings,
    "samples": evaluation.SamplesSettings, "sft": SftSettings, "train": TrainSettings, "variants": VariantSettings,
}  # fmt: skip
NULLABLE = ("captioner", "encoder")  # null where the profile trains nothing in that stage


def check_params(params: dict[str, Any]) -> None:
    """Check every group, every variant, and the name and the stage of every run.

    Raises:
        CimError: for the first that is missing or invalid.
    """
    photos = "vision_tower" in (params.get("captioner") or {})
    for name, cls in (GROUPS | {"captioner": PhotoCaptionerSettings} if photos else GROUPS).items():
        if name not in NULLABLE or params.get(name, {}) is not None:
            group(cls, params.get(name), name)
    variants = {method: group(Variant, changes, f"variants.{method}") for method, changes in params["variants"].items()}
    for method, variant in variants.items():
        changed, _ = with_variant(params, method)
        for name in variant.model_fields_set - {"of"}:
            group(GROUPS[name], changed[name], f"variants.{method}.{name}")
    runs = params["runs"]
    for run in (run for run in runs["grpo"] + runs["sft"] if parse_run(run)[0] == ON_SFT):
        raise CimError(f"parameters: run '{run}' belongs in runs.on_sft, by its seed alone")
    for seed in (seed for seed in runs["on_sft"] if f"sft-{seed}" not in runs["sft"]):
        raise CimError(f"parameters: seed {seed} of runs.on_sft starts from run 'sft-{seed}'; add that to runs.sft")
    for run in all_runs(runs):
        supervised = with_variant(params, parse_run(run)[0])[1] in SFT_METHODS
        if supervised != (run in runs["sft"]):
            raise CimError(f"parameters: run '{run}' belongs in runs.{'sft' if supervised else 'grpo'}")
