"""Dataset, views and method of a run, built from its configuration, and checks that they fit each other."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sslcli.backbones.base import Backbone
from sslcli.config.run_config import RunConfig
from sslcli.data.sources.base import Source
from sslcli.data.views.views import Views
from sslcli.distributed import processes
from sslcli.errors import ConfigError, first_line, user_code
from sslcli.methods.base import Method
from sslcli.nn.modes import evaluating
from sslcli.runs.build import build_method, build_source, build_views, check_classes
from sslcli.runs.contract import check_members
from sslcli.runs.teacher import TeacherOfRun
from sslcli.runs.trial import check_accepts


@dataclass(frozen=True)
class Parts:
    """Dataset, views and method of a run."""

    source: Source
    views: Views
    method: Method
    teacher: TeacherOfRun | None = None  # of a method that distills


def build_parts(config: RunConfig, *, initialize: Callable[[Backbone], None] | None = None) -> Parts:
    """Build and return dataset, views and method. Raises ConfigError if they are incompatible.

    `initialize` is described in `build_method`.
    """
    trust = config.trust
    groups = ("dataset", "views", "method", "backbone", "optimizer")
    check_classes({group: config.values[group] for group in groups}, trust=trust)
    with warnings.catch_warnings():
        if processes.number() > 0:  # rank 0 prints the same warnings about the files
            warnings.simplefilter("ignore", UserWarning)
        source = build_source(config.dataset, trust=trust)
    views = build_views(config.views, trust=trust)
    teacher = None if config.teacher is None else TeacherOfRun(config)
    network = None if teacher is None else teacher.build(source, views)
    method = build_method(
        config.method,
        config.backbone,
        seed=config.seed,
        image_size=source.image_size,
        num_images=len(source.splits["train"]),
        trust=trust,
        initialize=initialize,
        teacher_network=network,
        teacher_features=None if network is None else network.num_features,
    )
    check_members(method)
    if method.num_views != views.num_views:
        remedy = f", or set method.num_views={views.num_views}" if "num_views" in config.method else ""
        raise ConfigError(
            f"method needs {method.num_views} view{'s' * (method.num_views != 1)} per image, but the chosen views give "
            f"{views.num_views}: choose others with views=...{remedy}"
        )
    if method.color_spaces and views.color_space not in method.color_spaces:
        raise ConfigError(
            f"method splits the channels of {' or '.join(method.color_spaces)} images, but views.color_space is "
            f"{views.color_space}: choose views=lab, or set other parts with method.modalities={{name: channels, ...}}"
        )
    check_views(method, views, source)
    check_channels(method, source)
    return Parts(source, views, method, teacher)


def check_views(method: Method, views: Views, source: Source) -> None:
    """Raise ConfigError unless the method accepts the views.

    Random images are used for the check. They have the sizes of the views and the number of channels of the dataset.
    """
    examples = []
    for number, size in enumerate(views.sizes(source.image_size)):
        try:
            images = torch.rand(2, source.channels, size, size, generator=torch.Generator().manual_seed(0)).round()
            examples.append(views.finish(images, mean=source.mean, std=source.std))
        except ValueError as error:
            raise ConfigError(f"views: {error}") from error
        except (RuntimeError, MemoryError) as error:  # torch raises RuntimeError if there is too little memory
            entry = views.entry_number(number)
            key = "dataset.image_size" if views.views[number].size is None else f"views.views.{entry}.size"
            raise ConfigError(
                f"{key} is {size}, but such images do not fit into memory: choose a smaller size"
            ) from error

    def explain(error: BaseException) -> str:
        check_accepts(method, views, source)
        return f"method: {type(method).__name__} does not accept the views: {first_line(error)}"

    with (
        user_code("checking views", explain=explain),
        evaluating(method),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        try:
            method.check_views(examples)
        except ValueError as error:
            raise ConfigError(f"method: {error}") from error


def check_channels(method: Method, source: Source) -> None:
    """Raise ConfigError unless the method can compute features of images with the shape of the source's images."""

    def explain(error: BaseException) -> str:
        return (
            f"backbone: it does not accept the images of {source.name}, which have {source.channels} channels and "
            f"{source.image_size}x{source.image_size} pixels: {first_line(error)}. Set backbone.in_channels to the "
            "number of channels, and dataset.image_size to a size that the backbone accepts"
        )

    black = torch.zeros(2, source.channels, source.image_size, source.image_size)
    with (
        user_code("computing features", explain=explain),
        evaluating(method),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
    ):
        method.features(black)
