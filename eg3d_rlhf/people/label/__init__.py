"""Labelling of shapes and assets in the browser: campaigns, pages, the store of answers, and access."""
