"""`load_data` and `load_labelled` on real folders, tables and saved data sets, and every error with the class and the remedy in it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from veneer.errors import ConfigError, DataError
from veneer.vision.data import ImageData, Split, load_data, load_labelled

PARTS = ("train", "val", "test")
serial = iter(range(10**9))


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def picture(path: Path, seed: int | None = None) -> Path:
    """A picture with content of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(next(serial) if seed is None else seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def tree(root: Path, **counts: int) -> Path:
    for name, count in counts.items():
        for i in range(count):
            picture(root / name.replace("__", "/") / f"{i}.png")
    return root


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def sources(split: Split | None) -> list[str]:
    return [split.source(i) for i in range(len(split))] if split else []


def counts(data: ImageData) -> list[dict[str, int]]:
    return [Counter(data.labels[i] for i in part.labels) for part in (data.train, data.val, data.test) if part]


def refused(source: str | Path, *words: str, load: Callable = load_data, **settings: object) -> str:
    with pytest.raises(DataError) as caught:
        load(source, **settings)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return str(caught.value)


# Folders


def test_class_folders_are_split_once_and_the_same_each_time(tmp_path: Path) -> None:
    tree(tmp_path, dog=10, cat=5)
    data = load_data(tmp_path, seed=3)
    assert data.labels == ["cat", "dog"]
    assert counts(data) == [{"cat": 4, "dog": 8}, {"cat": 1, "dog": 2}]
    assert data.test is None and data.skipped == []
    assert data.origin == "val is a stratified 20 % of the pictures, chosen with seed 3"
    assert all(Path(s).parent.name == data.labels[y] for s, y in zip(sources(data.train), data.train.labels, strict=True))
    again, other = load_data(tmp_path, seed=3), load_data(str(tmp_path), seed=4)
    assert sources(again.train) == sources(data.train) and sources(again.val) == sources(data.val)
    assert sources(other.val) != sources(data.val)
    assert not set(sources(data.train)) & set(sources(data.val))
    assert counts(load_data(tmp_path, val_fraction=0.5))[1] == {"cat": 3, "dog": 5}
    with pytest.raises(ConfigError, match="val_fraction"):
        load_data(tmp_path, val_fraction=1)


@pytest.mark.parametrize("val", ["val", "Validation", "VALID"])
def test_given_parts_are_kept(tmp_path: Path, val: str) -> None:
    tree(tmp_path, train__a=3, train__b=2, Test__a=1, Test__b=1, **{f"{val}__a": 2, f"{val}__b": 1})
    data = load_data(tmp_path)
    assert counts(data) == [{"a": 3, "b": 2}, {"a": 2, "b": 1}, {"a": 1, "b": 1}]
    assert data.origin == "train, val and test as given by the folders"
    assert [part.name for part in (data.train, data.val, data.test) if part] == list(PARTS)


def test_val_comes_out_of_train_where_it_is_missing(tmp_path: Path) -> None:
    tree(tmp_path, train__a=5, train__b=5)
    assert counts(load_data(tmp_path)) == [{"a": 4, "b": 4}, {"a": 1, "b": 1}]
    tree(tmp_path, test__a=2, test__b=2)
    data = load_data(tmp_path)
    assert counts(data) == [{"a": 4, "b": 4}, {"a": 1, "b": 1}, {"a": 2, "b": 2}]
    assert data.origin == "val is a stratified 20 % of train, chosen with seed 0; test as given by the folders"
    assert all("/test/" in s for s in sources(data.test))


def test_classes_may_be_called_train_and_test(tmp_path: Path) -> None:
    tree(tmp_path, train=2, test=2, bus=2)
    assert load_data(tmp_path).labels == ["bus", "test", "train"]


def test_a_test_folder_without_classes_is_no_test(tmp_path: Path) -> None:
    tree(tmp_path, train__a=2, train__b=2, test=2)
    data = load_data(tmp_path)
    assert data.test is None and "test has no pictures in class folders" in data.origin
    assert [item.reason for item in data.skipped] == ["not in a class folder"] * 2


def test_labels_are_in_natural_order_trimmed_and_composed(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "café")
    for name in ("10", "2", " Apple ", "apple", "Zebra", decomposed, "日本"):
        tree(tmp_path, **{name: 2})
    assert load_data(tmp_path).labels == ["2", "10", "Apple", "apple", "café", "Zebra", "日本"]


def test_unreadable_files_are_listed_and_litter_is_not(tmp_path: Path) -> None:
    tree(tmp_path, cat=3, dog=3)
    whole = picture(tmp_path / "dog" / "half.png").read_bytes()
    (tmp_path / "dog" / "half.png").write_bytes(whole[:-40])
    write(tmp_path / "dog" / "text.jpg", "no picture")
    write(tmp_path / "cat" / "notes.txt", "no picture")
    picture(tmp_path / "stray.png")
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "._1.png"):
        write(tmp_path / "cat" / name, "")
    write(tmp_path / ".cache", "")
    tree(tmp_path, **{".git": 1, "__MACOSX": 1})
    data = load_data(tmp_path)
    skipped = {item.source.removeprefix(f"{tmp_path}/"): item.reason for item in data.skipped}
    assert skipped.pop("dog/half.png").startswith("the file is cut short")
    assert skipped == {"stray.png": "not in a class folder", "cat/notes.txt": "not a picture", "dog/text.jpg": "not a picture"}
    assert len(data.train) + len(data.val) == 6


