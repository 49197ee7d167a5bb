"""Datasets in tar or parquet shards: formats, index, reader, and the streaming source."""
