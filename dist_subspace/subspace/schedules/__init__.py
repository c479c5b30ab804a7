"""The plans of methods that decide something on the way: which triplets to cut, which to move, when to switch."""
