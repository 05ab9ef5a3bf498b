"""Speed and memory beside the best of the peers: `python -m bench` from the repository root.

Not part of the package: nothing here is installed. `memory.py` and `tiles.py` are scripts for the
other sections of RESULTS.md.
"""