def test_harmless_warnings_of_pillow_do_not_cost_a_picture(tmp_path: Path) -> None:
    tree(tmp_path, cat=2, dog=2)
    Image.new("RGB", (4, 4)).save(tmp_path / "dog" / "odd.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert load_data(tmp_path).skipped == []


def test_linked_folders_are_followed_and_circles_end(tmp_path: Path) -> None:
    tree(tmp_path / "store", felines=3)
    tree(tmp_path / "data", dog=3)
    tree(tmp_path / "data", dog__puppies=2)
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "store" / "felines")
    (tmp_path / "data" / "dog" / "again").symlink_to(tmp_path / "data" / "dog")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    data = load_data(tmp_path / "data")
    assert counts(data) == [{"cat": 2, "dog": 4}, {"cat": 1, "dog": 1}]
    assert [item.reason for item in data.skipped] == ["a link to a folder that contains it"]


def test_one_file_in_two_places(tmp_path: Path) -> None:
    tree(tmp_path, train__a=2, train__b=2, val__a=1, val__b=1)
    link = tmp_path / "train" / "a" / "link.png"
    link.symlink_to(tmp_path / "train" / "a" / "0.png")
    assert "listed twice: the same file as" in load_data(tmp_path).skipped[0].reason
    link.unlink()
    link.symlink_to(tmp_path / "val" / "a" / "0.png")
    refused(tmp_path, "val/a/0.png in train and in val", "Keep one")
    link.unlink()
    link.symlink_to(tmp_path / "train" / "b" / "0.png")
    refused(tmp_path, "train/b/0.png under two classes", '"a" and "b"', "keep one")


