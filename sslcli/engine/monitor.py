"""Monitoring of a run: metrics, health, k-NN and logging after each step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslcli.config.settings import MonitorSettings
from sslcli.distributed import collectives, watchdog
from sslcli.engine import checkpoint, collapse, health
from sslcli.engine.knn_drop import KnnDrop
from sslcli.engine.metric_means import MetricMeans
from sslcli.engine.slow_data import SlowData
from sslcli.errors import NotFinite, TrainingFailed, printable
from sslcli.methods.base import Method
from sslcli.nn.assignments import Assignments
from sslcli.report import pictures
from sslcli.report.console import Screen, percent
from sslcli.report.metrics import Metrics
from sslcli.report.tensorboard import open_writer

LARGE_WEIGHTS = 30.0  # limit on the root mean square of a weight tensor; in runs of all methods, it stayed below 3
REMEDIES = (
    "Usual remedies: a lower optimizer.lr, a longer train.warmup_epochs, train.clip_grad=1, or train.precision=fp32"
)
HEALTH_ROWS = 1024  # embeddings per batch used by the health metrics


class Monitor:
    """Monitor of a run: writes metrics.jsonl and TensorBoard, and prints progress.

    At regular intervals, it also computes the k-NN accuracy, and the health metrics that show a collapse.

    Args:
        settings: which metrics are computed, and how often.
        log_every_steps: number of steps between two lines of `train/*` metrics.
        batch_size: number of images per step; used to compute images per second.
        steps_per_epoch: used to convert steps to epochs.
        run_dir: the run directory. Only the main process writes to it.
        screen: progress display.
        probe: function that evaluates the representation and returns scalars by name; None if there are no labels. All
            processes run it, and share its work.
        draw: function that returns pictures of what the method computes, such as generated images: name -> (3, H, W) in
            [0, 1]. None if the method has no pictures.
        together: True if parameters are sharded. All processes must then run `draw`.
        seconds_waited: function that returns the seconds in which the steps waited for images, since the start.
        faster_data: the remedies in the warning about steps that wait for images most of the time.
        measures_start: True if the probe also runs before the first step, because the run has initial weights.
    """

    def __init__(
        self,
        settings: MonitorSettings,
        *,
        log_every_steps: int,
        batch_size: int,
        steps_per_epoch: int,
        run_dir: Path,
        screen: Screen,
        probe: Callable[[], dict[str, float]] | None,
        draw: Callable[[], dict[str, Tensor]] | None = None,
        together: bool = False,
        seconds_waited: Callable[[], float] = lambda: 0.0,
        faster_data: str = "",
        measures_start: bool = False,
    ) -> None:
        self.settings, self.log_every_steps, self.batch_size = settings, log_every_steps, batch_size
        self.steps_per_epoch, self.run_dir, self.screen, self.probe = steps_per_epoch, run_dir, screen, probe
        self.draw, self.seconds_waited, self.faster_data = draw, seconds_waited, faster_data
        self.slow_data, self.knn_drop, self.measures_start = SlowData(), KnnDrop(), measures_start
        self.writes = collectives.is_main()
        self.draws = self.writes or together
        self.metric_means = MetricMeans()
        self.detector = collapse.CollapseDetector()
        self.wall = 0.0  # seconds of training in earlier starts of the run
        self.last_waited = 0.0  # value of `seconds_waited` at the last log
        self.seconds_evaluating = 0.0  # seconds spent on evaluation since the last log
        self.good_step = 0  # step of the checkpoint that the run resumed from or saved last; its weights are finite
        self.has_diverged = False  # True after the warning about divergence
        self.has_collapsed = False  # True from a report of a collapse until the embeddings recover
        self.facts: dict[str, str] = {}
        self.hyperparameters: dict[str, Any] = {}  # for TensorBoard, by dotted name
        self.picture: Tensor | None = None  # for TensorBoard, (3, H, W) in [0, 1]

    def start(self, step: int, total: int) -> None:
        """Open the files and start the progress display at `step` of `total`."""
        self.total, self.start_time = total, time.perf_counter()
        self.last_log, self.last_waited = (self.start_time, step), self.seconds_waited()
        if self.writes:
            self.metrics = Metrics(self.run_dir / "metrics.jsonl", step=step, warn=self.screen.warn)
            if step == 0 and self.metrics.dropped is not None:
                found = f"{self.run_dir} has no checkpoint, but metrics up to step {self.metrics.dropped}"
                self.screen.warn(f"{found}: the run starts from the beginning")
            # TensorBoard hides the entries that a killed run wrote after its last checkpoint.
            purge = step + 1 if step else 0
            self.tensorboard = open_writer(self.run_dir / "tensorboard", purge_step=purge)
            if step == 0:
                self.add_run_facts()
        self.screen.start("step", total=total, done=step)
        if step == 0 and self.measures_start and self.probe is not None:
            line = {f"monitor/{name}": value for name, value in self.measure_probe(0).items()}
            if self.writes:
                self.write(0, line)

    def add_run_facts(self) -> None:
        """Write facts that do not change during the run to TensorBoard.

        These are the hyperparameters, the names of the scalars that compare runs (such as "train/loss"), and a picture
        of a few images with their views.
        """
        from torch.utils.tensorboard.summary import hparams

        values = {name: plain(value) for name, value in sorted(self.hyperparameters.items())}
        if values:
            results = dict.fromkeys(["train/loss", *(["monitor/knn_top1"] if self.probe else [])], 0.0)
            for summary in hparams(values, results):  # type: ignore[no-untyped-call]
                self.tensorboard._get_file_writer().add_summary(summary)  # type: ignore[no-untyped-call]
            rows = "".join(f"| {name} | {value} |\n" for name, value in values.items())
            self.tensorboard.add_text("configuration", f"| key | value |\n|---|---|\n{rows}", 0)
        if self.picture is not None:
            self.tensorboard.add_image("views", self.picture, 0)

    def after_step(self, step: int, scalars: dict[str, Tensor], *, lr: float, method: Method) -> None:
        """Compute and log everything that is due after `step` steps. Write at most one line of metrics.

        scalars: the detached loss and other scalars of this step.
        lr: learning rate of this step.

        Raises TrainingFailed if a loss, a weight or a feature is not finite, or to stop the run after a collapse.
        """
        self.metric_means.add(step, scalars)
        last = step == self.total
        line: dict[str, float] = {}
        if step % self.log_every_steps == 0 or last:
            self.check_finite()
            line |= {f"train/{name}": value for name, value in self.metric_means.means().items()}
            line |= {"train/lr": lr, **self.speed(step)}
            self.facts |= {"loss": f"{line['train/loss']:.4f}", "images/s": f"{line['train/images_per_s']:.0f}"}
            self.facts["data"] = percent(line["train/data_wait"])
        before, verdict = time.perf_counter(), None
        is_measured = last or self.epoch_ends(step)
        if is_measured or self.health_is_due(step):  # non-finite values would make the metrics meaningless
            self.check_finite()
            self.check_weights(step, method)
        if is_measured:
            self.warn_of_divergence(step, method)
        if self.health_is_due(step) and method.embeddings:
            values, verdict = self.measure_health(method.embeddings, method.assignments)
            line |= values
            self.has_collapsed &= verdict is not None
        if self.probe is not None and is_measured:
            found = self.measure_probe(step)
            line |= {f"monitor/{name}": value for name, value in found.items()}
        if self.draw is not None and self.draws and is_measured:
            self.show_pictures(step, self.draw())
        self.seconds_evaluating += time.perf_counter() - before
        if line and self.writes:
            self.write(step, line)
        if verdict is not None:
            self.act_on_collapse(step, verdict)
        facts = "  ".join(f"{name} {value}" for name, value in self.facts.items())
        self.screen.advance(step, facts, always=last)
        if last:
            self.screen.stop()

    def health_is_due(self, step: int) -> bool:
        """Return True every `health_every_steps` steps and after step 1.

        Collapse detection compares the metrics of later steps with those of step 1.
        """
        return self.settings.health_every_steps > 0 and (step == 1 or step % self.settings.health_every_steps == 0)

    def epoch_ends(self, step: int) -> bool:
        every = self.settings.knn_every_epochs * self.steps_per_epoch
        return every > 0 and step % every == 0

    def speed(self, step: int) -> dict[str, float]:
        """Return images per second and the fraction of time spent waiting for data, both since the last call.

        On a GPU, the time to launch kernels is not waiting for data, see `Loader.steps`.
        """
        now = time.perf_counter()
        (then, last_step), self.last_log = self.last_log, (now, step)
        spent = max(now - then - self.seconds_evaluating, 1e-9)
        total = self.seconds_waited()
        waited, self.last_waited = total - self.last_waited, total
        if (waiting := self.slow_data.update(spent, waited)) is not None:
            self.screen.warn(f"the training steps wait for images {percent(waiting)} of the time. {self.faster_data}")
        values = {
            "train/images_per_s": (step - last_step) * self.batch_size / spent,
            "train/data_wait": min(1.0, waited / spent),
        }
        self.seconds_evaluating = 0.0
        return values

    def measure_health(
        self, embeddings: tuple[Tensor, ...], assignments: Assignments | None
    ) -> tuple[dict[str, float], str | None]:
        """Return the health metrics over all processes, and an explanation if the model has collapsed, else None.

        embeddings: (n, d) embeddings of this process for each view; the first two views are used.
        assignments: the summary of the assignments of this process to prototypes, if the method has prototypes.
        """
        views = [collectives.all_gather(view)[:HEALTH_ROWS] for view in embeddings[:2]]
        values = health.measure(*views)
        if assignments is not None:
            whole = Assignments(*(collectives.all_reduce_mean(each) for each in assignments))
            values["assignment_information"] = float(whole.information())
        verdict = self.detector.update(values, dim=views[0].shape[1])
        return {f"health/{name}": value for name, value in values.items()}, verdict

    def act_on_collapse(self, step: int, verdict: str) -> None:
        """Ignore a collapse, warn about it once, or stop the run, as `monitor.on_collapse` requires.

        `verdict` is the explanation of the collapse. To stop the run, TrainingFailed is raised.
        """
        message = f"the representation has probably collapsed at step {step}: {verdict}"
        if self.settings.on_collapse == "stop":
            raise TrainingFailed(message)
        if self.settings.on_collapse == "warn" and not self.has_collapsed:
            self.screen.warn(message)
        self.has_collapsed = True

    def measure_probe(self, step: int) -> dict[str, float]:
        """Run the probe (see `Monitor`) on all processes, and return its scalars.

        Raises TrainingFailed on all processes if features are not finite. The cause is then that the weights are too
        large. The weights themselves are finite, because they were checked before this call.
        """
        assert self.probe is not None
        watchdog.report_progress("the k-NN")
        found, failure = {}, ""
        try:
            found = self.probe()
        except NotFinite as error:
            failure = str(error).partition(":")[0]
        failures = [each for each in collectives.gather_objects(failure) if each]
        if failures:
            raise TrainingFailed(f"after step {step}, {failures[0]}; {self.remedy()}")
        for name, label in (("knn_top1", "k-NN"), ("test_knn_top1", "k-NN (test)")):
            if name in found:
                self.facts[label] = percent(found[name])
        if self.measures_start and (warning := self.knn_drop.warning(step, found)):
            self.screen.warn(warning)
        return found

    def show_pictures(self, step: int, found: dict[str, Tensor]) -> None:
        """Write the pictures `found` (name -> picture) to TensorBoard and to the run directory.

        In the run directory, the file of an earlier picture of the same name is overwritten.
        """
        for name, picture in found.items() if self.writes else ():
            path = self.run_dir / "pictures" / f"{name}.png"
            path.parent.mkdir(exist_ok=True)
            pictures.save(picture, path)
            self.tensorboard.add_image(name, picture, step)

    def check_finite(self) -> None:
        """Raise TrainingFailed if the loss of any process was not finite at any step since the last check."""
        step, means = self.metric_means.bad_step()
        if step >= 0:
            raise TrainingFailed(f"the loss is not finite since step {step} ({means}); {self.remedy()}")

    def check_weights(self, step: int, method: Method) -> None:
        """Raise TrainingFailed if a weight is not finite. Call this method before each checkpoint is saved.

        Each process checks all weights or, if the parameters are sharded, its own shards of the weights. If one process
        finds a non-finite weight, all processes raise.
        """
        finite = {name: collectives.local(weight).isfinite().all() for name, weight in method.named_parameters()}
        if not finite or collectives.all_gather(torch.stack(list(finite.values())).all()[None]).all():
            return
        broken = [name for name, whole in finite.items() if not whole]
        found = [name for names in collectives.gather_objects(broken) for name in names]
        if found:
            raise TrainingFailed(
                f"after step {step}, {len(set(found))} of {len(finite)} weight tensors are not finite, {found[0]} "
                f"among them; {self.remedy()}"
            )

    def warn_of_divergence(self, step: int, method: Method) -> None:
        """Warn once if the root mean square of a weight tensor is above `LARGE_WEIGHTS`."""
        sizes = {name: collectives.local(weight).detach().float() for name, weight in method.named_parameters()}
        roots = {name: values.square().mean().sqrt() for name, values in sizes.items() if values.numel()}
        if self.has_diverged or not roots:
            return
        largest, value = max(
            zip(roots, torch.stack(list(roots.values())).tolist(), strict=True), key=lambda one: one[1]
        )
        if value > LARGE_WEIGHTS:
            self.has_diverged = True
            self.screen.warn(
                f"the run has diverged: after step {step} the weights of {largest} have a root mean square of "
                f"{value:.3g}; the normal range is about 0.01 to 3. {REMEDIES}"
            )

    def remedy(self) -> str:
        """Return the end of an error message: the last checkpoint with finite weights, and the usual remedies."""
        # Leave out checkpoints after `good_step`. They are damaged, which is why the run resumed from an older one.
        saved = [path for path in checkpoint.all_of(self.run_dir) if checkpoint.step_of(path) <= self.good_step]
        kept = f"the last good checkpoint is {saved[-1]}" if saved else "there is no checkpoint yet"
        return f"{kept}. {REMEDIES}"

    def write(self, step: int, line: dict[str, float]) -> None:
        """Write one line of metrics.jsonl and the same scalars to TensorBoard."""
        facts = {"step": step, "epoch": round(step / self.steps_per_epoch, 4), "wall": round(self.seconds(), 3)}
        self.metrics.write({**facts, **line})
        for name, value in line.items():
            if math.isfinite(value):
                self.tensorboard.add_scalar(name, value, step)

    def seconds(self) -> float:
        """Return the seconds of training, including earlier starts of the run."""
        return self.wall + time.perf_counter() - self.start_time

    def synchronize(self) -> None:
        """Flush all files to disk."""
        if self.writes:
            self.metrics.synchronize()
            self.tensorboard.flush()

    def close(self) -> None:
        """Stop the progress display, and close metrics.jsonl and the files of TensorBoard."""
        self.screen.stop()
        if self.writes and hasattr(self, "metrics"):
            with suppress(OSError):  # if the disk is full, the error that ended the run has already been reported
                self.metrics.close()
            if hasattr(self, "tensorboard"):  # missing if metrics.jsonl could not be opened
                with suppress(OSError):
                    self.tensorboard.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor state to save in a checkpoint. The state is identical on all processes."""
        start = {} if self.knn_drop.start is None else {"start_knn": self.knn_drop.start}
        return {"detector": self.detector.state_dict(), "wall": self.seconds(), **start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.detector.load_state_dict(state["detector"])
        self.wall, self.knn_drop.start = state["wall"], state.get("start_knn")


def plain(value: Any) -> bool | int | float | str:
    """Return a configuration value as a type that TensorBoard accepts.

    Numbers and booleans are returned unchanged. Other values are converted to text, in which control characters are
    escaped.
    """
    return value if isinstance(value, (bool, int, float)) else printable(value)
