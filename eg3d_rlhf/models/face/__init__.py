"""Detector of faces and network of face landmarks, for photographs of people."""
