"""Sharded checkpoints, written by all processes with torch.distributed.checkpoint.

    step-00001234/
        .metadata           index: names and shapes of the tensors, and the location of each shard
        __0_0.distcp ...    the tensors of method and optimizer, one file per process
        rest.pt             all other values, readable with torch.load(weights_only=True)
        SHA256SUMS          checksums of the files above, in the format of sha256sum

A checkpoint can be loaded with any number of processes, including one. Loading executes no code from the files.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from sslcli.distributed import collectives, watchdog
from sslcli.errors import ConfigError, TrainingFailed
from sslcli.system.atomic import sha256, synchronize

INDEX = ".metadata"
REST = "rest.pt"
SUMS = "SHA256SUMS"
PARTS = ("method", "optimizer")  # the tensors below these keys of a state are written in shards
OF_AN_INDEX = (  # an index may contain only classes from these modules
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "pathlib",
    "pathlib._local",
)

Place = tuple[Any, ...]  # path of keys to a tensor in a nested state
Placement = Callable[
    [Place, torch.Size], Tensor | None
]  # (path, shape) of a tensor -> a tensor with the wanted placement, or None if the tensor is not to be sharded
T = TypeVar("T")


class Snapshot:
    """Copy of the state of a run, in main memory. A later training step does not change the copy.

    For a sharded tensor, the copy contains only the shard of this process.

    Args:
        state: nested dictionaries. The tensors in state["method"] and state["optimizer"] may be sharded.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        found: dict[str, Tensor] = {}
        places: dict[str, Place] = {}

        def without_tensors(node: Mapping[Any, Any], place: Place) -> dict[Any, Any]:
            rest = {}
            for key, value in node.items():
                here = (*place, key)
                if isinstance(value, Tensor):
                    name = "/".join(map(str, here))
                    found[name], places[name] = value, here
                else:
                    rest[key] = without_tensors(value, here) if isinstance(value, Mapping) else value
            return rest

        rest = {key: without_tensors(value, (key,)) if key in PARTS else value for key, value in state.items()}
        self.tensors: dict[str, Tensor] = BlockingAsyncStager().stage(found)
        buffer = io.BytesIO()
        torch.save({"state": rest, "places": places}, buffer)
        self.rest = buffer.getvalue()


def write(folder: Path, snapshot: Snapshot, *, group: dist.ProcessGroup) -> None:
    """Write a complete checkpoint and synchronize it to disk (fsync). All processes of `group` must call this function.

    Raises OSError on all processes if one process cannot write.
    """
    on_main(folder.mkdir, group)
    try:
        save(snapshot.tensors, storage_writer=FileSystemWriter(folder), process_group=group)
    except CheckpointException as error:
        raise OSError(reason_of(error)) from error
    mine = sorted(folder.glob(f"__{collectives.rank()}_*"))
    sums = together(lambda: {path.name: sha256(path) for path in mine}, group)

    def complete() -> None:
        (folder / REST).write_bytes(snapshot.rest)
        every = {name: digest for part in sums for name, digest in part.items()}
        every |= {name: sha256(folder / name) for name in (REST, INDEX)}
        (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in every.items()), encoding="utf-8")
        for path in (*folder.iterdir(), folder):
            synchronize(path)

    on_main(complete, group)


def together(act: Callable[[], T], group: dist.ProcessGroup) -> list[T]:
    """Call `act` on every process of `group`. Return the results of all processes in rank order.

    If `act` raises OSError on one process, OSError is raised on all processes.
    """
    watchdog.report_progress()
    mine: tuple[T | None, str] = (None, "")
    try:
        mine = (act(), "")
    except OSError as error:
        mine = (None, str(error))
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    failures = [reason for _, reason in everyone if reason]
    if failures:
        raise OSError(failures[0])
    return [found for found, _ in everyone]


def on_main(act: Callable[[], object], group: dist.ProcessGroup) -> None:
    """Call `act` on the main process while the other processes wait.

    If the call fails, raise OSError on all processes.
    """
    together(lambda: act() if collectives.is_main() else None, group)


def reason_of(error: BaseException) -> str:
    """Return the cause of an error from torch as one line."""
    reasons = [str(cause) for cause, _ in getattr(error, "failures", {}).values()]
    return ((reasons or [str(error)])[0].strip() or type(error).__name__).splitlines()[0]


def read(
    folder: Path, *, device: torch.device, only: Collection[str] = PARTS, like: Placement | None = None
) -> dict[str, Any]:
    """Load the state of a checkpoint. All processes must call this function.

    Args:
        folder: folder of the checkpoint.
        device: device of tensors that are not sharded.
        only: subset of `PARTS`; only the tensors of these parts are loaded.
        like: function that returns, for each entry to shard, a tensor with the wanted sharding. Each process then loads
            only its own shard of the entry. If None, every tensor is loaded whole.

    Raises ConfigError on all processes if one process finds damaged files.
    """
    wrong, index, rest = damage(folder), None, {}
    if not wrong:
        try:
            index = index_of(folder)
            rest = torch.load(folder / REST, map_location=device, weights_only=True)
            wrong = "" if not (reason := _structural_damage(index, rest)) else f"is damaged ({reason})"
        except Exception as error:  # damaged files can cause nearly any type of exception
            wrong = f"cannot be read ({reason_of(error)})"
    found = collectives.gather_objects((folder.name, wrong))
    if len({name for name, _ in found}) > 1:
        raise TrainingFailed(
            f"the processes see different checkpoints in {folder.parent}: run the same command again to resume"
        )
    for _, reason in found:
        if reason:
            raise ConfigError(f"the checkpoint {folder} {reason}")
    assert index is not None
    state: dict[str, Any] = rest["state"]
    places: dict[str, Place] = {name: place for name, place in rest["places"].items() if place[0] in only}
    tensors = {name: empty(index, name, place, device=device, like=like) for name, place in places.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "torch.distributed is disabled", UserWarning
            )  # torch warns if there is no process group, but loading in a single process is intended
            load(tensors, storage_reader=Reader(folder, index))
    except CheckpointException as error:
        raise ConfigError(f"the checkpoint {folder} cannot be read ({reason_of(error)})") from error
    for name, (*above, last) in places.items():
        node = state
        for key in above:
            node = node.setdefault(key, {})
        node[last] = tensors[name]
    return state


