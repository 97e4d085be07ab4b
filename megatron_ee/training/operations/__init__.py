"""What keeps a run of weeks going: attempts, stops, faults."""
