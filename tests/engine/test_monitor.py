from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer import event_file_writer
from torch import Tensor, nn

from processes import Pair
from sslcli.config.settings import MonitorSettings
from sslcli.engine import monitor as monitor_module
from sslcli.engine.metric_means import MetricMeans
from sslcli.engine.monitor import Monitor
from sslcli.errors import NotFinite, TrainingFailed
from sslcli.methods.base import Method
from sslcli.nn.assignments import summarize
from sslcli.report.console import Screen
from sslcli.report.metrics import read

CLOCKS = {"wall", "train/images_per_s", "train/data_wait"}


@pytest.fixture(autouse=True)
def _files_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads files in the order of their names, in which the tenth of a process precedes the ninth."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))


def make_monitor(run_dir: Path, *, log_every_steps: int = 1, steps_per_epoch: int = 4, **changes: Any) -> Monitor:
    """Return a monitor that measures only what `changes` enable."""
    settings = {
        "knn_every_epochs": 0,
        "knn_k": 5,
        "knn_temperature": 0.1,
        "knn_images": None,
        "health_every_steps": 0,
        "on_collapse": "ignore",
        "pictures": 0,
    }
    parts = {"probe": None, "draw": None, "screen": Screen(silent=True)}
    optional = (*parts, "seconds_waited", "faster_data", "measures_start")
    parts |= {name: changes.pop(name) for name in list(changes) if name in optional}
    run_dir.mkdir(exist_ok=True)
    return Monitor(
        MonitorSettings(**(settings | changes)),
        log_every_steps=log_every_steps,
        batch_size=8,
        steps_per_epoch=steps_per_epoch,
        run_dir=run_dir,
        **parts,
    )


