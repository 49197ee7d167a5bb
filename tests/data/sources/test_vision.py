import pickle

import numpy as np
import pytest
import torch

from sslcli.data.sources.base import TorchvisionSet


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10 in miniature: five batches of 8 images and a test batch of 6, in the official format."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for name, count in [*[(f"data_batch_{i}", 8) for i in range(1, 6)], ("test_batch", 6)]:
        pixels = noise.integers(0, 256, (count, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(count)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    monkeypatch.setattr(CIFAR10, "train_list", [(f"data_batch_{i}", None) for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [("test_batch", None)])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    return tmp_path


@pytest.fixture
def no_network(monkeypatch):
    import urllib.error
    import urllib.request

    def refuse(*_args, **_kwargs):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_cifar_files_become_one_tensor_in_their_order(cifar, no_network):
    source = TorchvisionSet(name="CIFAR10", root=str(cifar), image_size=32)
    assert source.images.shape == (46, 3, 32, 32)
    assert source.images.dtype == torch.uint8
    assert source.images.is_contiguous()
    stored = pickle.loads((cifar / "cifar-10-batches-py" / "data_batch_2").read_bytes())
    assert np.array_equal(source.images[9].numpy().reshape(-1), stored["data"][1])
    assert source.labels[8:16].tolist() == [i % 10 for i in range(8)]
    assert source.splits["test"].tolist() == list(range(40, 46))
    assert len(source.splits["val"]) == 4
    assert source.classes[3] == "class 3"
    assert source.name == "cifar10"
    assert source.path(3) == "cifar10[3]"


def test_memory_fingerprint_follows_pixels_labels_and_not_the_split(cifar):
    first = TorchvisionSet(name="CIFAR10", root=str(cifar), image_size=32).fingerprint
    assert TorchvisionSet(name="CIFAR10", root=str(cifar), image_size=64, limit=3, seed=5).fingerprint == first
    path = cifar / "cifar-10-batches-py" / "test_batch"
    batch = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps({**batch, "labels": batch["labels"][::-1]}))
    assert TorchvisionSet(name="CIFAR10", root=str(cifar), image_size=32).fingerprint != first


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "STL10", "SVHN"])
@pytest.mark.parametrize("download", [True, False])
def test_absent_set_names_folder_files_and_remedy(tmp_path, no_network, name, download):
    if name == "SVHN":
        pytest.importorskip("scipy")
    with pytest.raises(ValueError, match="must contain") as caught:
        TorchvisionSet(name=name, root=str(tmp_path / "data"), download=download, image_size=32)
    text = str(caught.value)
    first = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python", "STL10": "stl10_binary"}
    assert first.get(name, "train_32x32.mat") in text
    assert str(tmp_path / "data") in text
    assert ("Name or service not known" if download else "dataset.download is false") in text
    assert "http" in text
    assert (tmp_path / "data").exists() == download


def test_download_has_a_timeout_and_restores_the_default(tmp_path, monkeypatch):
    import socket
    import urllib.request

    seen = []

    def hang(*_args, **_kwargs):
        seen.append(socket.getdefaulttimeout())
        raise TimeoutError("timed out")

    monkeypatch.setattr(urllib.request, "urlopen", hang)
    with pytest.raises(ValueError, match="timed out"):
        TorchvisionSet(name="CIFAR10", root=str(tmp_path), image_size=32)
    assert seen
    assert all(0 < timeout <= 60 for timeout in seen)
    assert socket.getdefaulttimeout() is None


def test_damaged_file_is_told_from_an_absent_one(cifar):
    (cifar / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"\x80\x04 nonsense")
    with pytest.raises(ValueError, match="damaged"):
        TorchvisionSet(name="CIFAR10", root=str(cifar), image_size=32)


def test_stl10_beyond_the_memory_budget_is_refused_before_it_is_read(tmp_path, no_network):
    with pytest.raises(ValueError, match=r"STL10 takes 3\.1 GB .*memory_gb is 2.*unlabeled=false"):
        TorchvisionSet(name="STL10", root=str(tmp_path), unlabeled=True, memory_gb=2.0, image_size=96)


def test_unlabeled_stl10_is_held_out_of_val(tmp_path, monkeypatch):
    from torchvision.datasets import STL10

    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)
    for part, count in (("train", 10), ("unlabeled", 30), ("test", 4)):
        # The files hold each image column by column.
        (folder / f"{part}_X.bin").write_bytes(pixels[np.arange(count) % 3].transpose(0, 1, 3, 2).tobytes())
        if part != "unlabeled":
            (folder / f"{part}_y.bin").write_bytes(bytes(i % 10 + 1 for i in range(count)))
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    lists = {"train_list": ["train_X.bin", "train_y.bin", "unlabeled_X.bin"], "test_list": ["test_X.bin", "test_y.bin"]}
    for key, names in lists.items():
        monkeypatch.setattr(STL10, key, [[name, None] for name in names])
    source = TorchvisionSet(name="STL10", root=str(tmp_path), unlabeled=True, image_size=96, val_fraction=0.2)
    assert source.images.shape == (44, 3, 96, 96)
    assert np.array_equal(source.images[1].numpy(), pixels[1])
    assert source.labels.tolist() == [*range(10), *[-1] * 30, *range(4)]
    assert len(source.splits["train"]) == 38
    assert int(source.splits["val"].max()) < 10
    assert source.classes == list("abcdefghij")
    assert len(TorchvisionSet(name="STL10", root=str(tmp_path), image_size=96)) == 14


def test_unlabeled_is_refused_where_there_is_nothing_unlabeled(cifar):
    with pytest.raises(ValueError, match="CIFAR10 has no unlabeled images"):
        TorchvisionSet(name="CIFAR10", root=str(cifar), unlabeled=True, image_size=32)


def test_svhn_reads_the_matlab_files(tmp_path, monkeypatch):
    matlab = pytest.importorskip("scipy.io")
    from torchvision.datasets import SVHN

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 7), dtype=np.uint8)
    for part in ("train", "test"):
        file = tmp_path / f"{part}_32x32.mat"
        matlab.savemat(file, {"X": pixels, "y": np.arange(1, 8, dtype=np.uint8)[:, None] + 3})
    parts = {part: ["http://somewhere", f"{part}_32x32.mat", None] for part in ("train", "test")}
    monkeypatch.setattr(SVHN, "split_list", parts)
    source = TorchvisionSet(name="SVHN", root=str(tmp_path), image_size=32)
    assert source.images.shape == (14, 3, 32, 32)
    assert np.array_equal(source.images[2].numpy(), pixels[..., 2].transpose(2, 0, 1))
    assert source.labels[:7].tolist() == [4, 5, 6, 7, 8, 9, 0]
    assert source.classes == [str(digit) for digit in range(10)]


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'cifar10', but .*CIFAR10, CIFAR100, STL10, SVHN"):
        TorchvisionSet(name="cifar10", root="data", image_size=32)
