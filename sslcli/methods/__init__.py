"""Self-supervised methods, one file per family of papers.

The modules of this package import each other, sslcli.nn, sslcli.distributed and sslcli.errors. They import no other
modules of sslcli.
"""
