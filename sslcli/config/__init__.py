"""Typed settings, validation of configurations, signatures of classes, trusted packages, and old names."""
