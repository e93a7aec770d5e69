"""CIDEr, nouns, identification and repetition: hand-worked examples and slow implementations."""

from collections import Counter
from math import exp, log, sqrt

import numpy as np
import pytest

from cim.evaluation.caption_metrics import (
    HumanCaptions,
    cider,
    identification_ranks,
    metrics_of,
    nouns,
    words,
)

REFERENCES = [
    ["A dog runs on the grass .", "A brown dog runs ."],
    ["A man rides a bike .", "The man is on a red bike .", "A cyclist ."],
    ["A dog and a man sit on the beach ."],
]


def slow_cider(captions, references, images):
    """CIDEr-D from its definition, one n-gram at a time."""

    def grams(text, n):
        text = words(text)
        return Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))

    def score(caption, texts):
        total = 0.0
        for n in (1, 2, 3, 4):
            seen = Counter(gram for own in references for gram in set().union(*(grams(text, n) for text in own)))

            def vector(text, n=n, seen=seen):
                return {
                    gram: c * (log(len(references)) - log(max(1, seen[gram]))) for gram, c in grams(text, n).items()
                }

            for text in texts:
                a, b = vector(caption), vector(text)
                lengths = sqrt(sum(v * v for v in a.values())) * sqrt(sum(v * v for v in b.values()))
                alike = sum(min(v, b.get(gram, 0)) * b.get(gram, 0) for gram, v in a.items())
                gap = len(words(caption)) - len(words(text))
                total += alike / lengths * exp(-(gap**2) / 72) if lengths else 0
        return 10 * total / 4 / len(texts)

    return [score(caption, references[image]) for caption, image in zip(captions, images, strict=True)]


def test_cider_by_hand():
    # Two images without a common word: every n-gram has the idf ln 2, which cancels.
    references = [["a b c d"], ["e f g h"]]
    assert cider(["a b c d", "e f g h"], references) == pytest.approx([10, 10])
    # One of two words and no pair is shared: cosine 1 / (sqrt 2 * 2) of single words, two words fewer.
    assert cider(["a x", ""], references) == pytest.approx([10 / 4 / sqrt(8) * exp(-4 / 72), 0])
    # A word that every image's references have is worth nothing.
    assert cider(["a", "a"], [["a"], ["a"]]) == pytest.approx([0, 0])


def test_cider_equals_a_slow_implementation(rng):
    vocabulary = sorted({word for own in REFERENCES for text in own for word in words(text)})
    random = [" ".join(rng.choice(vocabulary, size)) for size in rng.integers(0, 12, 20)]
    captions = ["A dog runs on the beach", "a man a man a man", "", "bike", *random]
    images = rng.integers(0, len(REFERENCES), len(captions))
    found = cider(captions, REFERENCES, images)
    assert found == pytest.approx(slow_cider(captions, REFERENCES, images))
    assert found.max() > 1
    first = [own[0] for own in REFERENCES]
    assert cider(first, REFERENCES) == pytest.approx(slow_cider(first, REFERENCES, range(3)))


def test_cider_of_people_on_flickr8k(reference):
    """Each first caption against the other four, on the test images; pycocoevalcap 1.2 gave 0.788675 on these words."""
    from cim.data import flickr8k

    frame, _ = flickr8k.read(reference / "flickr8k", None)
    human = flickr8k.human_captions(frame[frame["split"] == "test"])
    found = cider([first for first, *_ in human], [others for _, *others in human])
    assert found.shape == (1000,)
    assert found.mean() == pytest.approx(0.7886754251977479)


def test_identification_equals_a_slow_implementation(rng):
    counts = rng.integers(1, 5, 30)
    captions, human = rng.normal(size=(30, 8)), rng.normal(size=(counts.sum(), 8))
    slow = []
    for i, caption in enumerate(captions):
        best = [max(caption @ text for text in own) for own in np.split(human, np.cumsum(counts)[:-1])]
        slow.append(sorted(best, reverse=True).index(best[i]) + 1)
    assert identification_ranks(captions, human, counts).tolist() == slow
    assert len(set(slow)) > 5
    # A caption that says as much of every image identifies none.
    assert identification_ranks(np.zeros((3, 8)), human[:3], [1, 1, 1]).tolist() == [3, 3, 3]


def test_nouns_are_the_heads_of_noun_phrases(wordnet):
    captions = ["Two brown dogs run through the snow .", "A boy with tennis rackets", ""]
    assert nouns(captions, wordnet) == [{"dog", "snow"}, {"boy", "racket"}, set()]


def test_the_metrics_of_captions(wordnet):
    def encode(texts):
        """Which of these words a text holds, one or none."""
        return np.array([[float(word in text) for word in ("brown", "bike", "beach")] for text in texts])

    human = HumanCaptions(REFERENCES, encode, wordnet)
    table = human.compare(["A brown dog with a cat", "a bike , a bike", "A brown cat"])
    assert table["rank"].tolist() == [1, 1, 3]  # the third describes the first image
    assert table["nouns_right"].tolist() == [1, 1, 0]
    assert table["nouns_stated"].tolist() == [2, 1, 1]
    assert table["nouns_true"].tolist() == [2, 3, 3]  # dog grass; man bike cyclist; dog man beach
    found = metrics_of(table.sum())
    assert found["noun_precision"] == pytest.approx(2 / 4)
    assert found["noun_recall"] == pytest.approx(2 / 8)
    assert found["R@1"] == pytest.approx(2 / 3)
    assert found["ln_rank"] == pytest.approx(np.log(3) / 3)
    assert found["words"] == pytest.approx((6 + 4 + 3) / 3)
    assert table["repetition"].tolist() == pytest.approx([0, 1 / 3, 0])  # a comma is no word
    assert found["repetition"] == pytest.approx(1 / 9)
    assert found["cider"] == pytest.approx(table["cider"].mean())
