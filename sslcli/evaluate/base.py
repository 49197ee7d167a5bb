"""Base class of all evaluation protocols."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Protocol:
    """One way to measure a network, chosen by `protocol=...` and built from its yaml.

    The commands build classes that derive from this one and no others, so that a configuration cannot name anything
    else to be called.
    """

    def variant(self, usual: Mapping[str, Any]) -> str:
        """What in the settings makes the number another quantity, for the name of its result; "" for the usual one.

        Two results share a name, and the second replaces the first, where this is equal. `usual` has the values of
        `monitor.*` of the run.
        """
        return ""
