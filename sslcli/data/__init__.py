"""Datasets, augmented views and the loader: from image files to batches on the device."""
