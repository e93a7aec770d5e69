"""The rewards as TRL calls them."""

from __future__ import annotations

from cim.captioners.generate import diversity
from cim.errors import CimError
from cim.runs import REWARDS
from cim.scorer import Scorer


def trl_reward(scorer: Scorer, name: str):
    """The reward `name` as TRL calls it: a batch of completions and the data set's columns in, floats out.

    GRC, QIR and the diversity of the completions are logged too, whatever is optimised.

    Raises:
        CimError: for an unknown name.
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


def completion_text(completion) -> str:
    """The text of a completion, plain or conversational."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
