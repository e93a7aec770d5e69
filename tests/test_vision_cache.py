"""Features of frozen vision towers: the same values as without a cache, computed once for each image."""

from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from cim import fastvlm
from cim.captioners.models import ModelSettings, hold_batch_norm, prompt_inputs
from cim.captioners.vision_cache import cache_vision
from conftest import PROMPT
from standins import STANDINS

ORDER = [0, 1, 0, 2, 0, 1]  # as GRPO repeats images in a batch


def fastvlm_with_resnet():
    tokenizer = fastvlm.word_tokenizer(fastvlm.split_words(PROMPT))
    text = fastvlm.decoder_config(hidden_size=32, layers=2, heads=2)
    model = fastvlm.assemble(timm.create_model("test_resnet", num_classes=0), text, tokenizer)
    return model, fastvlm.build_processor(tokenizer, fastvlm.WORDS_CHAT, 64, [0.5] * 3, [0.5] * 3)


MODELS = {**STANDINS, "fastvlm": fastvlm_with_resnet}


def build(name: str):
    """A model whose vision tower is frozen, in training mode, and the inputs of a batch with repeated images."""
    torch.manual_seed(0)
    model, processor = MODELS[name]()
    hold_batch_norm(model)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad = "language_model" in parameter_name or "lm_head" in parameter_name
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (56, 56 + 28 * i, 3), np.uint8)) for i in range(3)]
    settings = ModelSettings(name="standin", prompt=PROMPT)
    return model.train(), prompt_inputs(processor, [images[i] for i in ORDER], settings)


def count_calls(cache) -> list[torch.Tensor]:
    """The pixels that the vision tower itself is called with from now on."""
    calls, forward = [], cache.forward
    cache.forward = lambda pixels, **options: (calls.append(pixels), forward(pixels, **options))[1]
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_the_same_and_each_image_is_computed_once(name):
    """Each image where the tower takes pixels alone; Qwen's also takes sizes, and SmolVLM's masks."""
    model, inputs = build(name)

    def outputs():
        model.zero_grad()
        logits = model(**inputs).logits
        logits.square().mean().backward()
        return logits.detach(), [p.grad for p in model.parameters() if p.grad is not None]

    # Convolutions of a batch and of one image may differ in the last bit.
    same = partial(torch.allclose, atol=1e-5) if name == "fastvlm" else torch.equal
    expected, gradients = outputs()
    calls = count_calls(cache_vision(model, 2**24))
    with torch.inference_mode():  # as in sampling: what it keeps must serve training
        model(**inputs)
    for _ in range(2):
        logits, found = outputs()
        assert same(logits, expected)
        assert len(gradients) == len(found) > 0
        assert all(map(same, gradients, found))
    if name in ("fastvlm", "llava", "internvl"):
        pixels = {call.contiguous().numpy().tobytes() for call in calls}
        assert len(calls) == len(pixels) >= 3  # no image twice
    else:
        assert len(calls) == 3  # one for all images


def test_memory_is_bounded():
    model, inputs = build("fastvlm")
    images = inputs["pixel_values"][[0, 1, 3]].split(1)
    tower = model.model.vision_tower
    size = tower(images[0]).last_hidden_state.nbytes
    cache = cache_vision(model, 2 * size)
    calls = count_calls(cache)
    for i, computed in ((0, 1), (1, 2), (0, 2), (1, 2), (2, 3), (0, 4), (2, 5), (0, 5)):  # the third image drops all
        tower(images[i])
        assert len(calls) == computed, i
        assert cache.bytes <= 2 * size


def test_each_precision_and_image_has_its_own_features():
    model, inputs = build("fastvlm")
    pixels, tower = inputs["pixel_values"][:1], model.model.vision_tower
    plain = tower.forward
    cache_vision(model, 2**24)

    def check():
        assert torch.equal(tower(pixels).last_hidden_state, plain(pixels).last_hidden_state)

    check()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check()
    pixels = pixels + 1e-3
    check()


def test_outputs_may_be_changed_by_the_caller():
    model, inputs = build("fastvlm")
    tower = model.model.vision_tower
    cache_vision(model, 2**24)
    first = tower(inputs["pixel_values"][:1])
    first.last_hidden_state.zero_()
    assert tower(inputs["pixel_values"][:1]).last_hidden_state.any()


def test_a_model_without_a_vision_tower_is_left_alone():
    assert cache_vision(torch.nn.Linear(2, 2), 1) is None
