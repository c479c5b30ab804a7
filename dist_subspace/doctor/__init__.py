"""`dist-subspace doctor`: what will break on this machine, or on all nodes of a launcher, before a run finds out.

Every kind of examination is a file with three functions: `examine` finds facts out on its own rank, `rows` shows them, and
`judge` says what is wrong with them; the latter two are pure functions of all ranks' facts. `kinds.py` names the kinds.
"""

PATIENCE = 60.0  # seconds for the ranks to come; those that have come are waited for as long as they show life
