"""What was read, kept and dropped, as figures, text and a page."""
