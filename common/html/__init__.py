"""Pages that load nothing from elsewhere: frame, style and script."""
