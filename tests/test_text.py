import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from suanli.core.errors import BadInput, DataError, UsageError
from suanli.core.types import Batch, Traits
from suanli.data.preprocess.text import MAX_FITTED_LENGTH, PREPROCESS, normalise, tokenize
from suanli.models.networks.text_cnn import build
from suanli.training.augments.word_dropout import WordDropout
from suanli.training.recipes.text import RECIPE
from suanli.training.recipes.text_small import RECIPE as SMALL

TEXTS = ["A fine film .", "a fine , fine story", "not a good film !", "a dull story"]
DATA = Path(__file__).parents[1].parent / "shared" / "data"


def fit(texts=TEXTS, **settings):
    return PREPROCESS.fit(lambda: iter(texts), settings)


def split(raw, **options) -> list[str]:
    return list(tokenize(normalise(raw), **options))


# --- tokens ---


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("I don't like it's “cheap” end!", ["i", "do", "n't", "like", "it", "'s", '"', "cheap", '"', "end", "!"]),
        ("they’ve CAN'T", ["they", "'ve", "ca", "n't"]),
        ("do n't it 's", ["do", "n't", "it", "'s"]),  # already tokenised
        ("早餐太差，无论WiFi", ["早", "餐", "太", "差", ",", "无", "论", "wifi"]),
        ("カタカナ ひらがな", list("カタカナひらがな")),
        ("한국어 영화", ["한국어", "영화"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("ﬁlm Ｆｕｌｌ", ["film", "full"]),
        ("cafe\u0301", ["caf\u00e9"]),
        ("a\x00b\u200bc\ufeff", ["a", "b", "c"]),
        ("😀👍", ["😀", "👍"]),
        ("", []),
        (" \t\r\n\u3000\x00", []),
    ],
)
def test_tokens_of_many_scripts(raw, expected):
    assert split(raw) == expected


def test_case_is_kept_on_request():
    assert split("Not NOT", lowercase=False) == ["Not", "NOT"]


def test_a_byte_order_mark_is_no_part_of_the_text():
    assert normalise("\ufeffgood".encode()) == "good"


@given(st.text())
def test_any_text_has_tokens_that_fit_into_json_and_lose_no_letter(raw):
    tokens = split(raw, lowercase=False)
    json.dumps(tokens, ensure_ascii=False).encode()
    assert all(tokens)
    assert not any(any(c.isspace() for c in token) for token in tokens)
    letters = [c for c in normalise(raw) if c.isalnum()]
    assert [c for c in "".join(tokens) if c.isalnum()] == letters


@given(st.text(), st.sampled_from([" ", "\n", "\t ", "\u3000"]))
def test_white_space_around_a_text_changes_nothing(raw, space):
    assert normalise(space + raw + space) == normalise(raw)


# --- fit ---


def test_the_vocabulary_is_ordered_by_count_then_by_token():
    assert fit(min_count=2).vocabulary == ("a", "fine", "film", "story")
    assert fit(min_count=1).vocabulary[4:] == ("!", ",", ".", "dull", "good", "not")
    assert fit(vocabulary_size=4, min_count=1).vocabulary == ("a", "fine")


@given(st.permutations(TEXTS))
def test_the_order_of_the_texts_does_not_matter(texts):
    assert fit(texts) == fit()


def test_the_length_holds_nearly_all_texts_whole_and_is_capped():
    short, long = ["a b c"] * 999, ["w " * 3000]
    assert fit(short + long).length == 3
    assert fit(long).length == MAX_FITTED_LENGTH
    assert fit(short, length=7).length == 7


def test_bad_inputs_among_the_training_texts_are_skipped():
    assert fit([b"\xff\xfe", "", *TEXTS, np.zeros(3)]) == fit()


def test_no_text_at_all_is_bad_data():
    for texts in ([], ["", " "], [b"\xff"]):
        with pytest.raises(DataError, match="column"):
            fit(texts)


