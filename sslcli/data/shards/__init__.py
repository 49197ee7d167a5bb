"""Datasets in tar or parquet shards: shard formats, indices, the reader, and the streaming dataset."""
