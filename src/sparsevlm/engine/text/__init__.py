"""The decoder on packed rows: prompts, captured or not, and decode steps."""
