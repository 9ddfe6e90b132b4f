"""Programs: flags and wiring only."""
