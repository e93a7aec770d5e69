"""CIM as a metric: human judgements in their published layouts, on small files made here."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.io import savemat

from cim.cli import __main__ as cli
from cim.errors import CimError
from cim.evaluation.judgements import VOTES, Judgements, _preferences, agreement_with_people, load_judgements
from cim.evaluation.statistics import kendall, kendall_within
from cim.images import ImageFolder
from cim.rewards import RewardSettings
from cim.scorer import Scorer


@pytest.fixture
def pictures(tmp_path, world):
    """Images of the small world under names that benchmarks use, and their captions."""
    (tmp_path / "Images").mkdir()
    test = world.split("test")
    names = [f"{1000 + i}_abc.jpg" for i in range(len(test))]
    for name, path in zip(names, test.image_paths, strict=True):
        (tmp_path / "Images" / name).write_bytes(path.read_bytes())
    return tmp_path, names, test.captions


@pytest.fixture
def scorer(gallery, encoders):
    return Scorer(gallery, *encoders, RewardSettings())


def expert_lines(names):
    """Every image with its own caption (left out), the next one's (grades 1, 2, 1) and the one after (2, 2, 3)."""
    lines = []
    for i, name in enumerate(names):
        lines.append(f"{name}\t{name}#0\t4\t4\t4")
        lines.append(f"{name}\t{names[(i + 1) % len(names)]}#0\t1\t2\t1")
        lines.append(f"{name}\t{names[(i + 2) % len(names)]}#1\t2\t2\t3")
    return lines


def expert_files(folder, names, captions):
    """The second caption of an image is the first one, shouted."""
    pairs = [(name, i, text) for name, c in zip(names, captions, strict=True) for i, text in enumerate((c, c.upper()))]
    (folder / "Flickr8k.token.txt").write_text("".join(f"{name}#{i}\t{text}\n" for name, i, text in pairs))
    (folder / "ExpertAnnotations.txt").write_text("\n".join(expert_lines(names)) + "\n")
    return pairs


def test_flickr8k_expert(pictures, scorer):
    folder, names, captions = pictures
    expert_files(folder, names, captions)
    judged = load_judgements("flickr8k-expert", folder)
    assert len(judged.rows) == 6 * len(names)
    assert f"{len(names)} captions of the same image and 0 damaged lines left out" in judged.summary
    metrics = agreement_with_people(judged, scorer, resamples=200)
    assert set(metrics["scores"]) == {"grc", "qir", "cim", "words"}
    for cells in metrics["scores"].values():
        for cell in cells.values():
            assert cell["interval"][0] <= cell["value"] <= cell["interval"][1]
    # The value is scipy's on the same rows.
    scores = scorer.score(judged.rows["image"].tolist(), judged.rows["caption"].tolist())
    expected = stats.kendalltau(scores["cim"], judged.rows["grade"], variant="c").statistic
    assert metrics["scores"]["cim"]["tau-c"]["value"] == pytest.approx(expected, abs=1e-6)


def test_flickr8k_cf(pictures):
    folder, names, captions = pictures
    expert_files(folder, names, captions)
    lines = [f"{names[0]}\t{name}#1\t{yes / 3}\t{yes}\t{3 - yes}" for yes, name in zip((3, 2, 0), names, strict=False)]
    (folder / "CrowdFlowerAnnotations.txt").write_text("\r\n".join(lines) + "\n\n")
    judged = load_judgements("flickr8k-cf", folder)
    assert judged.rows["caption"].tolist() == [caption.upper() for caption in captions[1:3]]
    assert judged.rows["grade"].tolist() == [2 / 3, 0]
    assert "2 grades of 1 images, 1 captions of the same image" in judged.summary


def test_captions_come_from_either_file(pictures):
    folder, names, captions = pictures
    pairs = expert_files(folder, names, captions)
    from_tokens = load_judgements("flickr8k-expert", folder)
    (folder / "Flickr8k.token.txt").unlink()
    table = "".join(f'{name},"{text}"\n' for name, _, text in pairs)
    (folder / "captions.txt").write_text(f"image,caption\n{table}")
    pd.testing.assert_frame_equal(load_judgements("flickr8k-expert", folder).rows, from_tokens.rows)
    # A damaged caption keeps its number, so that the next one is not taken for it.
    (folder / "captions.txt").write_text(f"image,caption\n{names[1]},\n{table}")
    (folder / "ExpertAnnotations.txt").write_text(f"{names[0]}\t{names[1]}#1\t1\t1\t1\n")
    assert load_judgements("flickr8k-expert", folder).rows["caption"].unique().tolist() == [captions[1]]


