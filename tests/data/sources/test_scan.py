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


def names(source: Flat | Folder) -> list[str]:
    return [source.relative(i) for i in range(len(source))]


def test_extensions_count_in_any_case_and_hidden_or_other_files_do_not(tmp_path):
    listed = ("a.JPG", "b.jpeg", "c.Png", "d.bmp", "e.webp", "f.tif", "g.tiff", "h.ppm", "i.pgm", "j.gif", "k.jfif")
    for name in (*listed, "l.jpe", "m.AVIF", "n.jp2", "o.psd", "p.tga", "q.fits"):
        (tmp_path / "deep" / "er").mkdir(parents=True, exist_ok=True)
        (tmp_path / "deep" / "er" / name).touch()
    for name in (".hidden.jpg", "notes.txt", "more.TXT", "jpg", "a.jpg.part"):
        (tmp_path / name).touch()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    with pytest.warns(UserWarning, match="left out.*: 2 .txt, 1 without an extension, 1 .part$"):
        source = Flat(root=str(tmp_path), image_size=8)
    assert [Path(name).name[0] for name in names(source)] == list("abcdefghijklmnopq")


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000", "DDS", "AVIF"])
def test_content_decides_for_files_without_an_extension(tmp_path, format_name):
    Image.new("RGB", (16, 16), (200, 40, 40)).save(tmp_path / "0001", format_name)
    (tmp_path / "README").write_text("RIFF of a guitar")
    (tmp_path / "Makefile").touch()
    with pytest.warns(UserWarning, match="2 without an extension"):
        source = Flat(root=str(tmp_path), image_size=8)
    assert names(source) == ["0001"]
    assert source.read(0).size == (16, 16)


def test_a_fifo_without_an_extension_is_left_out_without_waiting(tmp_path):
    save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "broken").symlink_to("nowhere")
    with pytest.warns(UserWarning, match="2 without an extension"):
        assert names(Flat(root=str(tmp_path), image_size=8)) == ["a.png"]


@pytest.mark.parametrize("extensions", [["png"], [".PNG"], ("png", "xyz")])
def test_the_extensions_of_the_configuration_replace_those_of_images(tmp_path, extensions):
    class_folders(tmp_path / "set")
    save(tmp_path / "set" / "cat" / "x.jpg")
    (tmp_path / "set" / "cat" / "000.png").rename(tmp_path / "set" / "cat" / "y")
    for kind in (Flat, Folder):
        with pytest.warns(UserWarning, match="files in .* left out.*: 1 without an extension, 1 .jpg"):
            source = kind(root=str(tmp_path / "set"), extensions=extensions, image_size=8)
        assert len(source) == 5


@pytest.mark.parametrize("extensions", ["png", [], ["a/b"], [""], {"png": 1}, 5])
def test_wrong_extensions_are_named_with_a_remedy(tmp_path, extensions):
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"dataset\.extensions is .*\[jpg, png\]"):
        Flat(root=str(tmp_path), extensions=extensions, image_size=8)


def test_extensions_that_no_file_has_are_named_with_the_files_there(tmp_path):
    save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"no images in .*named \*\.jpg \(any case\).*the files there are: 1 \.png"):
        Flat(root=str(tmp_path), extensions=["jpg"], image_size=8)


def test_names_of_left_out_files_are_printed_escaped(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "a.\x1b[31m").touch()
    with pytest.warns(UserWarning, match=r"files in .* left out.*: 1 \.\\x1b\[31m"):
        Flat(root=str(tmp_path), image_size=8)


def test_links_are_followed_and_loops_end(tmp_path):
    save(tmp_path / "elsewhere" / "b.png")
    save(tmp_path / "set" / "a.png")
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "self").symlink_to(tmp_path / "set" / "self")
    with pytest.warns(UserWarning, match="links in .* that are not followed.*: loop"):
        source = Flat(root=str(tmp_path / "set"), image_size=8)
    assert names(source) == ["a.png", "link/b.png"]


