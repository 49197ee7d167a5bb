"""Self-supervised methods, one file per family of papers.

Of the packages of sslcli, a method imports only sslcli.methods, sslcli.nn, sslcli.distributed and sslcli.errors.
"""
