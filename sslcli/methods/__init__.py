"""Self-supervised methods, one file per family of papers.

Apart from each other, the modules of this package import only sslcli.nn, sslcli.distributed and sslcli.errors from
sslcli.
"""
