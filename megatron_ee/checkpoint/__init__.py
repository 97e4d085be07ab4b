"""Run and step folders, and what is in them."""
