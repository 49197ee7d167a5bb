"""Datasets, augmented views and the data loader. The loader turns image files into batches on the device."""
