"""How well a trained head does on cases it has not learned from."""
