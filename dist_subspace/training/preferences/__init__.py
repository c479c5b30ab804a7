"""Objectives that learn from preferences: TRL's losses, on log probabilities that are made here."""
