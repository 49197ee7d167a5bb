"""Self-supervised methods, one file per family of papers.

The modules of this package import no other package of sslcli than sslcli.nn, sslcli.distributed and sslcli.errors.
"""
