"""Renderings, films and contact sheets of samples."""
