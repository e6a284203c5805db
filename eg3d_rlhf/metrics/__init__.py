"""Independent measurements of generators: image distance, geometry, and the statistics that qualify them."""
