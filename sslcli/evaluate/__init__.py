"""Evaluation protocols, one per file. Each takes a `FeatureSet` or a run and returns a JSON-serializable dict."""
