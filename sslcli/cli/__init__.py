"""Entry points of the commands: composition with Hydra, help and messages. Nothing here imports torch."""
