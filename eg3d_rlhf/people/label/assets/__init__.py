"""Reads 3D asset files for the labelling application. Files are identified by content, parsed without
trusting them, and converted to a clean form for the browser.
"""
