"""The command line: `nbdbackup VERB ...`."""
