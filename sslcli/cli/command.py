"""Main function of all commands: parse arguments, compose and validate configurations, and start the run or sweep."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from sslcli.cli.compose import CONF, checked_jobs
from sslcli.cli.help import MULTIRUNS
from sslcli.cli.hydra_errors import print_note
from sslcli.config.moved import current_override
from sslcli.config.paths import absolute, quote_home_paths
from sslcli.errors import EXIT_CONFIG, EXIT_INTERRUPTED, ConfigError, print_error, print_unexpected
from sslcli.report.terminal import guard_terminal
from sslcli.sweeps.job import stop_with_sweep
from sslcli.system.cpu import limit_spinning

ANSWERED_BY_HYDRA = ("hydra_help", "info", "shell_completion")


def command(name: str, run: Callable[[dict[str, Any]], int]) -> int:
    """Compose and validate the configuration of the command line, pass it to `run`, and return the exit code.

    `name` is train, eval, embed or export. With `--multirun`, a sweep is started and `run` is not called.
    """
    guard_terminal()
    stop_with_sweep()
    limit_spinning()
    try:
        arguments = read_arguments(name)
        if any(getattr(arguments, flag) for flag in ANSWERED_BY_HYDRA):
            if arguments.hydra_help:  # Hydra's help sets up logging from the configuration: validate it first
                checked_jobs(name, arguments)
            hand_over(name, lambda config: None, arguments)
            return 0
        if arguments.multirun and name not in MULTIRUNS:
            raise ConfigError(f"ssl-{name} does not support --multirun: run it once for each value")
        jobs = checked_jobs(name, arguments)
        if arguments.cfg:
            hand_over(name, lambda config: None, arguments)
            return 0
        if arguments.multirun:
            return sweep_jobs(name, jobs, arguments)
        return run(jobs[0])
    except ConfigError as error:
        print_error(name, error)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        print_error(name, "interrupted")
        return EXIT_INTERRUPTED
    except Exception as error:
        return print_unexpected(name, error)


def read_arguments(name: str, line: Sequence[str] | None = None) -> Namespace:
    """Parse flags and overrides in any order. `line` are the arguments of the command; None = those of this process.

    Raises ConfigError for unknown flags.

    `name` is train, eval, embed or export. Old names in overrides are replaced by current names.
    """
    arguments, unknown = get_args_parser().parse_known_intermixed_args(line)
    if unknown:
        raise ConfigError(
            f"there is no flag {unknown[0]}: settings are written key=value, as in train.epochs=5; see --help"
        )
    if arguments.experimental_rerun:
        raise ConfigError(
            "--experimental-rerun would unpickle a file, which can execute any code: run the command of the run again "
            "(overrides.txt in its directory)"
        )
    for flag in ("config_dir", "config_path"):
        if getattr(arguments, flag) is not None:
            setattr(arguments, flag, absolute(getattr(arguments, flag)))
    own = None if arguments.config_dir is None else Path(arguments.config_dir)
    arguments.overrides = [_with_current_names(name, quote_home_paths(line), own) for line in arguments.overrides]
    if arguments.multirun and arguments.cfg:
        raise ConfigError("--cfg prints one configuration, but --multirun composes several: remove one of the flags")
    return arguments


def _with_current_names(name: str, line: str, own_folder: Path | None) -> str:
    """Return an override in which names of version 0.1 are replaced by current names.

    If the override contains such an old name, a note is printed. `own_folder` is the folder that the user passes with
    `--config-dir`. The names of yaml files in this folder are not replaced.
    """
    current = current_override(line, own_folder=own_folder)
    if current != line:
        print_note(name, f"{line} is now {current}")
    return current


def hand_over(name: str, task: Callable[[DictConfig], Any], arguments: Namespace) -> None:
    """Run Hydra's main function with the configuration file `name`.

    Hydra's main function composes the configuration and calls `task` with it. If a flag requests shell completion,
    Hydra's own help, or printing of the configuration, it does this instead, and `task` is not called.
    """
    # Hydra parses sys.argv, and accepts overrides only if there are no flags between them.
    sys.argv = [sys.argv[0], *arguments.overrides, *flags_of(arguments)]
    hydra.main(version_base="1.3", config_path=CONF, config_name=name)(task)()


def flags_of(arguments: Namespace, *, only: tuple[str, ...] = ()) -> list[str]:
    """Return the flags of the command line as text, such as `--config-dir=DIR`.

    `arguments` are the parsed arguments. If `only` is not empty, return only the flags with these names.
    """
    flags = []
    for name, value in vars(arguments).items():
        if name == "overrides" or not value or (only and name not in only):
            continue
        flags.append(f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}"))
    return flags


def sweep_jobs(name: str, jobs: list[dict[str, Any]], arguments: Namespace) -> int:
    """Run the validated jobs of `--multirun`, and return the exit code.

    `name` is train or eval. `jobs` are the configurations of the jobs, as plain values (dicts, lists, strings and
    numbers).
    """
    from sslcli.cli import hydra_sweeps
    from sslcli.sweeps.sweep import CommandLine, run_sweep

    line = CommandLine(
        overrides=tuple(arguments.overrides),
        flags=tuple(flags_of(arguments, only=("config_dir", "config_path", "config_name"))),
        launch=partial(hydra_sweeps.launch_jobs, arguments),
        draw=partial(hydra_sweeps.draw_jobs, arguments),
    )
    return run_sweep(name, jobs, line)
