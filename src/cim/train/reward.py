"""The rewards as TRL calls them, and the samples that they leave."""

import json
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object

from cim.captioners.text import diversity, repetition
from cim.errors import CimError
from cim.files import write_text
from cim.processes import processes
from cim.runs import REWARDS
from cim.scorer import Scorer
from cim.train.settings import TrainSettings


def trl_reward(scorer: Scorer, name: str, settings: TrainSettings, end_tokens: set[int]):
    """The reward `name` as TRL calls it: a batch of completions and the data set's columns in, floats out.

    GRC, QIR and the diversity of the completions are logged too, whatever is optimized. Settings `truncated` and
    `repetition` guard against captions that please the reward without saying more: cut off, or repeating themselves. A
    guarded caption that was cut off gets the lowest reward of the batch.
    """
    if name not in REWARDS:
        raise CimError(f"reward '{name}' is unknown; choose one of {', '.join(REWARDS)}")

    def reward(completions, completion_ids, image_id, log_metric, **columns) -> list[float]:
        captions = texts(completions)
        scores = scorer.retrieval_scores(captions, image_id)
        if name not in scores:
            scores = scores.join(scorer.paired_scores(captions, image_id, [name]))
        for column in scores:
            log_metric(f"score/{column}", float(scores[column].mean()))
        for key, value in diversity(captions).items():
            log_metric(f"variety/{key}", value)
        values = scores[name].to_numpy(float)
        values = values - settings.repetition * np.std(_of_all_processes(values)) * repetition(captions)
        if settings.truncated == "lowest":
            cut = np.array([not ids or ids[-1] not in end_tokens for ids in completion_ids])
            values = np.where(cut, min(_of_all_processes(values)), values)
        return values.tolist()

    reward.__name__ = name
    return reward


def _of_all_processes(values: np.ndarray) -> list[float]:
    """The values of the whole batch; a process has a part of its captions."""
    processes()  # which gather_object would set up otherwise
    return gather_object(values.tolist())


class SampleLog:
    """Wraps a reward and writes captions of two training images of every tenth step, with rewards, as JSON lines."""

    def __init__(self, reward, path: Path, training_ids: set[str]):
        self.reward, self.path, self.training_ids = reward, path, training_ids
        self.__name__ = reward.__name__

    def __call__(self, completions, image_id, trainer_state, **columns) -> list[float]:
        values = self.reward(completions=completions, image_id=image_id, **columns)
        step = trainer_state.global_step
        shown = [image for image in dict.fromkeys(image_id) if image in self.training_ids][:2]
        if shown and step % 10 == 0 and trainer_state.is_world_process_zero:
            rows = [
                {"step": step, "image_id": image, "caption": caption, "reward": value}
                for caption, image, value in zip(texts(completions), image_id, values, strict=True)
                if image in shown
            ]
            # A resumed run repeats the steps after its checkpoint.
            written = self.path.read_text().splitlines(keepends=True) if self.path.is_file() else []
            kept = [line for line in written if json.loads(line)["step"] < step]
            write_text(self.path, "".join([*kept, *(json.dumps(row) + "\n" for row in rows)]))
        return values


def texts(completions) -> list[str]:
    """The texts of completions in TRL's conversational form."""
    return [completion[-1]["content"] for completion in completions]
