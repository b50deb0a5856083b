"""Games for the embedded agent policy (`embedded:agent`): openings and moves take few tokens, answers microseconds."""