def test_copies_stay_on_one_side_or_are_noted(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / "cat" / f"{i}.png", seed=10**9 + i // 2)
    tree(tmp_path, dog=4)
    data = load_data(tmp_path, val_fraction=0.5)
    assert "byte for byte" not in data.origin
    cats = [Path(s) for s in sources(data.val) if "/cat/" in s]
    assert len({path.read_bytes() for path in cats}) == 1 and len(cats) == 2
    tree(tmp_path / "parts", train__a=2, train__b=2, val__a=2, val__b=2)
    (tmp_path / "parts/val/a/0.png").write_bytes((tmp_path / "parts/train/a/1.png").read_bytes())
    assert load_data(tmp_path / "parts").origin.endswith("; 1 of the 4 pictures in val is in train too, byte for byte")


def test_a_class_that_val_lacks_is_noted(tmp_path: Path) -> None:
    tree(tmp_path, train__a=2, train__b=2, val__a=2)
    assert load_data(tmp_path).origin == 'train and val as given by the folders; val has no picture of "b"'


def test_errors_of_folders_name_the_class_and_the_remedy(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "has no class folders and is empty", "cat/1.jpg")
    flat = tree(tmp_path / "flat", **{".": 3})
    refused(flat, "has no class folders, only 3 files", "folder named after its class")
    write(flat / "labels.csv", "path,label")
    refused(flat, f"name {flat / 'labels.csv'}")
    one = tree(tmp_path / "one", cat=3)
    refused(one, 'a single class, "cat"', "takes at least two", "each of the others")
    nested = tree(tmp_path / "nested", pets__cat=2, pets__dog=2)
    refused(nested, 'a single class, "pets"', f"name {nested / 'pets'} instead")
    single = tree(tmp_path / "single", cat=3, dog=1)
    refused(single, 'The class "dog" has a single readable picture', "Add pictures")
    hollow = tree(tmp_path / "hollow", cat=3, dog=3)
    (hollow / "emu").mkdir()
    refused(hollow, 'The class "emu"', "no readable picture", "Add pictures to it, or remove it")
    write(hollow / "emu" / "1.jpg", "no picture")
    refused(hollow, 'The class "emu"')
    unlearnt = tree(tmp_path / "unlearnt", train__a=2, train__b=2, val__a=1, val__c=1, test__c=1)
    refused(unlearnt, 'The class "c"', "in val and test", "none in train", "Add pictures to train")
    broken = tmp_path / "broken"
    for name in ("cat", "dog"):
        (broken / name).mkdir(parents=True)
        write(broken / name / "1.jpg", "no picture")
    refused(broken, "None of the 2 files or rows", "cat/1.jpg: not a picture")
    bare = tmp_path / "bare"
    (bare / "cat").mkdir(parents=True)
    refused(bare, "holds no pictures. Add some")


def test_errors_of_parts(tmp_path: Path) -> None:
    refused(tree(tmp_path / "1", val__a=2, test__a=2), "has no train part, only val and test")
    refused(tree(tmp_path / "2", train__a=2, val__a=2, valid__a=2), 'two folders for val: "val" and "valid"', "Keep one")
    refused(tree(tmp_path / "3", train=2, test=2), "train has no class folders, only 2 files")
    bad = tree(tmp_path / "4", train__a=2, train__b=2)
    (bad / "val" / "a").mkdir(parents=True)
    write(bad / "val" / "a" / "1.jpg", "no picture")
    refused(bad, "The val part", "no readable picture", "leave it out")
    refused(tree(tmp_path / "5", cat=2, dog=2), "image_column and label_column are for tables", label_column="x")


def test_a_mistyped_path_offers_both_readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree(tmp_path, pets__cat=2, pets__dog=2))
    refused(
        "pest/cat",
        "no file or folder pest/cat (pest does not exist)",
        'Did you mean "pets"?',
        'data set "pest/cat"',
        "HF_HUB_OFFLINE is set",
    )
    refused("csv", "There is no file or folder csv.")  # a loader's name, which would read the working directory
    assert "hub" not in refused("./pest/", "no file or folder pest.")
    assert "hub" not in refused(tmp_path / "pest", 'Did you mean "pets"?')
    refused(write(tmp_path / "pets.zip", ""), "neither a folder nor a table", "Unpack")


# Tables


def rows(root: Path, n: int = 3) -> list[str]:
    return [f"{picture(root / 'img' / f'{name}{i}.png').relative_to(root)},{name}" for name in ("cat", "dog") for i in range(n)]


@pytest.mark.parametrize("header", ["path,label", "File_Name,Class", "image,category", "filename,target", "filepath,label"])
def test_csv_columns_are_found_by_name(tmp_path: Path, header: str) -> None:
    data = load_data(write(tmp_path / "a.csv", header, *rows(tmp_path)))
    assert data.labels == ["cat", "dog"] and counts(data) == [{"cat": 2, "dog": 2}, {"cat": 1, "dog": 1}]
    assert all(
        Path(s).is_absolute() and Path(s).name.startswith(data.labels[y])
        for s, y in zip(sources(data.train), data.train.labels, strict=True)
    )


def test_csv_columns_can_be_named(tmp_path: Path) -> None:
    table = write(tmp_path / "a.csv", "photo of,species,label", *(f"{row},x" for row in rows(tmp_path)))
    assert load_data(table, image_column="photo of", label_column="species").labels == ["cat", "dog"]
    refused(table, 'no column "speceis" for the labels', 'Did you mean "species"?', image_column="photo of", label_column="speceis")
    refused(table, "no column that is clearly the pictures", "Its columns are: photo of, species, label", "image_column")
    refused(write(table, "path,label,class", "a,b,c"), "several columns that could hold the labels: label, class", "label_column")