@pytest.mark.parametrize(
    "line",
    [
        "{0}\t{1}#0\t1\t2",
        "{0}\t{1}#9\t1\t1\t1",
        "x.jpg\t{1}#0\t1\t1\t1",
        "{0}\t{1}#0\t1\t5\t1",
        "{0}\t{1}#0\t1\t1\t1.5",
        "\x00",
    ],
)
def test_damaged_judgements_are_left_out(pictures, line):
    folder, names, captions = pictures
    expert_files(folder, names, captions)
    line, path = line.format(*names), folder / "ExpertAnnotations.txt"
    path.write_text("\n".join([line, *expert_lines(names)]))
    judged = load_judgements("flickr8k-expert", folder)
    assert len(judged.rows) == 6 * len(names)
    assert "and 1 damaged lines left out" in judged.summary
    path.write_text("\n".join([*expert_lines(names), line, line]))
    with pytest.raises(CimError, match=r"ExpertAnnotations.txt: 2 of 26 lines .*; line 25, 26\), 16 can be used"):
        load_judgements("flickr8k-expert", folder)


def test_a_caption_does_not_retrieve_its_own_image(world, gallery, encoders):
    train = world.split("train")
    scorer, leaves_in = (Scorer(gallery, *encoders, RewardSettings(exclude_source=e)) for e in (True, False))
    tau = []
    for grader in (scorer, leaves_in):
        grader.add_sources(train)
        grades = grader.retrieval_scores(train.captions, train.frame["image_id"].tolist())["qir"]
        rows = pd.DataFrame({"image": map(str, train.image_paths), "caption": train.captions, "grade": grades})
        tau.append(agreement_with_people(Judgements(rows, ""), scorer, resamples=2)["scores"]["qir"]["tau-b"]["value"])
    assert tau[0] == pytest.approx(1)
    assert tau[1] < 0.9


def test_composite(pictures, scorer):
    folder, names, captions = pictures
    for part, candidates in (("8k", 3), ("coco", 4)):
        lines = [";".join(["HITId", *["x"] * 26, "Input.image", *["c"] * candidates, *["r"] * candidates])]
        for i, name in enumerate(names):
            said = [captions[(i + j) % len(names)] for j in range(candidates)]
            grades = [str(5 - j) for j in range(candidates)]
            lines.append(";".join(["1", *["x"] * 26, f"http://somewhere/{name}", *said, *grades]))
        (folder / f"{part}_correctness.csv").write_text("\n".join(lines) + "\n")
    judged = load_judgements("composite", folder)
    assert len(judged.rows) == (3 + 4) * len(names)
    assert "parts 8k, coco" in judged.summary
    assert agreement_with_people(judged, scorer, resamples=100)["rows"] == len(judged.rows)
    (folder / "8k_correctness.csv").write_text(f"header\n1;http://x/{names[0]};one;two;three;5;four;3\n")
    with pytest.raises(CimError, match=r"8k_correctness.csv:2: should hold 3 captions"):
        load_judgements("composite", folder)


def pascal_files(folder, names, captions):
    """Pairs in which the image's own caption wins (the second side in odd pairs), by all votes but two."""
    pairs = np.zeros(len(names), dtype=[("image", object), ("sent_1", object), ("sent_2", object)])
    fields = [("A", object), ("B", object), ("C", object), ("winner", object)]
    triplets = np.zeros(len(names) * VOTES, dtype=fields)
    for i, name in enumerate(names):
        sides = [captions[i], captions[(i + 3) % len(names)]][:: -1 if i % 2 else 1]
        pairs[i] = (name, *sides)
        for j in range(VOTES):
            best = 2 if i % 2 else 1
            winner = best if j > 1 else 3 - best
            # Sentences lie in cells of their own there, winners in matrices: 1 is the first, -1 the second.
            cells = [np.array([[text]], object) for text in ("a reference", *sides)]
            triplets[i * VOTES + j] = (*cells, np.array([[1 if winner == 1 else -1]]))
    savemat(folder / "pair_pascal.mat", {"new_input": pairs, "category": np.arange(len(names)) % 4 + 1})
    savemat(folder / "consensus_pascal.mat", {"triplets": triplets})


def test_pascal50s(pictures, scorer):
    folder, names, captions = pictures
    pascal_files(folder, names, captions)
    judged = load_judgements("pascal50s", folder)
    assert len(judged.rows) == 2 * len(names)
    first = judged.rows[judged.rows["side"] == 0]
    assert first["preferred"].tolist() == [i % 2 for i in range(len(names))]
    metrics = agreement_with_people(judged, scorer, resamples=100)["scores"]
    assert set(metrics["qir"]) == {"HC", "HI", "HM", "MM", "mean"}
    # Each category, computed here.
    scores = scorer.score(judged.rows["image"].tolist(), judged.rows["caption"].tolist())["qir"].to_numpy()
    ahead = scores[1::2] - scores[0::2]
    right = np.where(np.arange(len(names)) % 2, ahead > 0, ahead < 0)
    assert metrics["qir"]["HI"]["value"] == pytest.approx(right[1::4].mean())
    assert metrics["qir"]["mean"]["value"] == pytest.approx(np.mean([right[c::4].mean() for c in range(4)]))


