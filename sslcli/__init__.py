"""sslcli: self-supervised pre-training of vision models from the command line."""

__version__ = "0.1.0"
