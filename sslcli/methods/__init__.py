"""Self-supervised methods, one file per family of papers.

A method imports only sslcli.methods, sslcli.nn, sslcli.distributed and sslcli.errors from sslcli.
"""
