"""What a run shows of itself: times, traces, profiles, warnings."""
