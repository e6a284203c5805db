"""Photographs of people: from a photograph to EG3D's crop and camera label, one by one and as a set."""
