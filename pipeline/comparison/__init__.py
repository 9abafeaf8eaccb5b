"""Several runs side by side: what each gained and forgot, and what it cost."""
