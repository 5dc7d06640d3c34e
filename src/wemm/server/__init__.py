"""The service: HTTP in, requests to the engine, answers out."""
