"""The two papers, a section a file."""
