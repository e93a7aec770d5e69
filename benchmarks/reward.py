"""The whole reward compared with the public server's way of computing it, in one run.

    python benchmarks/reward.py --rows 1000000 --captions captions.json

Each way runs in its own process, whose memory is measured. The peer gets fewer captions, since it takes as long
for each. All compute the same rewards: GRC + QIR of the nearest three.
"""

import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from common import (
    GALLERIES,
    KINDS,
    TEXT,
    arguments,
    changes,
    factory,
    gallery_folder,
    grouped_captions,
    images_of,
    median_seconds,
    recall_at_k,
    report,
    seed_captions,
)
from memory import memory

from cim.encoders import load_text_encoder
from cim.files import write_json
from cim.gallery.build import rebuild_index
from cim.gallery.store import IMAGES, INFO, ROWS, TEXTS, read_info

PEER_CAPTIONS = 40


def peer(folder: Path, captions: list[str], sources: np.ndarray, repeats: int) -> tuple[dict, np.ndarray]:
    """Ask the baseline server for one caption after the other."""
    with tempfile.TemporaryDirectory() as aside:
        port_file = Path(aside) / "port"
        server = subprocess.Popen(
            [sys.executable, "benchmarks/baseline.py", str(folder), str(port_file)], stdout=subprocess.PIPE, text=True
        )
        before = json.loads(server.stdout.readline())
        try:
            while not port_file.is_file() or not port_file.read_text():
                if server.poll() is not None:
                    raise SystemExit("the baseline server ended")
                time.sleep(0.2)

            def ask(i: int) -> dict:
                body = json.dumps({"caption": captions[i], "source": sources[i].tolist()}).encode()
                request = urllib.request.Request(f"http://127.0.0.1:{port_file.read_text()}", data=body)
                with urllib.request.urlopen(request) as answer:
                    return json.loads(answer.read())

            answers: list[dict] = []
            total = median_seconds(lambda: answers.extend(map(ask, range(len(captions)))), repeats) / len(captions)
            held = memory(psutil.Process(server.pid))
        finally:
            server.kill()
    held |= {f"gallery_{k}": held[k] - before[k] for k in held}
    per_caption = {key: float(np.median([a[key] for a in answers])) for key in ("encode", "search")}
    return {"total": total, **per_caption, **held}, np.array([a["reward"] for a in answers[: len(captions)]])


