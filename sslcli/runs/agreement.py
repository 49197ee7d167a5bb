"""All processes of a run must have the same configuration and the same code, else they wait for each other in vain."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sslcli.config.targets import targets
from sslcli.distributed import collectives
from sslcli.errors import ConfigError
from sslcli.runs.directory import flat

MAY_DIFFER = ("about", "device", "trust", "launcher.threads", "dataset.workers")  # between the processes of one run
SHOWN = 10  # differences a message lists


def check_agreement(config: dict[str, Any]) -> None:
    """Raise ConfigError on every process, naming who differs and in what, unless all are the same.

    Digests are compared first; only where they differ are the particulars sent.
    """
    if collectives.world_size() == 1:
        return
    mine = particulars(config)
    digests = collectives.gather_objects(hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    (usual, _), *_ = Counter(digests).most_common(1)
    model = digests.index(usual)
    everyone = collectives.gather_objects((platform.node(), mine))
    host, number = next((host, i) for i, (host, _) in enumerate(everyone) if digests[i] != usual)
    differing = differences(everyone[model][1], everyone[number][1])
    more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    raise ConfigError(
        f"process {number} (on {host}) is not of the same run as process {model} (on {everyone[model][0]}); what "
        f"differs: {'; '.join(differing[:SHOWN])}{more}. Start all with the same command and the same installation"
    )


def particulars(config: dict[str, Any]) -> dict[str, str]:
    """What must agree: values of the configuration by dotted key, versions, and a digest of every source file."""
    found = {f"{key}": repr(value) for key, value in flat(config, leave_out=MAY_DIFFER).items()}
    found |= {f"version of {name}": version(name) for name in ("torch", "torchvision")}
    found["version of python"] = platform.python_version()
    for path, name in sources(target.split(".")[0] for _, target in targets("", config)):
        found[f"file {name}"] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return found


def sources(packages: Iterable[str]) -> list[tuple[Path, str]]:
    """The source files of sslcli and of these packages, torch's excepted, with their names from the package on."""
    found = []
    for package in sorted({"sslcli", *packages} - {"torch", "torchvision"}):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        file = Path(spec.origin)
        files = sorted(file.parent.rglob("*.py")) if spec.submodule_search_locations else [file]
        top = file.parents[1] if spec.submodule_search_locations else file.parent
        found += [(path, str(path.relative_to(top))) for path in files]
    return found


def differences(usual: dict[str, str], other: dict[str, str]) -> list[str]:
    """What differs, `name: value of the one -> value of the other`."""
    return [
        f"{name}: {usual.get(name, 'not there')} -> {other.get(name, 'not there')}"
        for name in sorted(usual.keys() | other.keys())
        if usual.get(name) != other.get(name)
    ]
