"""Typed settings, validation of configurations, signatures of classes, and the packages that may be imported."""
