"""Many requests at once: offline through the engine, online through any OpenAI-compatible server."""
