"""Trial of a run: views that cannot be drawn, networks that do not fit the images, and unused parameters."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hydra._internal.utils import get_args_parser
from torch import Tensor, nn

from command_line import composed
from sslcli.backbones.wrap import as_backbone
from sslcli.cli.compose import checked_jobs
from sslcli.config.run_config import RunConfig
from sslcli.config.settings import MonitorSettings
from sslcli.data.loader import Loader
from sslcli.errors import ConfigError
from sslcli.methods.base import Batch, Method
from sslcli.methods.simclr import SimCLR
from sslcli.runs.assemble import build_loader
from sslcli.runs.parts import build_parts
from sslcli.runs.trial import Trial, draw, freeze, padding_warning, trial, trial_warnings, unused_warning
from tiny import TinyNet, copied_state, equal_states

CPU = torch.device("cpu")
SMALL = ["dataset.train_images=40", "dataset.test_images=0", "train.batch_size=8", "backbone.width=4"]


def built(*lines: str) -> tuple[Loader, Method]:
    config = RunConfig.from_plain(checked_jobs("train", get_args_parser().parse_args([*SMALL, *lines]))[0])
    parts = build_parts(config)
    return build_loader(config, parts, CPU), parts.method


class WithHead(TinyNet):
    """A network with a layer that `forward` does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 10)


class Strict(nn.Module):
    """A network for images of 32 pixels."""

    num_features = 3

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[-1] == 32, f"{images.shape[-1]} pixels are not 32"
        return images.mean((2, 3)) * self.scale


class Broken(Method):
    """A method whose `forward` returns what `result` computes."""

    num_views = 2

    def __init__(self, result: Callable[[Tensor], Any]) -> None:
        super().__init__(TinyNet())
        self.result = result

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.result(self.backbone(batch.views[0]))  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["simclr", "moco", "byol", "memory_bank", "vae", "bigan"])
def test_a_trial_changes_nothing_and_finds_every_parameter_of_the_own_methods_used(method: str) -> None:
    loader, net = built(f"method={method}")
    before, random = copied_state(net), torch.get_rng_state()
    assert trial(loader, net, CPU, "fp32") == Trial((), has_embeddings=True)
    assert equal_states(before, copied_state(net))
    assert torch.equal(random, torch.get_rng_state())
    assert net.embeddings == ()


def test_a_backbone_whose_weights_multiply_only_padding_is_warned_about_with_the_remedy() -> None:
    """Patches of 8 pixels leave block4 a map of 2 pixels and block5 a map of 1 pixel: 5/9 and 8/9 are not used."""

    monitor = MonitorSettings(**composed("train")["monitor"])

    def warnings(*lines: str) -> list[str]:
        loader, method = built("method=cpc", *lines)
        return trial_warnings(trial(loader, method, CPU, "fp32"), method, monitor)

    assert warnings() == []
    (warning,) = warnings("method.min_patch_size=8")
    assert warning.startswith("70% of the convolution weights of the backbone multiply only padding")
    assert "method.min_patch_size=16" in warning
    assert padding_warning(0.704) == warning


def test_unused_parameters_are_named_and_can_be_frozen() -> None:
    loader, _ = built()
    method = SimCLR(as_backbone(WithHead(), image_size=32))
    unused = trial(loader, method, CPU, "fp32").unused
    assert unused == ("backbone.fc.weight", "backbone.fc.bias")
    warning = unused_warning(unused)
    assert "does not depend on 2 trainable parameters" in warning
    assert "backbone.fc.weight, backbone.fc.bias. Remove" in warning
    freeze(method, unused)
    assert [name for name, p in method.named_parameters() if not p.requires_grad] == list(unused)
    assert trial(loader, method, CPU, "fp32").unused == ()


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ("blur: 0.5, blur_kernel: 101", r"views.views.0: blur_kernel=101 .* at most 63 at a side of 32 pixels"),
        ("blur: 0.5, size: 1", r"views.views.0: blur=0.5 .* 0 at a side of 1 pixels"),
        ("blur: 0.5, blur_kernel: 31, size: 12", r"views.views.0: blur_kernel=31 .* at most 23 at a side of 12"),
        ("rand_augment: 2, blur: 0.1, blur_kernel: 99", r"views.views.0: blur_kernel=99"),
    ],
)
def test_a_view_that_cannot_be_drawn_is_named(view: str, expected: str) -> None:
    loader, method = built("views.views=[{count: 2, " + view + "}]")
    with pytest.raises(ConfigError, match=expected):
        trial(loader, method, CPU, "fp32")


