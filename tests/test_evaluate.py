"""`cim evaluate`, the readers of questions, and whether methods differ."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from cim import cli
from cim.capture.labels import Labels
from cim.capture.readers import (
    AlwaysYes,
    ServerReader,
    TransformersReader,
    load_reader,
    parse_answer,
    question_scores,
    read_all,
)
from cim.capture.significance import holm, paired_permutation
from cim.capture.synonyms import load_wordnet
from cim.errors import CimError

LABELS = {
    "references.json": {
        "a": "A small red owl sits on a tall tree. A blue car is near the house.",
        "b": "Two women hold a white umbrella. The sky is blue.",
        "c": "A black dog runs on the green grass.",
    },
    "questions.json": {
        "a": {"Is the owl on the tree?": "Yes", "Is the car red?": "No"},
        "b": {"Is the umbrella white?": "Yes", "Is it raining?": "Not sure"},
    },
    "extra_attributes.json": {i: {"owl": ["red", "wild"], "dog": ["black"]} for i in "abc"},
}


@pytest.fixture
def wordnet():
    try:
        return load_wordnet()
    except CimError as error:
        pytest.skip(str(error))


@pytest.fixture
def folder(tmp_path):
    labels = tmp_path / "labels"
    labels.mkdir()
    for name, value in LABELS.items():
        (labels / name).write_text(json.dumps(value))
    (labels / "extra_objects.jsonl").write_text("".join(json.dumps({i: ["owl", "branch"]}) + "\n" for i in "abc"))
    (tmp_path / "full.json").write_text(json.dumps(LABELS["references.json"]))
    (tmp_path / "short.json").write_text(json.dumps({"a": "An owl.", "b": "Women.", "c": ""}))
    return tmp_path


def run(folder, *more):
    cli.main(
        ["evaluate", "--captions", str(folder / "full.json"), str(folder / "short.json"), "--benchmark", "mine",
         "--labels", str(folder / "labels"), "--out", str(folder / "out"), "--cache", str(folder / "cache"),
         "--resamples", "500", *more]
    )  # fmt: skip
    return json.loads((folder / "out" / "metrics.json").read_text())


@pytest.fixture
def server():
    """An OpenAI-compatible server that finds every question's last word in the description or does not."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            text = body["messages"][0]["content"]
            asked.append(body)
            description, _, rest = text.partition("Question:")
            word = rest.split("?")[0].split()[-1]
            content = json.dumps({"choices": [{"message": {"content": "Yes." if word in description else "n/a"}}]})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *_):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}/v1", asked
    served.shutdown()


def test_a_benchmark_from_files_to_page(wordnet, folder, server, capsys):
    url, asked = server
    metrics = run(folder, "--reader", f"server:{url}#tiny")
    full, short = metrics["methods"]["full"], metrics["methods"]["short"]
    assert full["strict"]["capture"]["value"] == pytest.approx(1)
    assert short["strict"]["object_recall"]["value"] < 0.6
    assert short["strict"]["object_precision"]["left_out"] == 1  # the empty caption states nothing
    low, high = short["strict"]["object_recall"]["interval"]
    assert low <= short["strict"]["object_recall"]["value"] <= high
    row = next(r for r in metrics["comparisons"] if (r["mode"], r["field"]) == ("strict", "object_recall"))
    assert row["method"] == "short"
    assert row["difference"] < 0
    assert row["p"] <= row["p_holm"] <= 1
    assert metrics["problems"] == [{"method": "short", "image": "c", "what": "caption is empty"}]
    assert "WordNet" in metrics["synonyms"]
    questions = metrics["questions"]
    assert questions["always yes"]["accuracy"] == 0.5
    assert questions["always yes"]["odd_labels"] == 1
    assert questions["full"]["yes_rate"] > questions["short"]["yes_rate"]
    assert questions["empty captions"]["unknown"] == 1
    assert len(asked) == 4 * 2  # nothing is asked of empty captions
    images = pd.read_csv(folder / "out" / "images.csv")
    assert len(images) == 2 * 2 * 3
    page = (folder / "out" / "page.html").read_text()
    assert "A small red owl" in page
    assert "<i>empty</i>" in page
    assert "strict mode" in capsys.readouterr().out
    # Parses are kept: again, the same comes out.
    assert run(folder)["methods"] == metrics["methods"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--labels", "nowhere"], "references.json"),
        (["--reader", "oracle"], "transformers:NAME or server:URL#MODEL"),
        (["--reader", "server:http://127.0.0.1:9#m"], "is it an OpenAI-compatible server"),
        (["--resamples", "3"], "at least 100"),
        (["--encoder", "pypi:no-such"], "no-such"),
    ],
)
def test_what_cannot_be_is_one_clear_error(wordnet, folder, capsys, arguments, says):
    with pytest.raises(SystemExit) as stop:
        run(folder, *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert says in error


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("Yes", "yes"), ("yes.", "yes"), ("**No**", "no"), ("N/A", "n/a"), ("n/a, it does not say", "n/a"),
        ("<think>no, wait</think> Yes", "yes"), ("Maybe", "other"), ("", "other"), ("Nobody", "other"), ("Unknown", "n/a"),
    ],
)  # fmt: skip
def test_answers(said, answer):
    assert parse_answer(said) == answer


