"""Base class of all evaluation protocols."""

from __future__ import annotations


class Protocol:
    """One way to measure a network, chosen by `protocol=...` and built from its yaml.

    The commands build classes that derive from this one and no others, so that a configuration cannot name anything
    else to be called.
    """