def follow(monitor: Monitor, losses: list[float], *, first: int = 1, total: int | None = None) -> None:
    """Steps `first`, `first` + 1, ... with these losses, and the end of the process."""
    method = Method(nn.Linear(2, 2))
    method.embeddings = (torch.randn(8, 4), torch.randn(8, 4))
    try:
        monitor.start(first - 1, total or first + len(losses) - 1)
        for step, loss in enumerate(losses, start=first):
            monitor.after_step(step, {"loss": torch.tensor(loss)}, lr=0.1 * step, method=method)
    finally:
        monitor.close()


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock decides."""
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in read(run_dir / "metrics.jsonl")]


def tensorboard_of(run_dir: Path) -> EventAccumulator:
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()


def scalars_of(events: EventAccumulator, name: str) -> list[tuple[int, float]]:
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]


def picture_in(events: EventAccumulator, name: str) -> list[tuple[int, Tensor]]:
    """Steps and pixels (3, H, W) of the pictures of this name."""
    found = []
    for event in events.Images(name):
        image = Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        found.append((event.step, pixels.view(image.height, image.width, 3).permute(2, 0, 1)))
    return found


def test_lines_have_the_mean_since_the_last_line_and_the_rate_of_their_step(tmp_path: Path) -> None:
    follow(make_monitor(tmp_path, log_every_steps=2), [1.0, 2.0, 3.0, 5.0, 7.0])
    assert lines_of(tmp_path) == [
        {"step": 2, "epoch": 0.5, "train/loss": 1.5, "train/lr": 0.2},
        {"step": 4, "epoch": 1.0, "train/loss": 4.0, "train/lr": 0.4},
        {"step": 5, "epoch": 1.25, "train/loss": 7.0, "train/lr": 0.5},  # the last step always has its line
    ]


def test_tensorboard_has_every_scalar_of_the_lines_at_their_steps(tmp_path: Path) -> None:
    found = {"knn_top1": 0.25, "knn_top5": 0.5}
    follow(
        make_monitor(tmp_path, health_every_steps=2, knn_every_epochs=1, probe=lambda: found), [1.0, 2.0, 3.0, 4.0, 5.0]
    )
    lines, events = read(tmp_path / "metrics.jsonl"), tensorboard_of(tmp_path)
    names = {name for line in lines for name in line} - {"step", "epoch", "wall"}
    assert {"train/loss", "train/lr", "train/images_per_s", "health/rankme", "monitor/knn_top1"} <= names
    assert names <= set(events.Tags()["scalars"])
    for name in names:
        assert [(line["step"], line[name]) for line in lines if name in line] == scalars_of(events, name)


def test_values_that_are_not_finite_are_null_in_the_lines_and_absent_in_tensorboard(tmp_path: Path) -> None:
    found = iter([{"knn_top1": math.nan}, {"knn_top1": 0.5}])
    follow(make_monitor(tmp_path, knn_every_epochs=1, steps_per_epoch=1, probe=lambda: next(found)), [1.0, 2.0])
    assert [line["monitor/knn_top1"] for line in lines_of(tmp_path)] == [None, 0.5]
    assert scalars_of(tensorboard_of(tmp_path), "monitor/knn_top1") == [(2, 0.5)]


class Said(Screen):
    """A screen that records warnings."""

    def __init__(self) -> None:
        super().__init__(silent=True)
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def test_a_run_with_initial_weights_measures_them_first_and_tells_when_they_are_lost(tmp_path: Path) -> None:
    screen, found = Said(), iter([{"knn_top1": value} for value in (0.8, 0.9, 0.8, 0.7, 0.6)])
    given = {"knn_every_epochs": 1, "steps_per_epoch": 1, "probe": lambda: next(found), "measures_start": True}
    first = make_monitor(tmp_path, screen=screen, **given)
    follow(first, [1.0, 1.0], total=4)
    assert [line["monitor/knn_top1"] for line in lines_of(tmp_path)] == [0.8, 0.9, 0.8]
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 1, 2]
    assert screen.warnings == []
    resumed = make_monitor(tmp_path, screen=screen, **given)
    resumed.load_state_dict(first.state_dict())
    follow(resumed, [1.0, 1.0], first=3)
    assert len(screen.warnings) == 1
    assert "from 80.0 % at step 0, with the weights of init, to 70.0 % at step 3" in screen.warnings[0]
    assert "start_knn" not in resumed.state_dict()


@pytest.mark.parametrize(("scale", "warned"), [(10.0, False), (100.0, True)])
def test_weights_that_grew_out_of_all_proportion_are_told_once(tmp_path: Path, scale: float, warned: bool) -> None:
    screen = Said()
    monitor = make_monitor(tmp_path, knn_every_epochs=1, steps_per_epoch=1, screen=screen)
    method = Method(nn.Linear(2, 2))
    nn.init.constant_(method.backbone.weight, scale)  # type: ignore[arg-type]
    monitor.start(0, 3)
    for step in (1, 2, 3):
        monitor.after_step(step, {"loss": torch.tensor(1.0)}, lr=0.1, method=method)
    monitor.close()
    assert len(screen.warnings) == warned
    if warned:
        assert (
            "after step 1 the weights of backbone.weight have a root mean square of 100; the normal range"
            in screen.warnings[0]
        )


@pytest.mark.parametrize(("measure", "due"), [({"knn_every_epochs": 1}, 2), ({"health_every_steps": 1}, 1)])
def test_nothing_is_measured_of_weights_that_are_not_finite(tmp_path: Path, measure: dict[str, int], due: int) -> None:
    monitor = make_monitor(
        tmp_path, log_every_steps=10, steps_per_epoch=2, probe=lambda: pytest.fail("measured"), **measure
    )
    method = Method(nn.Linear(2, 2))
    nn.init.constant_(method.backbone.weight, math.inf)  # type: ignore[arg-type]
    method.embeddings = (torch.full((8, 4), math.nan),) * 2
    monitor.start(0, 4)
    for step in range(1, due):
        monitor.after_step(step, {"loss": torch.tensor(1.0)}, lr=0.1, method=method)
    with pytest.raises(TrainingFailed, match=r"weight tensors are not finite, backbone.weight among them"):
        monitor.after_step(due, {"loss": torch.tensor(1.0)}, lr=0.1, method=method)
    monitor.close()


def test_a_run_that_goes_on_hides_what_was_written_beyond_its_checkpoint(tmp_path: Path) -> None:
    follow(make_monitor(tmp_path), [1.0, 1.0, 1.0, 1.0], total=6)
    follow(make_monitor(tmp_path), [2.0, 2.0, 2.0, 2.0], first=3)
    expected = [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert [(line["step"], line["train/loss"]) for line in lines_of(tmp_path)] == expected
    assert [(step, value.expected) for step, value in scalars_of(tensorboard_of(tmp_path), "train/loss")] == expected


def test_tensorboard_has_the_configuration_beside_what_it_led_to(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path, knn_every_epochs=1, probe=lambda: {"knn_top1": 0.5})
    monitor.hyperparameters = {"optimizer.lr": 0.06, "train.clip_grad": None, "method.mlp_head": True, "name": "x"}
    follow(monitor, [1.0])
    events = tensorboard_of(tmp_path)
    hparams = {
        key: HParamsPluginData.FromString(content) for key, content in events.PluginTagToContent("hparams").items()
    }
    values = hparams["_hparams_/session_start_info"].session_start_info.hparams
    assert values["optimizer.lr"].number_value == 0.06
    assert values["method.mlp_head"].number_value == 1  # torch takes true for a number
    assert values["name"].string_value == "x"
    assert values["train.clip_grad"].string_value == "None"
    infos = hparams["_hparams_/experiment"].experiment.metric_infos
    assert [info.name.tag for info in infos] == ["train/loss", "monitor/knn_top1"]
    assert {info.name.tag for info in infos} <= set(events.Tags()["scalars"])
    (text,) = events.Tensors("configuration/text_summary")
    assert "| optimizer.lr | 0.06 |" in text.tensor_proto.string_val[0].decode()


def test_without_labels_the_configuration_promises_no_accuracy(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path)
    monitor.hyperparameters = {"seed": 0}
    follow(monitor, [1.0])
    content = tensorboard_of(tmp_path).PluginTagToContent("hparams")["_hparams_/experiment"]
    infos = HParamsPluginData.FromString(content).experiment.metric_infos
    assert [info.name.tag for info in infos] == ["train/loss"]


def test_tensorboard_has_the_picture_of_the_views_once(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (3, 5, 7))
    for first in (1, 2):  # a run and its continuation
        monitor = make_monitor(tmp_path)
        monitor.picture = pixels / 255
        monitor.hyperparameters = {"seed": 0}
        follow(monitor, [1.0], first=first, total=2)
    ((step, found),) = picture_in(tensorboard_of(tmp_path), "views")
    assert step == 0
    assert torch.equal(found.long(), pixels)
    assert len(tensorboard_of(tmp_path).Tensors("configuration/text_summary")) == 1


def test_pictures_of_the_method_are_drawn_at_epochs_and_at_the_end(tmp_path: Path) -> None:
    drawn: list[Tensor] = []

    def draw() -> dict[str, Tensor]:
        drawn.append(torch.randint(0, 256, (3, 4, 6)))
        return {"reconstructions": drawn[-1] / 255}

    follow(make_monitor(tmp_path, knn_every_epochs=1, steps_per_epoch=2, draw=draw), [1.0] * 5)
    found = picture_in(tensorboard_of(tmp_path), "reconstructions")
    assert [step for step, _ in found] == [2, 4, 5]
    assert all(torch.equal(picture.long(), pixels) for (_, picture), pixels in zip(found, drawn, strict=True))
    with Image.open(tmp_path / "pictures" / "reconstructions.png") as newest:
        assert newest.size == (6, 4)
        assert newest.getpixel((0, 0)) == tuple(drawn[-1][:, 0, 0].tolist())


def test_the_probe_looks_every_so_many_epochs_and_at_the_end(tmp_path: Path) -> None:
    asked: list[int] = []

    def probe() -> dict[str, float]:
        asked.append(1)
        return {"knn_top1": len(asked) / 10}

    follow(make_monitor(tmp_path, log_every_steps=100, knn_every_epochs=2, steps_per_epoch=2, probe=probe), [1.0] * 9)
    found = [(line["step"], line["monitor/knn_top1"]) for line in lines_of(tmp_path)]
    assert found == [(4, 0.1), (8, 0.2), (9, 0.3)]


def test_health_is_measured_after_the_first_step_and_every_so_many(tmp_path: Path) -> None:
    follow(make_monitor(tmp_path, log_every_steps=100, health_every_steps=3), [1.0] * 7)
    measured = [line["step"] for line in lines_of(tmp_path) if "health/std" in line]
    assert measured == [1, 3, 6]


class Verdict:
    """A detector that finds every run collapsed, or those measurements that are listed."""

    def __init__(self, *collapsed: bool) -> None:
        self.collapsed = list(collapsed)

    def update(self, values: dict[str, float], *, dim: int) -> str | None:
        return f"std {values['std']:g} of {dim}" if not self.collapsed or self.collapsed.pop(0) else None

    def state_dict(self) -> dict[str, float]:
        return {}


def test_a_collapse_is_acted_on_as_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action, warnings in (("ignore", 0), ("warn", 1)):
        monitor = make_monitor(tmp_path, health_every_steps=2, on_collapse=action, screen=Screen())
        monitor.detector = Verdict()  # type: ignore[assignment]
        follow(monitor, [1.0, 1.0])
        assert capsys.readouterr().out.count("warning: the representation has probably collapsed at step") == warnings
    monitor = make_monitor(tmp_path, health_every_steps=1, on_collapse="warn", screen=Screen())
    monitor.detector = Verdict(False, True, True, False, True, True)  # type: ignore[assignment]
    follow(monitor, [1.0] * 6)
    found = re.findall(r"probably collapsed at step (\d)", capsys.readouterr().out)
    assert found == ["2", "5"]  # once for each collapse
    monitor = make_monitor(tmp_path, health_every_steps=2, on_collapse="stop")
    monitor.detector = Verdict()  # type: ignore[assignment]
    with pytest.raises(TrainingFailed, match=r"collapsed at step 1: std .* of 4"):
        follow(monitor, [1.0, 1.0])
    assert [line["step"] for line in lines_of(tmp_path)] == [1]  # the metrics behind the decision are written


def test_a_loss_that_is_not_finite_is_told_with_its_first_step(tmp_path: Path) -> None:
    monitor = make_monitor(tmp_path, log_every_steps=5)
    with pytest.raises(TrainingFailed, match=r"not finite since step 2 .*there is no checkpoint yet.*lower optimizer"):
        follow(monitor, [1.0, math.nan, 1.0, math.inf, 1.0])
    assert lines_of(tmp_path) == []


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    monitor, method = make_monitor(tmp_path), Method(nn.Linear(2, 2))
    monitor.check_weights(3, method)
    with torch.no_grad():
        method.backbone.bias[1] = math.inf
    with pytest.raises(TrainingFailed, match=r"after step 3, 1 of 2 weight tensors .* backbone\.bias among"):
        monitor.check_weights(3, method)


class Clock:
    """Stands in for `time` in the module."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def test_speed_counts_waiting_for_data_but_not_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(monitor_module, "time", clock)

    def probe() -> dict[str, float]:
        clock.now += 100
        return {}

    waited = 7.0  # before the start
    monitor = make_monitor(tmp_path, knn_every_epochs=1, steps_per_epoch=2, probe=probe, seconds_waited=lambda: waited)
    monitor.start(0, 3)
    for step in (1, 2, 3):
        waited += 1
        clock.now += 4  # waiting and computing
        monitor.after_step(step, {"loss": torch.tensor(1.0)}, lr=0.1, method=Method(nn.Identity()))
    monitor.close()
    lines = read(tmp_path / "metrics.jsonl")
    assert [line["train/images_per_s"] for line in lines] == [8 / 4, 8 / 4, 8 / 4]
    assert [line["train/data_wait"] for line in lines] == [0.25, 0.25, 0.25]
    assert lines[-1]["wall"] == 212


