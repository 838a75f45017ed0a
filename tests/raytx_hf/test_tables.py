"""Rows from files and from datasets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from raytx.errors import DataError, RecipeError
from raytx.registry import registry
from raytx_hf.tables import held_out, selected

REVIEWS = 'label,review\n1,good\n0,"bad,\nvery bad"\n1,\n,no label\n01,null\n'
COLUMNS = {"text": "review", "label": "label"}


def _source(**fields: Any) -> Any:
    return registry().parse("data", {"type": "files", **fields}).build()


def _csv(path: Path, rows: list[tuple[str, str]]) -> str:
    path.write_text("label,review\n" + "".join(f"{label},{text}\n" for label, text in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def reviews(tmp_path: Path) -> str:
    (tmp_path / "reviews.csv").write_text(REVIEWS, encoding="utf-8")
    return str(tmp_path / "reviews.csv")


def test_a_csv_gives_rows_under_the_tasks_names_with_missing_fields_as_none(reviews: str) -> None:
    assert list(_source(path=reviews, columns=COLUMNS).rows("train")) == [
        {"text": "good", "label": "1"},
        {"text": "bad,\nvery bad", "label": "0"},
        {"text": None, "label": "1"},
        {"text": "no label", "label": None},
        {"text": "null", "label": "01"},
    ]


def test_without_columns_every_column_keeps_its_name(reviews: str) -> None:
    assert next(_source(path=reviews).rows("train")) == {"label": "1", "review": "good"}


def test_one_column_may_serve_twice(reviews: str) -> None:
    row = next(_source(path=reviews, columns={"text": "review", "label": "review"}).rows("train"))
    assert row == {"text": "good", "label": "good"}


def test_a_byte_order_mark_is_no_part_of_the_first_columns_name(tmp_path: Path) -> None:
    (tmp_path / "marked.csv").write_text("review,label\n好,1\n", encoding="utf-8-sig")
    rows = list(_source(path=str(tmp_path / "marked.csv"), columns=COLUMNS).rows("train"))
    assert rows == [{"text": "好", "label": "1"}]


@pytest.mark.parametrize("format_", ["tsv", "json", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(format_: str, tmp_path: Path) -> None:
    records = [{"review": "good", "label": 1}, {"review": "bad", "label": 0}]
    path = tmp_path / f"reviews.{format_}"
    if format_ == "tsv":
        path.write_text("review\tlabel\ngood\t1\nbad\t0\n")
    elif format_ == "json":
        path.write_text(json.dumps(records))
    elif format_ == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        datasets.Dataset.from_list(records).to_parquet(path)
    rows = list(_source(path=str(path), columns=COLUMNS).rows("train"))
    assert [(row["text"], str(row["label"])) for row in rows] == [("good", "1"), ("bad", "0")]


def test_several_files_follow_each_other(tmp_path: Path) -> None:
    paths = [_csv(tmp_path / f"{name}.csv", [("1", name)]) for name in ("b", "a")]
    assert [row["text"] for row in _source(path=paths, columns=COLUMNS).rows("train")] == ["b", "a"]


def test_a_missing_column_is_refused_with_the_files_columns_and_the_nearest(reviews: str) -> None:
    source = _source(path=reviews, columns={"text": "reviews", "label": "label"})
    with pytest.raises(DataError, match=r"no column 'reviews'. Did you mean 'review'\? Columns: label, review"):
        list(source.rows("train"))


@pytest.mark.parametrize("options", [{"filter": {"labell": 1}}, {"split": {"test": 0.5, "stratify": "labell"}}])
def test_a_missing_column_in_an_option_is_refused_too(options: dict[str, Any], reviews: str) -> None:
    with pytest.raises(DataError, match=r"no column 'labell'. Did you mean 'label'"):
        list(_source(path=reviews, **options).rows("train"))


def test_a_filter_keeps_rows_by_value_or_values(reviews: str) -> None:
    one = _source(path=reviews, columns=COLUMNS, filter={"label": 1})
    several = _source(path=reviews, columns=COLUMNS, filter={"label": ["0", "01"]})
    assert [row["text"] for row in one.rows("train")] == ["good", None]
    assert [row["text"] for row in several.rows("train")] == ["bad,\nvery bad", "null"]


def test_a_filter_for_null_keeps_rows_without_a_value(reviews: str) -> None:
    source = _source(path=reviews, columns=COLUMNS, filter={"label": None})
    assert [row["text"] for row in source.rows("train")] == ["no label"]


def test_a_slice_keeps_rows_in_order(reviews: str) -> None:
    assert [row["label"] for row in _source(path=reviews, select="1:3").rows("train")] == ["0", "1"]


def test_a_number_of_rows_is_drawn_from_all_of_them() -> None:
    drawn = selected(1000, 100)
    assert drawn == sorted(set(drawn)) == selected(1000, 100)
    assert len(drawn) == 100
    assert 30 < sum(index < 500 for index in drawn) < 70
    assert selected(3, 100) == [0, 1, 2]


def test_a_split_covers_every_row_once_and_depends_on_the_seed(tmp_path: Path) -> None:
    path = _csv(tmp_path / "many.csv", [("1", f"t{i}") for i in range(50)])
    splits = []
    for seed in (0, 0, 1):
        source = _source(path=path, columns=COLUMNS, split={"test": 0.2, "seed": seed})
        train, test = ([row["text"] for row in source.rows(name)] for name in ("train", "test"))
        assert len(test) == 10
        assert sorted(train + test) == sorted(f"t{i}" for i in range(50))
        splits.append(test)
    assert splits[0] == splits[1] != splits[2]


def test_a_stratified_split_keeps_each_labels_share_and_takes_rows_without_one() -> None:
    groups = ["a"] * 70 + ["b"] * 20 + [None] * 10
    inside, outside = held_out(groups, share=0.1, seed=0)
    assert Counter(groups[i] for i in outside) == {"a": 7, "b": 2, None: 1}
    assert sorted(inside + outside) == list(range(100))
    assert inside == sorted(inside)
    assert held_out(groups, share=0.1, seed=0) == (inside, outside)


def test_shares_that_are_no_whole_rows_still_add_up() -> None:
    groups = ["a"] * 33 + ["b"] * 33 + ["c"] * 34
    _, outside = held_out(groups, share=0.25, seed=0)
    counts = Counter(groups[i] for i in outside)
    assert sum(counts.values()) == 25
    assert all(8 <= count <= 9 for count in counts.values())


def test_stratify_true_goes_by_the_column_mapped_to_label(tmp_path: Path) -> None:
    rows = [("1", f"p{i}") for i in range(40)] + [("0", f"n{i}") for i in range(10)]
    path = _csv(tmp_path / "uneven.csv", rows)
    columns = {"text": "review", "label": "label"}
    test = list(_source(path=path, columns=columns, split={"test": 0.2, "stratify": True}).rows("test"))
    assert Counter(row["label"] for row in test) == {"1": 8, "0": 2}


def test_a_split_that_leaves_nothing_is_refused(reviews: str) -> None:
    with pytest.raises(DataError, match="leaves one split empty"):
        list(_source(path=reviews, split={"test": 0.01}).rows("train"))


def test_files_of_their_own_can_be_the_test_split(tmp_path: Path) -> None:
    train, test = _csv(tmp_path / "a.csv", [("1", "one"), ("0", "two")]), _csv(tmp_path / "b.csv", [("1", "three")])
    source = _source(path=train, test_path=test, columns=COLUMNS, select=1)
    assert len(list(source.rows("train"))) == 1
    assert [row["text"] for row in source.rows("test")] == ["three"]


def test_without_a_split_the_test_split_is_empty(reviews: str) -> None:
    assert list(_source(path=reviews).rows("test")) == []


def test_the_fingerprint_follows_content_and_options_but_not_time(reviews: str) -> None:
    first = _source(path=reviews).fingerprint()
    Path(reviews).write_text(REVIEWS)
    assert _source(path=reviews).fingerprint() == first
    assert _source(path=reviews, select=2).fingerprint() != first
    Path(reviews).write_text(REVIEWS + "1,more\n")
    assert _source(path=reviews).fingerprint() != first


def test_changed_content_is_read_anew(reviews: str) -> None:
    list(_source(path=reviews).rows("train"))
    Path(reviews).write_text("label,review\n1,new\n")
    assert [row["review"] for row in _source(path=reviews).rows("train")] == ["new"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"a,b\n1,2,3\n1,2\n", "first row has 3 fields, the header 2"),
        (b"a,b\n1,2\n5,6,7\n", "not readable as csv"),
        (b"a,a\n1,2\n", "two columns have one name"),
        (b"a,b\n\xff\xfe,1\n", "UTF-8|utf-8"),
    ],
)
def test_a_broken_csv_is_an_error_that_names_it(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.csv").write_bytes(content)
    with pytest.raises(DataError, match=rf"data\.path=.*broken\.csv: .*({message})"):
        list(_source(path=str(tmp_path / "broken.csv")).rows("train"))


def test_a_broken_json_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"a": 1}\n{"a":\n')
    with pytest.raises(DataError, match=r"broken\.jsonl: not readable as json"):
        list(_source(path=str(tmp_path / "broken.jsonl")).rows("train"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "reviews.txt"}, "does not tell the format"),
        ({"path": "a.csv", "split": {}, "test_path": "b.csv"}, "not both"),
        ({"path": "a.csv", "select": "first ten"}, "slice such as"),
        ({"path": "a.csv", "select": 0}, "greater than 0"),
    ],
)
def test_impossible_options_are_refused(fields: dict[str, Any], message: str) -> None:
    from pydantic import ValidationError

    with pytest.raises((ValidationError, RecipeError), match=message):
        _source(**fields)


def test_files_are_named_for_the_plan_to_check() -> None:
    config = registry().parse("data", {"type": "files", "path": ["a.csv", "b.csv"], "test_path": "c.csv"})
    assert list(config.local_files()) == [("path", "a.csv"), ("path", "b.csv"), ("test_path", "c.csv")]


# ---- datasets


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A directory that `load_dataset` reads, with a class label."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    for name, labels in (("train", [1, 0, 1, 1, -1]), ("test", [0, 1])):
        records = {"text": [f"{name}{i}" for i in range(len(labels))], "label": labels}
        (tmp_path / "set").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(records, features=features).to_parquet(tmp_path / "set" / f"{name}.parquet")
    return str(tmp_path / "set")


def _hub(**fields: Any) -> Any:
    return registry().parse("data", {"type": "datasets", **fields}).build()


def test_a_dataset_gives_class_names_and_its_own_test_split(saved: str) -> None:
    source = _hub(name=saved, test_split="test")
    assert list(source.rows("train"))[:2] == [{"text": "train0", "label": "pos"}, {"text": "train1", "label": "neg"}]
    assert [row["label"] for row in source.rows("train")][-1] is None
    assert list(source.rows("test")) == [{"text": "test0", "label": "neg"}, {"text": "test1", "label": "pos"}]


def test_a_dataset_is_filtered_by_class_name(saved: str) -> None:
    assert [row["text"] for row in _hub(name=saved, filter={"label": "neg"}).rows("train")] == ["train1"]


def test_a_datasets_fingerprint_follows_its_content_and_options(saved: str) -> None:
    assert _hub(name=saved).fingerprint() == _hub(name=saved).fingerprint()
    assert _hub(name=saved).fingerprint() != _hub(name=saved, select=2).fingerprint()


@pytest.mark.parametrize("fields", [{"name": "nobody/nothing"}, {"train_split": "trian"}])
def test_a_dataset_that_cannot_be_had_is_an_error_that_names_it(fields: dict[str, Any], saved: str) -> None:
    source = _hub(**({"name": saved} | fields))
    with pytest.raises(DataError, match=r"data\.name="):
        list(source.rows("train"))
