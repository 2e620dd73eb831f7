"""The state of a sequence: rows, what a step adds to them, and taking it or leaving it."""
