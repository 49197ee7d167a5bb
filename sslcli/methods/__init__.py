"""Self-supervised methods, one file per family of papers.

A method imports only base, nn, losses and distributed from sslcli.
"""
