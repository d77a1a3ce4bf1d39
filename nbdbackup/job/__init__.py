"""Jobs: their states, the backup job, its rate limit and its target."""