def test_csv_as_spreadsheets_write_it(tmp_path: Path) -> None:
    lines = [row.replace(",", ";").replace("/", "\\") for row in rows(tmp_path)]
    (tmp_path / "a.csv").write_bytes(("\ufeffpath;label\r\n" + "\r\n".join(lines) + "\r\n;;\r\n\r\n").encode())
    assert load_data(tmp_path / "a.csv").labels == ["cat", "dog"]
    quoted = [f'"{picture(tmp_path / f"a, {i}.png").name}",{i % 2:02d}' for i in range(4)]
    assert load_data(write(tmp_path / "b.csv", "path,label", *quoted)).labels == ["00", "01"]


def test_csv_split_column_and_absolute_paths(tmp_path: Path) -> None:
    parts = ["train", "Train", "validation"] * 2
    table = write(
        tmp_path / "a.csv", "path,label,Split", *(f"{tmp_path}/{row},{part}" for row, part in zip(rows(tmp_path), parts, strict=True))
    )
    data = load_data(table)
    assert counts(data) == [{"cat": 2, "dog": 2}, {"cat": 1, "dog": 1}]
    assert data.origin == 'train and val as given by the column "split"'
    refused(write(table, "path,label,split", "a.png,cat,holdout"), "a.csv, line 2", "'holdout'", "train, val or test")
    write(table, "path,label,split", *(f"{row},train" for row in rows(tmp_path)))
    assert load_data(table).origin == "val is a stratified 20 % of train, chosen with seed 0"


def test_csv_rows_that_cannot_be_used_are_listed_by_line(tmp_path: Path) -> None:
    good = rows(tmp_path)
    table = write(tmp_path / "a.csv", "path,label", *good, "img/gone.png,cat", good[0], "img/x.png,", ",cat", "img/y.png")
    reasons = [(item.source.removeprefix(f"{tmp_path}/"), item.reason) for item in load_data(table).skipped]
    assert reasons == [
        ("a.csv, line 10", "no label"),
        ("a.csv, line 11", "no path"),
        ("a.csv, line 12", "no label"),
        ("img/gone.png", "no such file (a.csv, line 8)"),
        ("img/cat0.png", f"listed twice: the same file as {tmp_path}/img/cat0.png"),
    ]
    refused(write(table, "path,label", *good, good[0].replace(",cat", ",dog")), "under two classes", '"cat" and "dog"')
    refused(write(table, "path,label", "x.png,cat", "y.png,dog"), "None of the 2 files or rows", "x.png: no such file (a.csv, line 2)")
    refused(write(table, "path,label"), "holds no pictures")
    table.write_bytes(b"")
    refused(table, "is empty", "path,label")
    table.write_bytes(b"path,label\nb\xe4r.png,b\xe4r\n")
    refused(table, "not UTF-8", "Save it as CSV in UTF-8")


@pytest.mark.parametrize("labels", [[10, 2] * 3, ["10", "2"] * 3, [10.0, 2.0] * 3])
def test_parquet_of_paths(tmp_path: Path, labels: list) -> None:
    paths = [picture(tmp_path / f"{i}.png").name for i in range(6)]
    pq.write_table(pa.table({"file": pa.array(paths).dictionary_encode(), "label": labels}), tmp_path / "a.parquet")
    data = load_data(tmp_path / "a.parquet")
    assert data.labels == ["2", "10"] and len(data.train) == 4
    pq.write_table(pa.table({"file": [*paths, None, "gone.png"], "label": [*labels, labels[0], labels[0]]}), tmp_path / "b.parquet")
    assert [item.reason for item in load_data(tmp_path / "b.parquet").skipped] == ["no path", "no such file (b.parquet, row 7)"]
    refused(tmp_path / "a.parquet", 'no column "fil"', 'Did you mean "file"?', image_column="fil")
    refused(write(tmp_path / "c.parquet", "text"), "Cannot read the table", "whole Parquet file")


