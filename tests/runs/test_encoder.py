"""`sslcli.load`: the features of ssl-eval, the test transform, and the checks of the input."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import sslcli
from command_line import SMALL, Cli
from sslcli.backbones.base import Backbone
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
    with pytest.raises(ConfigError, match="no run directory or weight file '/none'"):
        sslcli.load("/none")
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
