"""Measuring: interleaved arms, token identity, answer quality, and their report (`python -m jaxspec bench`)."""
