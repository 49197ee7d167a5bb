"""From a set of image files to batches of augmented views on the device."""
