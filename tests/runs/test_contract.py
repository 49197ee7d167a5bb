"""The contract of methods: required members, scalars of `forward`, and embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sslcli.errors import ConfigError
from sslcli.methods.base import Batch, Method
from sslcli.runs.contract import check_embeddings, check_members, check_scalars, guard_warning
from tiny import TinyNet

LOSS = torch.ones((), requires_grad=True)


class Own(Method):
    """A method that keeps the contract."""

    num_views = 2

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.backbone(batch.views[0]).mean()}


class NoForward(Method):
    num_views = 2


class NoBackbone(Own):
    def __init__(self) -> None:
        nn.Module.__init__(self)


class NoViews(Method):
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {}


def with_views(value: Any) -> Method:
    return type("Own", (Own,), {"num_views": value})(TinyNet())  # type: ignore[no-any-return]


def of_part(name: str) -> Method:
    return type("Own", (Own,), {"evaluated_part": name})(TinyNet())  # type: ignore[no-any-return]


class OwnPart(Own):
    def __init__(self) -> None:
        super().__init__(TinyNet())
        self.twin = TinyNet()
        self.evaluated_part = "twin"


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (lambda: NoForward(TinyNet()), r"test_contract.NoForward does not define forward, which"),
        (NoBackbone, r"test_contract.NoBackbone has no backbone: call super\(\).__init__\(backbone\)"),
        (lambda: NoViews(TinyNet()), r"test_contract.NoViews has no num_views. It must .* as in num_views = 2"),
        (lambda: with_views("2"), r"has num_views = '2'. It must"),
        (lambda: with_views(0), r"has no num_views. It must"),
        (lambda: with_views(True), r"has num_views = True. It must"),
        (lambda: of_part("teacher"), r"has evaluated_part = 'teacher', but no submodule of this name: set it to the"),
        (OwnPart, r"OwnPart sets evaluated_part = 'twin' on the instance, but ssl-export reads it from the class"),
    ],
)
def test_a_method_without_a_required_member_is_rejected(method: Callable[[], Method], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_members(method())


def test_a_method_that_keeps_the_contract_is_accepted() -> None:
    check_members(Own(TinyNet()))
    check_embeddings(Own(TinyNet()))
    assert check_scalars({"loss": LOSS, "rate": torch.tensor(1)}, Own) is LOSS
    infinite = LOSS * float("inf")
    assert check_scalars({"loss": infinite}, Own) is infinite


@pytest.mark.parametrize(
    ("scalars", "expected"),
    [
        (None, r"forward of \S*test_contract.Own returned None, but it must return a dictionary .* \{\"loss\": loss\}"),
        (LOSS, r"returned a Tensor, but it must return a dictionary"),
        ((LOSS, LOSS), r"returned the tuple \(tensor\(1"),
        ({}, r"without 'loss' \(its keys: none\)"),
        ({"total": LOSS, "rate": LOSS}, r"without 'loss' \(its keys: 'total', 'rate'\), but it must return"),
        ({"loss": 0.5}, r"returned the float 0.5 as 'loss', but .* scalar tensor: return the tensor itself"),
        ({"loss": LOSS, "rate": 0.5}, r"returned the float 0.5 as 'rate', but .* torch.tensor\(value, device"),
        ({"loss": LOSS, "rate": None}, r"returned None as 'rate'"),
        ({"loss": LOSS, 3: LOSS}, r"with the key 3, but all keys must be text"),
        ({"loss": LOSS.expand(4)}, r"a Tensor of shape \(4,\) as 'loss', but it must be a scalar: return one number"),
        ({"loss": LOSS.reshape(1)}, r"a Tensor of shape \(1,\) as 'loss'"),
        ({"loss": LOSS, "rate": torch.ones(2, 3)}, r"a Tensor of shape \(2, 3\) as 'rate'"),
        ({"loss": LOSS.detach()}, r"a loss that depends on no trainable parameter, so nothing would be trained"),
        ({"loss": LOSS, "rate": torch.ones((), device="meta")}, r"'rate' on the device meta, but the loss is on cpu"),
    ],
)
def test_scalars_that_the_loop_cannot_use_are_rejected(scalars: object, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        check_scalars(scalars, Own)


@pytest.mark.parametrize(
    ("embeddings", "expected"),
    [
        (torch.ones(4, 3), r"forward of \S*test_contract.Own set self.embeddings to a Tensor of shape \(4, 3\), but"),
        ((torch.ones(4, 3, 2),), r"to a Tensor of shape \(4, 3, 2\), but it must be a tuple"),
        ((torch.ones(4, 3), None), r"to a Tensor of shape \(4, 3\), None, but"),
        (None, r"to None, but"),
    ],
)
def test_embeddings_that_the_metrics_cannot_use_are_rejected(embeddings: Any, expected: str) -> None:
    method = Own(TinyNet())
    method.embeddings = embeddings
    with pytest.raises(ConfigError, match=expected):
        check_embeddings(method)


def test_the_warning_says_how_to_turn_the_detection_on() -> None:
    warning = guard_warning(Own(TinyNet()))
    assert "test_contract.Own does not set self.embeddings: set it to a tuple" in warning
    assert "monitor.on_collapse=ignore" in warning
