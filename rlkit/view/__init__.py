"""Look at runs: a page, a file, the terminal. Reads run folders only; loads no torch, Ray, vLLM or transformers."""
