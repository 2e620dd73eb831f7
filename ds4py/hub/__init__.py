"""Model files from a Hugging Face hub: what to fetch, how, and when a directory is a model."""
