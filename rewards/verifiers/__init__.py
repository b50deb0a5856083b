"""Rewards that are programs: mathematics, choices, formats, tool calls, instructions, schemas, lengths."""
