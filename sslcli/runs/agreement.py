"""Check that all processes of a run have the same configuration, versions and source code.

Processes that differ could deadlock in a collective operation, or train different models without an error.
"""

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

from sslcli.config.comparison import flatten
from sslcli.config.targets import targets
from sslcli.distributed import collectives
from sslcli.errors import ConfigError

# Configuration keys whose values may differ between processes.
MAY_DIFFER = ("about", "device", "trust", "launcher.threads", "dataset.workers")
MAX_SHOWN = 10  # maximum number of differences in a message


def check_agreement(config: dict[str, Any]) -> None:
    """Raise ConfigError on every process unless all processes have the same configuration, versions and source code.

    The message lists the differences between two processes. The first one belongs to the largest group of processes
    that have the same values. The second one is outside of this group.

    Processes first exchange only a digest of configuration, versions and source code. If the digests differ, they also
    exchange the values from which the digests are computed.
    """
    if collectives.world_size() == 1:
        return
    own = fingerprint_items(config)
    digests = collectives.gather_objects(hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    (usual, _), *_ = Counter(digests).most_common(1)
    reference = digests.index(usual)
    gathered = collectives.gather_objects((platform.node(), own))
    host, number = next((host, i) for i, (host, _) in enumerate(gathered) if digests[i] != usual)
    differing = differences(gathered[reference][1], gathered[number][1])
    more = f" and {len(differing) - MAX_SHOWN} more" if len(differing) > MAX_SHOWN else ""
    raise ConfigError(
        f"process {number} (on {host}) differs from process {reference} (on {gathered[reference][0]}); what "
        f"differs: {'; '.join(differing[:MAX_SHOWN])}{more}. Start all with the same command and the same installation"
    )


def fingerprint_items(config: dict[str, Any]) -> dict[str, str]:
    """Return the items that must be equal on all processes, as name -> value.

    The items are configuration values, versions, and a digest of every source file.
    """
    found = {f"{key}": repr(value) for key, value in flatten(config, leave_out=MAY_DIFFER).items()}
    found |= {f"version of {name}": version(name) for name in ("torch", "torchvision")}
    found["version of python"] = platform.python_version()
    for path, name in source_files(target.split(".")[0] for _, target in targets("", config)):
        found[f"file {name}"] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return found


def source_files(packages: Iterable[str]) -> list[tuple[Path, str]]:
    """Return a pair (path, name) for each source file of sslcli and of `packages`, except torch and torchvision.

    A name is the path of the file relative to the folder that contains the package.
    """
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
    """Return the items that differ between two processes, each as `name: usual value -> other value`.

    Args:
        usual: the items (name -> value) of the largest group of processes with equal items, see `fingerprint_items`.
        other: the items of a process outside of this group.
    """
    return [
        f"{name}: {usual.get(name, 'absent')} -> {other.get(name, 'absent')}"
        for name in sorted(usual.keys() | other.keys())
        if usual.get(name) != other.get(name)
    ]
