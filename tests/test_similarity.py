"""Embeddings that are alike, targets that contradict their neighbours, and what a run keeps and shows of both."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

import suanli
from suanli.core.schema import Ragged
from suanli.core.similarity import directions, find_nearest, principal_components
from suanli.data.leaks import SIMILAR, Copy, LeakEntry, closeness, closeness_limit, replace_similar
from suanli.data.preprocess.image import ImagePreprocess
from suanli.tasks.classification import Classification
from suanli.tasks.multilabel import Multilabel
from suanli.tasks.regression import Regression
from suanli.verbs._embedding_findings import concatenate, project

Random = np.random.Generator


@pytest.fixture
def random() -> Random:
    return np.random.default_rng(0)


# --- similarity ---


def test_the_nearest_are_those_with_the_largest_cosine(random: Random) -> None:
    vectors, others = random.normal(3, 1, (1100, 8)), random.normal(3, 1, (50, 8))
    mean = others.mean(0)
    own, theirs = directions(vectors, mean), directions(others, mean)
    cosines, places = find_nearest(own, theirs, 3)
    expected = own @ theirs.T
    np.testing.assert_array_equal(places[:, 0], expected.argmax(1))
    np.testing.assert_allclose(cosines, -np.sort(-expected, axis=1)[:, :3], atol=1e-6)
    assert find_nearest(own, theirs[:2], 5)[1].shape == (1100, 2)
    assert find_nearest(own, theirs[:0], 5)[1].shape == (1100, 0)


@pytest.mark.parametrize("shape", [(80, 6), (12, 40)])
def test_principal_components_are_scikit_learns(random: Random, shape: tuple[int, int]) -> None:
    vectors = random.normal(size=shape) @ np.diag(np.linspace(1, 5, shape[1]))
    ours, theirs = principal_components(vectors, 4), PCA(4).fit_transform(vectors)
    np.testing.assert_allclose(np.abs(ours), np.abs(theirs), atol=1e-3)
    assert principal_components(random.normal(size=(1100, 1100)).astype(np.float32), 8).shape == (1100, 8)


def test_a_map_is_the_same_each_time_and_keeps_groups_together(random: Random) -> None:
    groups = np.repeat(np.arange(3), 30)
    vectors = random.normal(0, 0.3, (90, 10)) + 5 * np.eye(10)[groups]
    method, points = project(vectors)
    assert method == "t-SNE"
    assert np.abs(points).max() == pytest.approx(1)
    np.testing.assert_array_equal(points, project(vectors)[1])
    nearest = np.linalg.norm(points[:, None] - points[None], axis=2) + 9 * np.eye(90)
    assert (groups[nearest.argmin(1)] == groups).mean() > 0.95
    assert project(vectors[:6])[0] == "PCA"
    assert project(np.ones((40, 3)))[1].shape == (40, 2)  # all alike
    assert project(np.arange(20.0)[:, None])[1].shape == (20, 2)  # one number


def test_columns_of_different_lengths_are_joined() -> None:
    one, two = np.zeros((0, 2)), [np.ones((1, 2)), np.full((3, 2), 2.0)]
    joined = concatenate([Ragged.of(two[:1], like=one), Ragged.of(two[1:], like=one)])
    assert isinstance(joined, Ragged)
    np.testing.assert_array_equal(joined[1], two[1])


# --- copies ---


def test_an_image_has_a_mirrored_copy_and_one_of_its_middle() -> None:
    row = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    preprocess = ImagePreprocess(height=20, width=30)
    mirrored, middle = (one["image"] for one in preprocess.copies({"image": row}))
    np.testing.assert_array_equal(mirrored, row[:, ::-1])
    assert middle.shape == row.shape
    large = preprocess.thumbnail({"image": np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)})
    assert large.media_type == "image/jpeg"
    assert preprocess.thumbnail({"image": row}) == preprocess.preview({"image": row})


def _near(random: Random, count: int, middle: float) -> np.ndarray:
    """Closeness of examples whose nearest is about so far (a logarithm), and the next ones at -1."""
    distances = np.exp(np.concatenate([random.normal(middle, 0.3, (count, 1)), random.normal(-1, 0.3, (count, 5))], 1))
    return closeness(np.sort(distances, axis=1))


def test_copies_are_found_and_others_hardly_ever(random: Random) -> None:
    """500 examples of which 20 have a copy in training."""
    false, found = 0, 0
    for _ in range(40):
        examples = np.concatenate([_near(random, 20, -4), _near(random, 480, -1)])
        limit = closeness_limit(examples, _near(random, 30, -4)[:, None])
        assert limit is not None
        false += int((examples[20:] <= limit).sum())
        found += int((examples[:20] <= limit).sum())
    assert false <= 8  # of 19,200; 0.4 were expected, were closeness quite normal
    assert found > 0.9 * 40 * 20


def test_embeddings_that_cannot_tell_copies_say_so(random: Random) -> None:
    examples, alike, near = _near(random, 500, -1), _near(random, 30, -1)[:, None], _near(random, 30, -4)[:, None]
    assert closeness_limit(examples, alike) is None
    assert closeness_limit(examples, np.hstack([alike, near])) is not None  # one kind of copy is enough
    assert closeness_limit(examples[:20], near) is None  # too few to know chance
    assert closeness_limit(examples, np.zeros((0, 0))) is None
    assert np.isfinite(closeness(np.zeros((3, 6)))).all()


def test_similar_pairs_replace_those_of_before_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "leaks.csv"
    copy = Copy(name='a "quoted", name', split="train", distance=0.0123456)
    entry = LeakEntry(example="\udcff.png", split="test", kind=SIMILAR, copies=[copy])
    path.write_text("split,example,kind,copy_split,copy,distance\ntest,x,near,train,y,3\n")
    for _ in range(2):
        replace_similar(path, [entry])
        rows = list(csv.reader(path.read_text().splitlines()))
        assert rows[1:] == [
            ["test", "x", "near", "train", "y", "3"],
            ["test", "\\udcff.png", SIMILAR, "train", 'a "quoted", name', "0.01235"],
        ]
    replace_similar(path, [])
    assert len(path.read_text().splitlines()) == 2
    replace_similar(tmp_path / "none.csv", [])
    assert not (tmp_path / "none.csv").exists()


# --- targets that are likely wrong ---


def spread(random: Random, classes: np.ndarray, width: int = 12) -> np.ndarray:
    """Embeddings that say which class an example has, mostly."""
    return random.normal(0, 1, (len(classes), width)) + 4 * np.eye(width)[classes]


def rates(found: list[int], planted: np.ndarray) -> tuple[float, float]:
    """Precision and recall."""
    hits = len(set(found) & set(planted.tolist()))
    return hits / max(len(found), 1), hits / len(planted)


def test_wrong_classes_are_found(random: Random) -> None:
    truth = random.integers(0, 4, 600)
    given, planted = truth.copy(), random.permutation(600)[:30]
    given[planted] = (given[planted] + random.integers(1, 4, 30)) % 4
    task = Classification(classes=tuple("abcd"))
    suspects = task.find_suspects(spread(random, truth), {"class": given})
    assert suspects is not None
    precision, recall = rates([one.position for one in suspects], planted)
    assert precision > 0.8
    assert recall > 0.6
    assert np.mean([one.suggested["class"] == truth[one.position] for one in suspects]) > 0.8
    confidences = [one.confidence for one in suspects]
    assert confidences == sorted(confidences, reverse=True)
    assert all(0.5 <= one <= 1 for one in confidences)


def test_classes_that_the_embeddings_say_nothing_of_have_no_suspects(random: Random) -> None:
    classes = random.integers(0, 3, 300)
    assert Classification(classes=tuple("abc")).find_suspects(random.normal(size=(300, 8)), {"class": classes}) is None
    assert not Multilabel(classes=("a", "b")).find_suspects(
        random.normal(size=(300, 8)), {"labels": (random.random((300, 2)) < 0.5).astype(np.uint8)}
    )


def test_clean_classes_have_few_suspects_and_rare_ones_none(random: Random) -> None:
    truth = random.integers(0, 4, 600)
    truth[:3] = 4  # too few to judge
    suspects = Classification(classes=tuple("abcde")).find_suspects(spread(random, truth), {"class": truth})
    assert suspects is not None
    assert len(suspects) < 15
    assert not {one.position for one in suspects} & {0, 1, 2}
    assert (
        Classification(classes=("a", "b")).find_suspects(spread(random, truth), {"class": np.zeros(600, int)}) is None
    )
    assert Classification(classes=("a", "b")).find_suspects(np.zeros((3, 2)), {"class": np.array([0, 1, 0])}) in (
        None,
        [],
    )


def test_each_wrong_label_is_found_by_itself(random: Random) -> None:
    truth = (random.random((600, 3)) < 0.4).astype(np.uint8)
    features = random.normal(0, 1, (600, 10)) + 4 * np.pad(truth, ((0, 0), (0, 7)))
    given, planted = truth.copy(), random.permutation(600)[:30]
    given[planted, 1] ^= 1
    suspects = Multilabel(classes=("a", "b", "c")).find_suspects(features, {"labels": given})
    precision, recall = rates([one.position for one in suspects], planted)
    assert precision > 0.5
    assert recall > 0.8
    assert np.mean([(one.suggested["labels"] == truth[one.position]).all() for one in suspects]) > 0.5


def test_values_that_are_far_off_are_found_and_noise_is_not(random: Random) -> None:
    features = random.normal(0, 1, (600, 10))
    values = 100 + 10 * features @ np.linspace(0, 1, 10) + random.normal(0, 1, 600)
    task = Regression(mean=100.0, spread=15.0)
    assert len(task.find_suspects(features, {"value": values})) <= 2
    planted = random.permutation(600)[:30]
    given = values.copy()
    given[planted] += 15 * random.choice([-1, 1], 30)
    suspects = task.find_suspects(features, {"value": given})
    precision, recall = rates([one.position for one in suspects], planted)
    assert precision > 0.8
    assert recall > 0.8
    assert abs(float(suspects[0].suggested["value"]) - values[suspects[0].position]) < 8
    assert task.find_suspects(features[:5], {"value": values[:5]}) == []
    assert task.find_suspects(features, {"value": np.full(600, 3.0)}) == []


# --- a run ---


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A run on handwritten digits of whose labels 5 % are another digit's, and the names of these."""
    folder = tmp_path_factory.mktemp("planted")
    digits, random = load_digits(), np.random.default_rng(3)
    labels = digits.target.astype(np.int64)
    wrong = random.permutation(len(labels))[: len(labels) // 20]
    labels[wrong] = (labels[wrong] + random.integers(1, 10, len(wrong))) % 10
    np.savez(folder / "digits.npz", images=np.rint(digits.images * (255 / 16)).astype(np.uint8), labels=labels)
    options: dict[str, Any] = {"speedups": "none", "cache_dir": folder / "cache", "threads": 1}
    suanli.run(folder / "digits.npz", epochs=3, out=folder / "made", **options)
    return folder / "made", {int(i) for i in wrong}


def _number(name: str) -> int:
    return int("".join(c for c in name.rpartition("/")[2] if c.isdigit()))


def test_planted_label_errors_of_real_data_are_found(planted: tuple[Path, set[int]]) -> None:
    run, wrong = planted
    kept = np.load(run / "evaluation" / "embeddings.npz")  # as many as there was time for
    rows = list(csv.DictReader((run / "evaluation" / "label_errors.csv").read_text().splitlines()))
    found, judged = ({_number(name) for name in names} for names in ([row["name"] for row in rows], kept["names"]))
    precision, recall = len(found & wrong) / len(found), len(found & wrong) / len(judged & wrong)
    print(f"precision {precision:.3f}, recall {recall:.3f}, by chance 0.05")
    assert precision > 0.8
    assert recall > 0.4
    assert list(rows[0]) == ["name", "given", "suggested", "confidence", "split"]


def test_a_run_keeps_embeddings_and_the_report_shows_what_they_say(planted: tuple[Path, set[int]]) -> None:
    run, _ = planted
    kept = np.load(run / "evaluation" / "embeddings.npz")
    assert kept["vectors"].dtype == np.float16
    assert len(kept["names"]) == len(kept["splits"]) == len(kept["rows"]) == len(kept["vectors"])
    assert set(kept["splits"].tolist()) == {0, 1, 2}
    assert (run / "evaluation" / "embeddings.npz").stat().st_size < 4 << 20
    found = json.loads((run / "evaluation" / "embeddings.json").read_text())
    assert found["counts"]["test"] == len(found["map"]["points"]) == len(found["map"]["names"])
    assert all(1 <= len(one["neighbours"]) <= 3 for one in found["neighbours"])
    assert {n["split"] for one in found["neighbours"] for n in one["neighbours"]} == {"train"}
    page = (run / "report.html").read_text()
    assert page.count("<circle") >= found["counts"]["test"]
    assert "Likely label errors" in page
    assert "what is most like them" in page


def test_a_network_without_embeddings_is_evaluated_all_the_same(
    planted: tuple[Path, set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("suanli.models.backbone.HeadInputs._keep", lambda *_: None)
    assert suanli.evaluate(planted[0]).count > 0


# --- copies across splits ---

MIRRORED = 6


def write_photo(path: Path, seed: int, *, mirrored: bool = False) -> None:
    """Smooth noise in colours of its own."""
    random = np.random.default_rng(seed)
    tint = random.integers(0, 160, 3)
    pixels = (tint + random.integers(0, 96, (10, 10, 3))).astype(np.uint8)
    image = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    (ImageOps.mirror(image) if mirrored else image).save(path)


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images of which 6 of 60 test images are training images, mirrored."""
    folder = tmp_path_factory.mktemp("mirrored")
    for c in range(2):
        for split, count in (("train", 60), ("val", 10), ("test", 30)):
            for i in range(count):
                seed = 10_000 * c + {"train": 0, "val": 1000, "test": 2000}[split] + i
                write_photo(folder / "data" / split / f"class{c}" / f"{i}.png", seed)
        for i in range(MIRRORED // 2):
            write_photo(folder / "data" / "test" / f"class{c}" / f"{i}.png", 10_000 * c + i, mirrored=True)
    options: dict[str, Any] = {"speedups": "none", "cache_dir": folder / "cache", "threads": 1}
    suanli.run(folder / "data", model="mirror_model:build", epochs=1, out=folder / "made", **options)
    return folder / "made"


def test_mirrored_training_images_are_found_and_no_others(mirrored: Path) -> None:
    rows = list(csv.DictReader((mirrored / "leaks.csv").read_text().splitlines()))
    assert {row["kind"] for row in rows} == {SIMILAR}
    pairs = {(row["example"], row["copy"]) for row in rows}
    places = [f"class{c}/{i}.png" for c in range(2) for i in range(MIRRORED // 2)]
    assert pairs == {(f"test/{place}", f"train/{place}") for place in places}
    found = json.loads((mirrored / "evaluation" / "embeddings.json").read_text())["similar"]
    assert found["count"] == MIRRORED
    assert json.loads((mirrored / "evaluation" / "test.json").read_text())["count"] == 60  # no score leaves them out
    page = (mirrored / "report.html").read_text()
    assert "In two splits in another form" in page
    suanli.evaluate(mirrored, trust_code=True)
    assert len(list(csv.DictReader((mirrored / "leaks.csv").read_text().splitlines()))) == len(rows)
