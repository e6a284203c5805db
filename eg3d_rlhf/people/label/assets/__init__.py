"""Reading of 3D asset files for the labelling application.

Files are recognised by their content, parsed in a separate process because they may be malicious, and
converted to a form for the browser that contains no metadata.
"""
