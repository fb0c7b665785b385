"""Data sets, conversations and the input pipeline."""