def test_seconds_of_training_go_on_from_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(monitor_module, "time", clock)
    first, second = make_monitor(tmp_path), make_monitor(tmp_path)
    first.start(0, 4)
    clock.now += 50
    state = first.state_dict()
    first.close()
    clock.now += 1000  # nothing ran
    second.load_state_dict(state)
    second.start(2, 4)
    clock.now += 5
    assert second.seconds() == 55
    second.close()


def watched_by_two(run_dir: Path) -> tuple[dict[str, float], tuple[int, str], bool]:
    rank = torch.distributed.get_rank()
    window = MetricMeans()
    window.add(1, {"loss": torch.tensor(float(rank))})
    window.add(2, {"loss": torch.tensor(math.nan if rank else 2.0)})
    bad = window.bad_step()
    window.sums = {"loss": torch.tensor(float(rank)), "accuracy": torch.tensor(4.0)}
    monitor = make_monitor(run_dir)
    monitor.start(0, 2)
    monitor.close()
    return window.means(), bad, monitor.writes


def health_of(run_dir: Path, rows: slice) -> dict[str, float]:
    """Health metrics of some of 8 images with their assignments to 3 prototypes."""
    generator = torch.Generator().manual_seed(0)
    z, logits = torch.randn(8, 4, generator=generator), 3 * torch.randn(8, 3, generator=generator)
    values, _ = make_monitor(run_dir).measure_health((z[rows],), summarize(logits.softmax(1)[rows]))
    return values


