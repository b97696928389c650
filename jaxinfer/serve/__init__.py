"""The OpenAI-compatible server: an HTTP process without JAX, and a process for each replica of the engine; README.md says how."""
