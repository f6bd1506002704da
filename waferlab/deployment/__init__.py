"""The file that leaves: exported, checked, registered, run."""
