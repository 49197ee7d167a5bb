import os
import pickle
from pathlib import Path

import pytest
from PIL import Image

from sslcli.data.sources import files
from sslcli.data.sources.files import Flat, Folder, ImageNet


def save(path: Path, color=(200, 30, 60), size=(5, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def class_folders(root: Path, classes=("cat", "dog"), each: int = 3) -> Path:
    for number, name in enumerate(classes):
        for image in range(each):
            save(root / name / f"{image:03}.png", color=(number, image, 0))
    return root


def test_class_folders_give_labels_by_sorted_name(tmp_path):
    source = Folder(root=str(class_folders(tmp_path / "set")), image_size=8, val_fraction=0.34)
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [source.relative(i) for i in range(6)] == [f"{c}/{i:03}.png" for c in ("cat", "dog") for i in range(3)]
    assert source.path(5) == str(tmp_path / "set" / "dog" / "002.png")
    assert source.read(5).getpixel((0, 0)) == (1, 2, 0)
    assert (len(source.splits["train"]), len(source.splits["val"])) == (4, 2)
    assert source.images is None
    assert source.weights is None
    assert source.name == "set"


def test_names_that_are_not_utf8_are_read(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff\xe4.png"
    Path(os.fsdecode(name)).write_bytes(save(tmp_path / "a.png").read_bytes())
    source = Flat(root=str(tmp_path), image_size=8)
    assert os.fsencode(source.path(1)) == name
    assert source.read(1).size == (5, 4)


def test_flat_has_no_labels_and_holds_nothing_out(tmp_path):
    class_folders(tmp_path)
    source = Flat(root=str(tmp_path), image_size=8, val_fraction=0.5)
    assert source.labels.tolist() == [-1] * 6
    assert not source.has_labels
    assert source.classes == []
    assert len(source.splits["val"]) == 0
    assert source.splits["train"].tolist() == list(range(6))


def test_split_survives_a_move_and_moves_few_for_a_new_file(tmp_path):
    root = class_folders(tmp_path / "one", each=100)

    def held_out(folder):
        source = Folder(root=str(folder), image_size=8)
        return {source.relative(i) for i in source.splits["val"].tolist()}

    before = held_out(root)
    save(root / "ant" / "000.png")
    assert len(before ^ held_out(root)) <= 2
    (root / "ant" / "000.png").unlink()
    root.rename(tmp_path / "two")
    with pytest.warns(UserWarning, match="ant"):
        assert held_out(tmp_path / "two") == before


def test_several_roots_merge_their_classes(tmp_path):
    roots = [class_folders(tmp_path / "one"), class_folders(tmp_path / "two", classes=("dog", "emu"), each=1)]
    source = Folder(root=[str(root) for root in roots], image_size=8)
    assert source.classes == ["cat", "dog", "emu"]
    found = {source.path(i): int(label) for i, label in enumerate(source.labels)}
    assert found[str(roots[1] / "dog" / "000.png")] == found[str(roots[0] / "dog" / "000.png")] == 1
    assert len(found) == 8
    assert source.weights is None


def test_weights_belong_to_the_training_images_of_their_root(tmp_path):
    for name in ("one", "two"):
        class_folders(tmp_path / name, each=20)
    for kind in (Folder, Flat):
        source = kind(root={str(tmp_path / "one"): 2.0, str(tmp_path / "two"): 0.5}, image_size=8, limit=30)
        train = source.splits["train"].tolist()
        expected = [2.0 if Path(source.path(i)).is_relative_to(tmp_path / "one") else 0.5 for i in train]
        assert source.weights.tolist() == expected
        assert set(expected) == {2.0, 0.5}


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf"), "much", None, True])
def test_bad_weight_is_refused(tmp_path, weight):
    class_folders(tmp_path)
    with pytest.raises(ValueError, match=r"dataset\.root has the weight .*above 0"):
        Folder(root={str(tmp_path): weight}, image_size=8)


def test_root_named_twice_is_refused(tmp_path):
    class_folders(tmp_path / "set")
    with pytest.raises(ValueError, match="twice"):
        Flat(root=[str(tmp_path / "set"), str(tmp_path / "set" / ".." / "set")], image_size=8)


def test_official_test_folder_shares_the_classes(tmp_path):
    class_folders(tmp_path / "train", classes=("cat", "dog", "emu"))
    class_folders(tmp_path / "test", classes=("cat", "emu"), each=2)
    source = Folder(root=str(tmp_path / "train"), test=str(tmp_path / "test"), image_size=8, limit=2)
    assert source.labels[source.splits["test"]].tolist() == [0, 0, 2, 2]
    assert source.path(int(source.splits["test"][0])) == str(tmp_path / "test" / "cat" / "000.png")
    assert int(source.splits["train"].max()) < 9
    class_folders(tmp_path / "test", classes=("fox",))
    with pytest.raises(ValueError, match="'fox'"):
        Folder(root=str(tmp_path / "train"), test=str(tmp_path / "test"), image_size=8)


def test_imagenet_is_train_and_val_with_val_as_test(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*train: dataset\.root must contain train/ and val/"):
        ImageNet(root=str(tmp_path), image_size=8)
    class_folders(tmp_path / "train")
    class_folders(tmp_path / "val", each=1)
    source = ImageNet(root=str(tmp_path), image_size=8)
    assert source.splits["test"].tolist() == [6, 7]
    assert source.labels[6:].tolist() == [0, 1]
    assert source.name == "imagenet"


def test_splits_taken_for_classes_are_refused(tmp_path):
    class_folders(tmp_path / "train")
    class_folders(tmp_path / "test")
    with pytest.raises(ValueError, match=r"are names of splits: set dataset\.root=\S*/train"):
        Folder(root=str(tmp_path), image_size=8)


def test_scanning_asks_no_file_for_its_size(tmp_path, monkeypatch):
    class_folders(tmp_path)
    asked = []
    stat = os.stat
    monkeypatch.setattr(files.os, "stat", lambda path, **k: (asked.append(str(path)), stat(path, **k))[1])
    source = Folder(root=str(tmp_path), image_size=8)
    assert not [path for path in asked if path.endswith(".png")]
    assert source.fingerprint
    assert len([path for path in asked if path.endswith(".png")]) == 6


def test_file_fingerprint_follows_names_sizes_and_labels_only(tmp_path):
    def fingerprint(name, **keywords):
        return Folder(root=str(tmp_path / name), image_size=8, **keywords).fingerprint

    class_folders(tmp_path / "one")
    first = fingerprint("one")
    assert len(first) == 16
    (tmp_path / "one").rename(tmp_path / "two")
    assert fingerprint("two", limit=2, seed=3, val_fraction=0.0) == first
    (tmp_path / "two" / "cat").rename(tmp_path / "two" / "cow")
    renamed = fingerprint("two")
    assert renamed != first
    with open(tmp_path / "two" / "dog" / "000.png", "ab") as file:
        file.write(b"x")
    assert fingerprint("two") not in (first, renamed)
    assert Flat(root=str(tmp_path / "two"), image_size=8).fingerprint != fingerprint("two")


def test_set_survives_pickling_for_workers(tmp_path):
    source = pickle.loads(pickle.dumps(Folder(root=str(class_folders(tmp_path)), image_size=8)))
    assert source.path(5) == str(tmp_path / "dog" / "002.png")
    assert source.read(5).size == (5, 4)
