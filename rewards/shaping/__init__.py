"""Transforms of rewards after scoring: pure functions per family, typed steps over them, and chains of steps."""
