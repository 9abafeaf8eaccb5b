"""A tokenizer that knows the new languages: the model's own with merges learned on their text."""