@pytest.mark.parametrize(
    "settings",
    [
        {"vocabulary_size": 2},
        {"vocabulary_size": True},
        {"length": 0},
        {"length": 1.5},
        {"length": "long"},
        {"length": 10**9},
        {"min_count": 0},
        {"min_count": None},
        {"lowercase": "yes"},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UsageError, match=next(iter(settings))):
        fit(**settings)


def test_an_unknown_setting_suggests_the_nearest():
    with pytest.raises(UsageError, match="'vocabulary_size'"):
        fit(vocab_size=100)


# --- encode ---


def test_a_row_is_ids_then_padding():
    preprocess = fit(length=6)  # a fine film story
    encoded = preprocess.encode("A strange FINE film")
    assert encoded.arrays["tokens"].tolist() == [2, 1, 3, 4, 0, 0]
    assert (encoded.arrays["tokens"].dtype, encoded.arrays["tokens"].shape) == (
        "int32",
        preprocess.inputs["tokens"].shape,
    )
    assert (encoded.traits, encoded.geometry.size) == ((), (4,))
    assert preprocess.preview(encoded.arrays).content == b"a <unk> fine film"


def test_unusual_texts_have_traits():
    preprocess = fit(length=2)
    assert preprocess.encode("fine film").traits == ()
    assert preprocess.encode("fine film story").traits == ("truncated",)
    assert preprocess.encode("zut").traits == ("no known word",)


def test_the_same_text_has_the_same_digest_however_it_was_stored():
    preprocess = fit()
    digest = preprocess.encode("Fine caf\u00e9").digest
    assert len(digest) == 16
    for same in ("Fine caf\u00e9".encode(), "\ufeffFine  cafe\u0301\r\n".encode(), "Ｆｉｎｅ caf\u00e9"):
        assert preprocess.encode(same).digest == digest
    assert preprocess.encode("Fine cafe").digest != digest
    # Texts that share a row aren't duplicates: words beyond the vocabulary and the length count.
    assert preprocess.encode("zut").digest != preprocess.encode("zat").digest


@pytest.mark.parametrize("raw", [b"\xff\xfea\x00", b"caf\xe9", "", b"", "  \n", "\x00\x00", np.zeros(3, np.uint8)])
def test_what_is_not_text_is_a_bad_input(raw):
    with pytest.raises(BadInput):
        fit().encode(raw)


@pytest.mark.parametrize(
    "text", ["a" * 10**7, "a" + "\u0315\u0300" * 10**6, "n't " * 10**6, "an't" * 10**6, "！" * 10**7, "的" * 10**7]
)
def test_a_text_of_megabytes_costs_no_more_than_a_short_one(text):
    preprocess = fit()
    started = time.perf_counter()
    preprocess.encode(text)
    assert time.perf_counter() - started < 5  # the quadratic ways take hours
    assert len(normalise(text)) < 10**6


@given(st.text() | st.binary())
def test_any_input_is_encoded_or_refused(raw):
    preprocess = fit(length=5)
    try:
        row = preprocess.encode(raw).arrays["tokens"]
    except BadInput:
        return
    assert row.shape == (5,)
    assert row[0] > 0
    assert 0 <= row.min() <= row.max() < preprocess.model_args["vocabulary_size"]
    assert (row[: np.count_nonzero(row)] > 0).all()
    preprocess.preview({"tokens": row}).content.decode()


def test_settings_go_through_json_and_back():
    preprocess = fit([*TEXTS, "早餐 早餐 \ud800 \ud800"])
    again = PREPROCESS(**json.loads(json.dumps(preprocess.settings(), ensure_ascii=False).encode()))
    assert again == preprocess
    assert again.encode("fine 早").arrays["tokens"].tolist() == preprocess.encode("fine 早").arrays["tokens"].tolist()


def test_a_preview_of_chinese_has_no_spaces():
    preprocess = fit(["早餐很好 wifi fast"], min_count=1)
    assert preprocess.preview(preprocess.encode("早餐 wifi 很好").arrays).content.decode() == "早餐 wifi 很好"


# --- inputs ---


def read(path) -> list[tuple[str, object]]:
    return [(name, raw()) for name, raw in PREPROCESS.find_inputs(path)]


def test_each_line_of_a_text_file_is_one_input(tmp_path):
    path = tmp_path / "reviews.txt"
    path.write_bytes("good\r\n\n  \n好\nlast".encode())
    assert read(path) == [
        ("reviews.txt:1", b"good"),
        ("reviews.txt:4", "好".encode()),
        ("reviews.txt:5", b"last"),
    ]


def test_each_text_file_of_a_folder_is_one_input(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("two\nlines")
    (tmp_path / "deep" / "a.txt").write_text("one")
    (tmp_path / "notes.md").write_text("no")
    assert read(tmp_path) == [("b.txt", b"two\nlines"), ("deep/a.txt", b"one")]


def test_standard_input_is_read_line_by_line(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\n\ntwo\n")))
    assert read(Path("-")) == [("stdin:1", b"one"), ("stdin:3", b"two")]


def test_paths_without_texts_are_refused_with_a_fix(tmp_path):
    (tmp_path / "data.tsv").write_text("label\ttext\n0\tbad\n")
    with pytest.raises(UsageError, match="one text a line"):
        PREPROCESS.find_inputs(tmp_path / "data.tsv")
    with pytest.raises(DataError, match="exist"):
        PREPROCESS.find_inputs(tmp_path / "none.txt")
    with pytest.raises(DataError, match=r"No \.txt files"):
        PREPROCESS.find_inputs(tmp_path)


# --- model, augmentation, recipe ---


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 5])
def test_padding_does_not_change_the_answer(kernel_size):
    model = build(classes=3, vocabulary_size=50, length=9, kernel_size=kernel_size).eval()
    with torch.no_grad():
        model.embedding.weight[0] = 7.0  # whatever weights it is given
    ids = torch.randint(1, 50, (4, 9))
    longer = torch.nn.functional.pad(ids, (0, 20))
    torch.testing.assert_close(model(longer), model(ids))


def test_a_text_of_padding_only_has_a_finite_answer():
    model = build(classes=2, vocabulary_size=10, length=4)
    assert torch.isfinite(model(torch.zeros(3, 4, dtype=torch.int64))).all()


def test_the_model_sees_the_order_of_words():
    model = build(classes=2, vocabulary_size=10, length=4).eval()
    a, b = torch.tensor([[2, 3, 4, 5]]), torch.tensor([[5, 4, 3, 2]])
    assert not torch.allclose(model(a), model(b))


def test_impossible_sizes_are_refused():
    with pytest.raises(UsageError):
        build(classes=2, vocabulary_size=10, length=4, kernel_size=0)


def batch(ids: torch.Tensor) -> Batch:
    count = len(ids)
    return Batch(
        inputs={"tokens": ids},
        targets={"class": torch.zeros(count, dtype=torch.int64)},
        index=torch.arange(count),
        epoch=0,
        classes=2,
    )


def test_word_dropout_replaces_its_share_of_tokens_and_no_padding():
    ids = torch.randint(2, 100, (200, 100))
    ids[:, 60:] = 0
    before = ids.clone()
    dropped = WordDropout(p=0.25)(batch(ids), torch.Generator().manual_seed(0)).inputs["tokens"]
    assert torch.equal(ids, before)
    assert dropped.dtype == torch.int64
    assert not dropped[:, 60:].any()
    changed = dropped != ids
    assert (dropped[changed] == 1).all()
    assert changed[:, :60].float().mean().item() == pytest.approx(0.25, abs=0.02)
    again = WordDropout(p=0.25)(batch(ids), torch.Generator().manual_seed(0)).inputs["tokens"]
    assert torch.equal(dropped, again)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_an_impossible_share_is_refused(p):
    with pytest.raises(UsageError):
        WordDropout(p=p)


def traits(kind: str, examples: int = 50_000) -> Traits:
    return Traits(
        kind=kind, annotation="class", input_shape=(), examples=examples, classes=2, weights=False, model=None
    )


def test_the_recipe_is_for_text_only():
    assert RECIPE.suits(traits("text")) is not None
    assert RECIPE.suits(traits("image")) is None
    assert SMALL.suits(traits("image", 100)) is None


def test_few_texts_are_learned_from_in_more_passes():
    few, many = traits("text", 5_000), traits("text", 50_000)
    assert SMALL.suits(few) > RECIPE.suits(few)
    assert SMALL.suits(many) is None
    assert SMALL.recipe.epochs > RECIPE.recipe.epochs


def test_it_learns_what_words_alone_do_not_tell():
    """ "good" after "not" is bad: a mean of words can't tell the two orders apart."""
    good = ["it is good and not bad", "not bad but good", "so good and not bad at all"]
    bad = ["it is bad and not good", "not good but bad", "so bad and not good at all"]
    preprocess = fit(good + bad, min_count=1)
    rows = torch.from_numpy(np.stack([preprocess.encode(text).arrays["tokens"] for text in good + bad]))
    targets = torch.tensor([1, 1, 1, 0, 0, 0])
    torch.manual_seed(0)
    model = build(classes=2, **preprocess.model_args, dropout=0.0, embedding_dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(preprocess.to_model({"tokens": rows})["tokens"]), targets).backward()
        optimizer.step()
    assert (model(preprocess.to_model({"tokens": rows})["tokens"]).argmax(1) == targets).all()


def test_english_sentences_of_films_are_mostly_known_words():
    path = DATA / "sentiment_en" / "train.tsv"
    if not path.exists():
        pytest.skip(f"needs the real sentences of {path.parent}")
    texts = [line.split("\t")[1] for line in path.read_text(encoding="utf-8").splitlines()[1:5001]]
    preprocess = fit(texts)
    rows = np.stack([preprocess.encode(text).arrays["tokens"] for text in texts])
    assert (rows == 1).sum() < 0.15 * (rows > 0).sum()
    assert 20 <= preprocess.length <= 60
