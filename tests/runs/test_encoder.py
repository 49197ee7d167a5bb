"""`sslcli.load`: the features of ssl-eval, the test transform, and the checks of the input."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import sslcli
from command_line import SMALL, Cli
from sslcli.backbones.base import Backbone
from sslcli.backbones.small import Small
from sslcli.config.backbone_choice import backbone_node
from sslcli.data.bad_images import BadImage
from sslcli.data.crops import PlainCrops
from sslcli.data.sources.base import Shapes
from sslcli.data.sources.files import Flat
from sslcli.errors import ConfigError
from sslcli.methods.base import Method
from sslcli.runs.build import build_backbone
from sslcli.runs.encoder import Encoder

OLD = Path(__file__).parents[1] / "old"


@pytest.fixture(scope="module")
def encoder(run_dir: Path) -> Encoder:
    return sslcli.load(run_dir)


def test_the_features_are_bit_identical_to_those_of_ssl_eval(trained: Path, cli: Cli) -> None:
    assert cli("ssl-eval", f"run={trained}", "protocol=knn_full", "batch_size=64").code == 0
    (path,) = (trained / "eval" / "features").glob("trained_*.pt")
    stored = torch.load(path, weights_only=True)["tensors"]
    images = Shapes(image_size=32, limit=200, test_images=100).images
    assert images is not None
    net = sslcli.load(trained, precision="auto")
    with torch.no_grad():
        batches = [net(images[part].float() / 255) for part in stored["test_positions"].split(64)]
    assert torch.equal(torch.cat(batches), stored["test"].float())


@pytest.mark.parametrize("size", [(40, 23), (32, 32), (20, 2000), (9, 12)])
@pytest.mark.parametrize("name", ["image.png", "image.jpg"])
def test_the_transform_has_the_bits_of_the_data_path(
    encoder: Encoder, tmp_path: Path, size: tuple[int, int], name: str
) -> None:
    Image.effect_noise(size, 90).convert("RGB").save(tmp_path / name)
    batch, readable = PlainCrops(Flat(root=tmp_path, image_size=32, value_range="auto"))[torch.tensor([0])]
    assert readable.all()
    assert torch.equal(encoder.transform(tmp_path / name), batch[0].float() / 255)
    with Image.open(tmp_path / name) as opened:
        assert torch.equal(encoder.transform(opened), batch[0].float() / 255)


def test_gray_and_transparent_images_become_rgb(encoder: Encoder) -> None:
    assert encoder.transform(Image.new("L", (50, 40), 51)).unique().tolist() == pytest.approx([0.2])
    assert encoder.transform(Image.new("RGBA", (50, 40), (0, 0, 0, 0))).unique().tolist() == [1.0]


def test_an_unreadable_file_is_named(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(BadImage, match=r"a\.jpg"):
        encoder.transform(tmp_path / "a.jpg")
    with pytest.raises(BadImage, match=r"none\.jpg"):
        encoder.transform(str(tmp_path / "none.jpg"))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"uint8, but must be floats in \[0, 1\]: divide them by 255"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "int64, but must be floats"),
        (torch.zeros(3, 8, 8), r"\(3, 8, 8\), but must be \(N, 3, H, W\): add a batch"),
        (torch.zeros(2, 8, 8, 3), r"\(2, 8, 8, 3\), but must be \(N, 3, H, W\)"),
        (torch.full((2, 3, 8, 8), 1.5), r"from 1.5 to 1.5, .* divide 8-bit values by 255"),
        (torch.tensor([-0.5, 0.5]).expand(1, 3, 2, 2), r"from -0.5 to 0.5, .*do not normalize"),
        (torch.full((2, 3, 8, 8), torch.nan), "from nan to nan"),
    ],
)
def test_other_input_is_refused(encoder: Encoder, images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder(images)


def test_other_sizes_are_allowed_unless_the_network_refuses_them(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert encoder(torch.rand(2, 3, 40, 24)).shape == (2, encoder.num_features)

    def only_32(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"got {images.shape[-1]} pixels")

    monkeypatch.setattr(encoder.network, "forward", only_32)
    with pytest.raises(ValueError, match=r"40 x 24 pixels, .*\(got 24 pixels\): resize them to 32 x 32"):
        encoder(torch.rand(2, 3, 40, 24))
    with pytest.raises(RuntimeError, match="got 32 pixels"):
        encoder(torch.rand(2, 3, 32, 32))


def test_an_export_gives_the_features_of_its_run(encoder: Encoder, trained: Path, cli: Cli) -> None:
    images = torch.rand(3, 3, 32, 32)
    assert cli("ssl-export", f"run={trained}", f"out={trained}/net.pt").code == 0
    assert torch.equal(sslcli.load(trained / "net.pt")(images), encoder(images))


def test_published_weights_load_with_their_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = backbone_of("resnet18 stem=imagenet")
    state = {f"module.encoder_q.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "moco.pth")
    loaded = sslcli.load(tmp_path / "moco.pth", backbone="resnet18 backbone.stem=imagenet", image_size=64)
    assert "tensors taken with the prefix state_dict.module.encoder_q." in capsys.readouterr().out
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), net.eval()((images - mean) / std), atol=1e-5, rtol=1e-4)
    assert loaded.transform(Image.new("RGB", (100, 80))).shape == (3, 64, 64)
    with pytest.raises(ConfigError, match="requires backbone"):
        sslcli.load(tmp_path / "moco.pth")


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    """A file of weights that states nothing about its images."""
    torch.save(Small(image_size=32, width=8).state_dict(), tmp_path / "a.pt")
    return tmp_path / "a.pt"


def test_the_images_of_a_weight_file_are_those_of_its_preprocessing_file(
    small_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sslcli.load(small_file, backbone="small width=8").image_size == 224
    stated = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "center_crop": 48}
    (small_file.parent / "a.pt.preprocessing.json").write_text(json.dumps(stated))
    net = sslcli.load(small_file, backbone="small width=8")
    assert (net.image_size, net.transform.image_size) == (48, 48)
    images, printed = torch.rand(2, 3, 48, 48), capsys.readouterr().out
    mean, std = (torch.tensor(stated[key]).view(3, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(net(images), net.network((images - mean) / std))
    assert "if the weights were trained with other values, set mean and std" in printed
    net = sslcli.load(small_file, backbone="small width=8", image_size=40, mean=torch.zeros(3), std=(1, 1, 1))
    assert net.transform.image_size == 40
    assert torch.equal(net(images), net.network(images))
    Image.new("RGB", (60, 50)).save(small_file.parent / "a.png")
    found = sslcli.embed(small_file, small_file.parent / "a.png", backbone="small width=8", workers=0)
    assert "test transform at 48 px" in found.provenance["transform"]
    again = sslcli.embed(small_file, found.paths, backbone="small width=8", workers=0, image_size=40, mean=[0, 0, 0])
    assert "test transform at 40 px" in again.provenance["transform"]
    assert not torch.equal(found.features, again.features)


def test_the_size_of_a_backbone_in_a_dictionary_is_the_image_size(small_file: Path) -> None:
    node = {"_target_": "sslcli.backbones.small.Small", "image_size": 64, "width": 8}
    assert sslcli.load(small_file, backbone=node).image_size == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size is 0, but it must be at least 1"),
        ({"image_size": "32"}, "image_size is '32', but it must be an integer or None"),
        ({"image_size": 8}, "image_size is 8, but the small backbone needs at least 16 pixels"),
        ({"mean": 0.5}, "mean is 0.5, but it must be a list with one number for each channel"),
        ({"std": "123"}, "std is '123', but it must be a list"),
        ({"mean": []}, r"mean is \[\], but it must be a list"),
        ({"mean": [0.5]}, "mean has 1 and std has 3 values.*: correct the arguments mean and std"),
        ({"std": [1, 0, 1]}, "std greater than 0: correct the arguments"),
        ({"mean": [0.5], "std": [1]}, r"block1.0.weight is \(8, 3, 3, 3\) and should be \(8, 1, 3, 3\)"),
        ({"weights_prefix": 3}, "weights_prefix is 3, but it must be a string or None"),
        ({"trust": "abc"}, "trust is 'abc', but it must be a list of strings"),
        ({"trust": None}, "trust is None, but it must be a list"),
        ({"checkpoint": 7}, "checkpoint is 7, but .* is not a run directory: remove checkpoint"),
        ({"backbone": 3}, "backbone is 3, but it must be a text such as"),
        ({"backbone": {"image_size": 3}}, "a dictionary with _target_"),
        ({"backbone": "small width=[8"}, r"backbone is 'small width=\[8', which is not valid YAML"),
        (
            {"backbone": {"_target_": "sslcli.backbones.small.Small", "width": 8, "image_size": "x"}},
            "image_size is 'x'",
        ),
    ],
)
def test_wrong_arguments_are_refused(small_file: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sslcli.load(small_file, **{"backbone": "small width=8", "image_size": 32} | arguments)


def test_images_that_the_network_does_not_accept_are_refused(small_file: Path) -> None:
    node = {"_target_": "sslcli.backbones.small.Small", "image_size": 32, "width": 8}
    with pytest.raises(ConfigError, match=r"not accept images of 1 channels and 32 x 32 pixels .*: set image_size"):
        sslcli.load(small_file, backbone=node, mean=[0.5], std=[1])


def backbone_of(choice: str) -> Backbone:
    return build_backbone(backbone_node(choice, image_size=64), image_size=64, trust=[])


def test_loading_has_no_side_effects(run_dir: Path) -> None:
    state = torch.random.get_rng_state()
    net = sslcli.load(str(run_dir))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(part.training for part in net.modules())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(pickle.loads(pickle.dumps(net))(images), net(images))


@pytest.mark.parametrize("name", ["run_vae", "export_method.pt", "export_backbone.pt"])
def test_old_runs_and_exports_load(name: str) -> None:
    net = sslcli.load(OLD / name)
    assert net(torch.rand(2, net.channels, net.image_size, net.image_size)).shape == (2, net.num_features)
    assert not isinstance(net.network, Method)


def test_a_method_with_its_own_features_is_kept_whole(tmp_path: Path, cli: Cli) -> None:
    line = ["method=cpc", "backbone.width=8", "monitor.knn_every_epochs=0", *SMALL, "train.max_steps=1"]
    assert cli("ssl-train", *line, f"run_dir={tmp_path}/cpc").code == 0
    net = sslcli.load(tmp_path / "cpc")
    images = torch.rand(2, 3, 32, 32)
    assert isinstance(net.network, Method)
    assert torch.equal(net(images), net.network.features((images - 0.5) / 0.25))


def test_wrong_paths_and_steps_are_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run directory or weight file '/none' in .*: correct the path"):
        sslcli.load("/none")
    with pytest.raises(ConfigError, match="weight file is None, but it must be a text"):
        sslcli.load(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"weight file is b'a', but it must be a text"):
        sslcli.load(b"a")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"not a run directory \(it has no config.yaml\): name a run"):
        sslcli.load(tmp_path, backbone="small")
    with pytest.raises(ConfigError, match=r"mean is \[0.0, 0.0, 0.0\] and .* states its normalization: remove mean"):
        sslcli.load(run_dir, mean=[0, 0, 0])
    with pytest.raises(ConfigError, match="not a run directory"):
        sslcli.load(tmp_path)
    (tmp_path / "model.safetensors").touch()  # as in a folder of ssl-export
    with pytest.raises(ConfigError, match=r"not a run directory: write .*/model\.safetensors"):
        sslcli.load(tmp_path)
    with pytest.raises(ConfigError, match="checkpoint is 7"):
        sslcli.load(run_dir, checkpoint=7)
    with pytest.raises(ConfigError, match="device is 'tpu'"):
        sslcli.load(run_dir, device="tpu")
    with pytest.raises(ConfigError, match="remove backbone"):
        sslcli.load(run_dir, backbone={"_target_": "sslcli.backbones.small.Small"})
    with pytest.raises(ConfigError, match="remove backbone and weights_prefix"):
        sslcli.load(f"run:{run_dir}", weights_prefix="module")


def test_the_package_imports_no_torch() -> None:
    code = "import sys, sslcli; assert not {'torch', 'numpy', 'hydra'} & set(sys.modules); sslcli.load"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        _ = sslcli.nonesuch
