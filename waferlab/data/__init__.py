"""Wafer maps: read or generated, split without leaks, served in batches."""
