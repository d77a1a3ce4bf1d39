"""Backup jobs that outlive the daemon: what was asked for and the maps on disk, and putting them back."""
