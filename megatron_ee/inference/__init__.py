"""Decoding: full depth, or exit where a head is confident."""
