"""Attention over a cached prefix and a block of new tokens (a prompt, a tree, one token)."""
