"""Construction of objects from a validated configuration. Only this module imports the class of a `_target_`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar, get_args, get_type_hints

import torch
from torch import nn
from torch.optim import Optimizer

from sslcli.backbones.base import Backbone
from sslcli.backbones.wrap import as_backbone
from sslcli.config.run_config import Node, RunConfig
from sslcli.config.schema import check_has_target
from sslcli.config.targets import check_target, trusted_packages
from sslcli.data.sources.base import Source
from sslcli.data.views.views import Views
from sslcli.engine import fsdp
from sslcli.engine.optim import freeze_backbone, parameter_groups
from sslcli.errors import ConfigError, TrainingFailed, nearest, summary, user_code, with_traceback
from sslcli.evaluation.base import Protocol
from sslcli.kernels.winograd import use_winograd
from sslcli.methods.base import Method
from sslcli.nn import schedule

Net = TypeVar("Net", bound=nn.Module)
Built = TypeVar("Built")
BASES: dict[str, type] = {  # required base class of each group
    "method": Method,
    "dataset": Source,
    "backbone": nn.Module,
    "views": Views,
    "optimizer": Optimizer,
    "protocol": Protocol,
}
# Exceptions of constructors that reject a value. If a size is negative or too large, torch raises RuntimeError or
# OverflowError.
REJECTIONS = (ValueError, TypeError, RuntimeError, OverflowError)
CONTRACTS = (Method, Source, nn.Module, Optimizer, Protocol, Backbone)  # abstract base classes, which are not built


def find_class(target: str, *, base: type[Built], trust: list[str], where: str) -> type[Built]:
    """Return the class that a `_target_` names, without creating an instance.

    Args:
        target: the dotted name of a class.
        base: required base class. It prevents a configuration from calling arbitrary code.
        trust: trusted packages in addition to sslcli, torch.optim and plug-ins.
        where: the key of the `_target_`, for messages.

    Raises ConfigError in three cases: the name does not exist, its package is not trusted, or the object is not a class
    derived from `base`.
    """
    check_target(target, trust, where)
    module_name, _, name = target.rpartition(".")
    owner = import_owner(module_name, f"{where} is {target!r}")
    try:
        found = getattr(owner, name)
    except AttributeError as error:
        known = [n for n, kind in vars(owner).items() if isinstance(kind, type) and issubclass(kind, base)]
        classes = ", ".join(n for n in known if not n.startswith("_")) or "none"
        raise ConfigError(
            f"{where} is {target!r}, but {module_name} has no {name}.{nearest(name, known)} Its classes for this "
            f"setting: {classes}"
        ) from error
    module = getattr(found, "__module__", "")
    # A trusted module may import os or subprocess, so check that the object is also defined in a trusted package.
    if not callable(found) or not any(f"{module}.".startswith(f"{package}.") for package in trusted_packages(trust)):
        raise ConfigError(f"{where} is {target!r}, but that is not a class of a trusted package")
    check_class(found, target, base=base, where=where)
    return found  # type: ignore[no-any-return]


def import_owner(name: str, setting: str) -> ModuleType:
    """Import and return the module `name`.

    Raises ConfigError if the import fails. The message starts with `setting`, the setting that names the module.
    """
    try:
        with user_code(
            f"importing {name}",
            explain=lambda error: f"{setting}, but {name} cannot be imported ({summary(error)})",
            passes=lambda error: isinstance(error, ModuleNotFoundError),
        ):
            return import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{setting}, but {error.name} is neither installed nor in the current directory") from error


def check_class(found: Any, target: str, *, base: type, where: str) -> None:
    """Raise ConfigError unless `found` is a class derived from `base`. Abstract base classes of sslcli are rejected.

    `target` is the dotted name of `found`, and `where` is the key of the `_target_`, for messages.
    """
    required = f"{base.__module__}.{base.__qualname__}"
    if not isinstance(found, type):
        raise ConfigError(
            f"{where} is {target!r}, which is a function, but it must be a class derived from {required}: write a "
            "class that calls the function"
        )
    if not issubclass(found, base):
        raise ConfigError(f"{where} is {target!r}, but it must be a class derived from {required}")
    if found in CONTRACTS:
        raise ConfigError(f"{where} is {target!r}, which is an abstract base class: choose one of its subclasses")


def build(node: dict[str, Any], *, base: type[Built], trust: list[str], where: str, **arguments: Any) -> Built:
    """Return an instance of the class that a node of the configuration names.

    node: mapping with the key `_target_`, the dotted name of a class. The other keys are keyword arguments of the
        constructor. If the value of a keyword is also a node, it is built first. The class of this inner node must be
        the class in the annotation of the keyword, or a subclass of that class.
    base, trust, where: as for `find_class`.
    arguments: further keyword arguments of the constructor.

    Raises ConfigError if a keyword is unknown or the constructor rejects a value.
    """
    check_has_target(where, node)
    target = find_class(node["_target_"], base=base, trust=trust, where=f"{where}._target_")
    values: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, dict) and "_target_" in value:
            values[name] = build_inner(target, name, value, trust=trust, where=f"{where}.{name}")
        elif name != "_target_":
            values[name] = value
    parameters = inspect.signature(target).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in values:
            if name not in parameters:
                raise ConfigError(
                    f"{where}.{name}: {node['_target_']} has no such parameter.{nearest(name, parameters)} "
                    f"Its parameters are: {', '.join(parameters)}"
                )
    try:
        with user_code(f"building {where}", passes=lambda error: isinstance(error, REJECTIONS)):
            return target(**values, **arguments)
    except (ConfigError, TrainingFailed):
        raise
    except ValueError as error:  # the documented way to reject a value, so it needs no traceback
        raise ConfigError(f"{where}: {error}") from error
    except REJECTIONS as error:
        raise with_traceback(f"{where}: {error}", error) from error


def build_inner(owner: type, name: str, node: dict[str, Any], *, trust: list[str], where: str) -> Any:
    """Build the instance that `node` describes, as a constructor argument of the class `owner`. Return the instance.

    `name` is the name of the argument. `_target_` of `node` names the class of the instance. This class must match the
    annotation of the argument, see `build`. `where` is the dotted key of `node`, for messages.
    """
    allowed = annotated_classes(owner, name)
    if not allowed:
        raise ConfigError(
            f"{where} has a _target_, but the parameter {name} of {owner.__qualname__} has no annotation with a class: "
            f"annotate it, as in {name}: MyClass"
        )
    base = allowed[-1]
    for option in allowed[:-1]:
        with suppress(ConfigError):
            find_class(node["_target_"], base=option, trust=trust, where=where)
            base = option
            break
    return build(node, base=base, trust=trust, where=where)


def annotated_classes(owner: type, name: str) -> list[type]:
    """Return the classes in the annotation of the constructor's parameter `name` of class `owner`.

    The types of plain yaml values are left out. If there is no annotation, the result is [].
    """
    for kind in owner.__mro__:
        try:
            init: Any = kind.__init__  # type: ignore[misc]
            # Resolve only this annotation. A dataclass also has the annotations of its base classes, and these may use
            # names that the module of the dataclass does not import.
            alone = SimpleNamespace(__annotations__={name: init.__annotations__[name]})
            annotation = get_type_hints(alone, globalns=init.__globals__)[name]
        except (NameError, TypeError, AttributeError, KeyError):  # the name is imported only for type checkers
            continue
        if annotation is not None:
            options = get_args(annotation) or (annotation,)
            return [o for o in options if isinstance(o, type) and o.__module__ not in ("builtins", "typing")]
    return []


def check_classes(nodes: Mapping[str, Any], *, trust: list[str]) -> None:
    """Raise ConfigError unless the chosen class of each config group is derived from the base class of the group.

    Nothing is built. `nodes` maps a group, such as "method", to its node with the key `_target_`.
    """
    for group, node in nodes.items():
        check_has_target(group, node)
        find_class(node["_target_"], base=BASES[group], trust=trust, where=f"{group}._target_")


def build_source(node: Node, *, trust: list[str]) -> Source:
    """Build and return the dataset. `node` contains its settings, see `build`."""
    return build(node, base=Source, trust=trust, where="dataset")


def build_views(node: Node, *, trust: list[str]) -> Views:
    """Build and return the views. `node` is the mapping of the settings in the config group `views`, see `build`."""
    return build(node, base=Views, trust=trust, where="views")


def build_backbone(node: Node, *, image_size: int, trust: list[str]) -> Backbone:
    """Build and return the backbone. `node` contains its settings, see `build`.

    If the class of the backbone does not declare the number of features, a forward pass determines this number. The
    images of the forward pass have sides of `image_size` pixels.
    """
    module = build(node, base=nn.Module, trust=trust, where="backbone")
    try:
        return as_backbone(module, image_size=image_size, in_channels=node.get("in_channels", 3))
    except (ValueError, RuntimeError) as error:
        raise with_traceback(f"backbone: {error}", error) from error


def build_method(
    node: Node,
    backbone_node: Node,
    *,
    seed: int,
    image_size: int,
    num_images: int,
    trust: list[str],
    initialize: Callable[[Backbone], None] | None = None,
    teacher_network: nn.Module | None = None,
    teacher_features: int | None = None,
) -> Method:
    """Build and return the method with its backbone. The weights are initialized from `seed`.

    `node` and `backbone_node` are the settings of the method and of the backbone. `image_size` is the side of the
    images in pixels, and `num_images` is the number of training images. `trust` is described in `find_class`.
    `initialize` loads other weights into the backbone, before the method copies it for a momentum encoder.
    `teacher_network` and its number of features are arguments of methods that distill. Evaluation has no teacher.
    """
    torch.manual_seed(seed)
    backbone = build_backbone(backbone_node, image_size=image_size, trust=trust)
    if initialize is not None:
        initialize(backbone)
    target = find_class(node["_target_"], base=Method, trust=trust, where="method._target_")
    channels = backbone_node.get("in_channels", 3)
    known = {"backbone": backbone, "num_images": num_images, "image_size": image_size, "channels": channels}
    known |= {"teacher_network": teacher_network, "teacher_features": teacher_features}
    parameters = inspect.signature(target).parameters
    if ("teacher_features" in parameters) != (teacher_features is not None):
        raise ConfigError(
            f"teacher is null, but {target.__name__} needs a teacher: set teacher=FILE, run:DIR or timm:NAME"
            if teacher_features is None
            else f"teacher is set, but {target.__name__} has no teacher: remove it, or choose method=distill"
        )
    arguments = {name: value for name, value in known.items() if name == "backbone" or name in parameters}
    return accelerate(build(node, base=Method, trust=trust, where="method", **arguments))


def accelerate(net: Net) -> Net:
    """Convert a network in place to channels-last memory format and Winograd convolutions, and return the network.

    Convolutions that do not support Winograd are not converted.
    """
    use_winograd(net)
    return net.to(memory_format=torch.channels_last)


def build_optimizer(config: RunConfig, method: Method) -> tuple[Optimizer, float]:
    """Return the optimizer over the method's parameter groups, and the peak learning rate.

    The peak learning rate is optimizer.lr scaled to the batch size. train.lr_scaling selects the scaling rule.
    """
    node, train = config.optimizer, config.train
    for name in ("lr", "weight_decay"):
        value = node.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ConfigError(f"optimizer.{name} is {value!r}, but it must be a number of at least 0")
    if train.final_weight_decay is not None and "weight_decay" not in node:
        raise ConfigError(
            f"train.final_weight_decay is {train.final_weight_decay}, but the optimizer {node['_target_']} has no "
            "weight_decay to start from: set optimizer.weight_decay, or train.final_weight_decay=null"
        )
    peak = schedule.scale_lr(node["lr"], batch_size=train.batch_size, rule=train.lr_scaling)
    groups = parameter_groups(
        method, weight_decay=node.get("weight_decay", 0.0), decay_norm_and_bias=train.decay_norm_and_bias
    )
    if train.freeze_backbone_epochs:
        groups = freeze_backbone(groups, method, epochs=train.freeze_backbone_epochs)
    arguments = node | {"lr": peak}
    if node.get("fused") and fsdp.is_sharded(method):
        arguments["fused"] = None  # torch has no fused SGD for sharded parameters; with None, torch chooses
    optimizer = build(arguments, base=Optimizer, trust=config.trust, where="optimizer", params=groups)
    return optimizer, peak
