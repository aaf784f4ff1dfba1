"""Looking inside a trained head: attention, probing, likeness, and a report of it all."""
