"""Tokens that no text has: how learned embeddings, keys and values get into a transformers model, and out of its results.

part.py          what prefix, prompt and P-tuning have in common: one matrix, one row a virtual token
stacks.py        where a model begins: its stacks of blocks, their arguments, positions
segments.py      samples that share a row
input_tokens.py  what prompt and P-tuning have in common
insertion.py     virtual tokens before the input (prompt, P-tuning)
attention.py     virtual keys and values in attention (prefix)
prefix_hooks.py  how a stack gets them, once a forward
slots.py         where a layer's keys and values wait, and their gradients come back
"""
