"""Runs the contract of the part that an environment variable names; without one, all contracts over all parts."""

from __future__ import annotations

import os

VARIABLES = {
    "test_reward_contract.py": {"REWARD"},
    "test_algorithm_contract.py": {"ALGORITHM"},
    "test_data_contract.py": {"DATA"},
    "test_shaping_contract.py": {"SHAPING", "COMBINER"},
}
NAMED = set.union(*VARIABLES.values()) & os.environ.keys()
collect_ignore = [file for file, variables in VARIABLES.items() if NAMED and not NAMED & variables]
