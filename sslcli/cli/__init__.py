"""The commands: the only code that imports hydra and omegaconf. Nothing here imports torch before a run is built."""
