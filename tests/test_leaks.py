"""Examples that are in training too: found, counted, listed, and left out of the scores."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

import suanli
from suanli.core.types import Split
from suanli.data.examples import ExampleTable, rows_of_bytes
from suanli.data.leaks import EXACT, NEAR, VALIDATION, count_leaks, find_leaks
from suanli.data.perceptual_hash import SIMILAR_BITS, perceptual_hash
from suanli.data.preprocess.text import TextPreprocess
from suanli.tasks.regression import Regression
from suanli.verbs._leakage import find_rows
from suanli.verbs.evaluate import table

# --- near-duplicates -------------------------------------------------------------------------


def photo(seed: int, size: int = 64) -> Image.Image:
    """Smooth noise, as an image has most of its energy in low frequencies."""
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


def hash_of(image: Image.Image) -> np.ndarray:
    return np.frombuffer(perceptual_hash(np.asarray(image.convert("RGB").resize((32, 32)))), np.uint8)


def distance(one: Image.Image, other: Image.Image) -> int:
    return int(np.unpackbits(hash_of(one) ^ hash_of(other)).sum())


def encoded(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream)


def test_copies_are_near_and_others_far() -> None:
    photos = [photo(seed) for seed in range(12)]
    for one in photos:
        assert distance(one, encoded(one, 75)) <= SIMILAR_BITS
        assert distance(one, one.resize((60, 60))) <= SIMILAR_BITS
        assert distance(one, ImageEnhance.Brightness(one).enhance(1.05)) <= SIMILAR_BITS
    assert min(distance(one, other) for one in photos for other in photos if one is not other) > 3 * SIMILAR_BITS


def test_images_without_detail_are_like_none() -> None:
    flat = Image.new("RGB", (64, 64), (90, 90, 90))
    faint = np.asarray(flat).copy()
    faint[::7, ::5] += 1
    for image in (flat, Image.new("RGB", (64, 64)), Image.fromarray(faint)):
        assert perceptual_hash(np.asarray(image)) == b""
    assert perceptual_hash(np.asarray(photo(0, 8))) == b""  # too few pixels
    assert len(perceptual_hash(np.asarray(photo(0).filter(ImageFilter.GaussianBlur(6)))[:, :, :1])) == 32


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("A lovely film!", "a  LOVELY film", True),
        ("caf\u00e9 \u2013 open", "CAFE\u0301 open", True),
        ("\uff21\uff22\uff23 123", "abc, 123.", True),
        ("\u4f60\u597d\uff0c\u4e16\u754c", "\u4f60\u597d \u4e16\u754c", True),
        ("a lovely film", "a lovely filn", False),
        ("good", "goods", False),
    ],
)
def test_texts_are_near_whatever_their_case_and_punctuation(one: str, other: str, same: bool) -> None:
    preprocess = TextPreprocess(vocabulary=("a",), length=8)
    keys = [preprocess.similarity_key(text, preprocess.encode(text)) for text in (one, other)]
    assert (keys[0] == keys[1]) == same


def test_a_text_without_letters_is_like_none() -> None:
    preprocess = TextPreprocess(vocabulary=("a",), length=8)
    assert preprocess.similarity_key("!?", preprocess.encode("!?")) == b""


# --- the search ------------------------------------------------------------------------------


def examples(splits: list[int], digests: list[bytes], keys: list[bytes]) -> ExampleTable:
    return ExampleTable(
        names=[f"e{i}" for i in range(len(splits))],
        splits=np.array(splits, np.uint8),
        digests=rows_of_bytes(digests, 8),
        keys=rows_of_bytes(keys, 32),
        units=np.zeros((len(splits), 8), np.uint8),
    )


def flip(key: bytes, bits: int) -> bytes:
    flipped = np.unpackbits(np.frombuffer(key, np.uint8))
    flipped[10 : 10 + bits] ^= 1
    return np.packbits(flipped).tobytes()


def test_the_search_finds_equal_and_near_examples_of_other_splits() -> None:
    random = np.random.default_rng(0)
    a, b, c, d = (random.bytes(32) for _ in range(4))
    rows = [
        (0, b"a", a),
        (0, b"b", b),
        (0, b"", b""),  # can't be compared
        (1, b"c", c),
        (1, b"b2", flip(b, 20)),  # near a training example
        (2, b"a", d),  # equal to a training example, whatever its key
        (2, b"x", flip(a, 3)),
        (2, b"y", flip(a, 21)),  # too far
        (2, b"c", c),  # in validation only
        (2, b"", b""),
        (2, b"z", d),  # like a test example only
        (255, b"a", a),
    ]
    one = examples(*map(list, zip(*rows, strict=True)))
    leaks = find_leaks(one, one, 20)
    assert leaks.kinds.tolist() == [0, 0, 0, 0, NEAR, EXACT, NEAR, 0, EXACT | VALIDATION, 0, 0, 0]
    assert [(e["split"], e["example"], e["kind"]) for e in leaks.entries] == [
        ("test", "e5", "exact"),
        ("test", "e8", "exact"),
        ("test", "e6", "near"),
        ("val", "e4", "near"),
    ]
    assert leaks.entries[2]["copies"] == [{"name": "e0", "split": "train", "distance": 3}]
    assert count_leaks(leaks.kinds[5:11]) == {"examples": 6, "exact": 2, "near": 1, "only_validation": 1}


@pytest.mark.parametrize("numpy_1", [False, True])
def test_the_search_agrees_with_all_distances(numpy_1: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if numpy_1:
        monkeypatch.delattr(np, "bitwise_count", raising=False)
    random = np.random.default_rng(1)
    keys = [random.bytes(32) for _ in range(40)]
    keys += [flip(key, int(random.integers(0, 40))) for key in keys]
    one = examples([0] * 40 + [2] * 40, [str(i).encode() for i in range(80)], keys)
    bits = np.unpackbits(one.keys, axis=1)
    near = (bits[40:, None] != bits[None, :40]).sum(2).min(1) <= 20
    assert (find_leaks(one, one, 20).kinds[40:] == NEAR * near).all()


def test_the_table_of_examples_is_read_as_written(tmp_path: Path) -> None:
    one = examples([0, 255], [b"a", b""], [b"k" * 32, b""])
    one = ExampleTable(**{**one.__dict__, "names": ["\u732b/1.png", "\udcff.png"]})
    one.save(tmp_path / "examples.npz")
    again = ExampleTable.load(tmp_path / "examples.npz")
    assert again.names == one.names
    assert (again.digests == one.digests).all()
    (tmp_path / "examples.npz").write_bytes(b"PK\3\4 no archive")
    with pytest.raises(suanli.DataError, match="damaged"):
        ExampleTable.load(tmp_path / "examples.npz")


# --- what is said of it ----------------------------------------------------------------------


def leaky_folder(root: Path, *, new: int) -> Path:
    """Two classes with 24 training images; all are in the test split again, half of them encoded anew, beside `new`
    others of each class."""
    for c in range(2):
        for split in ("train", "val", "test"):
            (root / split / f"class{c}").mkdir(parents=True)
        for i in range(24):
            image = photo(100 * c + i)
            image.save(root / "train" / f"class{c}" / f"{i}.png")
            copy = root / "test" / f"class{c}" / f"copy{i}"
            image.save(copy.with_suffix(".png")) if i % 2 else image.save(copy.with_suffix(".jpg"), quality=75)
        for i in range(max(new, 4)):
            photo(1000 + 100 * c + i).save(root / "val" / f"class{c}" / f"{i}.png")
        for i in range(new):
            photo(2000 + 100 * c + i).save(root / "test" / f"class{c}" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def leaky_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`, of whose 68 test images 48 are in training, and a run on it, `made`."""
    folder = tmp_path_factory.mktemp("leaky")
    leaky_folder(folder / "data", new=10)
    options = {"speedups": "none", "device": "cpu", "cache_dir": folder / "cache", "settings": {"preprocess.size": 32}}
    suanli.run(folder / "data", epochs=1, out=folder / "made", **options)
    return folder


