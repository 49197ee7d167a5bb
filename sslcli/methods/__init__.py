"""Self-supervised methods, one file per family of papers.

Outside of this package, its modules import only sslcli.nn, sslcli.distributed and sslcli.errors from sslcli.
"""
