"""Trial of a run before its first step: draws every view once, and runs the loss once on a copy of the method."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from sslcli.config.settings import MonitorSettings
from sslcli.data.crops import Request
from sslcli.data.loader import Loader
from sslcli.data.sources.base import Source
from sslcli.data.views.views import Views
from sslcli.distributed import collectives
from sslcli.distributed.devices import unchanged_random_state
from sslcli.engine import precision
from sslcli.errors import ConfigError, class_name, first_line, is_out_of_memory, summary, user_code
from sslcli.methods.base import Batch, Method
from sslcli.nn.modes import evaluating
from sslcli.nn.padding import recorded_weights
from sslcli.runs.contract import check_embeddings, check_scalars, guard_warning

COUNT = 2  # images of a trial; BatchNorm needs two
MAX_NAMED = 3  # number of parameters that a warning names
MAX_PADDING_FRACTION = 0.25  # of the convolution weights; above, a warning says that the images are too small


@dataclass(frozen=True)
class Trial:
    """Result of a trial, which computes the loss once before the first step of a run.

    Attributes:
        unused: names of the trainable parameters on which the loss does not depend.
        has_embeddings: True if `forward` set `embeddings`, which the collapse detection needs.
        padding_fraction: fraction of the convolution weights of the backbone that multiply only padding.
    """

    unused: tuple[str, ...] = ()
    has_embeddings: bool = True
    padding_fraction: float = 0.0


def trial(loader: Loader, method: Method, device: torch.device, precision_name: str) -> Trial:
    """Compute the loss once on a copy of `method` on `device`, from the views of a few images of random pixels.

    The method, its buffers and all random states stay unchanged. No other process takes part.

    If the memory is too small, an error is raised for which `is_out_of_memory` returns True. A training step needs at
    least as much memory.

    Raises ConfigError if a view cannot be drawn, if the method does not accept the views, or if `forward` does not
    return what the training loop needs. The message names the key to change, or the class of the method.
    """
    with _unchanged_random_state(device), collectives.single_process():
        batch = draw(loader, COUNT, device)
        try:
            return _examine(loader, method, batch, precision_name)
        except ConfigError:
            # A method may need more than `COUNT` images. Therefore the trial is repeated with a whole micro-batch,
            # unless the micro-batch is not larger than `COUNT`.
            if loader.micro_batch_size <= COUNT:
                raise
        return _examine(loader, method, draw(loader, loader.micro_batch_size, device), precision_name)


def _examine(loader: Loader, method: Method, batch: Batch, precision_name: str) -> Trial:
    try:
        copied = copy.deepcopy(method)
    except Exception as error:  # a module of the user holds something that cannot be copied, such as a lock
        if is_out_of_memory(error):
            raise
        return Trial()
    copied.to(batch.index.device).train()
    with (
        user_code("computing the loss", explain=partial(_explain, loader, method)),
        precision.autocast(batch.index.device, precision_name),
        recorded_weights(copied.backbone) as weights,
    ):
        copied.before_step(0.0, 0.0)
        scalars: object = copied(batch)
    reached = parameters_of(check_scalars(scalars, type(method)))
    check_embeddings(copied)
    unused = [name for name, p in copied.named_parameters() if p.requires_grad and id(p) not in reached]
    return Trial(tuple(unused), len(copied.embeddings) > 0, weights.padding_fraction())


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
        with user_code("drawing views", explain=partial(_explain_view, loader, numbers[0])):
            crop = loader.crop(images.to(loader.device), loader.key(request), numbers)
            loader.color(request, crop, numbers)
        crops.append(crop)
    return loader.batch(request, crops, positions).to(device)


def _explain_view(loader: Loader, number: int, error: BaseException) -> str:
    """Return the message for view `number` of a run. Drawing this view raised `error`."""
    views = loader.views
    entry, size = views.entry_number(number), views.sizes(loader.source.image_size)[number]
    return (
        f"views.views.{entry} cannot be drawn at {size} pixels: {first_line(error)}. "
        f"Change views.views.{entry} ({views.entries[entry].describe()})"
    )


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
    """Freeze the parameters `names`, so that DistributedDataParallel does not wait for their gradients."""
    for name in names:
        method.get_parameter(name).requires_grad_(False)


def trial_warnings(found: Trial, method: Method, monitor: MonitorSettings) -> list[str]:
    """Return the warnings after a trial with the result `found`.

    The warnings are about unused parameters, weights that multiply only padding, and missing embeddings. Without
    embeddings, collapse is not detected. If `monitor` turns the detection of collapse off, missing embeddings cause no
    warning.
    """
    warnings = [unused_warning(found.unused)] if found.unused else []
    if found.padding_fraction > MAX_PADDING_FRACTION:
        warnings.append(padding_warning(found.padding_fraction))
    detects = monitor.health_every_steps > 0 and monitor.on_collapse != "ignore"
    return warnings if found.has_embeddings or not detects else [*warnings, guard_warning(method)]


def unused_warning(names: Sequence[str]) -> str:
    """Return the warning about parameters on which the loss does not depend."""
    listed = ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
    return (
        f"the loss does not depend on {len(names)} trainable parameters, so they keep their initial values: {listed}. "
        "Remove these layers, or use their output in the loss"
    )


def padding_warning(fraction: float) -> str:
    """Return the warning about a backbone in which this fraction of the convolution weights multiplies only padding."""
    return (
        f"{fraction:.0%} of the convolution weights of the backbone multiply only padding, because its last feature "
        "maps have too few pixels. These weights are not trained. Set a larger dataset.image_size (with cpc and "
        "cpc_v2, larger patches: method.min_patch_size=16, or a smaller method.grid), or choose a backbone with "
        "smaller strides, for example a resnet with backbone.stem=cifar"
    )


def check_accepts(method: Method, views: Views, source: Source) -> None:
    """Raise ConfigError unless the backbone accepts images of every size that a run uses.

    These are the size of the evaluation images and the size of each view. The message names the size and the key to
    change.
    """
    first = next(method.backbone.parameters(), torch.empty(0))
    for size in dict.fromkeys([source.image_size, *views.sizes(source.image_size)]):
        images = torch.zeros(2, source.channels, size, size, device=first.device)
        with (
            user_code("computing features", explain=partial(_explain_size, method, views, source, size)),
            evaluating(method.backbone),
            torch.no_grad(),
        ):
            method.backbone(images)


def _explain_size(method: Method, views: Views, source: Source, size: int, error: BaseException) -> str:
    """Return the message for a backbone that raises `error` on images of `size` pixels."""
    if size == source.image_size:
        key = "dataset.image_size, or the image size of the backbone"
    else:
        entry = views.entry_number(views.sizes(source.image_size).index(size))
        key = f"views.views.{entry}.size to null or to a size that the backbone accepts"
    return (
        f"backbone: {type(method.backbone).__name__} does not accept images with {source.channels} channels and "
        f"{size}x{size} pixels: {first_line(error)}. Change {key}"
    )


def _explain(loader: Loader, method: Method, error: BaseException) -> str:
    """Return the message for a method that raises `error` on the views of a run."""
    check_accepts(method, loader.views, loader.source)
    sizes = ", ".join(map(str, dict.fromkeys(loader.views.sizes(loader.source.image_size))))
    return (
        f"method: {class_name(type(method))} cannot compute its loss on views of {sizes} pixels ({summary(error)}). "
        "Change dataset.image_size, views=... or backbone=..., or correct the code of the method"
    )


@contextmanager
def _unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Restore the random states of torch, numpy and Python after the `with` block."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with unchanged_random_state(device):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
