"""Console, metrics.jsonl, TensorBoard, pictures, plots and tables."""
