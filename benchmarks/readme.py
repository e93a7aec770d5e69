"""The table of scale in docs/scale.md, from results/benchmarks/reward-1000000.json (a test compares the two).

python benchmarks/readme.py
"""

import json
from pathlib import Path


def scale_table(path: Path) -> str:
    """Ways of computing the reward, in Markdown."""
    ways = json.loads(Path(path).read_text())["ways"]
    lines = [
        "| | ms a caption | of it search | gallery in memory | recall@3 | mean change of the reward |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, way in ways.items():
        found = f"{way['recall']:.3f} | {way['reward_mean_change']:.4f}" if "recall" in way else "1 | 0"
        title = "the public way" if name.startswith("peer") else name
        times = f"{1e3 * way['total']:.1f} | {1e3 * way['search']:.2f}"
        lines.append(f"| {title} | {times} | {way['gallery_resident']:.2f} GiB | {found} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(scale_table(Path("results/benchmarks/reward-1000000.json")))
