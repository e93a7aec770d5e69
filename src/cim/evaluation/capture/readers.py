"""Yes/no questions answered from a caption alone: by a local language model, or one behind a server."""

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import pandas as pd
import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map
from urllib3 import Retry

from cim.captioners.loading import loading
from cim.errors import CimError
from cim.processes import default_device

YES, NO, UNKNOWN, OTHER = "yes", "no", "n/a", "other"
PROMPT = """Read the description of an image and answer the question from it alone.
Description: {caption}
Question: {question}
Answer with one word: Yes, No, or n/a where the description does not tell."""


class Reader(Protocol):
    """Answers (caption, question) pairs with YES, NO, UNKNOWN, or OTHER for any other answer."""

    name: str

    def answer(self, pairs: Sequence[tuple[str, str]]) -> list[str]: ...


def parse_answer(text: str) -> str:
    """YES, NO, UNKNOWN or OTHER from a model's output; its reasoning (<think>) is ignored."""
    text = text.rpartition("</think>")[2].strip().strip("*\"'` .").lower()
    first = re.match(r"(yes|no|n/a|na|not applicable|unknown)\b", text)
    return {"yes": YES, "no": NO}.get(first[1], UNKNOWN) if first else OTHER


def _chat(caption: str, question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": PROMPT.format(caption=caption, question=question)}]


class TransformersReader:
    """A chat model from the hub or a folder (the paper's is Qwen/Qwen3-8B), greedy, in batches.

    Raises:
        CimError: where it cannot be loaded.
    """

    def __init__(self, model: str, batch: int = 32):
        from transformers import pipeline

        with loading(f"reader '{model}'"):
            self._generate = pipeline("text-generation", model, dtype="auto", device=default_device())
        if self._generate.tokenizer.pad_token is None:
            self._generate.tokenizer.pad_token = self._generate.tokenizer.eos_token
        self.name = f"transformers:{model}"
        self._options = {
            "batch_size": batch,
            "max_new_tokens": 8,
            "do_sample": False,
            "return_full_text": False,
            "tokenizer_encode_kwargs": {"enable_thinking": False},  # read by Qwen3's template, ignored by others
        }

    def answer(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        outputs = self._generate((_chat(*pair) for pair in pairs), **self._options)
        outputs = tqdm(outputs, total=len(pairs), desc="reading", mininterval=2)
        return [parse_answer(output[0]["generated_text"]) for output in outputs]


class ServerReader:
    """A model behind an OpenAI-compatible server (vLLM, llama.cpp, ...), by several requests at once.

    Args:
        url: including /v1.

    Raises:
        CimError: from `answer`, where the server cannot be reached or sends no completion.
    """

    def __init__(self, url: str, model: str):
        self.name, self._url = f"server:{model}", f"{url.rstrip('/')}/chat/completions"
        # A server that is busy for a moment must not cost the answers so far; one that is down is an error at once.
        busy = Retry(5, connect=0, backoff_factor=1, status_forcelist=(429, 502, 503, 504), allowed_methods=None)
        self._session = requests.Session()
        self._session.mount(self._url, HTTPAdapter(pool_maxsize=8, max_retries=busy))
        no_thinking = {"chat_template_kwargs": {"enable_thinking": False}}
        self._body = {"model": model, "temperature": 0, "max_tokens": 8, **no_thinking}

    def answer(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        return thread_map(self._ask, pairs, max_workers=8, desc="reading", mininterval=2)

    def _ask(self, pair: tuple[str, str]) -> str:
        try:
            response = self._session.post(self._url, json=self._body | {"messages": _chat(*pair)}, timeout=120)
            response.raise_for_status()
            return parse_answer(response.json()["choices"][0]["message"]["content"])
        except (requests.RequestException, LookupError, AttributeError, TypeError, ValueError) as error:
            raise CimError(f"reader at {self._url}: {error}; is it an OpenAI-compatible server, and up?") from None


def load_reader(spec: str) -> Reader:
    """`transformers:NAME`, `server:URL#MODEL`, or `world` for the small world's grammar.

    Raises:
        CimError: for another form, or where the model cannot be loaded.
    """
    kind, _, rest = spec.partition(":")
    url, _, model = rest.partition("#")
    if spec == "world":
        from cim.world.reader import WorldReader

        return WorldReader()
    if kind == "transformers" and rest:
        return TransformersReader(rest)
    if kind == "server" and url and model:
        return ServerReader(url, model)
    raise CimError(f"reader '{spec}': use transformers:NAME or server:URL#MODEL")


def read_all(reader: Reader, captions: Mapping[str, str], questions: Mapping[str, Mapping[str, str]]) -> pd.DataFrame:
    """One row per question: image, question, expected and given answer, which is UNKNOWN for an empty caption."""
    rows = [(i, question, expected, UNKNOWN) for i, asked in questions.items() for question, expected in asked.items()]
    table = pd.DataFrame(rows, columns=["image", "question", "expected", "given"])
    said = table["image"].map(captions).str.strip() != ""
    pairs = zip(table["image"][said].map(captions), table["question"][said], strict=True)
    table.loc[said, "given"] = reader.answer(list(pairs))
    return table


def question_scores(table: pd.DataFrame) -> dict[str, float | int]:
    """Accuracy as published, and shares that explain it; NaN where no question counts.

    Returns:
        accuracy, over all questions, including the few labelled neither Yes nor No (odd_labels counts them); balanced,
        the mean of the accuracies on Yes and on No; yes_rate, unknown and other, shares of answers; questions.
    """
    expected, given = table["expected"].str.strip().str.lower(), table["given"]
    right = given == expected
    return {
        "accuracy": float(right.mean()),
        "balanced": float(right[expected == YES].mean() + right[expected == NO].mean()) / 2,
        "yes_rate": float((given == YES).mean()),
        "unknown": float((given == UNKNOWN).mean()),
        "other": float((given == OTHER).mean()),
        "questions": len(table),
        "odd_labels": int((~expected.isin([YES, NO])).sum()),
    }