def _structural_damage(index: Metadata, rest: Any) -> str:
    """Describe what is wrong with the files rest.pt or .metadata of a checkpoint. Return "" if nothing is wrong.

    index: the index of the checkpoint, from .metadata. It must contain all tensors that rest.pt names.
    rest: the content of rest.pt. It must have the expected structure.
    """
    if (
        not isinstance(rest, dict)
        or not isinstance(rest.get("state"), dict)
        or not isinstance(rest.get("places"), dict)
    ):
        return f"{REST} has no state and places"
    for name, place in rest["places"].items():
        if not isinstance(place, tuple) or len(place) < 2 or place[0] not in PARTS:
            return f"{REST} has the place {place!r}"
        if not isinstance(index.state_dict_metadata.get(name), TensorStorageMetadata):
            return f"{INDEX} has no tensor {name}"
        node = rest["state"]
        for key in place[:-1]:
            node = node.get(key, {})
            if not isinstance(node, dict):
                return f"{REST} has a {type(node).__name__} at {key}"
    return ""


def damage(folder: Path) -> str:
    """Describe damage to files of a checkpoint. Return "" if this process finds none.

    The files are divided among the processes. Each process verifies only its own part of the files.
    """
    try:
        sums = {name: digest for digest, name in map(str.split, (folder / SUMS).read_text("utf-8").splitlines())}
    except (OSError, ValueError) as error:
        return f"has no {SUMS} that can be read ({reason_of(error)})"
    if not {REST, INDEX} <= sums.keys():
        return f"is not complete: {SUMS} was truncated"
    for name in sorted(sums)[collectives.rank() :: collectives.world_size()]:
        try:
            intact = sha256(folder / Path(name).name) == sums[name]
        except OSError as error:
            return f"cannot be read ({name}: {error.strerror})"
        if not intact:
            return f"does not match its checksums: {name} was truncated or altered"
    return ""


def empty(index: Metadata, name: str, place: Place, *, device: torch.device, like: Placement | None) -> Tensor:
    """Return an uninitialized tensor for the tensor `name` of a checkpoint.

    Args:
        index: the index of the checkpoint, see `index_of`.
        name: name of the tensor in the index.
        place: path of keys to the tensor in the nested dictionary that the checkpoint contains.
        device: device of the result if it is not sharded.
        like: function of `place` and the shape. If it returns a tensor, the result gets the device and sharding of that
            tensor. If `like` or its result is None, the result is not sharded.
    """
    entry = index.state_dict_metadata[name]
    assert isinstance(entry, TensorStorageMetadata)
    dtype, model = entry.properties.dtype, None if like is None else like(place, entry.size)
    if model is None:
        return torch.empty(entry.size, dtype=dtype, device=device)
    return torch.empty_like(model, dtype=dtype, requires_grad=False)


def spread(state: dict[Any, Any], like: Placement, place: Place = ()) -> dict[Any, Any]:
    """Return a copy of a state in which some tensors are sharded. `like` selects these tensors.

    `like` is called with the path and the shape of a tensor. If it returns a sharded tensor, the tensor in the state is
    sharded in the same way.

    place: path of keys to `state` in the whole checkpoint; () = `state` is the whole checkpoint.
    """

    def placed(value: Any, here: Place) -> Any:
        if isinstance(value, dict):
            return spread(value, like, here)
        model = like(here, value.shape) if isinstance(value, Tensor) and len(here) > 1 else None
        if not isinstance(model, DTensor):
            return value
        return distribute_tensor(value.contiguous(), model.device_mesh, model.placements)

    return {key: placed(value, (*place, key)) for key, value in state.items()}


class Reader(FileSystemReader):
    """Reader of a sharded checkpoint whose index is already loaded (see `index_of`).

    The base class would load the index itself, in a way that can execute code from the file.
    """

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self.index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index


def index_of(folder: Path) -> Metadata:
    """Load the index of a checkpoint: names and shapes of its tensors, and the location of each shard.

    Raises UnpicklingError if the file contains a class that no index needs.
    """
    with (folder / INDEX).open("rb") as file:
        index = _Plain(file).load()
    if not isinstance(index, Metadata):
        raise pickle.UnpicklingError(f"{INDEX} contains a {type(index).__name__}")
    return index


class _Plain(pickle.Unpickler):
    """Unpickler that loads only the classes allowed in the index of a checkpoint (see `index_of`)."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.serialization", "_get_layout"):
            return super().find_class(module, name)
        if "." not in name and module in (*OF_AN_INDEX, "torch"):
            found = super().find_class(module, name)
            own = isinstance(found, type) and found.__module__ == module and module != "torch"
            if own or found is torch.Size or isinstance(found, torch.dtype):
                return found
        raise pickle.UnpicklingError(f"it contains {module}.{name}, which is not allowed in an index")