def test_parquet_with_the_pictures_inside(tmp_path: Path) -> None:
    blobs = [picture(tmp_path / f"{i}.png").read_bytes() for i in range(6)]
    pq.write_table(pa.table({"photograph": blobs, "label": ["a", "b"] * 3}), tmp_path / "a.parquet")
    data = load_data(tmp_path / "a.parquet")
    assert data.labels == ["a", "b"] and data.train.image(0).size == (6, 6) and data.train.source(0).startswith("row ")
    saved(6).to_parquet(tmp_path / "b.parquet")
    assert load_data(tmp_path / "b.parquet").labels == ["zebra", "ant"]


# Data sets


def saved(n: int, *, names: tuple[str, ...] = ("zebra", "ant"), labels: list[int] | None = None, **columns: list) -> datasets.Dataset:
    pictures = [Image.fromarray(np.random.default_rng(next(serial)).integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in range(n)]
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=list(names))})
    given = labels or [i % len(names) for i in range(n)]
    made = datasets.Dataset.from_dict({"img": pictures, "kind": given}, features=features)
    for name, values in columns.items():
        made = made.add_column(name, values)
    return made


def test_saved_dataset_keeps_its_own_order_of_classes(tmp_path: Path) -> None:
    saved(10).with_format("numpy").save_to_disk(tmp_path / "one")
    data = load_data(tmp_path / "one")
    assert data.labels == ["zebra", "ant"]
    assert counts(data) == [{"zebra": 4, "ant": 4}, {"zebra": 1, "ant": 1}]
    assert data.train.image(0).mode == "RGB" and data.train.source(0).startswith("row ")


def test_saved_dataset_dict_with_parts(tmp_path: Path) -> None:
    made = {"train": saved(6), "validation": saved(2), "test": saved(4), "extra": saved(2)}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "d")
    data = load_data(tmp_path / "d")
    assert counts(data) == [{"zebra": 3, "ant": 3}, {"zebra": 1, "ant": 1}, {"zebra": 2, "ant": 2}]
    assert data.origin == "train, val and test as given by the data set; left out: the splits extra"
    assert data.test is not None and data.test.source(1) == "test row 1"
    for name, part in (("train", data.train), ("validation", data.val), ("test", data.test)):
        for i in range(len(part)):
            assert np.array_equal(np.asarray(part.image(i)), np.asarray(made[name][i]["img"]))
    datasets.DatasetDict({"everything": saved(6)}).save_to_disk(tmp_path / "e")
    assert load_data(tmp_path / "e").origin.startswith("val is a stratified 20 % of the pictures")
    datasets.DatasetDict({"a": saved(6), "b": saved(6)}).save_to_disk(tmp_path / "f")
    refused(tmp_path / "f", "the splits a, b", "Rename")


def test_dataset_pictures_are_upright_and_checked(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = tmp_path / "turned.png"
    Image.new("RGB", (8, 4)).save(turned, exif=exif)
    values = [{"bytes": picture(tmp_path / f"{i}.png").read_bytes(), "path": None} for i in range(4)]
    values += [{"bytes": turned.read_bytes(), "path": None}, {"bytes": b"broken", "path": None}, None]
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("string")})
    labels = ["b", "a", "b", "a", "a", "a", "b"]
    datasets.Dataset.from_dict({"image": values, "label": labels}, features=features).save_to_disk(tmp_path / "d")
    data = load_data(tmp_path / "d")
    assert data.labels == ["a", "b"]
    assert [(item.source, item.reason) for item in data.skipped] == [("row 5", "not a picture"), ("row 6", "no picture in this row")]
    sizes = [part.image(i).size for part in (data.train, data.val) for i in range(len(part))]
    assert sorted(sizes) == [(4, 8), *[(6, 6)] * 4]


def test_dataset_labels_that_are_missing_or_unused(tmp_path: Path) -> None:
    saved(8, names=("a", "b", "c"), labels=[0, 1, -1, 0, 1, 0, 1, 1]).save_to_disk(tmp_path / "d")
    data = load_data(tmp_path / "d")
    assert data.labels == ["a", "b"]
    assert data.origin.endswith("left out: classes without a single picture (c)")
    assert [(item.source, item.reason) for item in data.skipped] == [("row 2", "no label")]
    datasets.DatasetDict({"train": saved(4), "test": saved(3, labels=[-1] * 3)}).save_to_disk(tmp_path / "e")
    refused(tmp_path / "e", "The test part", "leave it out")