def test_scores_are_of_the_new_examples_and_the_whole_split_is_beside(leaky_run: Path) -> None:
    written = json.loads((leaky_run / "made" / "evaluation" / "test.json").read_text())
    assert written["count"] == written["leakage"]["new"]["count"] == 20
    assert written["scores"] == written["leakage"]["new"]["scores"]
    assert written["leakage"]["whole"]["count"] == 68
    assert {key: written["leakage"][key] for key in ("examples", "exact", "near", "excluded")} == {
        "examples": 68,
        "exact": 24,
        "near": 24,
        "excluded": True,
    }
    assert not any("copy" in one["name"] for one in written["samples"] + written["mistakes"])
    assert sum(map(sum, written["confusion"])) == 20
    card = json.loads((leaky_run / "made" / "model" / "model.json").read_text())
    assert card["scores"]["test"] == written["scores"]


def test_the_run_lists_every_leak(leaky_run: Path) -> None:
    with (leaky_run / "made" / "leaks.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 48
    for row in rows:
        name = Path(row["example"])
        assert (row["split"], row["copy_split"]) == ("test", "train")
        assert Path(row["copy"]).stem == name.stem.removeprefix("copy")
        assert Path(row["copy"]).parent.name == name.parent.name
        assert row["kind"] == ("exact" if name.suffix == ".png" else "near")
    check = json.loads((leaky_run / "made" / "check.json").read_text())
    assert check["leakage"]["test"] == {"examples": 68, "exact": 24, "near": 24, "only_validation": 0}
    assert len(check["leaks"]) == 48


def test_report_and_card_say_it_and_claim_nothing_else(leaky_run: Path) -> None:
    for name in ("report.html", "README.md"):
        text = (leaky_run / "made" / name).read_text()
        assert "20 test examples that took no part in training" in text
        assert "68 test examples that took no part" not in text
        assert "48 of 68 test examples (70.6 %, 24 of them near-duplicates) are also training examples" in text
        assert "on 68 examples" in text


def test_the_terminal_says_it(leaky_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(leaky_run, tmp_path, dirs_exist_ok=True)
    options = {"cache_dir": tmp_path / "cache", "augmented_views": False}
    own = suanli.evaluate(tmp_path / "made", **options)
    assert "data leakage: 48 of 68 test examples" in capsys.readouterr().err
    lines = table(own).splitlines()
    assert lines[0] == "test, 20 examples that are not in training"
    assert lines[-1].startswith("  all 68 examples: accuracy ")
    assert lines[-1].endswith("too high, since 48 are training examples")


def test_other_data_is_compared_with_what_the_run_was_trained_on(
    leaky_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(leaky_run / "made", tmp_path / "made")
    shutil.copytree(leaky_run / "data" / "train", tmp_path / "more")
    for i in range(12):
        photo(5000 + i).save(tmp_path / "more" / f"class{i % 2}" / f"new{i}.png")
    other = suanli.evaluate(tmp_path / "made", data=tmp_path / "more", augmented_views=False)
    assert other.count == 12
    assert other.leakage is not None
    assert (other.leakage["examples"], other.leakage["exact"]) == (60, 48)
    listed = [line for line in capsys.readouterr().err.splitlines() if "leaks-" in line]
    assert len(Path(listed[0].rpartition(": ")[2]).read_text().splitlines()) == 49
    for i in range(12):
        (tmp_path / "more" / f"class{i % 2}" / f"new{i}.png").unlink()
    known = suanli.evaluate(tmp_path / "made", data=tmp_path / "more", augmented_views=False)
    assert known.leakage is not None
    assert known.leakage["new"] is None
    assert known.count == 48
    assert "No example is new to the model" in capsys.readouterr().err
    assert "48 of these are training examples: the scores are too high" in table(known)


def test_too_few_new_examples_are_no_headline(tmp_path: Path) -> None:
    root = leaky_folder(tmp_path / "data", new=2)
    run = suanli.run(root, epochs=1, speedups="none", device="cpu", out="run", settings={"preprocess.size": 32})
    written = json.loads((run.path / "evaluation" / "test.json").read_text())
    assert (written["count"], written["leakage"]["new"]["count"], written["leakage"]["excluded"]) == (52, 4, False)
    for name in ("report.html", "README.md"):
        text = (run.path / name).read_text()
        assert "took no part" not in text
        assert "Too few other examples remain for a score of their own" in text


def test_a_run_of_an_older_version_is_evaluated_without(leaky_run: Path, tmp_path: Path) -> None:
    shutil.copytree(leaky_run / "made", tmp_path / "made")
    (tmp_path / "made" / "examples.npz").unlink()
    other = suanli.evaluate(tmp_path / "made", data=leaky_run / "data", augmented_views=False)
    assert other.leakage is None
    assert other.count == 68


@pytest.mark.parametrize("grouped", [False, True])
def test_any_task_is_scored_without_what_it_has_seen(grouped: bool) -> None:
    count = 40
    split = Split(
        inputs={},
        index=np.arange(count),
        targets={},
        names=[str(i) for i in range(count)],
        geometries=np.zeros((count, 3, 0)),
        groups=np.arange(count) // 4 if grouped else None,
        leaks=np.array([EXACT, NEAR, 0, 0] * 10, np.uint8),
    )
    target = np.arange(count, dtype=np.float64)
    records = {"target": target, "predicted": target + np.where(split.leaks == 0, 2.0, 0.0)}
    rows, leakage = find_rows(Regression(), split, "test", records)
    assert rows.tolist() == [i for i in range(count) if i % 4 >= 2]
    assert leakage is not None
    assert leakage["new"] is not None
    assert (leakage["whole"]["scores"]["mean_absolute_error"], leakage["new"]["scores"]["mean_absolute_error"]) == (
        1,
        2,
    )
    assert leakage["new"]["intervals"]["mean_absolute_error"] == (2, 2)
    assert (leakage["exact"], leakage["near"]) == (10, 10)


# --- label conflicts -------------------------------------------------------------------------


def test_the_example_of_different_labels_has_different_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{word} number {i},{label}" for i in range(60) for word, label in (("red", "a"), ("blue", "b"))]
    table_file = tmp_path / "texts.csv"
    table_file.write_text("\n".join(["text,label", *["same words,a"] * 5, "same words,b", *lines]) + "\n")
    suanli.prepare(table_file)
    said = capsys.readouterr().err
    assert "1 example with different labels: texts.csv:2 (a) = texts.csv:7 (b)" in said


# --- real data -------------------------------------------------------------------------------


def test_real_reviews(shared_data: Path, tmp_path: Path) -> None:
    """One test text is a training text, and one differs in a full stop only."""
    lines = (shared_data / "sentiment_en" / "train.tsv").read_text().splitlines(keepends=True)
    (tmp_path / "reviews").mkdir()
    (tmp_path / "reviews" / "train.tsv").write_text("".join([lines[0], *lines[26_000:27_000], lines[38_755]]))
    shutil.copy(shared_data / "sentiment_en" / "test.tsv", tmp_path / "reviews")
    leakage = suanli.prepare(tmp_path / "reviews", input_column="sentence").findings["leakage"]
    assert (leakage["test"]["exact"], leakage["test"]["near"]) == (1, 1)
