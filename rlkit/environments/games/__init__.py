"""Games for the embedded agent policy (`embedded:agent`): openings and moves of few tokens, answers in microseconds."""
