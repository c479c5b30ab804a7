"""The learning rate of a configuration, found by short runs from one start."""
