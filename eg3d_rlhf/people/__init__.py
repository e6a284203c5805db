"""Everything that people do in a browser: labelling shapes, and blind studies."""
