"""Base class of all evaluation protocols."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Protocol:
    """Base class of a protocol, selected by `protocol=...` and instantiated from its yaml file.

    The commands instantiate only subclasses of this class, so a configuration cannot call arbitrary code.
    """

    def variant(self, usual: Mapping[str, Any]) -> str:
        """Return a suffix for the name of the result if the settings differ from the usual ones, else "".

        Two results with the same suffix have the same name, and the second replaces the first. `usual` holds the
        values of `monitor.*` of the run.
        """
        return ""
