"""The OpenAI-compatible server: a process for HTTP, without JAX, and one for each replica; README.md says how."""
