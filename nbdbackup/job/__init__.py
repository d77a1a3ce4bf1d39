"""Jobs: their states and transactions, the backup job, its sync modes, error policies, pace and target."""
