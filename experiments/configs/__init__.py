"""Named experiments, one small file each; the docstring says the command, the runtime and the number to expect."""
