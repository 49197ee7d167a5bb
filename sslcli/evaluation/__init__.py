"""Evaluation protocols, one per file, with the features and label subsets they share."""
