"""Self-speculative decoding (LayerSkip, arXiv 2404.16710): an exit drafts tokens, and full depth verifies all of them
in one launch, from the draft's own keys, values and hidden states. No layer runs twice.
"""
