"""The course of a command: arguments, composition, validation, and the run or sweep they ask for."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from sslcli.cli.compose import CONF, checked_jobs
from sslcli.cli.help import MULTIRUNS
from sslcli.cli.messages import print_note
from sslcli.config.moved import current_override
from sslcli.config.paths import absolute, quoted_home
from sslcli.errors import EXIT_CONFIG, EXIT_INTERRUPTED, ConfigError
from sslcli.report.terminal import guard_terminal
from sslcli.sweeps.job import stop_with_sweep
from sslcli.system.cpu import sleep_soon

ANSWERED_BY_HYDRA = ("hydra_help", "info", "shell_completion")


def command(name: str, run: Callable[[dict[str, Any]], int]) -> int:
    """Compose, check and run what the command line asks for; the exit code."""
    guard_terminal()
    stop_with_sweep()
    sleep_soon()
    try:
        arguments = read_arguments(name)
        if any(getattr(arguments, flag) for flag in ANSWERED_BY_HYDRA):
            if arguments.hydra_help:  # sets up logging as the configuration says
                checked_jobs(name, arguments)
            hand_over(name, lambda config: None, arguments)
            return 0
        if arguments.multirun and name not in MULTIRUNS:
            raise ConfigError(f"ssl-{name} has no --multirun: call it once for each value")
        jobs = checked_jobs(name, arguments)
        if arguments.cfg:
            hand_over(name, lambda config: None, arguments)
            return 0
        if arguments.multirun:
            return sweep_jobs(name, jobs, arguments)
        return run(jobs[0])
    except ConfigError as error:
        print(f"ssl-{name}: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        print(f"ssl-{name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def read_arguments(name: str) -> Namespace:
    """Flags and overrides in any order. Raises ConfigError for what is neither."""
    arguments, strange = get_args_parser().parse_known_intermixed_args()
    if strange:
        raise ConfigError(
            f"there is no flag {strange[0]}: settings are written key=value, as in train.epochs=5; see --help"
        )
    if arguments.experimental_rerun:
        raise ConfigError(
            "--experimental-rerun would unpickle a file, which can run any code: start the run's own command again "
            "(overrides.txt in its directory)"
        )
    for flag in ("config_dir", "config_path"):
        if getattr(arguments, flag) is not None:
            setattr(arguments, flag, absolute(getattr(arguments, flag)))
    arguments.overrides = [_with_current_names(name, quoted_home(line)) for line in arguments.overrides]
    if arguments.multirun and arguments.cfg:
        raise ConfigError("--cfg shows one configuration and --multirun makes several: leave one of them out")
    return arguments


def _with_current_names(name: str, line: str) -> str:
    """Return an override with today's names, and print a note if it had old ones."""
    current = current_override(line)
    if current != line:
        print_note(name, f"{line} is now {current}")
    return current


def hand_over(name: str, task: Callable[[DictConfig], Any], arguments: Namespace) -> None:
    """Let Hydra answer: completion, printing, and multirun with its sweepers and launchers."""
    # Hydra reads the command line itself, and only if all overrides stand together.
    sys.argv = [sys.argv[0], *arguments.overrides, *flags_of(arguments)]
    hydra.main(version_base="1.3", config_path=CONF, config_name=name)(task)()


def flags_of(arguments: Namespace, *, only: tuple[str, ...] = ()) -> list[str]:
    """The flags that were given, as a command line writes them."""
    flags = []
    for name, value in vars(arguments).items():
        if name == "overrides" or not value or (only and name not in only):
            continue
        flags.append(f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}"))
    return flags


def sweep_jobs(name: str, jobs: list[dict[str, Any]], arguments: Namespace) -> int:
    """Run the validated jobs of `--multirun`; return the exit code."""
    from sslcli.cli import hydra_sweeps
    from sslcli.sweeps.sweep import CommandLine, sweep

    line = CommandLine(
        overrides=tuple(arguments.overrides),
        flags=tuple(flags_of(arguments, only=("config_dir", "config_path", "config_name"))),
        launch=partial(hydra_sweeps.carry, arguments),
        draw=partial(hydra_sweeps.draw, arguments),
    )
    return sweep(name, jobs, line)
