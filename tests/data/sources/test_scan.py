import os
from pathlib import Path

import pytest
from PIL import Image

from sslcli.data.sources import scan
from sslcli.data.sources.files import Flat, Folder, ListFile


def save(path: Path, color=(200, 30, 60), size=(5, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def class_folders(root: Path, classes=("cat", "dog"), each: int = 3) -> Path:
    for number, name in enumerate(classes):
        for image in range(each):
            save(root / name / f"{image:03}.png", color=(number, image, 0))
    return root


def test_extensions_count_in_any_case_and_hidden_or_other_files_do_not(tmp_path):
    for name in ("a.JPG", "b.jpeg", "c.Png", "d.bmp", "e.webp", "f.tif", "g.tiff", "h.ppm", "i.pgm", "j.gif"):
        (tmp_path / "deep" / "er").mkdir(parents=True, exist_ok=True)
        (tmp_path / "deep" / "er" / name).touch()
    for name in (".hidden.jpg", "notes.txt", "jpg", "a.jpg.part"):
        (tmp_path / name).touch()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    source = Flat(root=str(tmp_path), image_size=8)
    assert [Path(source.path(i)).name[0] for i in range(len(source))] == list("abcdefghij")


def test_links_are_followed_and_loops_end(tmp_path):
    save(tmp_path / "elsewhere" / "b.png")
    save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "self").symlink_to(tmp_path / "set" / "self")
    source = Flat(root=str(tmp_path / "set"), image_size=8)
    assert [source.relative(i) for i in range(len(source))] == ["a.png", "link/b.png"]


@pytest.mark.parametrize("kind", [Folder, Flat])
def test_wrong_root_is_named_with_a_remedy(tmp_path, kind):
    with pytest.raises(ValueError, match=r"dataset\.root is .*nowhere.*No such file.*set dataset\.root"):
        kind(root=str(tmp_path / "nowhere"), image_size=8)
    file = save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png, which is a file"):
        kind(root=str(file), image_size=8)
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no images in .*empty.*\*\.jpg"):
        kind(root=str(tmp_path / "empty"), image_size=8)
    with pytest.raises(ValueError, match="at least one folder"):
        kind(root=[], image_size=8)


def test_images_without_class_folders_point_to_flat(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="1 images but no class folders: use dataset=flat"):
        Folder(root=str(tmp_path), image_size=8)


def test_empty_class_folder_and_loose_images_are_left_out_with_a_warning(tmp_path):
    class_folders(tmp_path)
    (tmp_path / "bird").mkdir()
    with pytest.warns(UserWarning, match="have no images and are skipped: bird"):
        assert Folder(root=str(tmp_path), image_size=8).classes == ["cat", "dog"]
    (tmp_path / "bird").rmdir()
    save(tmp_path / "loose.png")
    with pytest.warns(UserWarning, match="1 images outside of the class folders"):
        assert len(Folder(root=str(tmp_path), image_size=8)) == 6


def test_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    class_folders(tmp_path)
    scandir = os.scandir

    def refuse_dog(folder):
        if str(folder).endswith("dog"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(scan.os, "scandir", refuse_dog)
    with pytest.raises(ValueError, match=r"the folder \S*dog cannot be listed \(Permission denied\)"):
        Folder(root=str(tmp_path), image_size=8)


def write_list(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_list_reads_paths_and_labels_in_row_order(tmp_path):
    for name in ("dog/1", "cat/0", "cat/2", "cat/1"):
        save(tmp_path / f"{name}.png", color=(1, 1, 0))
    rows = "\ufeffby, label ,path\n" + "".join(
        f"x,{row}.png\n" for row in ("dog,dog/1", "cat,cat/0", ",cat/2", "-1,cat/1")
    )
    source = ListFile(file=write_list(tmp_path / "images.csv", rows), image_size=8, val_fraction=0)
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [1, 0, -1, -1]
    assert source.path(0) == str(tmp_path / "dog" / "1.png")
    assert source.read(0).getpixel((0, 0)) == (1, 1, 0)
    assert source.name == "images"


def test_list_takes_its_paths_from_root_or_absolute(tmp_path):
    class_folders(tmp_path / "set")
    (tmp_path / "lists").mkdir()
    file = write_list(tmp_path / "lists" / "a.csv", f"path\ncat/000.png\n{tmp_path}/set/dog/000.png\n")
    source = ListFile(file=file, root=str(tmp_path / "set"), image_size=8)
    assert [source.path(i) for i in (0, 1)] == [str(tmp_path / "set" / c / "000.png") for c in ("cat", "dog")]
    assert not source.has_labels
    assert source.classes == []


def test_numeric_labels_are_in_numeric_order(tmp_path):
    save(tmp_path / "a.png")
    file = write_list(tmp_path / "a.csv", "path,label\na.png,10\na.png,9\na.png,1\n")
    source = ListFile(file=file, image_size=8, val_fraction=0)
    assert source.classes == ["1", "9", "10"]
    assert source.labels.tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na.png,1\n", r"columns file, label, .*`path`"),
        ("", r"columns \(none\)"),
        ("path\n", "no rows"),
        ("path,label\na.png,1\n,2\n", "line 3 has no path"),
        ("path\nmissing.png\n", r"lists 'missing\.png'.*dataset\.root"),
    ],
)
def test_wrong_list_is_refused(tmp_path, text, message):
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=message):
        ListFile(file=write_list(tmp_path / "a.csv", text), image_size=8)


def test_list_that_is_absent_or_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dataset\.file=.*none\.csv cannot be read: No such file"):
        ListFile(file=str(tmp_path / "none.csv"), image_size=8)
    with pytest.raises(ValueError, match="not a CSV file in UTF-8"):
        ListFile(file=str(save(tmp_path / "a.png")), image_size=8)