@pytest.mark.parametrize("kind", [Folder, Flat])
def test_folders_that_link_to_each_other_count_their_images_once(tmp_path, kind):
    for folder in "abcdefgh":
        save(tmp_path / folder / "x.png")
        for other in "abcdefgh":
            if other != folder:
                (tmp_path / folder / f"to_{other}").symlink_to(tmp_path / other)
    with pytest.warns(UserWarning, match=r"links in .* not followed.*: a/to_b, a/to_c, a/to_d, \.\.\. \(56 links\)$"):
        source = kind(root=str(tmp_path), image_size=8, val_fraction=0)
    assert names(source) == [f"{folder}/x.png" for folder in "abcdefgh"]


def test_all_links_except_those_to_a_parent_are_followed_on_request(tmp_path):
    """This is the list of version 0.2."""
    for folder in "abc":
        save(tmp_path / "set" / folder / "x.png")
    (tmp_path / "set" / "a" / "to_b").symlink_to(tmp_path / "set" / "b")
    (tmp_path / "set" / "b" / "to_a").symlink_to(tmp_path / "set" / "a")
    (tmp_path / "set" / "c" / "root").symlink_to(tmp_path / "set")
    options = {"root": str(tmp_path / "set"), "linked_folders": "always", "image_size": 8, "val_fraction": 0}
    with pytest.warns(UserWarning, match="links in .* not followed.*: a/to_b/to_a, "):
        source = Folder(**options)
    inside = ["a/to_b/x.png", "a/x.png", "b/to_a/x.png", "b/x.png"]
    assert names(source) == [*inside, *(f"c/root/{name}" for name in inside), "c/x.png"]
    assert source.classes == ["a", "b", "c"]
    with pytest.warns(UserWarning, match=r"links in .* not followed.*: .*c/root"):
        assert names(Flat(**options)) == [*inside, "c/x.png"]
    with pytest.raises(ValueError, match=r"dataset\.linked_folders is 'twice', but it must be once or always"):
        Flat(root=str(tmp_path / "set"), linked_folders="twice", image_size=8)


def test_outside_folders_that_link_to_each_other_count_once_per_class(tmp_path):
    for folder, other in ("pq", "qp"):
        save(tmp_path / "pool" / folder / "x.png")
        (tmp_path / "pool" / folder / "other").symlink_to(tmp_path / "pool" / other)
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for folder in "pq":
            (tmp_path / "set" / name / folder).symlink_to(tmp_path / "pool" / folder)
    with pytest.warns(UserWarning, match="links in .* not followed"):
        source = Folder(root=str(tmp_path / "set"), image_size=8, val_fraction=0)
    assert names(source) == [f"{name}/p/{file}" for name in ("cat", "dog") for file in ("other/x.png", "x.png")]
    with pytest.warns(UserWarning, match="links in .* not followed"):
        assert names(Flat(root=str(tmp_path / "set"), image_size=8)) == ["cat/p/other/x.png", "cat/p/x.png"]


def test_a_class_folder_that_is_a_link_is_a_class_unless_its_images_are_listed_already(tmp_path):
    class_folders(tmp_path / "set")
    class_folders(tmp_path / "set" / ".hidden", classes=["bird"])
    class_folders(tmp_path / "pool", classes=["fox"])
    (tmp_path / "set" / "bird").symlink_to(".hidden/bird")
    (tmp_path / "set" / "fox").symlink_to(tmp_path / "pool" / "fox")
    (tmp_path / "set" / "hound").symlink_to("dog")
    with pytest.warns(UserWarning, match="links in .* that are not followed.*: hound"):
        source = Folder(root=str(tmp_path / "set"), image_size=8)
    assert source.classes == ["bird", "cat", "dog", "fox"]


def test_a_link_to_a_parent_does_not_list_the_root_again(tmp_path):
    class_folders(tmp_path / "set")
    save(tmp_path / "x.png")
    (tmp_path / "set" / "up").symlink_to(tmp_path)
    with pytest.warns(UserWarning, match="links in .* that are not followed.*: up/set"):
        source = Folder(root=str(tmp_path / "set"), image_size=8)
    assert [name for name in names(source) if name.startswith("up")] == ["up/x.png"]
    with pytest.warns(UserWarning, match="links in .* that are not followed.*: up/set"):
        assert len(Flat(root=str(tmp_path / "set"), image_size=8)) == 7


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