def child(folder: Path, precision: str, captions: list[str], ids: list[str], sources: dict, repeats: int) -> dict:
    """What one kind of index takes, in this process; captions of one batch, as in a GRPO step."""
    from cim.gallery.store import load_gallery
    from cim.scorer import RewardSettings, Scorer

    text = load_text_encoder(TEXT, precision=precision)
    text.encode(captions)
    before = memory()
    start = time.perf_counter()
    gallery = load_gallery(folder, text)
    loaded = time.perf_counter() - start
    scorer = Scorer(gallery, text, None, RewardSettings(exclude_source=False))
    scorer._sources.update(sources)
    vectors = text.encode(captions)
    search = median_seconds(lambda: gallery.image_vectors(gallery.search(vectors, 3)), repeats)
    encode = median_seconds(lambda: text.encode(captions), repeats)
    total = median_seconds(lambda: scorer.retrieval_scores(captions, ids), repeats)
    held = memory()
    scores, found = scorer.scores_and_rows(captions, ids)
    n = len(captions)
    return {
        "load": loaded,
        "total": total / n,
        "encode": encode / n,
        "search": search / n,
        **held,
        "gallery_resident": held["resident"] - before["resident"],
        "gallery_anonymous": held["anonymous"] - before["anonymous"],
        "reward": scores["cim"].tolist(),
        "rows": found.tolist(),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--child", nargs=2, help="run one way only and print it as JSON (used by the parent)")
    options = parser.parse_args()
    seeds = seed_captions(options.captions)
    folder = gallery_folder(options.rows, seeds)
    captions, image = grouped_captions(seeds, options.count)
    source_of = images_of(load_text_encoder(TEXT).encode(seeds), seed=5)
    ids = [f"seed-{i}" for i in image]
    if options.child:
        sources = {f"seed-{i}": source_of[i] for i in set(image)}
        measured = child(
            kind_folder(folder, options.child[0]), options.child[1], captions, ids, sources, options.repeats
        )
        print(json.dumps(measured))
        return

    print(f"peer: {PEER_CAPTIONS} captions, one request each", flush=True)
    ours_peer, peer_reward = peer(folder, captions[:PEER_CAPTIONS], source_of[image[:PEER_CAPTIONS]], options.repeats)
    ways = {"peer (one by one, float32)": ours_peer}
    rewards, rows = {}, {}
    for kind, precision in [("exact", "float32"), *((kind, "bfloat16") for kind in options.kinds)]:
        way = f"{kind}, {precision}"
        kind_folder(folder, kind)
        print(f"{way}: {len(captions)} captions in one batch", flush=True)
        command = [sys.executable, *sys.argv, "--child", kind, precision]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        ways[way] = json.loads(done.stdout.splitlines()[-1])
        rewards[way], rows[way] = np.array(ways[way].pop("reward")), np.array(ways[way].pop("rows"))
    reference = rewards["exact, float32"]
    for kind, reward in rewards.items():
        ways[kind]["against_peer"] = float(np.abs(reward[:PEER_CAPTIONS] - peer_reward).max())
        ways[kind] |= changes(reward, reference)
        # Against the exact search of the same embeddings, where there is one.
        exact = rows.get("exact, bfloat16", rows["exact, float32"]) if "bfloat16" in kind else rows["exact, float32"]
        ways[kind]["recall"] = recall_at_k(rows[kind], exact)
        ways[kind]["search_times_peer"] = ours_peer["search"] / ways[kind]["search"]
        ways[kind]["total_times_peer"] = ours_peer["total"] / ways[kind]["total"]
        ways[kind]["total_over_encode"] = ways[kind]["total"] / ways[kind]["encode"]
        ways[kind]["resident_share"] = ways[kind]["resident"] / ours_peer["resident"]
        ways[kind]["anonymous_share"] = ways[kind]["anonymous"] / ours_peer["anonymous"]
        for what in ("resident", "anonymous"):
            ways[kind][f"gallery_{what}_share"] = ways[kind][f"gallery_{what}"] / ours_peer[f"gallery_{what}"]
    table = pd.DataFrame(ways).T
    table[["total", "encode", "search"]] *= 1000
    shown = {
        "total": "ms a caption", "encode": "of it encoding", "search": "of it search and gather",
        "total_times_peer": "times the peer", "search_times_peer": "search, times the peer",
        "total_over_encode": "total / encoding", "resident": "process GiB", "gallery_resident": "gallery GiB",
        "resident_share": "process, share of the peer", "gallery_resident_share": "gallery, share of the peer",
        "recall": "recall@3", "against_peer": "largest change from the peer", "reward_mean_change": "mean change",
        "reward_largest_change": "largest change", "rank_correlation_in_groups": "rank correlation in fives",
    }  # fmt: skip
    words = float(np.mean([len(c.split()) for c in captions]))
    result = {"rows": options.rows, "captions": len(captions), "words": words, "peer_captions": PEER_CAPTIONS}
    name = f"reward-{options.rows}" + ("-gpu" if torch.cuda.is_available() else "")
    report(name, {**result, "ways": ways}, table.rename(columns=shown)[list(shown.values())].T)


def kind_folder(folder: Path, kind: str) -> Path:
    """The same gallery with another kind of index: its vectors are hard links."""
    info = read_info(folder)
    other = GALLERIES / f"{folder.name}-{kind.replace(',', '-')}"
    if kind == "exact":
        return folder
    if not (other / INFO).is_file():
        other.mkdir(exist_ok=True)
        for name in (TEXTS, IMAGES, ROWS):
            (other / name).unlink(missing_ok=True)
            (other / name).hardlink_to(folder / name)
        write_json(other / INFO, info)
    if read_info(other)["index"]["kind"] == "exact":
        start = time.perf_counter()
        rebuild_index(other, factory(kind, info["rows"]), 0.99)
        print(f"{kind}: index built in {time.perf_counter() - start:.0f} s", flush=True)
    return other


if __name__ == "__main__":
    main()
