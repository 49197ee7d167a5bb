"""A run of this process, made from a command line without the command."""

from __future__ import annotations

from pathlib import Path

import torch

from sslcli.config.run_config import RunConfig
from sslcli.engine.loop import train
from sslcli.engine.resume import resume
from sslcli.engine.run import Run
from sslcli.report.console import Screen
from sslcli.runs.assemble import assemble, build_loader
from sslcli.runs.build import build_optimizer
from sslcli.runs.parts import build_parts


def make_run(run_dir: Path, *overrides: str) -> Run:
    """A run of this process, from a command line."""
    from hydra._internal.utils import get_args_parser

    from sslcli.cli.compose import checked_jobs

    small = ["dataset.limit=96", "dataset.test_images=0", "train.batch_size=32", "monitor.knn_every_epochs=0"]
    arguments = get_args_parser().parse_args([*small, "backbone.width=8", *overrides])
    config = RunConfig.from_plain(checked_jobs("train", arguments)[0])
    parts = build_parts(config)
    device = torch.device("cpu")
    loader = build_loader(config, parts, device)
    optimizer, peak = build_optimizer(config, parts.method)
    run_dir.mkdir(parents=True, exist_ok=True)
    return assemble(config, parts, loader, optimizer, peak, run_dir, device, Screen(silent=True))


def finish(run: Run) -> None:
    try:
        train(run, resume(run))
    finally:
        run.stop.close()
        run.monitor.close()
