"""Python functions that run the commands in the process of the caller."""
