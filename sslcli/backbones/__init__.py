"""Networks from images to features. One family a file; `conf/backbone/<word>.yaml` names each."""

from __future__ import annotations

from sslcli.backbones.base import Backbone
from sslcli.backbones.wrap import as_backbone

__all__ = ["Backbone", "as_backbone"]
