"""Captions made to please a reward, and scores that can be gamed by them."""

import numpy as np
import pytest

from cim.evaluation.attacks import HONEST, STUFFED, attacks, preferred

CAPTIONS = ["a red owl sits there", "two dogs", "the blue bee flies over it"]


def test_every_attack_says_something_else():
    copied = ["copy 0", "copy 1", "copy 2"]
    variants = attacks(CAPTIONS, copied, ["owls like fish", "bees like honey", "like bees"])
    assert variants.pop(HONEST) == CAPTIONS
    for attack, captions in variants.items():
        same = [caption == honest for caption, honest in zip(captions, CAPTIONS, strict=True)]
        assert same == [False, attack == "fragment", False], attack  # "two dogs" has no three words
    assert variants["copied"] == copied
    assert variants["repeated"][1] == "two dogs two dogs two dogs"
    assert variants["fragment"] == ["a red owl", "two dogs", "the blue bee"]
    assert variants["another's"] == [CAPTIONS[2], CAPTIONS[0], CAPTIONS[1]]
    assert variants["stuffed"][0] == "like bees fish honey owls"
    assert variants["over-long"][0] == " ".join([CAPTIONS[0], CAPTIONS[2], CAPTIONS[1]])


def test_the_stuffed_caption_has_the_most_frequent_words_of_a_large_corpus():
    corpus = [" ".join(f"word{i:02d}" for i in range(n)) for n in range(1, 40)]
    assert attacks(CAPTIONS, CAPTIONS, corpus)["stuffed"][0].split() == [f"word{i:02d}" for i in range(STUFFED)]


def test_a_score_of_length_is_gamed_by_length_and_a_constant_by_everything():
    variants = attacks(CAPTIONS, CAPTIONS, CAPTIONS)

    def score(captions):
        return {"words": np.array([len(c.split()) for c in captions], float), "constant": np.zeros(len(captions))}

    share = preferred(variants, score).set_index(["score", "attack"])["share"]
    assert share["words", "repeated"] == share["words", "over-long"] == 1
    assert share["words", "fragment"] == pytest.approx(0.5 / 3)  # "two dogs" stays as it is
    assert share["words", HONEST] == 0.5
    assert (share["constant"] == 0.5).all()
