"""Hugging Face's model folders: what config.json says, which tensor is which of our parameters, and files of them."""
