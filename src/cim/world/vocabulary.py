"""The words of the small world, and the OpenMoji art behind its nouns."""

# family -> {object name: OpenMoji code point}. The order is part of the data: it fixes label indices.
FAMILIES: dict[str, dict[str, str]] = {
    "bird": {"owl": "1F989", "eagle": "1F985", "duck": "1F986", "penguin": "1F427",
             "parrot": "1F99C", "flamingo": "1F9A9", "rooster": "1F413", "peacock": "1F99A"},
    "mammal": {"cow": "1F404", "pig": "1F416", "elephant": "1F418", "kangaroo": "1F998",
               "giraffe": "1F992", "camel": "1F42A", "bat": "1F987", "rabbit": "1F407"},
    "bug": {"bee": "1F41D", "butterfly": "1F98B", "ladybug": "1F41E", "ant": "1F41C",
            "spider": "1F577", "scorpion": "1F982", "caterpillar": "1F41B", "cricket": "1F997"},
    "sea creature": {"octopus": "1F419", "crab": "1F980", "shark": "1F988", "dolphin": "1F42C",
                     "whale": "1F40B", "lobster": "1F99E", "pufferfish": "1F421", "turtle": "1F422"},
    "fruit": {"apple": "1F34E", "banana": "1F34C", "pear": "1F350", "cherry": "1F352",
              "pineapple": "1F34D", "strawberry": "1F353", "lemon": "1F34B", "watermelon": "1F349"},
    "vegetable": {"carrot": "1F955", "corn": "1F33D", "broccoli": "1F966", "mushroom": "1F344",
                  "eggplant": "1F346", "chili": "1F336", "onion": "1F9C5", "garlic": "1F9C4"},
    "vehicle": {"car": "1F697", "bus": "1F68C", "tractor": "1F69C", "bicycle": "1F6B2",
                "helicopter": "1F681", "rocket": "1F680", "sailboat": "26F5", "train": "1F682"},
    "instrument": {"guitar": "1F3B8", "violin": "1F3BB", "drum": "1F941", "trumpet": "1F3BA",
                   "saxophone": "1F3B7", "accordion": "1FA97", "banjo": "1FA95", "piano": "1F3B9"},
    "tool": {"hammer": "1F528", "saw": "1FA9A", "axe": "1FA93", "ladder": "1FA9C",
             "magnet": "1F9F2", "scissors": "2702", "shovel": "1FA8F", "key": "1F511"},
}  # fmt: skip
KIND_OF_FAMILY = {
    "bird": "animal", "mammal": "animal", "bug": "animal", "sea creature": "animal",
    "fruit": "food", "vegetable": "food",
    "vehicle": "thing", "instrument": "thing", "tool": "thing",
}  # fmt: skip
FAMILY_OF: dict[str, str] = {name: family for family, names in FAMILIES.items() for name in names}
NAMES: tuple[str, ...] = tuple(FAMILY_OF)

# Colour -> (shadow, mid tone, highlight): the art is reduced to luminance and tinted with these.
COLOURS: dict[str, tuple[str, str, str]] = {
    "red": ("#550000", "#ee3333", "#ffbbbb"),
    "orange": ("#552200", "#ee8800", "#ffdd88"),
    "yellow": ("#444400", "#ddcc00", "#ffffaa"),
    "green": ("#003300", "#22aa33", "#bbffbb"),
    "blue": ("#000055", "#3366ee", "#bbccff"),
    "purple": ("#330044", "#9933cc", "#eebbff"),
}
SIZES: tuple[str, ...] = ("small", "large")
BACKGROUND = "background"  # in graphs, the object whose attribute is the scene's background
BACKGROUNDS: tuple[str, ...] = ("meadow", "beach", "night", "snow")

# Relations whose subject comes first in reading order, and those that state the same with subject and object swapped.
FORWARD = ("left of", "above", "above left of", "above right of")
BACKWARD = ("right of", "below", "below right of", "below left of")
INVERSE: dict[str, str] = dict(zip(FORWARD + BACKWARD, BACKWARD + FORWARD, strict=True))


def generalisations(noun: str) -> tuple[str, ...]:
    """The noun and everything more general that is true of it, finest first.

    >>> generalisations("owl")
    ('owl', 'bird', 'animal')
    """
    family = FAMILY_OF.get(noun, noun)
    return tuple(dict.fromkeys((noun, family, KIND_OF_FAMILY.get(family, family))))
