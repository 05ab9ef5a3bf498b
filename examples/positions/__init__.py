"""What position does to attention: `show` draws, the other scripts train small models."""
