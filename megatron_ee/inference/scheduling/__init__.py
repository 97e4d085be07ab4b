"""Which rows run next, through which layers: decided in plain Python, for the engine and for its simulator alike.

A token of a sequence runs from exit to exit, and may wait at each. What waits at one depth, of many sequences, is a
queue; a launch takes rows of one queue on to where one of them is looked at next.
"""
