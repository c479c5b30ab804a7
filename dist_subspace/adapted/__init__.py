"""An adapter on its base, opened to be used: what a path is, and its model and tokenizer on all ranks."""