def test_a_view_operation_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    loader, method = built("views.views=[{count: 1}, {count: 1, flip: 0.0}]")

    def color(view: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if int(view[0]) == 1:
            raise KeyError("strength")
        return plain(view, *arguments, **options)

    plain = loader.views.color
    monkeypatch.setattr(loader.views, "color", color)
    with pytest.raises(
        ConfigError, match=r"views.views.1 cannot be drawn at 32 pixels: 'strength'. Change .*1 x image"
    ):
        trial(loader, method, CPU, "fp32")


def test_views_of_extreme_shape_are_drawn() -> None:
    loader, _ = built("views.views=[{count: 2, crop_ratio: [100, 200]}]")
    assert draw(loader, 2, CPU).views[0].isfinite().all()


def test_a_view_that_the_backbone_does_not_accept_is_named_with_its_key() -> None:
    loader, _ = built("+views.views.0.size=16")
    method = SimCLR(as_backbone(Strict(), image_size=32))
    with pytest.raises(
        ConfigError, match=r"Strict does not .* 16x16 pixels: 16 pixels are .* views.views.0.size to null"
    ):
        trial(loader, method, CPU, "fp32")


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (lambda x: {"total": x.mean()}, r"forward of \S*test_trial.Broken returned a dictionary without 'loss'"),
        (lambda x: {"loss": x.mean().detach()}, "depends on no trainable parameter"),
        (
            lambda x: {"loss": x[100]},
            r"test_trial.Broken cannot compute its loss on views of 32 pixels \(IndexError: index 100 .*\). Change "
            r"dataset.image_size.*\nTraceback(.*\n)+IndexError: index 100",
        ),
    ],
)
def test_a_loss_that_cannot_be_trained_is_rejected(result: Callable[[Tensor], Any], expected: str) -> None:
    loader, _ = built()
    with pytest.raises(ConfigError, match=expected):
        trial(loader, Broken(result), CPU, "fp32")


def test_a_method_that_needs_a_whole_micro_batch_gets_it() -> None:
    loader, _ = built()
    assert trial(loader, Broken(lambda x: {"loss": x[7].sum()}), CPU, "fp32").unused == ()


def test_a_loss_that_is_not_finite_is_no_error_of_the_trial() -> None:
    loader, _ = built()
    assert trial(loader, Broken(lambda x: {"loss": x.mean() * float("nan")}), CPU, "fp32").unused == ()


def test_a_method_without_embeddings_is_warned_about_if_collapse_is_to_be_detected() -> None:
    loader, _ = built()
    method = Broken(lambda x: {"loss": x.mean()})
    found = trial(loader, method, CPU, "fp32")
    assert not found.has_embeddings
    monitor = composed("train")["monitor"]

    def warnings(**changes: Any) -> list[str]:
        return trial_warnings(found, method, MonitorSettings(**{**monitor, **changes}))

    (warning,) = warnings()
    assert re.match(r"collapse is not detected, because forward of \S*Broken does not set self.embeddings", warning)
    assert warnings(on_collapse="ignore") == []
    assert warnings(health_every_steps=0) == []


def test_a_method_that_cannot_be_copied_has_no_trial() -> None:
    loader, _ = built()
    method = Broken(lambda x: {})
    method.lock = threading.Lock()  # type: ignore[assignment]
    assert trial(loader, method, CPU, "fp32") == Trial()


def test_a_trial_without_memory_is_no_error_of_the_method() -> None:
    class Huge(SimCLR):
        def forward(self, batch: Batch) -> dict[str, Tensor]:
            torch.empty(2**60, dtype=torch.uint8)  # torch's CPU allocator raises a plain RuntimeError
            return super().forward(batch)

    loader, method = built()
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        trial(loader, Huge(method.backbone), CPU, "fp32")


def test_a_copy_for_a_trial_without_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    loader, method = built()

    def fail(value: object) -> None:
        raise MemoryError

    monkeypatch.setattr("copy.deepcopy", fail)
    with pytest.raises(MemoryError):
        trial(loader, method, CPU, "fp32")
