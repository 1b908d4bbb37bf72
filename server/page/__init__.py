"""The coordinator's live page: studies in a browser, read-only."""
