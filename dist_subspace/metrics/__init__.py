"""Figures of a model from the results of single samples. Local, in float64, and knows neither torch nor a model."""
