"""Datasets, augmented views and the data loader, which turn image files into batches on the device."""
