"""From a command line to checked configurations, and the errors people get on the way.

Hydra composes; it stops at the first error without a suggestion, accepts any key after a plus sign and knows no
ranges. So every job of a command is composed and checked here, before anything runs and before torch is imported.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path, get_args_parser
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sslcli.cli import messages
from sslcli.cli.help import MULTIRUNS, folder_of_conf
from sslcli.cli.hydra_node import SECTIONS, check_hydra, resolved
from sslcli.config import schema
from sslcli.config.own_dataset import change_of, is_change
from sslcli.config.paths import absolute, absolute_paths, quoted_home
from sslcli.config.plugins import conf_of_plugins
from sslcli.config.settings import NEUTRAL
from sslcli.errors import EXIT_CONFIG, EXIT_INTERRUPTED, ConfigError
from sslcli.report.terminal import guard_terminal
from sslcli.sweeps.job import stop_with_sweep
from sslcli.system.idle_threads import sleep_soon
from sslcli.system.interpreter import find_trusted

# A checkout that is not installed has no sslcli.conf.
CONF = "pkg://sslcli.conf" if folder_of_conf(installed=True) else str(folder_of_conf())
ANSWERED_BY_HYDRA = ("hydra_help", "info", "shell_completion")


class ConfOfPlugins(SearchPathPlugin):
    """Lets Hydra find the yaml files of announced packages, after ours."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for package, folder in conf_of_plugins().items():
            search_path.append(f"sslcli.plugins: {package}", f"file://{folder}")


Plugins.instance().register(ConfOfPlugins)


