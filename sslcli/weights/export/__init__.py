"""Weights in the layouts of other tools, one tool per module. Each export can be loaded without sslcli."""