def test_what_is_missing_is_named(pictures):
    folder, names, captions = pictures
    with pytest.raises(CimError, match="unknown benchmark"):
        load_judgements("nocaps", folder)
    for benchmark, file in (("flickr8k-expert", "ExpertAnnotations"), ("flickr8k-cf", "CrowdFlowerAnnotations")):
        with pytest.raises(CimError, match=rf"{file}.txt: not found"):
            load_judgements(benchmark, folder)
    (folder / "ExpertAnnotations.txt").touch()
    with pytest.raises(CimError, match=r"holds neither Flickr8k.token.txt nor captions.txt"):
        load_judgements("flickr8k-expert", folder)
    with pytest.raises(CimError, match="no grades in"):
        load_judgements("composite", folder)
    with pytest.raises(CimError, match=r"pair_pascal.mat: not found"):
        load_judgements("pascal50s", folder)
    expert_files(folder, names, captions)
    (folder / "Images" / names[0]).unlink()
    with pytest.raises(CimError, match=f"1 of {len(names)} images are missing, '{names[0]}'"):
        load_judgements("flickr8k-expert", folder)
    for content, count in (("", "0 of 0"), ("one line\n", "1 of 1"), (f"{names[0]}\t{names[0]}#0\t4\t4\t4", "0 of 1")):
        (folder / "ExpertAnnotations.txt").write_text(content)
        with pytest.raises(CimError, match=rf"ExpertAnnotations.txt: {count} lines are damaged .* 0 can be used"):
            load_judgements("flickr8k-expert", folder)
    savemat(folder / "pair_pascal.mat", {"other": 1})
    savemat(folder / "consensus_pascal.mat", {"triplets": 1})
    with pytest.raises(CimError, match="not in Pascal-50S's layout"):
        load_judgements("pascal50s", folder)


def test_judge_from_the_command_line(pictures, gallery, capsys):
    folder, names, captions = pictures
    expert_files(folder, names, captions)
    out = folder / "judged.json"
    cli.main(
        ["judge", "--benchmark", "flickr8k-expert", "--data", str(folder), "--gallery", str(gallery.folder),
         "--out", str(out), "--resamples", "50"]
    )  # fmt: skip
    assert set(json.loads(out.read_text())["scores"]) == {"grc", "qir", "cim", "words"}
    assert "cim: tau-c" in capsys.readouterr().out


def test_kendall_knows_its_interval(rng):
    x = rng.normal(size=400)
    y = x + rng.normal(size=400)
    images = np.repeat(np.arange(100), 4)
    tau = kendall(x, y, images, rng, 300)
    assert tau["value"] == pytest.approx(stats.kendalltau(x, y).statistic)
    low, high = tau["interval"]
    assert low < tau["value"] < high
    assert high - low < 0.15
    assert np.isnan(kendall(np.ones(400), y, images, rng, 10)["value"])


def test_captions_of_one_image_are_drawn_together(rng):
    """Copies of every row say nothing new: each resample of images gives the same tau."""
    x, y, images = rng.normal(size=40), rng.normal(size=40), np.arange(40)
    few, copies = (
        kendall(*(np.repeat(values, n) for values in (x, y, images)), np.random.default_rng(0), 100) for n in (1, 5)
    )
    assert few["interval"][1] - few["interval"][0] > 0.2
    assert copies["value"] == pytest.approx(few["value"])
    assert copies["interval"] == pytest.approx(few["interval"])


def test_pairs_of_one_image_are_drawn_together(rng):
    columns = {"image": np.arange(24), "preferred": rng.integers(0, 2, 24), "category": ["HC", "HI", "HM", "MM"] * 6}

    def cells(copies: int) -> dict:
        pairs = pd.DataFrame(columns).loc[np.repeat(np.arange(24), copies)].reset_index(drop=True)
        sides = [pairs.assign(pair=pairs.index, side=side, score=(pairs["image"] % 3 == side) * 1.0) for side in (0, 1)]
        return _preferences(pd.concat(sides), "score", np.random.default_rng(0), 100)

    few, copies = cells(1), cells(5)
    assert set(few) == {"HC", "HI", "HM", "MM", "mean"}
    for category, cell in few.items():
        assert cell["interval"][1] - cell["interval"][0] > 0.1
        assert copies[category]["value"] == pytest.approx(cell["value"])
        assert copies[category]["interval"] == pytest.approx(cell["interval"])


def test_images_are_found_by_name_in_any_folder(pictures):
    folder, names, _ = pictures
    found = ImageFolder(folder).paths([names[0], names[1].removesuffix(".jpg")])
    assert [path.name for path in found] == names[:2]


def test_kendall_within_compares_captions_of_one_image_only(rng):
    images = np.repeat(np.arange(50), 3)
    level = np.tile([0.0, 1.0, 2.0], 50)
    offset = np.repeat(rng.normal(0, 100, 50), 3)  # what differs between images drowns what differs within
    assert kendall_within(level + offset, level, images, rng, 50) == {"value": 1.0, "interval": [1.0, 1.0]}
    assert kendall_within(-level + offset, level, images, rng, 50)["value"] == -1
    assert abs(kendall(level + offset, level, images, rng, 10)["value"]) < 0.3
    one = np.zeros(len(level), int)
    noisy = level + rng.normal(0, 1, len(level))
    assert kendall_within(noisy, level, one, rng, 2)["value"] == pytest.approx(stats.kendalltau(noisy, level).statistic)
    assert np.isnan(kendall_within(offset, level, images, rng, 10)["value"])
