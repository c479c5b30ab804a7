"""Methods that do both: reshape what is there, and add to it."""
