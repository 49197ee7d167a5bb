"""From a command line to checked configurations, and the errors people get on the way.

Hydra composes; it stops at the first error without a suggestion, accepts any key after a plus sign and knows no
ranges. So every job of a command is composed and checked here, before anything runs and before torch is imported.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_automatic_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sslcli.cli import _schema
from sslcli.cli._signature import parameters_of
from sslcli.errors import EXIT_CONFIG, ConfigError

# A checkout that is not installed has no sslcli.conf.
CONF = "pkg://sslcli.conf" if find_spec("sslcli.conf") else str(Path(__file__).resolve().parents[2] / "conf")
ANSWERED_BY_HYDRA = ("help", "hydra_help", "info", "shell_completion", "experimental_rerun")
NOT_IN_DIGEST = ("run_dir", "name", "resume", "dry_run", "launcher", "hydra.", "trust", "train.max_time")


def command(name: str, run: Callable[[dict[str, Any]], int]) -> int:
    """Compose, check and run what the command line asks for; the exit code."""
    arguments = get_args_parser().parse_args()
    if any(getattr(arguments, flag) for flag in ANSWERED_BY_HYDRA):
        _hand_over(name, lambda config: None)
        return 0
    try:
        jobs = checked_jobs(name, arguments)
        if arguments.cfg:
            _hand_over(name, lambda config: None)
            return 0
        if arguments.multirun:
            from sslcli.cli._sweep import sweep

            return sweep(name, jobs, arguments, _hand_over)
        return run(jobs[0])
    except ConfigError as error:
        print(f"{os.path.basename(sys.argv[0])}: {error}", file=sys.stderr)
        return EXIT_CONFIG


def _hand_over(name: str, task: Callable[[DictConfig], Any]) -> None:
    """Let Hydra answer: help, completion, printing, and multirun with its sweepers and launchers."""
    hydra.main(version_base="1.3", config_path=CONF, config_name=name)(task)()


def checked_jobs(name: str, arguments: Any) -> list[dict[str, Any]]:
    """The resolved, checked configuration of every job, as plain values. Raises ConfigError."""
    name = arguments.config_name or name
    engine = _engine(arguments)
    try:
        overrides = _parsed(engine, arguments.overrides)
        if not arguments.multirun and any(override.is_sweep_override() for override in overrides):
            swept = next(override for override in overrides if override.is_sweep_override())
            raise ConfigError(
                f"{swept.input_line} names several values: add --multirun to run them all, or write a list as key=[a,b]"
            )
        lines = [list(arguments.overrides)]
        if arguments.multirun:
            lines = BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]
        return [_job(engine, name, line) for line in lines]
    finally:
        GlobalHydra.instance().clear()


def _engine(arguments: Any) -> Hydra:
    path = CONF
    if arguments.config_path is not None:
        path = os.path.abspath(arguments.config_path)
    search = create_automatic_config_search_path(None, None, path)
    for folder in (arguments.config_dir, arguments.config_path):
        if folder is not None and not os.path.isdir(folder):
            raise ConfigError(f"the configuration folder {folder} does not exist: give an existing one")
    if arguments.config_dir is not None:
        before_schema = SearchPathQuery(provider="schema")  # which Hydra wants last
        search.prepend("command-line", f"file://{os.path.abspath(arguments.config_dir)}", before_schema)
    return Hydra.create_main_hydra2(task_name="sslcli", config_search_path=search)


def _parsed(engine: Hydra, lines: list[str]) -> list[Override]:
    try:
        return OverridesParser.create(config_loader=engine.config_loader).parse_overrides(lines)
    except HydraException as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"cannot read the command line: {text}. Write key=value, and quote brackets") from error


def _job(engine: Hydra, name: str, lines: list[str]) -> dict[str, Any]:
    overrides = _parsed(engine, lines)
    groups = set(engine.config_loader.list_groups("")) - {"hydra"}
    for override in overrides:
        if override.get_key_element().rpartition(".")[2].rpartition("/")[2] == "_target_":
            trust = next((o.value() for o in overrides if o.get_key_element() == "trust"), [])
            _schema.check_target(override.value(), trust, override.get_key_element())
    choices = [o for o in overrides if _is_choice(o, groups)]
    base = _composed(engine, name, [o.input_line for o in choices if o.input_line], groups)
    for override in overrides:
        if override not in choices and not override.get_key_element().startswith("hydra."):
            _check_path(override, base, groups)
    config = _composed(engine, name, lines, groups)
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise ConfigError(f"cannot resolve the configuration: {str(error).splitlines()[0]}") from error
    assert isinstance(plain, dict)
    job = {str(key): value for key, value in plain.items() if key != "hydra"}
    _schema.check("train" if "train" in job else "eval", job)
    chosen = OmegaConf.to_container(config.hydra.runtime.choices)
    return job | {"_choices_": chosen, "_overrides_": digested(lines), "_lines_": lines}


def _is_choice(override: Override, groups: set[str]) -> bool:
    key = override.get_key_element().split("@")[0].lstrip("+~")
    return key in groups or "/" in key or key == "hydra.searchpath"


def _composed(engine: Hydra, name: str, lines: list[str], groups: set[str]) -> DictConfig:
    try:
        return engine.compose_config(
            config_name=name,
            overrides=lines,
            run_mode=RunMode.RUN,
            from_shell=True,
            validate_sweep_overrides=False,
            with_log_configuration=False,
        )
    except MissingConfigException as error:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        options = list(error.options or ())
        if not options:
            raise ConfigError(" ".join(str(error).split())) from error
        raise ConfigError(
            f"{group}={choice}: there is no such choice.{_schema.nearest(choice, options)} Choices: {', '.join(options)}"
        ) from error
    except HydraException as error:
        raise ConfigError(_readable(error, groups)) from error


def _readable(error: HydraException, groups: set[str]) -> str:
    """Hydra's message in one line, with the groups there are where one was mistaken."""
    text = " ".join((str(error) + (f" ({error.__cause__})" if error.__cause__ else "")).split())
    return f"{text}. Groups: {', '.join(sorted(groups))}"


def _check_path(override: Override, base: DictConfig, groups: set[str]) -> None:
    """Refuse a value for a key that neither the yaml nor the constructor knows, plus sign or not."""
    path = override.get_key_element().lstrip("+~")
    node: Any = base
    walked = ""
    for part in path.split("."):
        if not OmegaConf.is_dict(node):
            return  # inside a list or a value: the types are checked later
        names = {str(name) for name in node} - {"hydra"}
        target = OmegaConf.select(node, "_target_") if walked else None
        parameters = parameters_of(target) if isinstance(target, str) else None
        names |= set(parameters or ())
        if node == base:
            names |= groups
        if part not in names:
            if target is not None and parameters is None:
                return  # not our class: its own signature decides when it is built
            where = f" in {walked}" if walked else ""
            raise ConfigError(
                f"{path}: there is no such key.{_schema.nearest(part, names)} Known{where}: "
                + ", ".join(sorted(names - {"_target_"}))
            )
        node = node.get(part) if part in node else None
        walked = f"{walked}.{part}" if walked else part


def digested(lines: list[str]) -> str:
    """Six hex digits of the overrides that make a run what it is, so that the same command finds its directory."""
    telling = sorted(line for line in lines if not line.lstrip("+~").startswith(NOT_IN_DIGEST))
    return hashlib.sha256("\n".join(telling).encode()).hexdigest()[:6] if telling else ""