def command(name: str, run: Callable[[dict[str, Any]], int]) -> int:
    """Compose, check and run what the command line asks for; the exit code."""
    guard_terminal()
    stop_with_sweep()
    sleep_soon()
    try:
        arguments = read_arguments()
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
            from sslcli.sweeps.sweep import sweep

            return sweep(name, jobs, arguments)
        return run(jobs[0])
    except ConfigError as error:
        print(f"ssl-{name}: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        print(f"ssl-{name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def read_arguments() -> Namespace:
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
    arguments.overrides = [quoted_home(line) for line in arguments.overrides]
    if arguments.multirun and arguments.cfg:
        raise ConfigError("--cfg shows one configuration and --multirun makes several: leave one of them out")
    return arguments


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


def checked_jobs(name: str, arguments: Namespace) -> list[dict[str, Any]]:
    """The resolved, checked configuration of every job, as plain values. Raises ConfigError."""
    engine = engine_of(arguments)
    try:
        overrides = _parsed(engine, arguments.overrides)
        swept = [override for override in overrides if override.is_sweep_override()]
        if swept and not arguments.multirun:
            raise ConfigError(
                f"{swept[0].input_line} names several values: add --multirun to run them all, write a list as "
                "key=[a,b], or quote a text that holds a comma, as in key='\"a,b\"'"
            )
        file = arguments.config_name or name
        if arguments.multirun:
            first = _job(engine, name, file, _first(overrides))
            overrides = [*_parsed(engine, [f"{key}={value}" for key, value in first["_params_"].items()]), *overrides]
            lines = _samples(overrides) if first["_choices_"]["hydra/sweeper"] != "basic" else _points(overrides)
        else:
            lines = [_first(overrides)]
        return [_job(engine, name, file, line) for line in lines]
    finally:
        GlobalHydra.instance().clear()


def _first(overrides: list[Override]) -> list[str]:
    """The overrides of one job: the first value of each that is swept."""
    return [_values(each)[0] if each.is_sweep_override() else each.input_line or "" for each in overrides]


def _values(override: Override) -> list[str]:
    """An override with each value it takes in turn; with the ends of an interval, which has no end of values."""
    key = override.get_key_element()
    if override.is_interval_sweep():
        interval = override.value()
        assert isinstance(interval, IntervalSweep)
        return [f"{key}={interval.start}", f"{key}={interval.end}"]
    try:
        return [f"{key}={value}" for value in override.sweep_string_iterator()]
    except (HydraException, ValueError) as error:
        raise ConfigError(f"cannot tell the jobs of --multirun: {messages.one_line(error)}") from error


def _points(overrides: list[Override]) -> list[list[str]]:
    """The overrides of each job: every combination of values."""
    try:
        return BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]
    except (HydraException, ValueError) as error:
        raise ConfigError(f"cannot tell the jobs of --multirun: {messages.one_line(error)}") from error


def _samples(overrides: list[Override]) -> list[list[str]]:
    """Overrides of jobs as a sweeper may draw them while it runs: each value once, beside the first of the others."""
    lines = [_first(overrides)]
    for place, override in enumerate(overrides):
        if override.is_sweep_override():
            lines += [[*lines[0][:place], value, *lines[0][place + 1 :]] for value in _values(override)[1:]]
    return lines


def engine_of(arguments: Namespace) -> Hydra:
    """What composes configurations. Raises ConfigError."""
    for flag, folder in (("--config-dir", arguments.config_dir), ("--config-path", arguments.config_path)):
        if folder is not None and not os.path.isdir(folder):
            raise ConfigError(f"{flag} is {folder}, but there is no such folder: give an existing one")
    path = CONF if arguments.config_path is None else arguments.config_path
    search = create_automatic_config_search_path(None, None, path)
    if arguments.config_dir is not None:
        before_schema = SearchPathQuery(provider="schema")  # which Hydra wants last
        search.prepend("command-line", f"file://{arguments.config_dir}", before_schema)
    return Hydra.create_main_hydra2(task_name="sslcli", config_search_path=search)


def _parsed(engine: Hydra, lines: list[str]) -> list[Override]:
    parser = OverridesParser.create(config_loader=engine.config_loader)
    found = []
    for line in lines:
        try:
            override = parser.parse_overrides([line])[0]
        except HydraException as error:
            raise ConfigError(messages.unreadable(line, error)) from error
        if not override.key_or_group:
            raise ConfigError(messages.unreadable(line))
        found.append(override)
    return found


def _job(engine: Hydra, command: str, config_name: str, lines: list[str]) -> dict[str, Any]:
    overrides = _parsed(engine, lines)
    messages.check_choices(command, overrides, engine)
    changes = _changes_of_dataset(engine, command, config_name, overrides)
    overrides = [each for each in overrides if each not in changes]
    try:
        config = _composed(engine, command, config_name, [each.input_line or "" for each in overrides])
    except ConfigError as error:
        choices = [override.input_line or "" for override in overrides if messages.is_choice(override, engine)]
        base = _composed(engine, command, config_name, choices)
        find_trusted(
            base.get("trust") or [str(each.input_line) for each in overrides if messages.group_of(each) == "trust"]
        )
        messages.check_overrides(command, [o for o in overrides if o.input_line not in choices], base)
        raise error
    messages.check_deletions(overrides, config)
    job = _plain(config)
    find_trusted(job.get("trust") or [])
    schema.check(command, job)
    own = config.hydra
    for node in (OmegaConf.to_container(own, resolve=False), resolved(own, only=SECTIONS)):
        check_hydra(node, job.get("trust", []))
    return absolute_paths(command, job) | {
        "_choices_": OmegaConf.to_container(own.runtime.choices),
        "_overrides_": digested(lines),
        "_lines_": lines,
        "_params_": dict(OmegaConf.select(own, "sweeper.params") or {}),
        "_sweep_dir_": own.sweep.dir,
        "_run_dir_": job.get("run_dir"),  # as it was written, which names the jobs of a sweep
        "_dataset_changes_": [change_of(each) for each in changes],
    }


def _changes_of_dataset(engine: Hydra, command: str, config_name: str, overrides: list[Override]) -> list[Override]:
    """The overrides that change the image set of a run, where none is chosen: Hydra has nothing to apply them to."""
    changes = [each for each in overrides if command == "eval" and is_change(each)]
    if not changes or any(messages.group_of(each) == "dataset" for each in overrides):
        return []
    if any(messages.group_of(each) == "weights" for each in overrides):
        raise ConfigError(
            f"{messages.group_of(changes[0])} is given, but weights=FILE has no image set of its own: choose one with "
            "dataset=..."
        )
    others = [each.input_line or "" for each in overrides if each not in changes]
    return changes if _composed(engine, command, config_name, others).get("dataset") is None else []


def _composed(engine: Hydra, command: str, name: str, lines: list[str]) -> DictConfig:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*is not available", category=UserWarning)
            return engine.compose_config(
                config_name=name,
                overrides=lines,
                run_mode=RunMode.RUN,
                from_shell=True,
                validate_sweep_overrides=False,
                with_log_configuration=False,
            )
    except MissingConfigException as error:
        raise ConfigError(messages.missing(error)) from error
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"a configuration file cannot be read: {messages.one_line(error)}") from error
    except (HydraException, OmegaConfBaseException, TypeError, ValueError) as error:
        raise ConfigError(messages.readable(error, groups=schema.GROUPS[command])) from error
    except UserWarning as error:
        raise ConfigError(f"hydra.searchpath names a folder that is not there: {messages.one_line(error)}") from error


def _plain(config: DictConfig) -> dict[str, Any]:
    """All but Hydra's own part, with every interpolation resolved."""
    try:
        own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
        plain = OmegaConf.to_container(own, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        where = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{where}cannot resolve the value: {str(error).splitlines()[0]}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def digested(lines: list[str]) -> str:
    """Six hex digits of the overrides that make a run what it is, so that the same command finds its directory."""
    found = telling(lines)
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:6] if found else ""


def telling(lines: Iterable[str]) -> list[str]:
    """The overrides that make a run what it is, in an order of their own."""
    return sorted(line for line in lines if not _is_neutral(line.partition("=")[0].lstrip("+~")))


def _is_neutral(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in (*NEUTRAL, "hydra")) or key.startswith("hydra/")
