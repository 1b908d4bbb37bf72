"""The coordinator side: Flower ServerApp, strategy, run directory, engines."""
