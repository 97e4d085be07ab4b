"""Thresholds with a promise: how they are chosen from measured losses, and the file that deploys them."""
