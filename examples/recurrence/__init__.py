"""Experiments behind docs/recurrence.md: attention and recurrences beside each other."""
