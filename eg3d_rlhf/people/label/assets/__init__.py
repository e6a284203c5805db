"""Finished 3D assets in the labelling application: told apart by content, read without trust, and given a
clean form for the browser.
"""
