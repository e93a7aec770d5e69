"""What a stage leaves where the profile trains nothing in it."""

import json

from cim.files import write_metrics, write_text
from cim.pipeline.paths import ARTIFACTS, RESULTS


def note_instead(stage: str, result: str, instead: dict[str, str]) -> None:
    """Write what is used instead, in place of the stage's outputs; `result` is its file in its folder of results."""
    write_metrics(ARTIFACTS / stage / "not_trained_here.json", instead)
    text = json.dumps(instead) if result.endswith(".json") else "\n".join([*instead, *instead.values()])
    write_text(RESULTS / stage / result, text + "\n")
    print(f"{stage}: not trained here; used instead: {', '.join(instead.values())}")
