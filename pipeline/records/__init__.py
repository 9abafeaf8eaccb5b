"""What a run writes and reads again: a class per file, and the files' names, once."""
