"""People: labelling in the browser, blind studies."""
