"""Watching a run: what is averaged, measured, printed and written after each step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslcli import distributed, health
from sslcli.errors import TrainingFailed
from sslcli.methods.base import Batch, Method
from sslcli.report.console import Screen, percent
from sslcli.report.metrics import Metrics
from sslcli.settings import MonitorSettings

HEALTH_ROWS = 1024  # embeddings of a batch that health measures look at


class Window:
    """Means of the scalars since the last log, kept on the device so that a step never waits for it."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.first_bad: Tensor | None = None  # () the first step whose loss was not finite, or -1

    def add(self, step: int, scalars: dict[str, Tensor]) -> None:
        for name, value in scalars.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.count += 1
        finite = torch.isfinite(scalars["loss"])
        before = self.first_bad if self.first_bad is not None else torch.full_like(finite, -1, dtype=torch.long)
        self.first_bad = torch.where(finite | (before >= 0), before, step)

    def state_dict(self) -> dict[str, Any]:
        """This process's own sums."""
        return {"sums": dict(self.sums), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.count = dict(state["sums"]), state["count"]

    def bad_step(self) -> int:
        """The first step whose loss was not finite on any process, or -1."""
        if self.first_bad is None:
            return -1
        return max(distributed.gather_objects(int(self.first_bad)))

    def means(self) -> dict[str, float]:
        """The mean of each scalar over steps and processes; then begin anew."""
        names = sorted(self.sums)
        values = distributed.all_reduce_mean(torch.stack([self.sums[name].float() for name in names]) / self.count)
        self.sums, self.count = {}, 0
        return dict(zip(names, values.tolist(), strict=True))


class Watch:
    """Scalars to metrics.jsonl and TensorBoard, progress to the screen, health and k-NN when they are due.

    Args:
        settings: what to measure and when.
        log_every: steps between lines of `train/*`.
        batch_size: images a step, for images a second.
        steps_per_epoch: to tell epochs from steps.
        run_dir: where to write, or None to write nothing (a process that is not the main one).
        screen: where to print.
        probe: measures the representation, giving scalars by name, or None where labels are missing.
    """

    def __init__(
        self,
        settings: MonitorSettings,
        *,
        log_every: int,
        batch_size: int,
        steps_per_epoch: int,
        run_dir: Path | None,
        screen: Screen,
        probe: Callable[[], dict[str, float]] | None,
    ) -> None:
        self.settings, self.log_every, self.batch_size = settings, log_every, batch_size
        self.steps_per_epoch, self.run_dir, self.screen, self.probe = steps_per_epoch, run_dir, screen, probe
        self.window = Window()
        self.judge = health.CollapseJudge()
        self.wall = 0.0  # seconds of training before this process
        self.waited = 0.0  # seconds the loop waited for data since the last log
        self.aside = 0.0  # seconds spent measuring since the last log
        self.facts: dict[str, str] = {}

    def start(self, step: int, total: int) -> None:
        """Open the files and begin the progress at `step` of `total`."""
        self.total, self.begun = total, time.perf_counter()
        self.last_log = (self.begun, step)
        if self.run_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.metrics = Metrics(self.run_dir / "metrics.jsonl", step=step)
            purge = step + 1 if step else None
            self.tensorboard = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=purge)
        self.screen.start("step", total=total, done=step)

    def timed_next(self, batches: Iterator[list[Batch]]) -> list[Batch]:
        """The next batches, with the time it took to get them."""
        before = time.perf_counter()
        result = next(batches)
        self.waited += time.perf_counter() - before
        return result

    def after_step(self, step: int, scalars: dict[str, Tensor], *, lr: float, method: Method) -> None:
        """Everything that is due after `step` steps; at most one line of metrics."""
        self.window.add(step, scalars)
        last = step == self.total
        line: dict[str, float] = {}
        if step % self.log_every == 0 or last:
            self.check_finite()
            line |= {f"train/{name}": value for name, value in self.window.means().items()}
            line |= {"train/lr": lr, **self.speed(step)}
            self.facts |= {"loss": f"{line['train/loss']:.4f}", "images/s": f"{line['train/images_per_s']:.0f}"}
            self.facts["data"] = percent(line["train/data_wait"])
        before = time.perf_counter()
        if self.health_is_due(step) and method.embeddings:
            line |= self.measure_health(step, method.embeddings)
        if self.probe is not None and (last or self.epoch_ends(step)):
            found = self.measure_probe()
            line |= {f"monitor/{name}": value for name, value in found.items()}
        self.aside += time.perf_counter() - before
        if line and self.run_dir is not None:
            self.write(step, line)
        facts = "  ".join(f"{name} {value}" for name, value in self.facts.items())
        self.screen.advance(step, facts, always=last)
        if last:
            self.screen.stop()

    def health_is_due(self, step: int) -> bool:
        """Every so many steps, and after the first, against which a fall is told."""
        return self.settings.health_every > 0 and (step == 1 or step % self.settings.health_every == 0)

    def epoch_ends(self, step: int) -> bool:
        every = self.settings.knn_every * self.steps_per_epoch
        return every > 0 and step % every == 0

    def speed(self, step: int) -> dict[str, float]:
        """Images a second, and the share of time spent waiting for data, since the last log."""
        now = time.perf_counter()
        (then, last_step), self.last_log = self.last_log, (now, step)
        spent = max(now - then - self.aside, 1e-9)
        values = {
            "train/images_per_s": (step - last_step) * self.batch_size / spent,
            "train/data_wait": min(1.0, self.waited / spent),
        }
        self.waited = self.aside = 0.0
        return values

    def measure_health(self, step: int, embeddings: tuple[Tensor, ...]) -> dict[str, float]:
        """Health of the batch's embeddings over all processes; acts on a collapse as the settings say."""
        views = [distributed.all_gather(view)[:HEALTH_ROWS] for view in embeddings[:2]]
        values = health.measure(*views)
        verdict = self.judge.update(values, dim=views[0].shape[1])
        if verdict is not None and self.settings.on_collapse != "ignore":
            message = f"the representation looks collapsed at step {step}: {verdict}"
            if self.settings.on_collapse == "stop":
                if self.run_dir is not None:
                    self.write(step, {f"health/{name}": value for name, value in values.items()})
                raise TrainingFailed(message)
            self.screen.warn(message)
        return {f"health/{name}": value for name, value in values.items()}

    def measure_probe(self) -> dict[str, float]:
        """What the probe finds; the main process looks, the others wait."""
        assert self.probe is not None
        found = self.probe() if distributed.is_main() else {}
        distributed.barrier()
        if "knn_top1" in found:
            self.facts["k-NN"] = percent(found["knn_top1"])
        return found

    def check_finite(self) -> None:
        """Raise TrainingFailed if the loss of any process was not finite at any step since the last look."""
        bad = self.window.bad_step()
        if bad < 0:
            return
        means = ", ".join(f"{name} {float(value) / self.window.count:g}" for name, value in self.window.sums.items())
        from sslcli.checkpoint import all_of

        saved = [] if self.run_dir is None else all_of(self.run_dir)
        kept = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        raise TrainingFailed(
            f"the loss is not finite since step {bad} ({means}); {kept}. Usual remedies: a lower optimizer.lr, a longer "
            "train.warmup_epochs, train.clip_grad=1, or train.precision=fp32"
        )

    def write(self, step: int, line: dict[str, float]) -> None:
        """One line of metrics.jsonl and the same scalars for TensorBoard."""
        facts = {"step": step, "epoch": round(step / self.steps_per_epoch, 4), "wall": round(self.seconds(), 3)}
        self.metrics.write({**facts, **line})
        for name, value in line.items():
            if math.isfinite(value):
                self.tensorboard.add_scalar(name, value, step)

    def seconds(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self.wall + time.perf_counter() - self.begun

    def synchronise(self) -> None:
        """Bring everything written to disk."""
        if self.run_dir is not None:
            self.metrics.synchronise()
            self.tensorboard.flush()

    def close(self) -> None:
        """Close the files."""
        self.screen.stop()
        if self.run_dir is not None and hasattr(self, "metrics"):
            self.metrics.close()
            self.tensorboard.close()

    def state_dict(self) -> dict[str, Any]:
        """What a continued run needs to write the same lines, the same on all processes."""
        return {"judge": self.judge.state_dict(), "wall": self.seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.judge.load_state_dict(state["judge"])
        self.wall = state["wall"]
