"""Real tasks on real data: sequences to labels, to one label, and to other sequences."""
