"""The verbs of the command line that are no Trainer run: each a function that a notebook can call."""
