"""Bitmaps: one bit for each cluster of a device."""
