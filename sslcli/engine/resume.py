"""Saving the state of a run in a checkpoint, and resuming from a checkpoint.

Only this module sets and reads the fields of a checkpoint.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from sslcli.distributed import collectives, watchdog
from sslcli.engine import checkpoint, fsdp
from sslcli.engine.checkpoint_check import check_state
from sslcli.engine.checkpoint_writer import Writer
from sslcli.engine.optim import load_optimizer
from sslcli.engine.phases import Phase, phases_from, plan
from sslcli.engine.run import Run
from sslcli.errors import TrainingFailed, with_traceback
from sslcli.kernels import library
from sslcli.weights.files import with_noise_states
from sslcli.weights.renamed import with_current_names


def save_good(run: Run, step: int, writer: Writer) -> None:
    """Write a checkpoint after `step` steps. Raises TrainingFailed instead if a weight or a loss is not finite."""
    run.monitor.check_finite()
    run.monitor.check_weights(step, run.method)
    save(run, step, writer)


def save(run: Run, step: int, writer: Writer) -> None:
    """Write a checkpoint after `step` steps. All processes must call this function.

    If the parameters are not sharded, rank 0 writes the whole checkpoint. If the parameters are sharded, each rank
    writes its own shards in the background, and rank 0 writes all other values.
    """
    watchdog.report_progress(f"{watchdog.CHECKPOINT} after step {step}")
    mine = {"rng": checkpoint.rng_state(run.device), "metric_means": run.monitor.metric_means.state_dict()}
    processes = collectives.gather_objects(mine)
    run.monitor.synchronize()
    state = {
        "step": step,
        "loader": run.loader.position(step),
        "method": run.method.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "processes": processes,
        "monitor": run.monitor.state_dict(),
        "config": run.config,
        "environment": environment_fingerprint(run),
    }
    if len(run.phases) > 1:
        state["phases"] = [asdict(phase) for phase in run.phases]
    writer.save(state, keep=run.settings.keep)
    run.monitor.good_step = step


def resume(run: Run) -> int:
    """Load the newest checkpoint into the run. Return its step, or 0 if there is no checkpoint."""
    like = fsdp.placement(run.method, run.optimizer) if fsdp.is_sharded(run.method) else None
    # Some tensors of a checkpoint are float64, which MPS does not support. The load functions below copy the others.
    device = torch.device("cpu") if run.device.type == "mps" else run.device
    state = checkpoint.load_newest(
        run.run_dir, device=device, warn=run.screen.warn, like=like, check=partial(check_state, run)
    )
    run.method.train()
    found = collectives.gather_objects(0 if state is None else state["step"])
    if len(set(found)) > 1:
        raise TrainingFailed(
            f"the processes found checkpoints of different steps ({', '.join(map(str, found))}) in {run.run_dir}: "
            "every process must see the same directory; check it, and run the same command again to resume"
        )
    if state is None:
        return 0
    run.loader.check_position(state["step"], state.get("loader"))
    try:
        restore(run, state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        path = checkpoint.folder(run.run_dir) / f"step-{state['step']:08d}"
        raise with_traceback(f"the checkpoint {path} does not fit this method or backbone: {error}", error) from error
    before, now = _stored_environment(state), environment_fingerprint(run)
    changed = [f"{name} {before[name]} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    run.monitor.good_step = state["step"]
    if changed:
        run.screen.warn(f"images and views are the same, but results will not be bit-identical: {', '.join(changed)}")
    run.screen.say(f"continuing from step {state['step']:,} in {run.run_dir}")
    resume_phases(run, state)
    return int(state["step"])


def _stored_environment(state: dict[str, Any]) -> dict[str, Any]:
    """Return the environment in which a checkpoint was saved, see `environment_fingerprint`.

    Checkpoints of versions without train.compile=auto and train.deterministic=auto contain only the settings.
    """
    settings = (state.get("config") or {}).get("train", {})
    stored: dict[str, Any] = {
        "deterministic kernels": settings.get("deterministic", True),
        "torch.compile": settings.get("compile", False),
    }
    return {**stored, **state["environment"]}


def restore(run: Run, state: dict[str, Any]) -> None:
    """Load the content `state` of a checkpoint into the objects of a run.

    If the content does not fit these objects, exceptions of nearly any type may be raised.
    """
    own = run.method.state_dict()
    run.method.load_state_dict(with_noise_states(with_current_names(state["method"], own), own))
    load_optimizer(run.optimizer, state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    run.monitor.load_state_dict(state["monitor"])
    processes = state["processes"]
    if len(processes) == collectives.world_size():
        checkpoint.set_rng_state(processes[collectives.rank()]["rng"], run.device)
        run.monitor.metric_means.load_state_dict(processes[collectives.rank()]["metric_means"])
    else:  # a different world size does not change images and views, but it changes torch's random numbers
        run.monitor.metric_means.load_mean([process["metric_means"] for process in processes])
        torch.manual_seed(run.seed + 1_000_003 * (collectives.rank() + 1) + state["step"])


def resume_phases(run: Run, state: dict[str, Any]) -> None:
    """Set the phases of a run that resumes. If an extension begins, print how the schedules change.

    A run has one phase, and each extension of the run adds a phase, see `sslcli.engine.phases`. If `config.yaml`
    contains several phases, they are used. Otherwise, the phases in the checkpoint `state` are used: if the user has
    deleted `config.yaml`, only the checkpoint contains the phases of earlier extensions.
    """
    if len(run.phases) == 1 and (stored := phases_of_checkpoint(state, run.loader.steps_per_epoch)):
        run.phases = plan(stored, step=state["step"], total=run.total_steps, extend=run.settings.extend)
    if len(run.phases) > 1 and state["step"] <= run.phases[-1].start:
        for line in describe_extension(run):
            run.screen.say(line)


def phases_of_checkpoint(state: dict[str, Any], steps_per_epoch: int) -> tuple[Phase, ...]:
    """Return the phases in a checkpoint. A run has one phase, and each extension of the run adds a phase.

    A run that was never extended stores no phases. Its only phase is derived from the configuration in the checkpoint.
    If the checkpoint has no configuration, the result is ().
    """
    if "phases" in state:
        return phases_from(state["phases"])
    train = (state.get("config") or {}).get("train", {})
    if "epochs" not in train:
        return ()
    return (Phase(0, train.get("max_steps") or train["epochs"] * steps_per_epoch, "rescale"),)


def describe_extension(run: Run) -> list[str]:
    """Return the lines that describe the last extension of a run to more steps.

    They show the lengths, the learning rates and the other scheduled values before and after the extension.
    """
    before, last = run.phases[-2:]
    per_epoch = run.loader.steps_per_epoch
    old, new = run.lr_at(max(0, last.start - 1)), run.lr_at(last.start)
    lines = [
        f"extended from {before.total:,} to {last.total:,} steps ({before.total / per_epoch:g} to "
        f"{last.total / per_epoch:g} epochs), train.extend={last.extend}",
        f"at step {last.start:,}, the learning rate changes from {old:.4g} to {new:.4g} (peak {run.peak_lr:.4g})",
    ]
    values = zip(
        *(run.method.scheduled(run.progress_at(step)).items() for step in (max(0, last.start - 1), last.start)),
        strict=True,
    )
    lines += [f"at step {last.start:,}, {name} changes from {one:.4g} to {two:.4g}" for (name, one), (_, two) in values]
    if last.extend != "restart" and last.extend != "rescale" and new < 0.01 * run.peak_lr:
        lines.append(
            f"train.extend={last.extend} keeps the learning rate of the end of the schedule, which is below 1 % of the "
            "peak, so the added steps change little: train.extend=rescale or restart raises it"
        )
    return lines


def environment_fingerprint(run: Run) -> dict[str, str | int]:
    """Return the properties of the environment that can change the last bits of the results: name -> value.

    The results also depend on the configuration, which is not returned.
    """
    return {
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type,
        "precision": run.precision,
        "processes": collectives.world_size(),
        "threads": torch.get_num_threads(),
        "deterministic kernels": torch.are_deterministic_algorithms_enabled(),
        "torch.compile": run.compiled,
        "compiled parts": ", ".join(library.present()) or "none",
    }
