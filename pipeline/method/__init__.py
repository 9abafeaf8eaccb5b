"""The two papers: one file per section, and one per stage of training."""
