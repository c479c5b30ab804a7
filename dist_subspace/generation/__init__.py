"""A model writes: batches of prompts over all ranks, or one text as it comes."""
