"""A trained model that answers: load.py, generation.py with its cache, prompts.py."""
