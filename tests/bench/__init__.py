"""Speed, side by side with the field's own servers: `python -m tests.bench` (see README.md)."""
