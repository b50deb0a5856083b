"""View runs on a page, in a file or in the terminal. Only reads run folders; no torch, Ray, vLLM or transformers."""