def test_dataset_columns(tmp_path: Path) -> None:
    saved(8, label=[1, 2] * 4, split=["train"] * 6 + ["test"] * 2).save_to_disk(tmp_path / "d")
    data = load_data(tmp_path / "d")
    assert data.labels == ["zebra", "ant"] and data.test is not None and sources(data.test) == ["row 6", "row 7"]
    assert load_data(tmp_path / "d", label_column="label").labels == ["1", "2"]
    refused(tmp_path / "d", 'no column "lable"', 'Did you mean "label"?', label_column="lable")
    fine = saved(4).add_column("coarse", [0, 1, 0, 1]).cast_column("coarse", datasets.ClassLabel(names=["x", "y"]))
    fine.save_to_disk(tmp_path / "e")
    refused(tmp_path / "e", "several columns that could hold the labels: kind, coarse", "label_column")
    assert load_data(tmp_path / "e", label_column="coarse").labels == ["x", "y"]
    saved(4, tags=[[1]] * 4).save_to_disk(tmp_path / "f")
    refused(tmp_path / "f", 'the column "tags" holds List', label_column="tags")
    (tmp_path / "d" / "state.json").write_text("{}")
    refused(tmp_path / "d", "looks like a saved data set, but cannot be loaded", "Save it again")


# Splits and evaluation


@pytest.mark.parametrize("kind", ["folder", "dataset"])
def test_a_split_travels_to_worker_processes(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        tree(tmp_path / "d", a=4, b=4)
    else:
        datasets.DatasetDict({"train": saved(400), "test": saved(4)}).save_to_disk(tmp_path / "d")
    split = load_data(tmp_path / "d").train
    packed = pickle.dumps(split)
    copy = pickle.loads(packed)
    assert copy.labels == split.labels and np.array_equal(np.asarray(copy.image(1)), np.asarray(split.image(1)))
    assert len(packed) < 20_000
    taken = split.take([3, 0])
    assert len(taken) == 2 and taken.name == "train"
    assert taken.labels == [split.labels[3], split.labels[0]] and taken.source(0) == split.source(3)
    assert np.array_equal(np.asarray(taken.image(1)), np.asarray(split.image(0)))


def test_load_labelled_uses_the_models_labels_and_the_part_kept_apart(tmp_path: Path) -> None:
    tree(tmp_path, test__b=2)
    split, skipped = load_labelled(tmp_path, ["c", "b"])
    assert (split.labels, split.name, skipped) == ([1, 1], "test", [])
    tree(tmp_path, train__a=2, val__c=1)
    assert load_labelled(tmp_path, ["c", "b"])[0].name == "test"
    flat = tree(tmp_path / "flat", **{unicodedata.normalize("NFD", "café"): 1})
    write(flat / "café.txt", "")
    split, skipped = load_labelled(flat, ["tea", "café"])
    assert (split.labels, split.name, [item.reason for item in skipped]) == ([1], "all", ["not in a class folder"])
    refused(
        tmp_path, 'does not know the class "b"', 'Did you mean "bb"?', "It knows: a, bb", "Rename", load=load_labelled, labels=["a", "bb"]
    )
    datasets.DatasetDict({"validation": saved(2), "extra": saved(2)}).save_to_disk(tmp_path / "d")
    assert load_labelled(tmp_path / "d", ["ant", "zebra"])[0].labels == [1, 0]


SCRIPT = """
import sys
from pathlib import Path
from veneer.vision.checking import check
from veneer.vision.sources import Files
paths = sorted(map(str, Path(sys.argv[1]).glob("*/*.png"))) * 20
assert len(check(Files(paths), range(len(paths)), patience=0.0)) == 120
assert not {"torch", "datasets", "transformers"} & set(sys.modules)
"""


def test_progress_is_shown_on_a_terminal_only(tmp_path: Path) -> None:
    tree(tmp_path, a=3, b=3)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    quiet = subprocess.run(command, capture_output=True, text=True, check=True)
    assert quiet.stdout == quiet.stderr == ""
    terminal, end = os.openpty()
    shown = subprocess.run(
        command, stderr=end, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    )
    os.close(end)
    text = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert shown.stdout == "" and "Checking pictures" in text and "/120" in text
