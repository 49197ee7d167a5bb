"""Self-supervised methods, one file per family of papers.

The modules of this package may import from this package, sslcli.nn, sslcli.distributed and sslcli.errors. They import
no other modules of sslcli.
"""
