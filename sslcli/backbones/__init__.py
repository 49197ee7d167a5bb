"""Backbones: networks from images to features.

Each family of backbones has one module here, and yaml files `conf/backbone/<name>.yaml`.
"""

from __future__ import annotations

from sslcli.backbones.base import Backbone
from sslcli.backbones.wrap import as_backbone

__all__ = ["Backbone", "as_backbone"]
