"""Backbones: networks from images to features, one file per family, each with `conf/backbone/<name>.yaml` files."""

from __future__ import annotations

from sslcli.backbones.base import Backbone
from sslcli.backbones.wrap import as_backbone

__all__ = ["Backbone", "as_backbone"]
