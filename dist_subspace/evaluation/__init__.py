"""What a model is worth: the figures of a run's adapter, of any adapter, or of a base model, on data of the user's choice."""
