"""Who is served, with what, and when somebody should look: keys, budgets, bounds, whose turn it is, alarms, an audit.

Plain Python without a model, a web framework or a clock: the time is an argument, in seconds of any clock.
"""
