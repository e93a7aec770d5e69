"""The rewards as TRL calls them, and the samples that they leave."""

import json
from pathlib import Path

import numpy as np

from cim.captioners.generate import diversity, repetition
from cim.errors import CimError
from cim.files import write_text
from cim.runs import REWARDS
from cim.scorer import Scorer
from cim.train.settings import TrainSettings


def trl_reward(scorer: Scorer, name: str):
    """The reward `name` as TRL calls it: a batch of completions and the data set's columns in, floats out.

    GRC, QIR and the diversity of the completions are logged too, whatever is optimized.
    """
    if name not in REWARDS:
        raise CimError(f"reward '{name}' is unknown; choose one of {', '.join(REWARDS)}")

    def reward(completions, image_id, log_metric=None, **columns) -> list[float]:
        captions = [completion_text(c) for c in completions]
        scores = scorer.retrieval_scores(captions, image_id)
        if name not in scores:
            scores = scores.join(scorer.paired_scores(captions, image_id))
        if log_metric is not None:
            for column in scores:
                log_metric(f"score/{column}", float(scores[column].mean()))
            for key, value in diversity(captions).items():
                log_metric(f"variety/{key}", value)
        return scores[name].tolist()

    reward.__name__ = name
    return reward


class Guarded:
    """Wraps a reward against captions that please it without saying more: cut off, or repeating themselves.

    The settings are `truncated` and `repetition` of the `train` group. A guarded caption that was cut off gets the
    lowest reward of the batch.
    """

    def __init__(self, reward, settings: TrainSettings, end_tokens: set[int]):
        self.reward, self.settings, self.end_tokens = reward, settings, end_tokens
        self.__name__ = reward.__name__

    def __call__(self, completions, completion_ids, **columns) -> list[float]:
        values = np.array(self.reward(completions=completions, completion_ids=completion_ids, **columns))
        repeated = repetition([completion_text(c) for c in completions])
        values = values - self.settings.repetition * values.std() * repeated
        if self.settings.truncated == "lowest":
            cut = np.array([not ids or ids[-1] not in self.end_tokens for ids in completion_ids])
            values = np.where(cut, values.min(), values)
        return values.tolist()


class SampleLog:
    """Wraps a reward and writes captions of two training images of every tenth step, with rewards, as JSON lines."""

    def __init__(self, reward, path: Path, training_ids: set[str], every: int = 10, images: int = 2):
        self.reward, self.path, self.training_ids = reward, path, training_ids
        self.every, self.images, self.started = every, images, False
        self.__name__ = reward.__name__

    def __call__(self, completions, image_id, trainer_state=None, **columns) -> list[float]:
        values = self.reward(completions=completions, image_id=image_id, **columns)
        if trainer_state is not None and trainer_state.is_world_process_zero:
            self._write(trainer_state.global_step, completions, image_id, values)
        return values

    def _write(self, step: int, completions, image_id, values) -> None:
        if not self.started and self.path.is_file():  # resumed: the steps after the checkpoint are repeated
            lines = self.path.read_text().splitlines(keepends=True)
            write_text(self.path, "".join(line for line in lines if json.loads(line)["step"] < step))
        self.started = True
        shown = [image for image in dict.fromkeys(image_id) if image in self.training_ids][: self.images]
        if step % self.every == 0:
            rows = [
                {"step": step, "image_id": image, "caption": completion_text(completion), "reward": value}
                for completion, image, value in zip(completions, image_id, values, strict=True)
                if image in shown
            ]
            with self.path.open("a") as file:
                file.write("".join(json.dumps(row) + "\n" for row in rows))


def completion_text(completion) -> str:
    """The text of a completion, plain or conversational."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
