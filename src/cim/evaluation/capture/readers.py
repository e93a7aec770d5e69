"""Yes/no questions answered from a caption alone: by a language model, here or behind a server, and two controls."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from tqdm.auto import tqdm

from cim.errors import CimError

YES, NO, UNKNOWN, OTHER = "yes", "no", "n/a", "other"
PROMPT = """Read the description of an image and answer the question from it alone.
Description: {caption}
Question: {question}
Answer with one word: Yes, No, or n/a where the description does not tell."""


class Reader(Protocol):
    """Answers (caption, question) pairs with YES, NO, UNKNOWN, or OTHER where it says something else."""

    name: str

    def answer(self, pairs: Sequence[tuple[str, str]]) -> list[str]: ...


def parse_answer(text: str) -> str:
    """YES, NO, UNKNOWN or OTHER of what a model wrote; what it thought aloud before it is passed over."""
    text = text.rpartition("</think>")[2].strip().strip("*\"'` .").lower()
    first = re.match(r"(yes|no|n/a|na|not applicable|unknown)\b", text)
    if first is None:
        return OTHER
    return first.group(1) if first.group(1) in (YES, NO) else UNKNOWN


class AlwaysYes:
    """The control that reads nothing."""

    name = "always yes"

    def answer(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        return [YES] * len(pairs)


class TransformersReader:
    """A chat model of the hub or a folder (the paper's is Qwen/Qwen3-8B), greedy, in batches.

    Raises:
        CimError: where it cannot be loaded.
    """

    def __init__(self, model: str, device: str | None = None, batch: int = 32, max_new_tokens: int = 8):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from cim.processes import default_device

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
            self._model = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval()
        except (OSError, ValueError) as error:
            raise CimError(f"reader '{model}' could not be loaded: {' '.join(str(error).split())[:200]}") from None
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model.to(device or default_device())
        self.name, self._batch, self._max_new_tokens = f"transformers:{model}", batch, max_new_tokens

    @torch.inference_mode()
    def answer(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        answers: list[str] = []
        for start in tqdm(range(0, len(pairs), self._batch), desc="reading", mininterval=2):
            texts = [
                self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": PROMPT.format(caption=caption, question=question)}],
                    add_generation_prompt=True,
                    tokenize=False,
                    enable_thinking=False,  # Qwen3's templates know it, others ignore it
                )
                for caption, question in pairs[start : start + self._batch]
            ]
            inputs = self._tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            inputs = inputs.to(self._model.device)
            out = self._model.generate(**inputs, max_new_tokens=self._max_new_tokens, do_sample=False)
            said = self._tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers += map(parse_answer, said)
        return answers


class ServerReader:
    """A model behind an OpenAI-compatible server (vLLM, llama.cpp, ...); several requests at once.

    Args:
        url: up to and with /v1.

    Raises:
        CimError: where the server does not answer as it should.
    """

    def __init__(self, url: str, model: str, at_once: int = 8, key: str = "none", timeout: float = 120):
        self.name = f"server:{model}"
        self._url, self._model, self._at_once = url.rstrip("/") + "/chat/completions", model, at_once
        self._key, self._timeout = key, timeout

    def answer(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        with ThreadPoolExecutor(self._at_once) as pool:
            return list(tqdm(pool.map(self._ask, pairs), total=len(pairs), desc="reading", mininterval=2))

    def _ask(self, pair: tuple[str, str]) -> str:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": PROMPT.format(caption=pair[0], question=pair[1])}],
            "temperature": 0,
            "max_tokens": 8,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                return parse_answer(json.loads(answer.read())["choices"][0]["message"]["content"])
        except (urllib.error.URLError, TimeoutError, KeyError, IndexError, TypeError, ValueError) as error:
            raise CimError(f"reader at {self._url}: {error}; is it an OpenAI-compatible server, and up?") from None


def load_reader(spec: str) -> Reader:
    """`transformers:NAME`, `server:URL#MODEL`, or `world` for the small world's own.

    Raises:
        CimError: for another form, or where the model cannot be loaded.
    """
    if spec == "world":
        from cim.world.graphs import WorldReader

        return WorldReader()
    kind, _, rest = spec.partition(":")
    if kind == "transformers" and rest:
        return TransformersReader(rest)
    url, _, model = rest.partition("#")
    if kind == "server" and url and model:
        return ServerReader(url, model)
    raise CimError(f"reader '{spec}': should be transformers:NAME or server:URL#MODEL")


def read_all(
    reader: Reader, captions: Mapping[str, str], questions: Mapping[str, Mapping[str, str]]
) -> list[dict[str, str]]:
    """One row a question: image, question, expected and given answer. Of an empty caption nothing can be told."""
    rows = [
        {"image": image, "question": question, "expected": expected}
        for image, asked in questions.items()
        for question, expected in asked.items()
    ]
    told = [i for i, row in enumerate(rows) if captions[row["image"]].strip()]
    given = reader.answer([(captions[rows[i]["image"]], rows[i]["question"]) for i in told])
    for row in rows:
        row["given"] = UNKNOWN
    for i, answer in zip(told, given, strict=True):
        rows[i]["given"] = answer
    return rows


def question_scores(rows: Sequence[Mapping[str, str]]) -> dict[str, float | int]:
    """Accuracy as published, and what it hides.

    Returns:
        accuracy over all questions, the handful included whose label is neither Yes nor No; balanced, the mean of the
        accuracies on Yes and on No; yes_rate, the share answered Yes; unknown and other, the shares of n/a and
        of what is no answer; questions; odd_labels, how many are labelled neither Yes nor No.
    """
    expected = np.array([row["expected"].strip().lower() for row in rows])
    given = np.array([row["given"] for row in rows])
    right = given == expected

    def share(hit: np.ndarray) -> float:
        return float(hit.mean()) if len(hit) else float("nan")

    return {
        "accuracy": share(right),
        "balanced": (share(right[expected == YES]) + share(right[expected == NO])) / 2,
        "yes_rate": share(given == YES),
        "unknown": share(given == UNKNOWN),
        "other": share(given == OTHER),
        "questions": len(rows),
        "odd_labels": int((~np.isin(expected, [YES, NO])).sum()),
    }