def test_question_scores():
    rows = [
        {"expected": e, "given": g}
        for e, g in (("Yes", "yes"), ("Yes", "n/a"), ("Yes", "yes"), ("No", "yes"), ("No", "other"), ("Maybe", "yes"))
    ]
    assert question_scores(rows) == pytest.approx(
        {
            "accuracy": 2 / 6,
            "balanced": 1 / 3,
            "yes_rate": 4 / 6,
            "unknown": 1 / 6,
            "other": 1 / 6,
            "questions": 6,
            "odd_labels": 1,
        }
    )


def test_a_published_accuracy_is_mostly_yes(reference):
    from cim.capture.labels import load_labels

    labels = load_labels(reference / "cocoln500")
    scores = question_scores(read_all(AlwaysYes(), labels.references, labels.questions))
    assert scores["questions"] == 2462
    assert scores["accuracy"] == pytest.approx(0.957, abs=5e-4)
    assert scores["balanced"] == 0.5


def test_a_model_reads_in_batches(tmp_path):
    """A tiny chat model with random weights: what it says means nothing, but the whole path runs."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    # Single bytes, in the form that Qwen2's tokenizer class expects.
    letters = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(tmp_path)
    config = Qwen2Config(
        vocab_size=len(letters) + 8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, eos_token_id=0, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    pairs = [("a red owl.", "is the owl red?"), ("an owl that is not blue at all.", "red?"), ("x", "y")]
    together = TransformersReader(str(tmp_path), batch=3).answer(pairs)
    assert together == [TransformersReader(str(tmp_path), batch=1).answer([pair])[0] for pair in pairs]
    assert set(together) <= {"yes", "no", "n/a", "other"}


def test_a_reader_that_is_not_there(tmp_path):
    with pytest.raises(CimError, match="could not be loaded"):
        load_reader(f"transformers:{tmp_path}/nothing")
    labels = Labels("x", {"a": "an owl"}, {"a": {"an owl?": "Yes"}})
    with pytest.raises(CimError, match="OpenAI-compatible"):
        read_all(ServerReader("http://127.0.0.1:9/v1", "m", timeout=2), labels.references, labels.questions)


def test_the_permutation_test_agrees_with_scipy(rng):
    difference = rng.normal(0.2, 1, 60)
    ours = paired_permutation(difference, rng, 20_000)
    theirs = stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=20_000, rng=rng
    ).pvalue
    assert ours == pytest.approx(theirs, abs=0.02)
    assert paired_permutation(np.zeros(5), rng) == 1
    assert paired_permutation(np.ones(200), rng) < 1e-3


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
