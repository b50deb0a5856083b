"""Rule rewards: the final answer of a response, judged by math-verify in worker processes that can be killed."""
