"""Networks from images to features, one file per family; each has a `conf/backbone/<name>.yaml`."""

from __future__ import annotations

from sslcli.backbones.base import Backbone
from sslcli.backbones.wrap import as_backbone

__all__ = ["Backbone", "as_backbone"]
