"""The commands: each module parses, loads its config, calls one stage and returns the exit status."""