def health_of_my_half(run_dir: Path) -> dict[str, float]:
    start = 4 * torch.distributed.get_rank()
    return health_of(run_dir, slice(start, start + 4))


def test_health_is_measured_over_the_images_of_all_processes(tmp_path: Path, pair: Pair) -> None:
    whole = health_of(tmp_path, slice(8))
    assert 0.1 < whole["health/assignment_information"] < math.log(3)
    for found in pair.run(health_of_my_half, tmp_path):
        assert found == pytest.approx(whole, rel=1e-5)


def test_processes_share_means_and_what_went_wrong_and_one_writes(tmp_path: Path, pair: Pair) -> None:
    first, second = pair.run(watched_by_two, tmp_path)
    assert first[:2] == second[:2] == ({"loss": 0.25, "accuracy": 2.0}, (2, "loss nan"))
    assert (first[2], second[2]) == (True, False)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_features_of_large_weights_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    def probe() -> dict[str, float]:
        raise NotFinite("train features of 3 of 3 images are NaN or infinite: evaluate an earlier checkpoint")

    with pytest.raises(TrainingFailed, match=r"^after step 2, train features of 3 of 3 images are NaN .*; there is no"):
        follow(make_monitor(tmp_path, knn_every_epochs=1, steps_per_epoch=2, probe=probe), [1.0, 1.0])


def test_a_tensorboard_that_cannot_be_opened_is_what_is_told(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(OSError, match="tensorboard"):
        follow(make_monitor(tmp_path), [1.0])


def test_steps_that_wait_for_images_most_of_the_time_are_reported_with_remedies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = waited = 0.0
    monkeypatch.setattr(monitor_module.time, "perf_counter", lambda: now)
    monitor = make_monitor(
        tmp_path / "run", screen=Screen(), faster_data="Set dataset.workers=7", seconds_waited=lambda: waited
    )
    monitor.start(0, 40)
    for _ in range(20):
        now += 1.0
        waited += 9.0
        now += 9.0
        monitor.speed(1)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("wait for images 90.0 % of the time. Set dataset.workers=7") == 1
    monitor.close()
