"""What model families call their parts: every list of names, one file per subject, and nothing else.

names.py          whole components of a dotted name
attention.py      attention modules: cross-attention, heads and their width
blocks.py         stacks of transformer blocks
buffers.py        tables that a model computes itself
classes.py        endings of class names, and the task each one stands for
configuration.py  entries of a configuration: the text part, bias switches, extra layers
embeddings.py     the input embeddings and the output layer, as the model tells them
experts.py        mixtures of experts, and their routers
heads.py          output layers and classification heads
norms.py          norms, and the norm behind a post-norm block
positions.py      tables of positions
projections.py    the linear layers of attention and feed-forward networks
towers.py         parts that text never reaches

The package knows torch alone. A new family is taught here; tests/families/test_one_room.py finds a list of such names elsewhere.
"""
