"""The OpenAI-compatible server: an HTTP process without JAX, and a process for the engine; README.md says how."""
