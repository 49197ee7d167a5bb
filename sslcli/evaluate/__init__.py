"""Evaluation protocols, one a file: each takes a `FeatureSet` or a run and returns a JSON-able dict."""
