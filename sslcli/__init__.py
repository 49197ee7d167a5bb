"""Self-supervised pre-training of vision models."""

import sys

from sslcli.config.moved import MovedModules

__version__ = "0.2.0"

sys.meta_path.insert(0, MovedModules())  # else submodules of a moved package would be loaded twice
