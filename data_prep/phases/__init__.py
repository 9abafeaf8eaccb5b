"""The phases of a preparation, a file each."""
