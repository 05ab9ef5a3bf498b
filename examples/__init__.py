"""Examples: scripts that ask one question each, with their answers as tables and pictures.

Run them from the repository root, `python -m examples.positions.show`; they need
`pip install '.[examples]'` (matplotlib and tqdm).
"""
