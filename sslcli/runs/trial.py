"""Trial of a run before its first step: draws every view once, and runs the loss once on a copy of the method."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from sslcli.data.crops import Request
from sslcli.data.loader import Loader
from sslcli.data.sources.base import Source
from sslcli.data.views.views import Views
from sslcli.distributed import collectives
from sslcli.engine import precision
from sslcli.errors import ConfigError
from sslcli.methods.base import Batch, Method
from sslcli.nn.modes import evaluating

COUNT = 2  # images of a trial; BatchNorm needs two
MAX_NAMED = 3  # number of parameters that a warning names


def trial(loader: Loader, method: Method, device: torch.device, precision_name: str) -> list[str]:
    """Return the names of the trainable parameters on which the loss does not depend.

    The loss is computed on a copy of `method` on `device`, from the views of a few random images. The method, its
    buffers and all random states stay unchanged, and no other process takes part.

    Raises ConfigError if a view cannot be drawn, if the method does not accept the views, or if the loss has no
    gradient. The message names the key to change.
    """
    try:
        with _unchanged_random_state(device), collectives.single_process():
            try:
                return _unused(loader, method, device, precision_name, COUNT)
            except _MethodError:
                # A method may need more images than `COUNT`. Therefore, only a failure with a real micro-batch is an
                # error.
                if loader.micro_batch_size <= COUNT:
                    raise
                return _unused(loader, method, device, precision_name, loader.micro_batch_size)
    except torch.OutOfMemoryError:  # the first step reports the lack of memory
        return []
    except _MethodError as error:
        raise ConfigError(_explain(loader, method, error.cause)) from error.cause


class _MethodError(Exception):
    """Raised if the method raises the exception `cause`."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause


def _unused(loader: Loader, method: Method, device: torch.device, precision_name: str, count: int) -> list[str]:
    batch = draw(loader, count, device)
    try:
        copied = copy.deepcopy(method).to(device).train()
    except (TypeError, RuntimeError):  # a module of the user holds something that cannot be copied, such as a lock
        return []
    try:
        with precision.autocast(device, precision_name):
            scalars = copied(batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # code of the user can raise any exception
        raise _MethodError(error) from error
    reached = parameters_of(check_scalars(scalars, type(method).__name__))
    return [name for name, p in copied.named_parameters() if p.requires_grad and id(p) not in reached]


def draw(loader: Loader, count: int, device: torch.device) -> Batch:
    """Return a batch of `count` images of random pixels. Every view is drawn once for each image.

    No image of the dataset is read, because a read may never end if the file system hangs.

    Raises ConfigError if a view cannot be drawn. The message names the entry in `views.views`.
    """
    source, views = loader.source, loader.views
    try:
        views.check_sizes(source.image_size)
    except ValueError as error:
        raise ConfigError(f"{error}: change it, or set a larger size") from error
    index = torch.arange(count) % len(source.splits["train"])
    positions = source.splits["train"][index]
    shape = (count, source.channels, source.image_size, source.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    request = Request(index, torch.zeros_like(index), torch.zeros_like(index, dtype=torch.bool))
    crops: list[Tensor] = []
    for numbers in views.groups:
        try:
            crop = loader.crop(images.to(loader.device), loader.key(request), numbers)
            loader.color(request, crop, numbers)
        except Exception as error:  # a view operation of the user can raise any exception
            entry, size = views.entry_number(numbers[0]), views.sizes(source.image_size)[numbers[0]]
            raise ConfigError(
                f"views.views.{entry} cannot be drawn at {size} pixels: {first_line(error)}. "
                f"Change views.views.{entry} ({views.entries[entry].describe()})"
            ) from error
        crops.append(crop)
    return loader.batch(request, crops, positions).to(device)


def check_scalars(scalars: object, name: str) -> Tensor:
    """Return the loss in `scalars`, the output of a method named `name`. Raises ConfigError if it is not valid."""
    if not isinstance(scalars, Mapping) or not isinstance(scalars.get("loss"), Tensor):
        has = (
            f"a dictionary with the keys {', '.join(scalars)}" if isinstance(scalars, Mapping) else repr(type(scalars))
        )
        raise ConfigError(
            f"forward of {name} returned {has}, but it must return a dictionary whose entry 'loss' is a tensor"
        )
    loss: Tensor = scalars["loss"]
    if loss.numel() != 1:
        raise ConfigError(
            f"the loss of {name} has the shape {tuple(loss.shape)}, but it must be one number: return its mean"
        )
    if not loss.requires_grad:
        raise ConfigError(
            f"the loss of {name} depends on no trainable parameter, so nothing would be trained: do not detach the "
            "loss, and do not freeze all parameters"
        )
    return loss


def parameters_of(loss: Tensor) -> set[int]:
    """Return the `id` of each leaf tensor on which `loss` depends, as found in the graph of autograd."""
    found: set[int] = set()
    visited: set[object] = set()
    open_nodes = [loss.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        variable = getattr(node, "variable", None)  # only nodes that accumulate a gradient have a variable
        if variable is not None:
            found.add(id(variable))
        open_nodes += [next_node for next_node, _ in node.next_functions]
    return found


def freeze(method: nn.Module, names: Sequence[str]) -> None:
    """Freeze the named parameters, so that DistributedDataParallel does not wait for their gradients."""
    for name in names:
        method.get_parameter(name).requires_grad_(False)


def unused_warning(names: Sequence[str]) -> str:
    """Return the warning about parameters on which the loss does not depend."""
    listed = ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
    return (
        f"the loss does not depend on {len(names)} trainable parameters, so they keep their initial values: {listed}. "
        "Remove these layers, or use their output in the loss"
    )


def check_accepts(method: Method, views: Views, source: Source) -> None:
    """Raise ConfigError unless the backbone accepts the images of the source at the sizes of evaluation and of views.

    The message names the size and the key to change.
    """
    sizes = dict.fromkeys([source.image_size, *views.sizes(source.image_size)])
    for size in sizes:
        error = _rejection(method.backbone, source.channels, size)
        if error is None:
            continue
        if size == source.image_size:
            key = "dataset.image_size, or the image size of the backbone"
        else:
            entry = views.entry_number(views.sizes(source.image_size).index(size))
            key = f"views.views.{entry}.size to null or to a size that the backbone accepts"
        raise ConfigError(
            f"backbone: {type(method.backbone).__name__} does not accept images with {source.channels} channels and "
            f"{size}x{size} pixels: {first_line(error)}. Change {key}"
        ) from error


def _rejection(backbone: nn.Module, channels: int, size: int) -> Exception | None:
    """Return the exception of the backbone for two black images, or None if it accepts them."""
    first = next(backbone.parameters(), torch.empty(0))
    images = torch.zeros(2, channels, size, size, device=first.device)
    try:
        with evaluating(backbone), torch.no_grad():
            backbone(images)
    except Exception as error:  # code of the user can raise any exception
        return error
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error message without the final period, or the class of an error without message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _explain(loader: Loader, method: Method, error: BaseException) -> str:
    """Return the message for a method that raises `error` on the views of a run."""
    try:
        check_accepts(method, loader.views, loader.source)
    except ConfigError as rejection:
        return str(rejection)
    sizes = ", ".join(map(str, dict.fromkeys(loader.views.sizes(loader.source.image_size))))
    return (
        f"method: {type(method).__name__} cannot compute its loss on views of {sizes} pixels: {type(error).__name__}: "
        f"{first_line(error)}. Change dataset.image_size, views=... or backbone=..."
    )


@contextmanager
def _unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Restore the random states of torch, numpy and Python after the `with` block."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
