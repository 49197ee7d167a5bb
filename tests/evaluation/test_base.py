"""Contract of evaluation protocols: defaults, and the base class of protocols on frozen features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from learnable import Colors, start_of, task_of
from sslcli.errors import ConfigError
from sslcli.evaluation import layers
from sslcli.evaluation.base import (
    FeatureProtocol,
    OnProgress,
    Outcome,
    Protocol,
    check_outcome,
    described,
    ignore_progress,
)
from sslcli.evaluation.features import FeatureSet
from sslcli.evaluation.task import Start, Task
from sslcli.report import console
from tiny import TinyNet


class Count(FeatureProtocol):
    """Counts its calls, and reports the number of features as top1."""

    def __init__(self, *, units: int = 0) -> None:
        self.units, self.measured = units, []  # type: ignore[var-annotated]

    @property
    def progress_units(self) -> int:
        return self.units

    def measure(self, features: FeatureSet, *, on_progress: OnProgress = ignore_progress) -> dict[str, Any]:
        width = features.train.shape[1]
        self.measured.append(width)
        for _ in range(self.units):
            on_progress(1)
        return {"protocol": "count", "split": "test", "top1": width, "interval": [0, 1], "n_train": len(features.train)}


@pytest.fixture(scope="module")
def task() -> Task:
    return task_of(Colors())


@pytest.fixture(scope="module")
def starts(task: Task) -> dict[str, Start]:
    torch.manual_seed(0)
    trained = start_of(TinyNet(), task)
    pixels = Start(net=None, layer=layers.BACKBONE, features=trained.features)
    return {"trained": trained, "pixels": pixels, "random": start_of(TinyNet(), task)}


def test_every_start_is_measured_and_baselines_keep_their_numbers_only(starts: dict[str, Start], task: Task) -> None:
    protocol = Count()
    outcome = protocol(starts, task)
    assert protocol.measured == [8, 8, 8]
    assert outcome.result["n_train"] == 60
    assert outcome.result["baselines"] == {name: {"top1": 8, "interval": [0, 1]} for name in ("pixels", "random")}
    assert (outcome.net, outcome.positions, outcome.files) == (None, None, {})


def test_without_baselines_the_result_has_none(starts: dict[str, Start], task: Task) -> None:
    assert "baselines" not in Count()({"trained": starts["trained"]}, task).result


def test_stored_numbers_of_baselines_are_not_measured_again(starts: dict[str, Start]) -> None:
    asked = []

    def stored(name: str, measure: Any) -> dict[str, Any]:
        asked.append(name)
        return {"top1": 0.5}

    task = task_of(Colors())
    object.__setattr__(task, "kept", stored)
    protocol = Count()
    outcome = protocol(starts, task)
    assert len(protocol.measured) == 1
    assert asked == ["pixels", "random"]
    assert outcome.result["baselines"]["random"] == {"top1": 0.5}


def test_units_of_work_move_a_progress_bar(
    starts: dict[str, Start], task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    monkeypatch.setattr(console.Progress, "__call__", lambda self, count, *_: moved.append(count))
    Count(units=3)({"trained": starts["trained"]}, task)
    assert moved == [1, 1, 1]


def test_a_protocol_has_to_define_its_work(starts: dict[str, Start], task: Task) -> None:
    with pytest.raises(NotImplementedError, match="Protocol does not define __call__"):
        Protocol()(starts, task)
    with pytest.raises(NotImplementedError, match="FeatureProtocol does not define measure"):
        FeatureProtocol()(starts, task)


def test_defaults_of_a_protocol(task: Task) -> None:
    protocol = Protocol()
    source = task.source
    assert protocol.defaults({"knn_k": 5}) == {}
    assert protocol.variant({}) == ""
    result = {"split": "val", "n_train": 1200, "n_test": 300}
    assert protocol.description(result) == (
        "evaluation, trained on 1,200 training images, measured on 300 images of val, which are not the test images of "
        "publications: comparable only with the same protocol and settings"
    )
    assert "measured on images of test: comparable" in protocol.description({"split": "test"})
    assert protocol.choose_layer("layer3", TinyNet(), task.example()) == ("layer3", layers.BACKBONE)
    assert torch.equal(protocol.training_positions(source, {}), source.splits["train"])
    assert (Protocol.baselines, Protocol.trains) == (("random",), True)
    assert (FeatureProtocol.baselines, FeatureProtocol.trains) == (("pixels", "random"), False)


@pytest.mark.parametrize("text", ["", "two\nlines", None])
def test_a_description_is_one_line_of_text(text: Any) -> None:
    class Described(Protocol):
        def description(self, result: Mapping[str, Any]) -> str:
            return text  # type: ignore[no-any-return]

    with pytest.raises(ConfigError, match=r"Described returned .*, but it must return one line of text"):
        described(Described(), {})
    assert described(Protocol(), {"split": "test"}).startswith("evaluation, ")


def test_outcomes_do_not_share_their_files() -> None:
    one, other = Outcome(result={}), Outcome(result={})
    one.files["a"] = "b"
    assert other.files == {}


GOOD = {"protocol": "mine", "split": "test", "top1": 0.5, "interval": [0.4, 0.6]}


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (None, "returned None, but it must return an Outcome"),
        (Outcome(result={"protocol": "mine"}), "has no 'split'"),
        (Outcome(result=GOOD | {"protocol": "../../x"}), r"named '\.\./\.\./x'"),
        (Outcome(result=GOOD, files={"/etc/x": ""}), "named '/etc/x'"),
        (Outcome(result=GOOD, variant="a/b"), "named 'a/b'"),
        (Outcome(result=GOOD | {"top1": float("nan")}), "must be in"),
        (Outcome(result=GOOD | {"extra": {1, 2}}), "cannot be written as JSON"),
    ],
)
def test_an_outcome_that_breaks_the_contract_is_rejected_with_the_class(outcome: Any, expected: str) -> None:
    check_outcome(Outcome(result=GOOD, variant="a-b", files={"curve.svg": ""}), Protocol())
    with pytest.raises(ConfigError, match=rf"sslcli\.evaluation\.base\.Protocol.*{expected}"):
        check_outcome(outcome, Protocol())
